"""A collective as formulas and compiled programs describe it, and the kinds of buffers that both account for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Kinds of buffers. Paths tell the parts of the state, shapes the copies and gradients of parameters, and the pass that
# computes a buffer tells the rest.
BUFFER_KINDS = (
    "parameters", "moments", "batch", "gradients", "gathered or cast parameters", "forward pass", "backward pass",
    "other",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective in the schedule."""

    kind: str  # one of `aot.collectives.KINDS`
    bytes: int  # bytes that each device receives in one run
    group: tuple[int, ...]  # the devices of the first group, by their place in the program's order
    axes: str  # mesh axes, where the program names them; for a collective-permute see `axes_of`
    scope: str
    pairs: tuple[tuple[int, int], ...] = ()  # (sender, receiver) of a collective-permute


def axes_of(pairs: Iterable[tuple[int, int]], sizes: Mapping[str, int]) -> str:
    """The names, joined by commas, of the mesh axes along which the devices of some pair differ."""
    ends = np.unravel_index(np.array([*pairs], dtype=int).reshape(-1, 2).T, tuple(sizes.values()))
    return ",".join(name for name, (a, b) in zip(sizes, ends, strict=True) if (a != b).any())
