"""What contestants are given, and what it costs: exact attention, or linear attention of a kind.

FLOPs are those of the visible pairs, or of the recurrence, without recomputation. Bytes are the least that must cross
device memory, in each pass: every argument read and every result written once. The backward pass reads q, k, v, out
and its cotangent again; that of linear attention all inputs and the cotangent.
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
from longattn.cost import flops as cost
from longattn.numerics import LinearProblem, draw
from longattn.shapes import suggest

What = Literal["forward", "forward_backward"]
Dtype = Literal["float32", "bfloat16", "float16"]


@runtime_checkable
class Problem(Protocol):
    """A shape, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def dtype(self) -> Dtype:
        """Of q, k and v."""

    def drawn(self) -> dict[str, np.ndarray]:
        """The inputs, and do, the cotangent of the output, by name; q, k, v and do rounded to the dtype."""

    def numbers(self) -> int:
        """Of all that is drawn."""

    def flops(self, what: What) -> float:
        """The same for every contestant, however it computes them."""

    def least_bytes(self, what: What) -> int:
        """That cross device memory."""

    def shape(self) -> cases.Shape:
        """Of the kernels whose static cycles are known. Raises NotImplementedError for one that they do not take."""


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
        return forward * (3 if what == "forward_backward" else 1)  # backward those, do and their gradients

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
    """Linear attention of a kind, from a state of zeros; of its results the output."""

    T: int
    B: int
    H: int  # heads of v and of the state
    K: int | None  # of q and k; none: H
    D: int
    dtype: Dtype
    kind: str  # as `cases.Shape` names it

    def __post_init__(self) -> None:
        for name in "TBHKD":
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.H % self.heads:
            raise ValueError(f"K={self.K} must divide H={self.H}")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; {suggest(self.kind, KINDS)}")

    @property
    def heads(self) -> int:
        """Of q and k."""
        return self.H if self.K is None else self.K

    @property
    def call(self) -> LinearProblem:
        """As one draws it whose results are tested."""
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
        forward = cost.linear_flops(self.B * self.T, self.H * self.D * self.D, delta=self.call.delta)
        return forward * (3 if what == "forward_backward" else 1)

    def least_bytes(self, what: What) -> int:
        *inputs, out = (math.prod(x.shape) * x.dtype.itemsize for x in self._arrays())
        return sum(inputs) + out + (2 * sum(inputs) + out if what == "forward_backward" else 0)

    def _arrays(self) -> list[Any]:
        """Shapes and dtypes of the inputs, and of the output."""
        shaped = self.call.shaped()
        return [*shaped.arrays.values(), shaped.cotangents["out"]]

    def shape(self) -> cases.Shape:
        return cases.Shape(T=self.T, H=self.H, K=self.K, D=self.D, kind=self.kind, bT=self.T, bS=self.T)
