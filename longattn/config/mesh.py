"""How devices share a training step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longattn.config.checks import positive, typed

LayoutName = Literal["contiguous", "zigzag", "striped"]  # the orders of a sequence over its devices: parallel/layout.py

if TYPE_CHECKING:
    StrategyName = str
else:

    class _AnyString(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, str)

    class StrategyName(metaclass=_AnyString):
        """Any string, as the type of a field that names a strategy of `longattn.parallel.STRATEGIES`.

        That table lies above this module, which therefore cannot check the name: whoever makes a mesh from a config
        does. The command line knows by this type where to list the names.
        """


def layout_unit(layout: LayoutName, shards: int) -> int:
    """The number whose multiples a layout divides into `shards` shards: zigzag has two pieces in each."""
    return 2 * shards if layout == "zigzag" and shards > 1 else shards


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; their product is the number of devices. All 1: one device, no mesh.

    Parameters and moments are divided among the devices on fsdp, ring and seq, whose product must divide Model.E.
    """

    data: int = 1  # rows of the batch; parameters and moments are replicated
    fsdp: int = 1  # rows of the batch
    tensor: int = 1  # heads and the MLP's width
    seq: int = 1  # positions
    ring: int = 1  # shards of the sequence, each on seq devices, between which keys and values travel: strategy usp
    strategy: StrategyName = "ring"  # how queries meet the keys of other devices; see parallel/attention.py
    layout: LayoutName = "contiguous"  # which tokens a device has; see parallel/layout.py

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "data", "fsdp", "tensor", "seq", "ring")

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
    def P(self) -> int:
        """Devices along the sequence."""
        return self.ring * self.seq

    @property
    def shards(self) -> int:
        """Shards that `layout` permutes: one for each device on the ring axis for usp, else on the seq axis."""
        return self.ring if self.ring > 1 else self.seq

    @property
    def unit(self) -> int:
        """The number whose multiples data.T may be."""
        return math.lcm(self.P, layout_unit(self.layout, self.shards))
