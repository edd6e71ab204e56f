"""What is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longattn.analysis import bench
from longattn.analysis.compare.contestants import CONTESTANTS
from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.shapes import suggest

CASES: dict[str, Literal["forward", "forward_backward"]] = {
    "attention_forward": "forward",
    "attention_forward_backward": "forward_backward",
}


@dataclass(frozen=True)
class CompareOptions:
    """Compare attention kernels on this device, under one profiler trace."""

    case: str  # attention_forward or attention_forward_backward
    contestants: tuple[str, ...] = tuple(n for n in CONTESTANTS if n != "reference")  # or --with a,b: first is the base
    T: int = 2048  # length
    B: int = 1  # sequences
    H: int = 8  # query heads
    K: int | None = None  # key/value heads; none: as many as H
    D: int = 64  # head size
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # none: float32 on a CPU, bfloat16 elsewhere
    mask: Mask = Causal()  # an expression such as "Causal() & Window(512)"
    rounds: int = 15  # timed calls of each
    out: str = "runs/compare"  # folder of the trace, the plot and compare.jsonl
    json: bool = False  # print one JSON document instead of the tables

    def __post_init__(self) -> None:
        if not self.contestants:
            raise ValueError(f"--with must name at least one contestant; they are {', '.join(CONTESTANTS)}")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"unknown contestant {name!r}; {suggest(name, tuple(CONTESTANTS))}")
        if len(set(self.contestants)) < len(self.contestants):
            raise ValueError(f"--with {','.join(self.contestants)} must name each contestant once")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.case not in CASES:
            raise ValueError(f"unknown case {self.case!r}; {suggest(self.case, tuple(CASES))}")
        _ = self.problem  # it checks the sizes

    @property
    def what(self) -> Literal["forward", "forward_backward"]:
        """As `bench` calls the case."""
        return CASES[self.case]

    @property
    def problem(self) -> bench.AttentionOptions:
        """The shapes, as `bench` takes them."""
        return bench.AttentionOptions(
            T=(self.T,), B=self.B, H=self.H, K=self.K, D=self.D, mask=self.mask, window=0, what=(self.what,),
            dtype=self.dtype or ("float32" if dispatch.target().platform == "cpu" else "bfloat16"),
        )  # fmt: skip


def heading(options: Mapping[str, Any]) -> str:
    """What a document's options compare, in one line."""
    K = "" if options["K"] is None else f" K{options['K']}"
    sizes = f"B{options['B']} T{options['T']} H{options['H']}{K} D{options['D']}"
    return f"{options['case']} {options['mask']}: {sizes} {options['dtype']}"
