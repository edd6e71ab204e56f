"""Machines by name: `v5e:16x16`, `v5p:8x8x8`, `v6e:16x16`, `tpu7x:4x4x4`, `h100:8`, `h100:8x8` (hosts x their GPUs)."""

from __future__ import annotations

import math
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
    """Accelerators that need not be there."""

    chip: Chip
    dims: tuple[int, ...]  # chips along each axis of the torus; of GPUs (hosts, GPUs of a host)

    @property
    def name(self) -> str:
        dims = self.dims[1:] if self.is_gpu and self.dims[0] == 1 else self.dims
        return f"{self.chip.name}:{'x'.join(map(str, dims))}"

    @property
    def is_gpu(self) -> bool:
        return self.chip.name in hardware.GPUS

    @property
    def size(self) -> int:
        """JAX devices."""
        return math.prod(self.dims) * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Memory of one device that a program may use."""
        if self.is_gpu:
            return self.chip.hbm_bytes
        return hardware.TENSOR_CORES[self.chip.name].hbm_usable

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s of one device."""
        return self.chip.peak_bf16_flops / self.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s of one device."""
        return self.chip.hbm_bandwidth / self.chip.devices

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that one device receives over all its links together; GPUs: NVLink, within a host."""
        return self.chip.link_bandwidth / 2 / self.chip.devices

    @property
    def one_link(self) -> float:
        """Bytes/s of a single link between chips, in one direction; GPUs: all of NVLink, for a switch is at its end."""
        return self.chip.link_bandwidth / 2 / self.chip.links

    @property
    def network_bandwidth(self) -> float:
        """Bytes/s that one device receives from other hosts; of TPUs, whose slice is one network, as over its links."""
        return _NETWORK.get(self.chip.name, self.link_bandwidth)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Of a TPU slice, which axes have wrap-around links: with three axes all, from whole cubes on, or none.

        So says docs.cloud.google.com/tpu/docs/v5p; of pods with two axes jax-ml.github.io/scaling-book/tpus says that
        only an axis as long as the pod's has them.
        """
        if len(self.dims) == 3:
            return (all(n % _CUBE == 0 for n in self.dims),) * 3
        return tuple(n >= _POD for n in self.dims)

    def torus(self, devices: Iterable[Any]) -> Torus | None:
        """Its links, where these are its devices in a program's order; None for GPUs, which hang on switches."""
        if self.is_gpu:
            return None
        places = tuple(tuple(device.coords[: len(self.dims)]) for device in devices)
        return Torus(self.dims, self.rings, self.one_link, self.one_link * self.chip.links, places)

    @property
    def node(self) -> int:
        """Devices that need no other network to reach each other."""
        return self.dims[1] if self.is_gpu else self.size

    @property
    def host_bandwidth(self) -> float:
        """Bytes/s that one device sends to the host's memory, and as many back at the same time."""
        return self.chip.host_bandwidth / self.chip.devices

    def smaller(self) -> list[Topology]:
        """This machine and those of its kind with fewer devices, smallest first, each half the one after."""
        ladder, dims = [self.dims], list(self.dims)
        while math.prod(dims) > 1:
            if self.is_gpu:  # hosts are left out before GPUs of a host
                dims[0 if dims[0] > 1 else 1] //= 2
                ladder.append(tuple(dims))
                continue
            longest = dims.index(max(dims))
            if dims[longest] % 2:
                break
            dims[longest] //= 2
            ladder.append(tuple(sorted(dims, reverse=len(dims) == 3)))
        return [Topology(self.chip, d) for d in reversed(ladder)]


def parse(name: str) -> Topology:
    """The topology of a name.

    Raises:
      ValueError: for a chip that cannot be compiled for, or dimensions that it does not have.
    """
    chip, _, dims = name.partition(":")
    known = [*hardware.TENSOR_CORES, *hardware.GPUS]
    if chip not in known:
        raise ValueError(f"topology={name!r} must begin with a chip that can be compiled for; {suggest(chip, known)}")
    try:
        sizes = tuple(int(d) for d in dims.split("x"))
    except ValueError:
        sizes = ()
    is_gpu = chip in hardware.GPUS
    rank = 2 if is_gpu else hardware.TENSOR_CORES[chip].topology.partition(":")[2].count("x") + 1
    if is_gpu and len(sizes) == 1:
        sizes = (1, *sizes)
    if len(sizes) != rank or min(sizes, default=0) < 1:
        example = f"{chip}:8 or {chip}:4x8 (hosts x GPUs)" if is_gpu else hardware.TENSOR_CORES[chip].topology
        raise ValueError(f"topology={name!r} must be a chip and its {rank} dimensions, such as {example}")
    if is_gpu and sizes[1] > _NODE:
        raise ValueError(f"topology={name!r}: a host holds at most {_NODE} GPUs, such as {chip}:{sizes[1] // _NODE}x8")
    return Topology(hardware.CHIPS[chip], sizes)
