"""Chips and their published limits, and the device this process runs on.

Every figure is per chip and comes from the vendor's page named in `Chip.source`; GPU peaks are dense, without the
doubling for 2:4 sparsity, and for the SXM or HGX board. None of them was measured here.

Google publishes no bandwidth between a TPU and its host. `host_bandwidth` is 16 GB/s each way, the figure for TPU v4 in
"How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), which computes with 15 GB/s for v6e. For GPUs it is half
the PCIe bandwidth that their data sheets give for both directions.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_GB, _GiB = 10**9, 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Chip:
    """One accelerator as its vendor describes it."""

    name: str  # key in CHIPS
    peak_bf16_flops: (
        float  # dense bfloat16 FLOP/s with float32 accumulation (float16 for the T4, which has no bfloat16)
    )
    hbm_bytes: int  # device memory
    hbm_bandwidth: float  # bytes/s between device memory and the chip
    link_bandwidth: float  # bytes/s to other chips, both directions added: ICI, NVLink, or PCIe where there is neither
    links: int  # to neighbours, among which that bandwidth is divided; 1: a switch, or the host, leads to every chip
    host_bandwidth: float  # bytes/s to the host's memory, and as many back at the same time: PCIe
    devices: int  # JAX devices per chip
    kinds: str  # regular expression of the `device_kind` that JAX reports
    source: str  # where the figures are published


_TABLE = (
    Chip("v5e", 197e12, 16 * _GiB, 819e9, 400e9, 4, 16e9, 1, r"TPU v5( lite|e)", _TPU + "v5e"),
    Chip("v5p", 459e12, 95 * _GiB, 2765e9, 1200e9, 6, 16e9, 1, r"TPU v5p?", _TPU + "v5p"),
    Chip("v6e", 918e12, 32 * _GiB, 1638e9, 800e9, 4, 16e9, 1, r"TPU v6( lite|e)", _TPU + "v6e"),
    Chip("tpu7x", 2307e12, 192 * _GiB, 7380e9, 1200e9, 6, 16e9, 2, r"TPU ?v?7x?", _TPU + "tpu7x"),
    Chip("a100-40", 312e12, 40 * _GB, 1555e9, 600e9, 1, 32e9, 1, r"NVIDIA A100-SXM4-40GB", _NVIDIA + "a100/"),
    Chip("a100-80", 312e12, 80 * _GB, 2039e9, 600e9, 1, 32e9, 1, r"NVIDIA A100-SXM4-80GB", _NVIDIA + "a100/"),
    Chip("h100", 989.4e12, 80 * _GB, 3350e9, 900e9, 1, 64e9, 1, r"NVIDIA H100 80GB HBM3", _NVIDIA + "h100/"),
    Chip("h200", 989.4e12, 141 * _GB, 4800e9, 900e9, 1, 64e9, 1, r"NVIDIA H200", _NVIDIA + "h200/"),
    Chip("b200", 2250e12, 180 * _GB, 8000e9, 1800e9, 1, 64e9, 1, r"NVIDIA B200", _NVIDIA + "dgx-b200/"),
    Chip("t4", 65e12, 16 * _GB, 320e9, 32e9, 1, 16e9, 1, r"(Tesla|NVIDIA) T4", _NVIDIA + "tesla-t4/"),
    Chip("l4", 121e12, 24 * _GB, 300e9, 64e9, 1, 32e9, 1, r"NVIDIA L4", _NVIDIA + "l4/"),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}


@dataclass(frozen=True)
class TensorCore:
    """A matrix core of a TPU as its compiler schedules for it: one bundle of instructions per cycle.

    `mxu_flops` comes from libtpu's schedules of bfloat16 products: the cycles for which a product of known size keeps
    the matrix units busy. `hbm_usable` comes from its refusal of a program too large, the rest from jax's
    `pltpu.get_tpu_info`. Clocks are not published: the chip's peak is assumed to mean all matrix units busy in every
    cycle.
    """

    mxu_flops: int  # bfloat16 FLOP per cycle of all matrix units of the core
    vmem_bytes: int  # bytes of the core's vector memory
    hbm_usable: int  # bytes of one JAX device's HBM that libtpu gives a program; the system keeps the rest
    per_device: int  # cores of one JAX device; a grid spreads over them where it is marked parallel
    topology: str  # libtpu's name of a small slice


TENSOR_CORES: dict[str, TensorCore] = {
    "v5e": TensorCore(131_072, 128 * 2**20, int(15.75 * _GiB), 1, "v5e:2x2"),
    "v5p": TensorCore(131_072, 64 * 2**20, int(95.73 * _GiB), 2, "v5p:2x2x1"),
    "v6e": TensorCore(524_288, 128 * 2**20, int(31.24 * _GiB), 1, "v6e:2x2"),
    "tpu7x": TensorCore(524_288, 64 * 2**20, int(94.74 * _GiB), 1, "tpu7x:2x2x1"),
}


def tpu_clock(name: str) -> float:
    """Cycles per second at which the chip's published peak is reached by its matrix units."""
    chip, core = CHIPS[name], TENSOR_CORES[name]
    return chip.peak_bf16_flops / (chip.devices * core.per_device * core.mxu_flops)


