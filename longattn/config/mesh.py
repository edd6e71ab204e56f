"""How devices share a training step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longattn.config.checks import positive


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; their product is the number of devices. All 1: one device, no mesh.

    Parameters and moments are divided among the devices on fsdp, ring and seq, whose product must divide Model.E.
    """

    data: int = 1  # rows of the batch; parameters and moments are replicated
    fsdp: int = 1  # rows of the batch
    tensor: int = 1  # heads and the MLP's width
    seq: int = 1  # positions
    ring: int = 1  # parts of the sequence between which keys and values travel, each on seq devices: strategy usp
    strategy: Literal["ring", "balanced", "all_gather", "ulysses", "usp"] = (
        "ring"  # how queries meet the keys of other devices; see parallel/api.py
    )
    layout: Literal["contiguous", "zigzag", "striped"] = "contiguous"  # which tokens a device has; parallel/layout.py

    def __post_init__(self) -> None:
        positive(self, "data", "fsdp", "tensor", "seq", "ring")
        if (self.ring > 1) != (self.strategy == "usp"):
            raise ValueError(
                f"Mesh.ring={self.ring} with strategy={self.strategy!r}: usp, and no other, has parts that devices "
                "share, at least 2; set ring and strategy='usp', or neither (of one part, usp is strategy='ulysses')"
            )
        if self.strategy == "balanced" and self.layout != "contiguous":
            raise ValueError(
                f"Mesh.layout={self.layout!r} with strategy='balanced': both even out the causal work; "
                "set layout='contiguous', or strategy='ring'"
            )

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, as `longattn.parallel.make_mesh` takes them; ring only where it is more than one."""
        axes = ("data", "fsdp", "tensor", *(("ring",) if self.ring > 1 else ()), "seq")
        return {axis: getattr(self, axis) for axis in axes}

    @property
    def sequence(self) -> int:
        """Devices among which a sequence is divided."""
        return self.ring * self.seq

    @property
    def parts(self) -> int:
        """Parts that the layout orders: one on each device, or where there is a ring on the devices of a part of it."""
        return self.ring if self.ring > 1 else self.seq

    @property
    def unit(self) -> int:
        """What data.T must be a multiple of: zigzag has two halves of every part."""
        halves = 2 if self.layout == "zigzag" and self.parts > 1 else 1
        return math.lcm(self.sequence, halves * self.parts)
