"""The chip table's rows are found by the names JAX reports, and the CPU's peak is measured."""

import jax
import pytest

from longattn.cost import hardware

KINDS = {
    "v5e": ["TPU v5 lite", "TPU v5e"],
    "v5p": ["TPU v5p", "TPU v5"],
    "v6e": ["TPU v6 lite", "TPU v6e"],
    "tpu7x": ["TPU7x", "TPU v7x"],
    "a100-40": ["NVIDIA A100-SXM4-40GB"],
    "a100-80": ["NVIDIA A100-SXM4-80GB"],
    "h100": ["NVIDIA H100 80GB HBM3"],
    "h200": ["NVIDIA H200"],
    "b200": ["NVIDIA B200"],
    "t4": ["Tesla T4"],
    "l4": ["NVIDIA L4"],
}


@pytest.mark.parametrize("name", hardware.CHIPS)
def test_each_chip_is_found_by_its_kind_and_by_no_other(name):
    for kind in KINDS[name]:
        assert hardware.chip_of(kind).name == name
        assert sum(hardware.re.fullmatch(c.kinds, kind) is not None for c in hardware.CHIPS.values()) == 1


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA H100 PCIe", "TPU v4", "NVIDIA H200 NVL"])
def test_other_boards_are_not_taken_for_a_listed_one(kind):
    assert hardware.chip_of(kind) is None


def test_figures_have_sensible_units_and_a_source():
    for chip in hardware.CHIPS.values():
        assert chip.source.startswith("https://")
        assert 5e13 < chip.peak_bf16_flops < 1e16
        assert 1e10 < chip.hbm_bytes < 1e12
        # FLOPs per byte of device memory: tens to hundreds on every chip since 2018.
        assert 50 < chip.peak_bf16_flops / chip.hbm_bandwidth < 700
        assert chip.link_bandwidth < chip.hbm_bandwidth


def test_tpu_cores_fit_their_chips():
    # GHz at which the published peak is reached, and bytes per cycle of each core.
    implied = {"v5e": (1.50, 546), "v5p": (1.75, 790), "v6e": (1.75, 937), "tpu7x": (2.20, 1677)}
    assert set(hardware.TENSOR_CORES) == set(implied)
    for name, (clock, per_cycle) in implied.items():
        assert hardware.tpu_clock(name) == pytest.approx(clock * 1e9, rel=0.01)
        per_core = hardware.hbm_bytes_per_cycle(name) / hardware.TENSOR_CORES[name].per_device
        assert per_core == pytest.approx(per_cycle, rel=0.01)


def test_gpus_fit_their_chips():
    implied = {"a100-40": 1.41, "a100-80": 1.41, "h100": 1.83, "h200": 1.83, "b200": 1.86}  # GHz at the published peak
    assert set(hardware.GPUS) == set(implied)
    for name, gpu in hardware.GPUS.items():
        assert hardware.gpu_clock(name) == pytest.approx(implied[name] * 1e9, rel=0.01)
        assert hardware.chip_of(gpu.kind).name == name
        assert f"core_count: {gpu.multiprocessors}\n" in hardware.gpu_target(name)
    assert [hardware.GPUS[name].capability for name in ("a100-80", "h100", "b200")] == [(8, 0), (9, 0), (10, 0)]


def test_detect_measures_the_cpu_and_divides_it_among_its_devices():
    device = hardware.detect()
    if device.platform != "cpu":
        pytest.skip(f"runs on {device.kind}: nothing to measure")
    assert (device.chip, device.n, device.measured) == (None, jax.device_count(), True)
    assert 1e8 < device.peak_flops * jax.local_device_count() < 1e14
    assert hardware.detect() == device  # measured once
