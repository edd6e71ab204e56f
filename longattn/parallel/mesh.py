"""The device mesh, and the sharding of every array over it.

    data        rows of the batch; parameters are replicated
    fsdp        rows of the batch; a slice of every matrix, gathered where it is used (ZeRO stage 3, arXiv:1910.02054)
    tensor      heads and the MLP's width (arXiv:1909.08053)
    seq         positions; a slice of every matrix, as fsdp
    ring        an optional fifth axis: positions are then sharded along `ring`, and each shard along `seq`

All axes are Auto: the partitioner shards the arrays outside a shard_map.

The first rule whose pattern is found in a parameter's path, such as "layers/layer_0/mixer/q", gives its sharding. The
optimiser's moments have the parameter's path as the end of their own, so the same rules hold for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from longattn.parallel.layout import Axis, devices_on, names_of
from longattn.shapes import suggest

AXES = ("data", "fsdp", "tensor", "ring", "seq")  # the axes of a mesh; ring is left out where it has one device
SLICED = ("fsdp", "ring", "seq")  # the axes that slice matrices along E

Rule = tuple[str, P]  # a regular expression for `re.search` in the path, and the array's sharding

STACKED = r"(^|/)layers/"  # parameters of scanned layers have an axis of layers before the axes of their rule


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    seq: int = 1,
    *,
    ring: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of these sizes whose axes are Auto.

    Neighbours on the later axes are neighbours in the machine: as many of a process's devices as `seq` has follow one
    another along it. Between several slices (TPU pods joined by a slower network) lies `data` alone, or `fsdp` where
    `data` is 1, since these axes send the fewest messages. XLA counts each host of GPUs as a slice; any axis may lie
    between hosts.

    Args:
      data, fsdp, tensor, seq: devices along each axis; their product must be the number of devices.
      ring: devices along one more axis, before seq; with 1 the mesh has no such axis.
      devices: any devices, also those of an ahead-of-time topology; None is all devices.

    Raises:
      ValueError: for sizes that do not multiply to the number of devices, or slices that no axis can cross.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor, ring, seq), strict=True))
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1")
    if ring == 1:
        del sizes["ring"]
    devices = list(jax.devices() if devices is None else devices)
    product = math.prod(sizes.values())
    if product != len(devices):
        given = " * ".join(f"{name}={size}" for name, size in sizes.items())
        remedy = f", or pass {product} of them as devices" if product < len(devices) else ""
        raise ValueError(f"{given} = {product} must be the number of devices, {len(devices)}: change the sizes{remedy}")
    return Mesh(_arranged(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    """The devices in the mesh's shape; slices are divided along `data`, or along `fsdp` where `data` is 1."""
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or getattr(devices[0], "platform", "") == "gpu":  # XLA numbers GPUs host by host
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = "data" if sizes["data"] > 1 else "fsdp"
    if sizes[across] % slices:
        raise ValueError(
            f"{across}={sizes[across]} must be a multiple of {slices}, the slices of these devices: only data, or fsdp "
            "where data is 1, may cross the slower network between slices"
        )
    within = tuple(size // slices if name == across else size for name, size in sizes.items())
    between = tuple(slices if name == across else 1 for name in sizes)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def _mesh(mesh: Mesh | AbstractMesh | None, axis: Axis) -> Mesh | AbstractMesh:
    """The mesh given, or the current one. Raises ValueError unless it has the axis, and all its axes are Auto."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError("mesh=None needs a current mesh: pass mesh= or set one with jax.set_mesh(mesh)")
    for name in names_of(axis):
        if name not in mesh.axis_names:
            raise ValueError(f"{axis=} must be an axis of the mesh; {suggest(str(name), mesh.axis_names)}")
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind != AxisType.Auto:
            remedy = (
                "call longattn.attention inside a shard_map" if kind == AxisType.Manual else "make it with Auto axes"
            )
            raise ValueError(f"axis {name!r} of the mesh is {kind.name} and must be Auto; {remedy}")
    return mesh


def axes(
    mesh: Mesh | AbstractMesh | None, axis: Axis, batch_axes: tuple[str, ...], head_axis: str
) -> tuple[Mesh | AbstractMesh, tuple[str, ...], str | None]:
    """The mesh to use, and its axes along which the batch and the heads are sharded.

    Raises ValueError for an axis that the mesh lacks or that is not Auto, and for one named twice.
    """
    mesh = _mesh(mesh, axis)
    batch = tuple(name for name in batch_axes if name in mesh.axis_names)
    head = head_axis if head_axis in mesh.axis_names else None
    if len({*names_of(axis), *batch, head}) != len(names_of(axis)) + len(batch) + 1:
        raise ValueError(f"{axis=}, {batch_axes=} and {head_axis=} must be different axes of the mesh")
    return mesh, batch, head


def divide_rows(mesh: Mesh | AbstractMesh, B: int, batch: tuple[str, ...]) -> None:
    """Raises ValueError unless the batch axes divide B."""
    rows = math.prod(mesh.shape[name] for name in batch)
    if B % rows:
        raise ValueError(f"{B=} must be a multiple of {rows}, the devices on the batch axes {batch}")


def divide_tokens(mesh: Mesh | AbstractMesh, T: int, axis: Axis, name: str = "T") -> None:
    """Raises ValueError, naming the next length, unless the devices along the sequence divide it."""
    devices = devices_on(mesh, axis)
    if T % devices:
        longer = -(-T // devices) * devices
        raise ValueError(f"{name}={T} must be a multiple of {devices}, the devices on {axis!r}; pad it to {longer}")


def fit(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec without the axes that the mesh lacks."""

    def keep(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name in mesh.axis_names)
        return entry if entry in mesh.axis_names else None

    return P(*map(keep, spec))


def sharding(mesh: Mesh | AbstractMesh, spec: P, shape: Sequence[int], name: str) -> NamedSharding:
    """The sharding of an array of this shape.

    Raises ValueError, naming the array and the axis, where the devices do not divide a size.
    """
    spec = fit(spec, mesh)
    for i, entry in enumerate(spec):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        devices = math.prod(mesh.shape[axis] for axis in names)
        if shape[i] % devices:
            raise ValueError(
                f"axis {i} of {name}, of shape {list(shape)}, must be a multiple of {devices}, the devices along "
                f"{' and '.join(names)}: change the model, the data or the mesh"
            )
    return NamedSharding(mesh, spec)


def shardings(mesh: Mesh | AbstractMesh, tree: Any, rules: Sequence[Rule]) -> Any:
    """The shardings of a tree of parameters, optimiser states or both; scalars are replicated.

    Raises ValueError for a path that no rule matches, and where devices do not divide a size.
    """

    def one(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not x.shape:
            return NamedSharding(mesh, P())
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise ValueError(f"{name}, of shape {list(x.shape)}, is matched by no sharding rule; add one for it")
        stacked = (None,) if re.search(STACKED, name) else ()
        return sharding(mesh, P(*stacked, *spec), x.shape, name)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(x: Array, mesh: Mesh | AbstractMesh, spec: P, name: str) -> Array:
    """`x`, constrained inside a jit to the sharding of `spec`; `name` names it where devices do not divide a size."""
    return jax.lax.with_sharding_constraint(x, sharding(mesh, spec, x.shape, name))
