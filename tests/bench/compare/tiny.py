"""Small comparisons."""

from __future__ import annotations

from rich.console import Console

from longattn.bench import compare
from longattn.bench.compare.problems import Attention, Linear

TINY = {"T": 300, "H": 4, "D": 8, "rounds": 3}
SHARED = {"version", "kind", "options", "environment", "load", "checked_against", "peak", "trace"}


def quiet() -> Console:
    return Console(quiet=True)


def problem(**changes) -> Attention:
    return compare.CompareOptions("attention_forward", **{"T": 256, "H": 2, "D": 128, **changes}).problem


def linear(**changes) -> Linear:
    return compare.CompareOptions("linear_forward", **{"T": 40, "H": 2, "D": 16, **changes}).problem
