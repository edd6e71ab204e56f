"""One kernel case on one TPU chip: compiled by libtpu in a process of its own, its schedule read back and weighted.

Not in the figures: waits for DMA (so the cycles in which device memory moves the kernel's bytes are given beside them,
and the larger of the two is what to compare), bank conflicts of VMEM, instruction fetch, clocks, and the XLA operations
around the kernel, which are named. Nothing here has run on a TPU.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from longattn import mask
from longattn.analysis import aot, hardware
from longattn.analysis.cases import CASES, Shape
from longattn.analysis.static.schedule import SLOTS, parse, weigh

_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization).*"
)
_DUMPED = re.compile(r"\d+-(?P<name>[^<].*)-\d+-packed-bundles-post-ra\.txt")
_KERNEL = re.compile(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def compile_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one case for one chip in this process, whose environment names libtpu's flags: VMEM bytes by kernel."""
    shape = Shape(**{**request["shape"], "mask": mask.parse(request["shape"]["mask"])})
    core = hardware.TENSOR_CORES[request["chip"]]
    fn, arrays = CASES[request["case"]].build(shape)
    device = topologies.get_topology_desc(topology_name=core.topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
    text = jax.jit(fn).trace(*arrays).lower().compile().as_text()
    # An instruction ends where the next one's "%name =" begins, its attributes may hold line breaks.
    kernels = {m[1]: text[m.end() : _end(text, m.end())] for m in _KERNEL.finditer(text)}
    vmem = {name: _VMEM.search(rest) for name, rest in kernels.items()}
    return {"vmem": {name: int(m[1]) if m else None for name, m in vmem.items()}}


def _end(text: str, start: int) -> int:
    following = re.compile(r"^ *(ROOT )?%\S+ = ", re.MULTILINE).search(text, start)
    return following.start() if following else len(text)


def profile(case: str, chip: str, shape: Shape, timeout: float = 300) -> dict[str, Any]:
    """One row of the table, as JSON: a case on one JAX device of `chip`; with a `reason` where there is no number."""
    row: dict[str, Any] = {"case": case, "chip": chip}
    kernels = CASES[case].kernels(shape)
    core = hardware.TENSOR_CORES[chip]
    with tempfile.TemporaryDirectory(prefix="longattn_static_") as name:
        folder = Path(name)
        request = {"case": case, "chip": chip, "shape": {**vars(shape), "mask": str(shape.mask)}}
        environment = aot.tpu_environment(_FLAGS.format(folder=folder / "dump"))
        answer = aot.call("longattn.analysis.static.tpu:compile_here", request, environment, timeout)
        if "reason" in answer:
            return {**row, "reason": " ".join(answer["reason"].split())[:500]}
        dumps = {m["name"]: path for path in sorted((folder / "dump").iterdir()) if (m := _DUMPED.fullmatch(path.name))}
        dumps = {name: path for name, path in dumps.items() if not name.endswith("schedule-analysis")}
        try:
            chosen = [_the_one(kernel.name, answer["vmem"]) for kernel in kernels]
            weighted = [
                weigh(parse(dumps[name].read_text(), _utilisation_of(dumps[name], name).read_text()), kernel,
                      core.per_device)
                for name, kernel in zip(chosen, kernels)
            ]  # fmt: skip
        except ValueError as error:
            return {**row, "reason": str(error)}
    cycles = sum(w.cycles for w in weighted)
    busy = {slot: sum(w.busy[slot] for w in weighted) for slot in SLOTS}
    hbm_bytes = sum(k.hbm_bytes for k in kernels)
    hbm_cycles = hbm_bytes / hardware.hbm_bytes_per_cycle(chip)
    floor = sum(k.flops for k in kernels) / core.mxu_flops / core.per_device
    busiest = max(busy, key=lambda slot: busy[slot])
    return {
        **row,
        "cycles": cycles,
        "hbm_bytes": hbm_bytes,
        "hbm_cycles": hbm_cycles,
        "compare_cycles": max(cycles, hbm_cycles),
        "floor_cycles": floor,
        "efficiency": floor / max(cycles, hbm_cycles),
        "bound": "HBM" if hbm_cycles > cycles else busiest,
        "utilisation": {slot: busy[slot] / cycles for slot in SLOTS},
        "cores": min(w.cores for w in weighted),
        "spills": sum(w.spills for w in weighted),
        "vmem_bytes": max((n for name in chosen if (n := answer["vmem"][name]) is not None), default=None),
        "kernels": [asdict(w) for w in weighted],
        "not_counted": sorted(name for name in dumps if name not in chosen and name != "TLP"),
    }


def _the_one(prefix: str, names: Mapping[str, Any]) -> str:
    found = [name for name in names if name.startswith(prefix)]
    if len(found) != 1:
        raise ValueError(f"{prefix}: the program has the kernels {', '.join(names) or 'none'}, one was expected")
    return found[0]


def _utilisation_of(path: Path, name: str) -> Path:
    found = [
        p for p in path.parent.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-pre-delay_hlo.*\.txt", p.name)
    ]
    if len(found) != 1:
        raise ValueError(f"{name}: libtpu wrote {len(found)} utilisation files, one was expected")
    return found[0]
