"""One layer's attention, and a way to spread its sequence over P devices: what all counts here are counts of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longattn.config import Mesh, Model
from longattn.config.mesh import LayoutName
from longattn.models.mixers import calls
from longattn.ops.calls import AttentionCall
from longattn.parallel.attention import STRATEGIES, strategy_on
from longattn.parallel.layout import SequenceLayout
from longattn.parallel.strategy import Call
from longattn.shapes import suggest


@dataclass(frozen=True)
class Problem(AttentionCall):
    """Attention of the B rows and H heads that each of P devices along the sequence has a part of: S is T."""

    dtype: str = "bfloat16"  # of q, k, v and out
    block: int = 1  # tokens along both edges of the squares in which pairs are computed, whole where one is visible
    ids: bool = False  # segment ids and positions are given

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name in ("T", "H", "K", "D", "B", "block") and size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.keys != self.T:
            raise ValueError(f"S={self.S} must be T={self.T}: strategies are counted for as many keys as queries")
        if self.H % self.heads:
            raise ValueError(f"K={self.K} must divide H={self.H}")

    @property
    def itemsize(self) -> int:
        """Bytes of an element of q, k, v and out."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Way:
    """A strategy over a layout."""

    strategy: str
    layout: LayoutName
    sizes: tuple[int, ...]  # devices along the axis; for usp along its ring and along its all-to-all

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r} must be one; {suggest(self.strategy, STRATEGIES)}")
        if len(self.sizes) != (axes := STRATEGIES[self.strategy].axes) or min(self.sizes) < 1:
            wanted = "one" if axes == 1 else "two"
            raise ValueError(
                f"sizes={self.sizes} must be {wanted} for {self.strategy}, one for each mesh axis it takes"
            )
        SequenceLayout(self.layout)

    @property
    def P(self) -> int:
        """Devices."""
        return int(np.prod(self.sizes))

    def __str__(self) -> str:
        inner = f" {self.sizes[0]}x{self.sizes[1]}" if len(self.sizes) > 1 else ""
        return f"{self.strategy}{inner}, {self.layout}"


def ways(P: int, K: int) -> list[Way]:
    """Every strategy on P devices, over every layout that it serves and that makes a difference to it.

    A strategy of two axes has as many devices on the inner one as both P and K allow, at least 2, and at least two on
    the outer one. There is none where P is a prime.
    """
    found = []
    inner = [n for n in range(2, P) if P % n == 0]
    for strategy in STRATEGIES.values():
        sizes: tuple[int, ...] = (P,)
        if strategy.axes == 2:
            if not inner:
                continue
            at = max([n for n in inner if K % n == 0], default=inner[0])
            sizes = P // at, at
        layouts = strategy.layouts[:1] if strategy.even else strategy.layouts
        found += [Way(strategy.name, layout, sizes) for layout in layouts]
    return found


def entry[E](table: Mapping[str, E], way: Way, what: str) -> E:
    """A table's entry for the way's strategy. Raises NotImplementedError where the table has none."""
    if way.strategy not in table:
        raise NotImplementedError(
            f"no formula is known for the {what} of strategy={way.strategy!r}: longattn.cost.sequence has those of "
            f"{', '.join(table)}"
        )
    return table[way.strategy]


def call(problem: Problem, way: Way) -> Call:
    """The call that the strategy is given inside its shard_map."""
    axis = "seq" if len(way.sizes) == 1 else ("ring", "seq")
    return Call(
        axis=axis, sizes=way.sizes, layout=SequenceLayout(way.layout), in_order=not problem.ids,
        out_dtype=problem.dtype, scale=1.0, softcap=None, implementation=None, tuning=None, K=problem.heads,
    )  # fmt: skip


def check(problem: Problem, way: Way) -> Call:
    """The call.

    Raises:
      ValueError: for a T that the devices or the layout do not divide.
      NotImplementedError: with the strategy's own reason, where it does not serve the mask.
    """
    made = call(problem, way)
    made.layout.check(problem.T, made.shards)
    if problem.T % made.P:
        raise ValueError(f"T={problem.T} must be a multiple of {made.P}, the devices along the sequence")
    STRATEGIES[way.strategy].refuse(problem.mask, problem.T, problem.T, made)
    return made


def layers_of(model: Model, T: int, rows: int, tensor: int = 1) -> dict[Problem, int]:
    """The calls of attention that a model's layers make on the devices along the sequence, and how many make each.

    Args:
      model: whose layers are counted.
      T: tokens of a sequence.
      rows: sequences of a micro-batch that these devices share.
      tensor: devices among which heads are divided.
    """
    found = (call for mixer in model.layers for call in calls(mixer, model, T, AttentionCall))
    return Counter(_problem(call.shared(tensor), rows) for call in found)


def _problem(call: AttentionCall, rows: int) -> Problem:
    return Problem(T=call.T, H=call.H, K=call.heads, D=call.D, V=call.V, B=rows, dtype=call.dtype, mask=call.mask)


def way_of(mesh: Mesh) -> Way:
    """The way that a config's mesh spreads attention. Raises ValueError where its strategy does not go with it."""
    return Way(mesh.strategy, mesh.layout, (mesh.ring, mesh.seq) if strategy_on(mesh).axes == 2 else (mesh.seq,))


def with_strategy(mesh: Mesh, strategy: str, K: int) -> Mesh:
    """A mesh with another strategy, of as many devices along the sequence, in its layout where the strategy takes it.

    Args:
      mesh: the mesh whose devices along the sequence a strategy of two axes divides as `ways` does.
      strategy: the other.
      K: key/value heads of all devices.

    Raises:
      ValueError: for two axes on devices that cannot be divided.
    """
    if mesh.strategy == strategy:
        return mesh
    way = next((way for way in ways(mesh.P, K // mesh.tensor) if way.strategy == strategy), None)
    if way is None:
        raise ValueError(
            f"{mesh.P} devices along the sequence cannot be divided into a ring and an all-to-all of at least "
            f"two each for strategy={strategy!r}"
        )
    served = STRATEGIES[strategy].layouts
    return with_way(mesh, dataclasses.replace(way, layout=mesh.layout if mesh.layout in served else served[0]))


def with_way(mesh: Mesh, way: Way) -> Mesh:
    """Returns the mesh with another way to spread attention over the devices along the sequence."""
    *outer, seq = way.sizes
    ring = outer[0] if outer else 1
    return dataclasses.replace(mesh, strategy=way.strategy, layout=way.layout, ring=ring, seq=seq)
