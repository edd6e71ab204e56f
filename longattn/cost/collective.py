"""A collective as formulas and compiled programs describe it, and the kinds of buffers that both account for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# What a buffer is: the state's parts by their paths, copies and gradients of parameters by their shapes, the rest by
# the pass that computes it.
BUFFER_KINDS = (
    "parameters", "moments", "batch", "gradients", "gathered or cast parameters", "forward pass", "backward pass",
    "other",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective in the schedule."""

    kind: str  # one of `aot.collectives.KINDS`
    bytes: int  # that each device receives in one run
    group: tuple[int, ...]  # the devices of the first group, by their place in the program's order
    axes: str  # of the mesh, where the program names them: not of a collective-permute, see `axes_of`
    scope: str
    pairs: tuple[tuple[int, int], ...] = ()  # of a collective-permute: who sends to whom


def axes_of(pairs: Iterable[tuple[int, int]], sizes: Mapping[str, int]) -> str:
    """The axes of a mesh along which pairs of its devices, by their place in it, lie apart, with commas."""
    ends = np.unravel_index(np.array([*pairs], dtype=int).reshape(-1, 2).T, tuple(sizes.values()))
    return ",".join(name for name, (a, b) in zip(sizes, ends, strict=True) if (a != b).any())
