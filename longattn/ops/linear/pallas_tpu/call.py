"""The static side of the kernels, and the parts of arrays that one program of the grid holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.chunk import Statics, Tokens
from longattn.ops.linear.pallas_tpu.cost import Pass, estimate


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for. A step of the grid is one span of chunks of `block_h` heads."""

    B: int
    H: int
    Hq: int
    Hk: int
    Hv: int
    T: int
    D: int
    V: int
    chunk: int  # tokens
    span: int  # chunks
    block_h: int  # heads
    decay: str
    delta: bool
    scale: float
    dtype: Any  # of q, k, v and their gradients
    vmem_bytes: int  # that a kernel may use

    @property
    def rows(self) -> int:
        """Tokens of a span."""
        return self.chunk * self.span

    @property
    def spans(self) -> int:
        return -(-self.T // self.rows)

    @property
    def again(self) -> int:
        """Chunks of a span after which the backward kernel needs the state, or whose inverse it needs, once more."""
        return self.span if self.delta else self.span - 1

    @property
    def groups(self) -> int:
        """Programs of one sequence."""
        return self.H // self.block_h

    @property
    def statics(self) -> Statics:
        return Statics(self.chunk, self.decay, self.delta, self.dtype, self.scale)

    def own(self, heads: int) -> int:
        """Of an array of so many heads, those that a program reads."""
        return max(self.block_h * heads // self.H, 1)

    def cost(self, passes: Mapping[Pass, int], arrays: Sequence[Any]) -> pl.CostEstimate:
        """Of `passes` as `run` takes them, each array read or written once."""
        runs = {what: self.B * self.H * self.spans * chunks for what, chunks in passes.items()}
        return estimate(self.statics, self.D, self.V, runs, arrays)


Part = tuple[Any, pl.BlockSpec]  # an array or its ShapeDtypeStruct, and what a program has of it


@dataclass(frozen=True)
class Parts:
    """Which part of an array a program (p, t) has. `reverse`: the last span comes first."""

    n: Call
    reverse: bool

    def _spec(self, block: Sequence[int | None], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """`index` of sequence, group of heads and span."""
        groups, spans = self.n.groups, self.n.spans
        at = lambda t: spans - 1 - t if self.reverse else t
        return pl.BlockSpec(tuple(block), lambda p, t: index(p // groups, p % groups, at(t)))

    def tokens(self, heads: int, size: int) -> pl.BlockSpec:
        """Of [B heads T size]."""
        n, own = self.n, self.n.own(heads)
        first = lambda group: group * n.block_h * heads // n.H // own
        return self._spec((None, own, n.rows, size), lambda b, group, t: (b, first(group), t, 0))

    def shares(self, size: int) -> pl.BlockSpec:
        """Of [B groups T size]."""
        return self._spec((None, 1, self.n.rows, size), lambda b, group, t: (b, group, t, 0))

    def numbers(self) -> pl.BlockSpec:
        """Of [B H chunks 1 C]."""
        n = self.n
        return self._spec((None, n.block_h, n.span, 1, n.chunk), lambda b, group, t: (b, group, t, 0, 0))

    def starts(self) -> pl.BlockSpec:
        """Of [B chunks 1 C]."""
        return self._spec((None, self.n.span, 1, self.n.chunk), lambda b, group, t: (b, t, 0, 0))

    def state(self) -> pl.BlockSpec:
        """Of [B H D V]."""
        return self._spec((None, self.n.block_h, self.n.D, self.n.V), lambda b, group, t: (b, group, 0, 0))

    def states(self) -> pl.BlockSpec:
        """Of [B H spans D V]."""
        n = self.n
        return self._spec((None, n.block_h, None, n.D, n.V), lambda b, group, t: (b, group, t, 0, 0))


def read(n: Call, refs: Mapping[str, Any], c: Array, span: Array, *names: str) -> list[Array]:
    """Chunk c of arrays of tokens, float32 [heads C size]; beyond the last token zeros, whatever lies there."""
    first = pl.multiple_of(c * n.chunk, n.chunk)
    found = [refs[name][:, pl.ds(first, n.chunk)].astype(jnp.float32) for name in names]
    if n.T % n.rows == 0:
        return found
    index = span * n.rows + first + lax.broadcasted_iota(jnp.int32, (1, n.chunk, 1), 1)
    return [jnp.where(index < n.T, x, 0.0) for x in found]


def tokens(n: Call, refs: Mapping[str, Any], c: Array, span: Array, queries: bool = True) -> Tokens:
    """Chunk c of the inputs; without q where there is none, or where it is not asked for."""
    queries = queries and "q" in refs
    k, v, *q = read(n, refs, c, span, "k", "v", *(["q"] if queries else []))
    g = None
    if n.decay != "none":
        g = refs["g"][:, c] if n.decay == "scalar" else read(n, refs, c, span, "g")[0]
    return Tokens(q[0] if queries else None, k, v, g, refs["beta"][:, c] if n.delta else None)


def starts(refs: Mapping[str, Any], c: Array) -> Array | None:
    """Of chunk c, how many segments began since its begin: float32 [1 1 C]."""
    return refs["starts"][pl.ds(c, 1)] if "starts" in refs else None


def run(
    n: Call, name: str, kernel: Callable[..., None], inputs: Mapping[str, Part], outputs: Mapping[str, Part],
    scratch: Mapping[str, Any], passes: Mapping[Pass, int],
) -> dict[str, Array]:  # fmt: skip
    """The kernel, called with its refs by name, over (sequences and groups of heads) x spans: its outputs by name.

    `passes`: which it makes over the chunks of a span, and over how many of them.
    """
    names = (*inputs, *outputs, *scratch)
    kind = jax.typeof(inputs["k"][0]).manual_axis_type
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind)
    found = pl.pallas_call(
        lambda *refs: kernel(n, dict(zip(names, refs))),
        name=name,
        grid=(n.B * n.groups, n.spans),
        in_specs=[options for _, options in inputs.values()],
        out_specs=[options for _, options in outputs.values()],
        out_shape=[shaped(x) for x, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=n.cost(passes, [x for x, _ in (*inputs.values(), *outputs.values())]),
    )(*(x for x, _ in inputs.values()))
    return dict(zip(outputs, found))


float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
