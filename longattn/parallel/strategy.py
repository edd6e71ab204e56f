"""What every strategy of sequence parallelism is given, inside the shard_map and after validation.

A strategy is a pair of functions of one device's shards, which no derivative is taken of,

    forward(q, k, v, bias, visibility, call) -> (out in call.out_dtype, lse, kept)
    backward(kept, out, lse, do, dlse, visibility, call) -> (dq, dk, dv, dbias), dq, dk and dv in the statistics' dtype

`kept` is what the backward pass needs besides out and lse: q, k, v and the bias, as they are where that is least to
send. q [B t H D] are this device's T / P queries, k [B s K D] and v [B s K V] its S / P keys, all in the layout's
order; the ids and positions in `visibility` are whole on every device ([B T], [B S]): they are small. A bias is split along
T and is not in `visibility`. There are no sinks. All arrays vary over the same mesh axes (`dispatch.vary_together`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax
from jaxtyping import Array

from longattn.mask import Mask
from longattn.parallel.layout import Axis, SequenceLayout

Edges = list[tuple[int, int]]  # (from, to), devices along the axis


@dataclass(frozen=True)
class Call:
    """The static side of a call; where not said otherwise as in `longattn.attention`."""

    axis: Axis  # the mesh axis along which the sequence is spread; of usp, those of its ring and of its all-to-all
    sizes: tuple[int, ...]  # devices along each of them
    layout: SequenceLayout
    in_order: bool  # positions are the layout's, as none were given
    out_dtype: str  # name of the dtype of `out`: q's, or the statistics' where sinks are still to rescale it
    scale: float
    softcap: float | None
    implementation: str | tuple[str, ...] | None
    tuning: Any
    K: int  # key/value heads on each device

    @property
    def devices(self) -> int:
        """P, along all of the axis."""
        return math.prod(self.sizes)

    @property
    def ring(self) -> int:
        """The devices, or groups of them, that the layout orders."""
        return self.sizes[0]

    @property
    def outer(self) -> Call:
        """Of usp, the call of its ring; else this one."""
        if len(self.sizes) == 1:
            return self
        return dataclasses.replace(self, axis=self.axis[0], sizes=self.sizes[:1])

    def options(self, mask: Mask, positions: Any, segment_ids: Any) -> dict[str, Any]:
        """The keyword arguments of `attend_partial` and its like, without the bias."""
        return {
            "mask": mask,
            "positions": positions,
            "segment_ids": segment_ids,
            "scale": self.scale,
            "softcap": self.softcap,
            "implementation": self.implementation,
            "tuning": self.tuning,
        }


def _serves(mask: Mask, T: int, S: int, call: Call) -> None:
    """Refuses no mask."""


class Strategy(NamedTuple):
    """How devices along the sequence share the work of exact attention."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    bias: bool = False  # whether it takes one
    check: Callable[[Mask, int, int, Call], None] = _serves  # raises NotImplementedError(reason) for (mask, T, S, call)


def sent(arrays: Any, axis: Axis, edges: Edges, scope: str) -> Any:
    """What arrives here of a tree of arrays that go along the edges; zeros where nothing does."""
    with jax.named_scope(scope):
        return jax.tree.map(lambda x: lax.ppermute(x, axis, edges), arrays)


def without_out(out: Array, do: Array, dlse: Array) -> Array:
    """A dlse with which zeros may stand for out [B T H V]: gradients read it in rowsum(do out) - dlse alone."""
    return dlse - (do.astype(dlse.dtype) * out.astype(dlse.dtype)).sum(-1)
