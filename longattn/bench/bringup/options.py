"""The options of `longattn bringup`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from longattn.config.checks import typed, usable_path
from longattn.numerics.cases import NAMES
from longattn.ops import dispatch
from longattn.shapes import suggest
from longattn.train.kernel_check import CHECKOUT

Part = Literal["numerics", "memory", "timing"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class BringupOptions:
    """Check and time every kernel on this machine's chip. Writes a JSON document and a page of HTML.

    Sizes that are not given suit the device: large ones on an accelerator, about a minute's work on a CPU.
    """

    parts: tuple[Part, ...] = PARTS  # parts to run; without the numerics a report does not count as passed
    cases: tuple[str, ...] = ()  # names of cases of the numerics; none: all, which a report needs to count as passed
    seconds: float = (
        540  # time for everything; what is not done by then is reported so, and 30 s later the process ends
    )
    T: int | None = None  # tokens in the numerics' cases; none: 2048, on a CPU 128
    timed_T: int | None = None  # tokens in the timed calls; none: 8192, on a CPU 256
    rounds: int | None = None  # timed calls of each contestant; none: 15, on a CPU 3
    out: str | None = None  # folder of the report; none: experiments/bringup in a checkout of longattn, else bringup
    json: bool = False  # print the JSON document instead of the tables

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "out")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts={' '.join(self.parts)!r} must name some of {', '.join(PARTS)}, each once")
        for name in self.cases:
            if name not in NAMES:
                raise ValueError(f"unknown case {name!r}; {suggest(name, NAMES)}")
        if self.seconds <= 0:
            raise ValueError(f"seconds={self.seconds:g} must be positive")
        for name, least in (("T", 64), ("timed_T", 1), ("rounds", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def small(self) -> bool:
        """Whether the device is a CPU."""
        return dispatch.target().platform == "cpu"

    @property
    def length(self) -> int:
        """Tokens in the numerics' cases."""
        return self.T or (128 if self.small else 2048)

    @property
    def timed_length(self) -> int:
        """Tokens in the timed calls."""
        return self.timed_T or (256 if self.small else 8192)

    @property
    def calls(self) -> int:
        """Number of timed calls of each contestant."""
        return self.rounds or (3 if self.small else 15)

    @property
    def folder(self) -> Path:
        """Folder of the report."""
        if self.out is not None:
            return Path(self.out)
        here = (CHECKOUT / "pyproject.toml").is_file() and Path.cwd().samefile(CHECKOUT)
        return Path("experiments/bringup" if here else "bringup")
