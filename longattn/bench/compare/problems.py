"""The problems that contestants solve, exact or linear attention, with their FLOPs and bytes.

FLOPs count the visible pairs, or the recurrence, without recomputation. Bytes are the least device-memory traffic of
each pass: every argument is read once and every result written once. The backward pass of exact attention reads q, k,
v, out and the cotangent; that of linear attention reads all inputs and the cotangent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from longattn.aot.kernels import cases
from longattn.aot.kernels.cases.shape import KINDS
from longattn.bench import attention
from longattn.config.checks import typed
from longattn.cost.flops import linear_flops
from longattn.numerics import LinearProblem, draw
from longattn.shapes import suggest

What = Literal["forward", "forward_backward"]
Dtype = Literal["float32", "bfloat16", "float16"]


@runtime_checkable
class Problem(Protocol):
    """A frozen dataclass that describes the shapes of a call."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dtype(self) -> Dtype:
        """Dtype of q, k and v."""

    def drawn(self) -> dict[str, np.ndarray]:
        """Returns the inputs by name, and the output's cotangent do. q, k, v and do are rounded to the dtype."""

    def numbers(self) -> int:
        """Returns the number of elements of all that is drawn."""

    def flops(self, what: What) -> float:
        """Returns the FLOPs, which are the same for every contestant."""

    def least_bytes(self, what: What) -> int:
        """Returns the bytes that must at least cross device memory."""

    def shape(self) -> cases.Shape:
        """Returns the shape for the static profile. Raises NotImplementedError if its kernels cannot take it."""


@dataclass(frozen=True)
class Attention(attention.AttentionOptions):
    """Exact attention of one length."""

    def drawn(self) -> dict[str, np.ndarray]:
        return attention.inputs(self, self.T[0])

    def numbers(self) -> int:
        return attention.numbers(self, self.T[0])

    def flops(self, what: What) -> float:
        return attention.flops(self, self.T[0], what)

    def least_bytes(self, what: What) -> int:
        forward = attention.numbers(self, self.T[0]) * jnp.dtype(self.dtype).itemsize  # q, k, v, out
        return forward * (
            3 if what == "forward_backward" else 1
        )  # the backward pass reads those and do, and writes their gradients

    def shape(self) -> cases.Shape:
        (T,) = self.T
        fitting = [b for b in (1024, 512, 256, 128) if T % b == 0 and b < T]
        if not fitting:
            raise NotImplementedError(
                f"its blocks are multiples of 128 that divide T, and T={T} has at least two of them"
            )
        return cases.Shape(T=T, H=self.H, D=self.D, mask=self.mask, bT=fitting[0], bS=fitting[0])


@dataclass(frozen=True)
class Linear:
    """Linear attention of one kind from a zero state. Only the output is compared, not the final state."""

    T: int
    B: int
    H: int  # heads of v and of the state
    K: int | None  # of q and k; none: H
    D: int
    dtype: Dtype
    kind: str  # as `cases.Shape` names it

    def __post_init__(self) -> None:
        typed(self)
        for name in "TBHKD":
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.H % self.heads:
            raise ValueError(f"K={self.K} must divide H={self.H}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; {suggest(self.kind, KINDS)}")

    @property
    def heads(self) -> int:
        """Number of heads of q and k."""
        return self.H if self.K is None else self.K

    @property
    def call(self) -> LinearProblem:
        """The same call as `numerics` describes it, which draws the inputs."""
        return LinearProblem(
            T=self.T, B=self.B, H=self.H, D=self.D, heads=(self.heads, self.heads, self.H), dtype=self.dtype,
            decay=self.kind.removesuffix("_delta"), delta=self.kind.endswith("_delta"),
        )  # fmt: skip

    def drawn(self) -> dict[str, np.ndarray]:
        made = draw(self.call)
        return {**made.arrays, "do": made.cotangents["out"]}

    def numbers(self) -> int:
        return sum(math.prod(x.shape) for x in self._arrays())

    def flops(self, what: What) -> float:
        forward = linear_flops(self.B * self.T, self.H * self.D * self.D, delta=self.call.delta)
        return forward * (3 if what == "forward_backward" else 1)

    def least_bytes(self, what: What) -> int:
        *inputs, out = (math.prod(x.shape) * x.dtype.itemsize for x in self._arrays())
        return sum(inputs) + out + (2 * sum(inputs) + out if what == "forward_backward" else 0)

    def _arrays(self) -> list[Any]:
        """Returns shapes and dtypes of the inputs and the output."""
        shaped = self.call.shaped()
        return [*shaped.arrays.values(), shaped.cotangents["out"]]

    def shape(self) -> cases.Shape:
        return cases.Shape(T=self.T, H=self.H, K=self.K, D=self.D, kind=self.kind, bT=self.T, bS=self.T)