def hbm_bytes_per_cycle(name: str) -> float:
    """Bytes that device memory moves per cycle for one JAX device, all its cores together."""
    chip = CHIPS[name]
    return chip.hbm_bandwidth / chip.devices / tpu_clock(name)


@dataclass(frozen=True)
class Gpu:
    """A GPU of CHIPS, with the figures that its compilers need.

    What a multiprocessor holds is in the CUDA programming guide's table of compute capabilities
    (docs.nvidia.com/cuda/cuda-c-programming-guide, "features and technical specifications"); how many there are, their
    products per cycle, the cache and the links in NVIDIA's papers on the Ampere, Hopper and Blackwell architectures and
    in the tuning guides (docs.nvidia.com/cuda/blackwell-tuning-guide).
    """

    arch: str  # ptxas's name of the instruction set; "a" adds instructions that only this generation has
    kind: str  # as JAX reports it
    multiprocessors: int
    tensor_flops: int  # dense bfloat16 FLOP per cycle of one multiprocessor
    fp32_lanes: int  # of one multiprocessor
    l2_bytes: int
    shared_bytes: int  # shared memory of one multiprocessor
    nvlinks: int
    max_threads: int = 2048  # of one multiprocessor
    registers: int = 65_536  # of 32 bit, of one multiprocessor, and the most that one block may have

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (9, 0) for sm_90a."""
        number = int(re.sub(r"\D", "", self.arch))
        return number // 10, number % 10

    @property
    def shared_bytes_per_block(self) -> int:
        """The most shared memory that one block may ask for: 1 KiB of each block is the system's."""
        return self.shared_bytes - 1024


GPUS: dict[str, Gpu] = {
    "a100-40": Gpu("sm_80", "NVIDIA A100-SXM4-40GB", 108, 2048, 64, 40 * 2**20, 164 * 2**10, 12),
    "a100-80": Gpu("sm_80", "NVIDIA A100-SXM4-80GB", 108, 2048, 64, 40 * 2**20, 164 * 2**10, 12),
    "h100": Gpu("sm_90a", "NVIDIA H100 80GB HBM3", 132, 4096, 128, 50 * 2**20, 228 * 2**10, 18),
    "h200": Gpu("sm_90a", "NVIDIA H200", 132, 4096, 128, 50 * 2**20, 228 * 2**10, 18),
    "b200": Gpu("sm_100a", "NVIDIA B200", 148, 8192, 128, 126 * 2**20, 228 * 2**10, 18),
}


def gpu_clock(name: str) -> float:
    """Cycles per second at which the GPU's published peak is reached by its tensor cores."""
    return CHIPS[name].peak_bf16_flops / (GPUS[name].multiprocessors * GPUS[name].tensor_flops)


def gpu_target(name: str) -> str:
    """The GPU `name` as a text of XLA's GpuTargetConfigProto: all that its compiler asks of a device.

    Memory is the published size; a real device reports some of it as taken.
    """
    chip, gpu = CHIPS[name], GPUS[name]
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if gpu.arch.endswith("a") else "NONE"
    return f"""
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fp32_lanes}
  clock_rate_ghz: {gpu_clock(name) / 1e9:.3f}
  memory_bandwidth: {chip.hbm_bandwidth:.0f}
  device_memory_size: {chip.hbm_bytes}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  registers_per_core_limit: {gpu.registers}
  registers_per_block_limit: {gpu.registers}
  threads_per_core_limit: {gpu.max_threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  device_interconnect_info {{ active_links: {gpu.nvlinks} }}
}}
"""


@dataclass(frozen=True)
class Device:
    """The kind of device this process computes on."""

    kind: str  # as JAX reports it
    platform: str  # cpu, gpu or tpu
    n: int  # devices of this kind, over all processes
    chip: Chip | None  # None: a CPU, or a chip that CHIPS does not list
    peak_flops: float | None  # FLOP/s of one JAX device; None where it is not known
    measured: bool  # the peak was measured here (CPU, float32), not published (bfloat16)


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`, or None for one that CHIPS does not list (another board of a family differs)."""
    return next((chip for chip in _TABLE if re.fullmatch(chip.kinds, kind)), None)


@functools.cache
def _matmul_flops(size: int = 1024, repeats: int = 8) -> float:
    """float32 FLOP/s of this host's CPU, by the fastest of a few `size`-cubed products: it takes about 0.2 s.

    The fastest, because anything else that runs on the machine only ever slows a product down.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    a = jax.device_put(jnp.full((size, size), 1e-3, jnp.float32), cpu)
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def detect() -> Device:
    """The default device and its peak: published for a known chip, measured once for a CPU.

    The devices of one host's CPU share its cores, and two JAX devices may share a chip: `peak_flops` is one device's
    part.
    """
    first = jax.devices()[0]
    kind, n = first.device_kind, jax.device_count()
    if first.platform == "cpu":
        return Device(kind, first.platform, n, None, _matmul_flops() / jax.local_device_count(), True)
    chip = chip_of(kind)
    return Device(kind, first.platform, n, chip, chip.peak_bf16_flops / chip.devices if chip else None, False)
