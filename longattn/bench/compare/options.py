"""The options of `longattn compare CASE`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from longattn.bench.compare.peers import CONTESTANTS, LINEAR, Contestant
from longattn.bench.compare.problems import Attention, Dtype, Linear, Problem, What
from longattn.config.checks import typed, usable_path
from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.shapes import suggest

CASES: dict[str, What] = {
    "attention_forward": "forward",
    "attention_forward_backward": "forward_backward",
    "linear_forward": "forward",
    "linear_forward_backward": "forward_backward",
}


def known(case: str) -> dict[str, Contestant]:
    """Returns the contestants of a case."""
    return LINEAR if case.startswith("linear") else CONTESTANTS


@dataclass(frozen=True)
class CompareOptions:
    """Compare attention kernels, exact or linear, on this device, under one profiler trace.

    `longattn compare attention --help`: wall-clock time over several lengths, against PyTorch too.
    """

    case: str  # attention_forward, attention_forward_backward, linear_forward or linear_forward_backward
    contestants: tuple[str, ...] | None = None  # names, with commas; ratios are to the first
    T: int = 2048  # tokens of a sequence
    B: int = 1  # sequences
    H: int = 8  # query heads; linear: heads of the state
    K: int | None = None  # key/value heads; linear: heads of q and k; none: as many as H
    D: int = 64  # head size
    dtype: Dtype | None = None  # none: float32 on a CPU, bfloat16 elsewhere
    mask: Mask = Causal()  # an expression such as "Causal() & Window(512)"; linear: causal only
    kind: str | None = None  # linear: decay none, scalar (default) or vector; append _delta for the delta rule
    rounds: int = 15  # timed calls of each contestant
    out: str = "runs/compare"  # folder for the trace, the plot and compare.jsonl
    json: bool = False  # print one JSON document instead of the tables

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "out")
        if self.case not in CASES:
            raise ValueError(f"unknown case {self.case!r}; {suggest(self.case, tuple(CASES))}")
        if not self.names:
            raise ValueError(f"--with must name at least one contestant; they are {', '.join(self.known)}")
        for name in self.names:
            if name not in self.known:
                raise ValueError(f"unknown contestant {name!r}; {suggest(name, tuple(self.known))}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"--with {','.join(self.names)} must name each contestant once")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.linear and self.mask != Causal():
            raise ValueError(f"mask={self.mask} must be Causal() in {self.case}: linear attention has no other")
        if not self.linear and self.kind is not None:
            raise ValueError(f"kind={self.kind!r} must be left out of {self.case}: it is of linear attention")
        _ = self.problem  # it checks the sizes

    @property
    def linear(self) -> bool:
        """Whether linear attention is compared."""
        return self.known is LINEAR

    @property
    def known(self) -> dict[str, Contestant]:
        """Contestants of the case, by name."""
        return known(self.case)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the contestants."""
        return tuple(n for n in self.known if n != "reference") if self.contestants is None else self.contestants

    @property
    def what(self) -> What:
        """Direction of the case, as `bench.attention` names it."""
        return CASES[self.case]

    @property
    def problem(self) -> Problem:
        """Shapes of the case."""
        dtype: Dtype = self.dtype or ("float32" if dispatch.target().platform == "cpu" else "bfloat16")
        if self.linear:
            return Linear(self.T, self.B, self.H, self.K, self.D, dtype, self.kind or "scalar")
        return Attention(
            T=(self.T,), B=self.B, H=self.H, K=self.K, D=self.D, mask=self.mask, window=0, what=(self.what,),
            dtype=dtype,
        )  # fmt: skip

    def given(self, name: str) -> Problem:
        """Returns the problem that a contestant solves."""
        instead = self.known[name].instead
        return self.problem if instead is None else instead(self.problem)

    def resolved(self) -> CompareOptions:
        """Returns the options with every None replaced by its value on this device."""
        kind = self.problem.kind if isinstance(self.problem, Linear) else None
        return replace(self, dtype=self.problem.dtype, contestants=self.names, kind=kind)


def heading(options: Mapping[str, Any]) -> str:
    """Returns in one line what a document's options compare."""
    K = "" if options["K"] is None else f" K{options['K']}"
    sizes = f"B{options['B']} T{options['T']} H{options['H']}{K} D{options['D']}"
    return f"{options['case']} {options['kind'] or options['mask']}: {sizes} {options['dtype']}"
