"""Machines by name: `v5e:16x16`, `v5p:8x8x8`, `v6e:16x16`, `tpu7x:4x4x4`, `h100:8`, `h100:8x8` (hosts x their GPUs)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longattn.cost import hardware
from longattn.cost.hardware import Chip
from longattn.cost.torus import Torus
from longattn.shapes import suggest

_POD = 16  # chips along each axis of a pod of those that have two
_CUBE = 4  # chips along each axis of the cubes of which larger slices of those with three axes are made
_NODE = 8  # GPUs of one host of those that CHIPS lists
# Bytes per second that a GPU receives from other hosts: it has one adapter of 400 Gbit/s in NVIDIA's DGX H100, H200 and
# B200, of 200 Gbit/s in its DGX A100.
_NETWORK = {"a100-40": 25e9, "a100-80": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}


@dataclass(frozen=True)
class Topology:
    """The chips of a machine and how they are joined. The machine need not be at hand."""

    chip: Chip
    dims: tuple[int, ...]  # chips along each axis of the torus; for GPUs (hosts, GPUs of a host)

    @property
    def name(self) -> str:
        dims = self.dims[1:] if self.is_gpu and self.dims[0] == 1 else self.dims
        return f"{self.chip.name}:{'x'.join(map(str, dims))}"

    @property
    def is_gpu(self) -> bool:
        return self.chip.name in hardware.GPUS

    @property
    def size(self) -> int:
        """The number of JAX devices."""
        return math.prod(self.dims) * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Bytes of one device's memory that a program may use."""
        if self.is_gpu:
            return self.chip.hbm_bytes
        return hardware.TENSOR_CORES[self.chip.name].hbm_usable

    @property
    def peak_flops(self) -> float:
        """Peak bfloat16 FLOP/s of one device."""
        return self.chip.peak_bf16_flops / self.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s between one device and its memory."""
        return self.chip.hbm_bandwidth / self.chip.devices

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that one device receives over all its links together; for GPUs over NVLink, within a host."""
        return self.chip.link_bandwidth / 2 / self.chip.devices

    @property
    def one_link(self) -> float:
        """Bytes/s of one link between chips in one direction; for GPUs all of NVLink, which leads to a switch."""
        return self.chip.link_bandwidth / 2 / self.chip.links

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s that one device receives from other hosts; for TPUs the links', since a slice is one network."""
        return _NETWORK.get(self.chip.name, self.link_bandwidth)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis of a TPU slice has wrap-around links.

        Slices of three axes have them on all axes if they consist of whole cubes, else on none
        (docs.cloud.google.com/tpu/docs/v5p). In pods of two axes only an axis as long as the pod's has them
        (jax-ml.github.io/scaling-book/tpus).
        """
        if len(self.dims) == 3:
            return (all(n % _CUBE == 0 for n in self.dims),) * 3
        return tuple(n == _POD for n in self.dims)

    def torus(self, devices: Iterable[Any]) -> Torus | None:
        """The links between these devices, given in a program's order; None for GPUs, which switches join."""
        if self.is_gpu:
            return None
        places = tuple(tuple(device.coords[: len(self.dims)]) for device in devices)
        return Torus(self.dims, self.rings, self.one_link, self.one_link * self.chip.links, places)

    @property
    def node(self) -> int:
        """The number of devices that reach each other without the network between hosts."""
        return self.dims[1] if self.is_gpu else self.size

    @property
    def host_bandwidth(self) -> float:
        """Bytes/s that one device sends to the host's memory; it receives as many at the same time."""
        return self.chip.host_bandwidth / self.chip.devices

    def smaller(self) -> list[Topology]:
        """This machine and smaller ones of its kind, smallest first; each has half the devices of the next."""
        ladder, dims = [self.dims], list(self.dims)
        while math.prod(dims) > 1:
            if self.is_gpu:  # halve the hosts before the GPUs of a host
                dims[0 if dims[0] > 1 else 1] //= 2
                ladder.append(tuple(dims))
                continue
            longest = dims.index(max(dims))
            if dims[longest] % 2:
                break
            dims[longest] //= 2
            ladder.append(tuple(sorted(dims, reverse=len(dims) == 3)))
        return [Topology(self.chip, d) for d in reversed(ladder)]


def one(chip: str) -> Topology:
    """One device of a chip that can be compiled for."""
    return Topology(hardware.CHIPS[chip], (1,) * _rank(chip))


def _rank(chip: str) -> int:
    """The number of dimensions: of a TPU's torus, or hosts and the GPUs of each."""
    return 2 if chip in hardware.GPUS else hardware.TENSOR_CORES[chip].topology.partition(":")[2].count("x") + 1


def _cloud_name(name: str) -> str | None:
    """The topology that a cloud's name such as "v5p-128" or "v5litepod-16" means, the most compact of its size."""
    found = re.fullmatch(r"(v5p|v5e|v5litepod|v6e)-(\d+)", name)
    if found is None:
        return None
    chip = found[1].replace("v5litepod", "v5e")
    n = int(found[2]) // (2 if chip == "v5p" else 1)  # v5p is named by its cores, of which a chip has two
    shapes = [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    if chip == "v5p":
        shapes = [(a, b, ab // b) for a, ab in shapes for b in range(1, ab + 1) if ab % b == 0]  # type: ignore[misc]
    if not shapes:
        return None
    dims = sorted(min(shapes, key=max), key=lambda d: (d == 1, d))  # clouds write 2x2x1 and 4x8
    return f"{chip}:{'x'.join(map(str, dims))}"


def parse(name: str) -> Topology:
    """The topology that a name such as "v5e:4x4" describes.

    Raises:
      ValueError: for a chip that cannot be compiled for, or dimensions that it does not have.
    """
    chip, _, dims = name.partition(":")
    known = [*hardware.TENSOR_CORES, *hardware.GPUS]
    if meant := _cloud_name(name):
        raise ValueError(f"topology={name!r} must be a chip and its dimensions: this one is {meant}")
    if chip not in known:
        raise ValueError(f"topology={name!r} must begin with a chip that can be compiled for; {suggest(chip, known)}")
    try:
        sizes = tuple(int(d) for d in dims.split("x"))
    except ValueError:
        sizes = ()
    is_gpu = chip in hardware.GPUS
    rank = _rank(chip)
    if is_gpu and len(sizes) == 1:
        sizes = (1, *sizes)
    if len(sizes) != rank or min(sizes, default=0) < 1:
        example = f"{chip}:8 or {chip}:4x8 (hosts x GPUs)" if is_gpu else hardware.TENSOR_CORES[chip].topology
        raise ValueError(f"topology={name!r} must be a chip and its {rank} dimensions, such as {example}")
    if rank == 2 and not is_gpu and max(sizes) > _POD:
        raise ValueError(f"topology={name!r}: a pod has at most {_POD}x{_POD} chips, {chip}:{_POD}x{_POD}")
    if is_gpu and sizes[1] > _NODE:
        raise ValueError(f"topology={name!r}: a host holds at most {_NODE} GPUs, such as {chip}:{sizes[1] // _NODE}x8")
    return Topology(hardware.CHIPS[chip], sizes)
