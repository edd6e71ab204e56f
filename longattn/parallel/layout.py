"""The order of a sequence over the devices along an axis: one value that everything that reads positions shares.

    contiguous    device i holds the i-th of P pieces
    zigzag        device i holds pieces i and 2 P - 1 - i of 2 P: under a causal mask all devices have the same work
                  (arXiv:2407.21783, section 3.3.2)
    striped       device t mod P holds token t: the same work up to the diagonal (arXiv:2311.09431)

Global arrays are in the layout's order along axis 1, so that each shard is one slice of them. Every device holds its
tokens in the order of their positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from longattn.config.mesh import LayoutName, layout_unit
from longattn.shapes import suggest

Axis = str | tuple[str, ...]  # a mesh axis, or several, the devices in row-major order


def names_of(axis: Axis) -> tuple[str, ...]:
    """The names of the mesh axes that `axis` stands for."""
    return (axis,) if isinstance(axis, str) else tuple(axis)


def devices_on(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """The number of devices along an axis or several."""
    return math.prod(mesh.shape[name] for name in names_of(axis))


@dataclass(frozen=True)
class SequenceLayout:
    """The order of a sequence over P devices, or over the P shards that devices of an inner axis divide again.

    Hashable and static.
    """

    name: LayoutName = "contiguous"

    def __post_init__(self) -> None:
        if self.name not in get_args(LayoutName):
            raise ValueError(f"layout {self.name!r} must be one; {suggest(str(self.name), get_args(LayoutName))}")

    def unit(self, P: int) -> int:
        """The number whose multiples the layout divides over P devices."""
        return layout_unit(self.name, P)

    def check(self, length: int, P: int, name: str = "T") -> None:
        """Raises ValueError, naming the next length, where the layout does not divide this one."""
        if length % (unit := self.unit(P)):
            devices = f"{P} devices along the sequence" + (", two pieces each" if unit > P else "")
            raise ValueError(
                f"{name}={length} must be a multiple of {unit} for the {self.name} layout ({devices}); pad it to "
                f"{-(-length // unit) * unit}"
            )

    def _halves(self, P: int) -> np.ndarray:
        """The pieces of zigzag in the layout's order."""
        return np.stack([np.arange(P), 2 * P - 1 - np.arange(P)], 1).reshape(-1)

    def permute(self, x: Array | np.ndarray, P: int) -> Array | np.ndarray:
        """An array [B T ...] from the order of the sequence into the layout's; NumPy stays NumPy."""
        return self._reordered(x, P, back=False)

    def restore(self, x: Array | np.ndarray, P: int) -> Array | np.ndarray:
        """The inverse of `permute`."""
        return self._reordered(x, P, back=True)

    def _reordered(self, x: Array | np.ndarray, P: int, *, back: bool) -> Array | np.ndarray:
        self.check(x.shape[1], P)
        if P == 1 or self.name == "contiguous":
            return x
        B, T, *rest = x.shape
        if self.name == "zigzag":
            order = self._halves(P)
            return x.reshape(B, 2 * P, T // (2 * P), *rest)[:, np.argsort(order) if back else order].reshape(x.shape)
        return x.reshape(B, *((P, T // P) if back else (T // P, P)), *rest).swapaxes(1, 2).reshape(x.shape)

    def positions(self, T: int, P: int) -> Int32[np.ndarray, " T"]:
        """The positions of the T tokens in the layout's order."""
        return self.permute(np.arange(T, dtype=np.int32)[None], P)[0]

    def local_positions(self, device: Array | int, T: int, P: int) -> Int32[Array, " t"]:
        """The positions of one device's tokens, of T in all; `device` may be traced."""
        n, device = T // P, jnp.asarray(device, jnp.int32)
        at = jnp.arange(n, dtype=jnp.int32)
        if self.name == "striped":
            return at * P + device
        if self.name == "contiguous" or P == 1:
            return at + device * n
        half = n // 2
        return jnp.where(at < half, at + device * half, at + (2 * P - 1 - device) * half - half)

    def runs(self, device: int, T: int, P: int) -> list[tuple[int, int]]:
        """(first, last) positions of a device's pieces, which are equal in length and in the order of its tokens."""
        n = T // P
        if self.name == "striped":
            return [(device, device + (n - 1) * P)]
        if self.name == "contiguous" or P == 1:
            return [(device * n, (device + 1) * n - 1)]
        half = n // 2
        return [(piece * half, (piece + 1) * half - 1) for piece in (device, 2 * P - 1 - device)]


def convert(
    x: Float[Array, "B T ..."],
    source: SequenceLayout,
    target: SequenceLayout,
    *,
    mesh: Mesh | AbstractMesh,
    axis: Axis,
    batch_axes: tuple[str, ...] = (),
) -> Float[Array, "B T ..."]:
    """Returns a global array [B T ...] in another layout.

    Two permutations of half shards convert between zigzag and contiguous, an all-to-all between striped and contiguous.
    At most B T / P elements of each trailing index leave a device in each. Zigzag becomes striped by way of contiguous.
    Along two axes the layouts order the shards of the outer one, and each device sends its part of a shard whole.

    Args:
      x: the array, in the order of `source`, with T sharded along `axis`.
      source, target: the layouts.
      mesh: the mesh, all of whose axes are Auto.
      axis: the mesh axis, or two, along which the sequence is sharded.
      batch_axes: mesh axes along which the batch is sharded.

    Raises:
      ValueError: for a length that a layout does not divide; with striped, T must be a multiple of the devices' square.
      NotImplementedError: along two axes for striped, and for zigzag where the inner one has an odd number of devices:
        the tokens of a device are then not contiguous in the sequence.
    """
    P, shards = devices_on(mesh, axis), mesh.shape[names_of(axis)[0]]
    for layout in (source, target):
        layout.check(x.shape[1], shards)
    if source == target or shards == 1:
        return x
    if shards < P and ("striped" in (source.name, target.name) or P // shards % 2):
        raise NotImplementedError(
            f"a sequence along {axis}, {shards} shards of {P // shards} devices each, is not converted from "
            f"{source.name} to {target.name}; choose the layout contiguous, zigzag with an even number of "
            "devices to a shard, or a strategy with one axis"
        )
    if "striped" in (source.name, target.name) and x.shape[1] % P**2:
        raise ValueError(
            f"T={x.shape[1]} must be a multiple of {P**2}, the square of the devices along the sequence, to convert "
            f"between the layouts {source.name} and {target.name}; pad it to {-(-x.shape[1] // P**2) * P**2}"
        )
    lies = PartitionSpec(batch_axes, axis)

    def local(x: Array) -> Array:
        with jax.named_scope(f"{source.name}_to_{target.name}"):
            if shards < P:
                pieces, places = source.positions(P, shards), np.argsort(target.positions(P, shards))
                return lax.ppermute(x, axis, [(i, int(places[piece])) for i, piece in enumerate(pieces)])
            if source.name != "contiguous":
                x = _gather(x, source, axis, P)
            return x if target.name == "contiguous" else _scatter(x, target, axis, P)

    return jax.shard_map(local, mesh=mesh, in_specs=lies, out_specs=lies, check_vma=True)(x)


def _gather(x: Array, layout: SequenceLayout, axis: Axis, P: int) -> Array:
    """Sends a device's tokens [B n ...] of the layout, and returns its tokens of the contiguous layout."""
    if layout.name == "striped":
        B, n, *rest = x.shape
        x = lax.all_to_all(x, axis, split_axis=1, concat_axis=1, tiled=True)  # (sender, its n/P tokens in order)
        return x.reshape(B, P, n // P, *rest).swapaxes(1, 2).reshape(x.shape)
    device = lax.axis_index(axis)
    low, high = jnp.split(x, 2, 1)  # pieces `device` and 2 P - 1 - device: one is even, one is odd
    even, odd = _ordered(device % 2 == 1, low, high)
    pieces = [(i, 2 * P - 1 - i) for i in range(P)]
    to = [[(i, piece // 2) for i in range(P) for piece in pieces[i] if piece % 2 == parity] for parity in (0, 1)]
    return jnp.concatenate([lax.ppermute(even, axis, to[0]), lax.ppermute(odd, axis, to[1])], 1)


def _scatter(x: Array, layout: SequenceLayout, axis: Axis, P: int) -> Array:
    """The inverse of `_gather`."""
    if layout.name == "striped":
        B, n, *rest = x.shape
        x = x.reshape(B, n // P, P, *rest).swapaxes(1, 2).reshape(x.shape)
        return lax.all_to_all(x, axis, split_axis=1, concat_axis=1, tiled=True)
    even, odd = jnp.split(x, 2, 1)  # pieces 2 device and 2 device + 1
    holder = lambda piece: piece if piece < P else 2 * P - 1 - piece
    even = lax.ppermute(even, axis, [(i, holder(2 * i)) for i in range(P)])
    odd = lax.ppermute(odd, axis, [(i, holder(2 * i + 1)) for i in range(P)])
    return jnp.concatenate(_ordered(lax.axis_index(axis) % 2 == 1, even, odd), 1)


def _ordered(swap: Array, a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.where(swap, b, a), jnp.where(swap, a, b)
