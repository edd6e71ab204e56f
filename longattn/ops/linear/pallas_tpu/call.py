"""The static side of the kernels, the blocks of arrays that one program of the grid holds, and how a kernel is called.

The grid is B x (groups of block_H heads), in parallel, by J spans of M chunks of C tokens, in order. The last span may
reach beyond the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.cost import Pass, estimate
from longattn.ops.linear.pallas_tpu.statics import Statics, Tokens
from longattn.ops.linear.pallas_tpu.tuning import Problem, Tuning, choose


@dataclass(frozen=True)
class Call(Problem):
    """The static description that a kernel is compiled for: the plan of a call."""

    scale: float
    C: int  # tokens of a chunk
    M: int  # chunks of a span
    block_H: int  # heads of a program
    vmem_bytes: int  # that a kernel may use

    @property
    def span(self) -> int:
        """Tokens of a span."""
        return self.M * self.C

    @property
    def J(self) -> int:
        """Spans."""
        return -(-self.T // self.span)

    @property
    def recomputed(self) -> int:
        """Chunks of a span that the backward kernel runs forward again, for the state after or for the inverse."""
        return self.M if self.delta else self.M - 1

    @property
    def groups(self) -> int:
        """Programs of one sequence."""
        return self.H // self.block_H

    @property
    def statics(self) -> Statics:
        return Statics(self.C, self.decay, self.delta, self.dtype, self.scale)

    def block_heads(self, heads: int) -> int:
        """Returns how many heads of an array with `heads` of them a program reads."""
        return max(self.block_H * heads // self.H, 1)


def plan_call(problem: Problem, scale: float, tuning: Tuning | None = None) -> Call:
    """Returns the plan of a call. Raises NotImplementedError if no block sizes fit."""
    return Call(**vars(problem), scale=scale, **choose(problem, tuning)._asdict())


@dataclass(frozen=True)
class Operand:
    """An array, or the ShapeDtypeStruct of an output, with the block of it that a program holds."""

    array: Any
    spec: pl.BlockSpec


@dataclass(frozen=True)
class Specs:
    """BlockSpecs of a program (p, t). With `reverse` the last span comes first."""

    n: Call
    reverse: bool

    def _spec(self, block: Sequence[int | None], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """`index` is a function of sequence, group of heads and span."""
        groups, J = self.n.groups, self.n.J
        at = lambda t: J - 1 - t if self.reverse else t
        return pl.BlockSpec(tuple(block), lambda p, t: index(p // groups, p % groups, at(t)))

    def tokens(self, heads: int, size: int) -> pl.BlockSpec:
        """BlockSpec for an array [B heads T size]."""
        n, own = self.n, self.n.block_heads(heads)
        first = lambda group: group * n.block_H * heads // n.H // own
        return self._spec((None, own, n.span, size), lambda b, group, t: (b, first(group), t, 0))

    def partials(self, size: int) -> pl.BlockSpec:
        """BlockSpec for an array [B groups T size]."""
        return self._spec((None, 1, self.n.span, size), lambda b, group, t: (b, group, t, 0))

    def scalars(self) -> pl.BlockSpec:
        """BlockSpec for an array [B H JM 1 C]."""
        n = self.n
        return self._spec((None, n.block_H, n.M, 1, n.C), lambda b, group, t: (b, group, t, 0, 0))

    def starts(self) -> pl.BlockSpec:
        """BlockSpec for an array [B JM 1 C]."""
        return self._spec((None, self.n.M, 1, self.n.C), lambda b, group, t: (b, t, 0, 0))

    def state(self) -> pl.BlockSpec:
        """BlockSpec for an array [B H D V]."""
        return self._spec((None, self.n.block_H, self.n.D, self.n.V), lambda b, group, t: (b, group, 0, 0))

    def states(self) -> pl.BlockSpec:
        """BlockSpec for an array [B H J D V]."""
        n = self.n
        return self._spec((None, n.block_H, None, n.D, n.V), lambda b, group, t: (b, group, t, 0, 0))

    def arrays(self, x: Tokens) -> Tokens:
        """Operands of q, k, v [B heads T size], log_decay [B H T D] or [B H JM 1 C] and beta [B H JM 1 C]."""
        n, scalars = self.n, self.scalars()
        decays = self.tokens(n.H, n.D) if n.decay == "vector" else scalars
        specs = Tokens(self.tokens(n.Hq, n.D), self.tokens(n.Hk, n.D), self.tokens(n.Hv, n.V), decays, scalars)
        return Tokens(*(None if y is None else Operand(y, spec) for y, spec in zip(x, specs)))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a float32 output."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


Ref = Any  # a Pallas reference to memory: jax has no public type

# ---- inside a kernel: c is a chunk of the program's span, t the span


def rows(n: Call, c: Array) -> Any:
    """The chunk's tokens within the span."""
    return pl.ds(pl.multiple_of(c * n.C, n.C), n.C)


def read_rows(n: Call, ref: Ref, c: Array, t: Array) -> Array:
    """Reads a chunk of [heads T size] as float32. After the last token it gives zeros, whatever memory holds."""
    x = ref[:, rows(n, c)].astype(jnp.float32)
    if n.T % n.span == 0:
        return x
    index = t * n.span + pl.multiple_of(c * n.C, n.C) + lax.broadcasted_iota(jnp.int32, (1, n.C, 1), 1)
    return jnp.where(index < n.T, x, 0.0)


def read_tokens(n: Call, refs: Tokens, c: Array, t: Array) -> Tokens:
    """Reads a chunk of every array that is there."""
    k, v = (read_rows(n, ref, c, t) for ref in (refs.k, refs.v))
    q = None if refs.q is None else read_rows(n, refs.q, c, t)
    g = refs.log_decay
    if g is not None:
        g = g[:, c] if n.decay == "scalar" else read_rows(n, g, c, t)
    return Tokens(q, k, v, g, None if refs.beta is None else refs.beta[:, c])


def read_starts(ref: Ref, c: Array) -> Array | None:
    """Reads the number of segments started within a chunk, up to each token: float32 [1 1 C]."""
    return None if ref is None else ref[pl.ds(c, 1)]


# ---- the call


def run(
    n: Call, name: str, kernel: Callable[..., None], inputs: Any, outputs: Any, passes: Mapping[Pass, int],
    scratch: Any = (),
) -> Any:  # fmt: skip
    """Runs a kernel over the grid, and returns its outputs.

    Args:
      kernel: gets n, then the refs in the structure of inputs, outputs and scratch; None stays None.
      inputs, outputs: trees of operands.
      passes: over how many chunks of a span the kernel makes each pass.
      scratch: a tree of memory.
    """
    (read, _), (written, made) = jax.tree.flatten(inputs), jax.tree.flatten(outputs)
    kept, structure = jax.tree.leaves(scratch), jax.tree.structure((inputs, outputs, scratch))
    vary = jax.typeof(read[0].array).manual_axis_type
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=vary)
    runs = {what: n.B * n.H * n.J * chunks for what, chunks in passes.items()}
    found = pl.pallas_call(
        lambda *refs: kernel(n, *structure.unflatten(refs)),
        name=name,
        grid=(n.B * n.groups, n.J),
        in_specs=[x.spec for x in read],
        out_specs=[x.spec for x in written],
        out_shape=[shaped(x.array) for x in written],
        scratch_shapes=kept,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=estimate(n.statics, n.D, n.V, runs, [x.array for x in (*read, *written)]),
    )(*(x.array for x in read))
    return made.unflatten(found)
