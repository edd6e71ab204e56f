"""A strategy of sequence parallelism, and what it is given inside the shard_map, after validation.

A strategy's passes are two functions of one device's shards, which no derivative is taken of:

    forward(q, k, v, bias, visibility, call) -> (out in call.out_dtype, lse, kept)
    backward(kept, out, lse, do, dlse, visibility, call) -> (dq, dk, dv, dbias), dq, dk and dv in the statistics' dtype

`kept` is what the backward pass needs besides out and lse: q, k, v and the bias, wherever they cost least to send.
q [B t H D] are this device's T / P queries. k [B s K D] and v [B s K V] are its S / P keys and values. All lie in the
layout's order. The ids and positions in `visibility` are small, and whole on every device ([B T], [B S]). A bias is
sharded along T. Sinks are added later. All arrays vary over the same mesh axes (`dispatch.vary_together`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import jax
from jax import lax
from jaxtyping import Array

from longattn.config.mesh import LayoutName
from longattn.mask import Mask
from longattn.ops.attention import attend_partial, attention_with_lse
from longattn.ops.attention.back_ends import Tuning
from longattn.parallel.layout import Axis, SequenceLayout

Pair = tuple[Array, Array]  # one array of the queries' side, one of the keys'
Kept = Any  # a strategy's own tree of arrays
Gradients = tuple[Array, Array, Array, Array | None]  # dq, dk, dv, dbias
Edges = list[tuple[int, int]]  # (from, to), devices along the axis


@dataclass(frozen=True)
class Call:
    """The static side of a call; fields without a comment are those of `longattn.attention`."""

    axis: Axis  # the mesh axis of the sequence; for a strategy of two axes the outer and the inner one
    sizes: tuple[int, ...]  # devices along each of them
    layout: SequenceLayout
    in_order: bool  # no positions were given, so they are the layout's
    out_dtype: str  # name of the dtype of `out`: q's, or the statistics' where sinks are still to rescale it
    scale: float
    softcap: float | None
    implementation: str | tuple[str, ...] | None
    tuning: Tuning | None
    K: int  # key/value heads on each device

    @property
    def P(self) -> int:
        """Devices along the sequence, over all its axes."""
        return math.prod(self.sizes)

    @property
    def shards(self) -> int:
        """Shards that the layout permutes: one for each device on the outer axis."""
        return self.sizes[0]

    @property
    def outer(self) -> Call:
        """The same call along the outer axis alone."""
        if len(self.sizes) == 1:
            return self
        return dataclasses.replace(self, axis=self.axis[0], sizes=self.sizes[:1])

    def options(self, mask: Mask, positions: Pair | None, segment_ids: Pair | None) -> dict[str, Any]:
        """The keyword arguments, without the bias, of `attend_partial` and of the functions that take the same."""
        return {
            "mask": mask,
            "positions": positions,
            "segment_ids": segment_ids,
            "scale": self.scale,
            "softcap": self.softcap,
            "implementation": self.implementation,
            "tuning": self.tuning,
        }


def _no_reason(mask: Mask, T: int, S: int, call: Call) -> None:
    """Refuses no call."""


@dataclass(frozen=True)
class Strategy:
    """How the devices along the sequence share the work of exact attention."""

    name: str
    summary: str  # one line for help texts and tables
    forward: Callable[..., tuple[Array, Array, Kept]]
    backward: Callable[..., Gradients]
    axes: int = 1  # mesh axes along which the sequence lies
    layouts: tuple[LayoutName, ...] = get_args(LayoutName)  # layouts that it serves
    bias: bool = False  # whether it takes one
    even: bool = False  # devices share a causal mask's pairs evenly whatever the layout, so that layouts cost the same
    exchanges_heads: bool = False  # devices on the last axis divide the heads, filled up to a multiple of their number
    skips: bool = (
        False  # neither sends nor computes keys that the mask hides if positions follow the rule: positions.py
    )
    check: Callable[[Mask, int, int, Call], None] = _no_reason  # its own refusals: raises NotImplementedError(reason)

    def refuse(self, mask: Mask, T: int, S: int, call: Call, bias: bool = False) -> None:
        """Raises NotImplementedError(reason) for a call that the strategy does not serve."""
        if bias and not self.bias:
            raise NotImplementedError(
                f"strategy={self.name!r} takes no bias: its columns would have to travel with the keys, and their "
                "gradient back; use strategy='all_gather'"
            )
        self.check(mask, T, S, call)
        if call.layout.name not in self.layouts:
            raise NotImplementedError(
                f"strategy={self.name!r} serves the layout {' or '.join(self.layouts)}, not {call.layout.name}; "
                "use strategy='ring'"
            )


def attended(q: Array, k: Array, v: Array, call: Call, **options: Any) -> tuple[Array, Array]:
    """out in call.out_dtype, and lse, of one local attention."""
    if call.out_dtype == q.dtype.name:
        return attention_with_lse(q, k, v, **options)
    return tuple(attend_partial(q, k, v, **options))


def sent[Tree](arrays: Tree, axis: Axis, edges: Edges, scope: str) -> Tree:
    """The tree of arrays that arrives here along the edges; zeros where no edge ends."""
    with jax.named_scope(scope):
        return jax.tree.map(lambda x: lax.ppermute(x, axis, edges), arrays)


def without_out(out: Array, do: Array, dlse: Array) -> Array:
    """The dlse with which zeros may replace out [B T H V]: gradients read out only in rowsum(do out) - dlse."""
    return dlse - (do.astype(dlse.dtype) * out.astype(dlse.dtype)).sum(-1)
