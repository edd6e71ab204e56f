"""Small comparisons."""

from __future__ import annotations

from rich.console import Console

from longattn.analysis import bench, compare

TINY = {"T": 300, "H": 4, "D": 8, "rounds": 3}
SHARED = {"version", "kind", "options", "environment", "load", "checked_against", "peak", "trace"}


def quiet() -> Console:
    return Console(quiet=True)


def problem(**changes) -> bench.AttentionOptions:
    return compare.CompareOptions("attention_forward", **{"T": 256, "H": 2, "D": 128, **changes}).problem
