"""Profiles one kernel case on one TPU chip: libtpu compiles it in a process of its own; its schedule is weighted.

The cycles leave out waits for DMA, bank conflicts of VMEM, instruction fetch, clocks, and the XLA operations around the
kernel (which are named). The row also has the cycles in which HBM moves the kernel's bytes: compare the larger of the
two. Nothing here has run on a TPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from longattn import cache
from longattn.aot import compilers
from longattn.aot.kernels.bundles import SLOTS, along, parse, weigh
from longattn.aot.kernels.cases import CASES, Kernel, Shape
from longattn.aot.kernels.rates import small
from longattn.cost import hardware

_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization).*"
)
_DUMPED = re.compile(r"\d+-(?P<name>[^<].*)-\d+-packed-bundles-post-ra\.txt")
_KERNEL = re.compile(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def program(case: str, chip: str, shape: Shape) -> jax.stages.Lowered:
    """Lowers a case for one device of a chip, in a process with `compilers.tpu_environment()`."""
    core = hardware.TENSOR_CORES[chip]
    topology = topologies.get_topology_desc(topology_name=core.topology, platform="tpu")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for the chip
        fn, arrays = CASES[case].build(shape)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
        return jax.jit(fn).trace(*arrays).lower()


def compile_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a case in this process, whose environment sets libtpu's flags; returns the VMEM bytes of each kernel."""
    text = program(request["case"], request["chip"], Shape.from_json(request["shape"])).compile().as_text()
    # Attributes may contain line breaks: an instruction ends where the next "%name =" begins.
    kernels = {m[1]: text[m.end() : _end(text, m.end())] for m in _KERNEL.finditer(text)}
    vmem = {name: _VMEM.search(rest) for name, rest in kernels.items()}
    return {"vmem": {name: int(m[1]) if m else None for name, m in vmem.items()}}


def _end(text: str, start: int) -> int:
    following = re.compile(r"^ *(ROOT )?%\S+ = ", re.MULTILINE).search(text, start)
    return following.start() if following else len(text)


def profile(case: str, chip: str, shape: Shape, timeout: float = 300) -> dict[str, Any]:
    """Returns one row of the table: a case on one JAX device of `chip`, or the `reason` why there is no number.

    Answers are cached on disk.
    """
    row: dict[str, Any] = {"case": case, "chip": chip, **shape.as_json()}
    if (module := CASES[case].module) and importlib.util.find_spec(module) is None:
        return {**row, "reason": f'{module} is not installed: pip install "longattn[peers]"'}
    try:
        kernels = CASES[case].kernels(shape)
    except NotImplementedError as error:
        return {**row, "reason": str(error)}
    rates = None
    if any(branch.data for kernel in kernels for branch in kernel.branches):
        request = {"case": case, "shape": small(shape).as_json()}
        measured = remembered(
            {**versions(case), **request},
            lambda: compilers.call(
                "longattn.aot.kernels.rates:measure_here", request, {"JAX_PLATFORMS": "cpu"}, timeout
            ),
        )
        if "reason" in measured:
            return {**row, "reason": f"its rates of branches are not known: {measured['reason']}"}
        rates = measured["rates"]
    key = {**versions(case), **row, "libtpu": compilers.libtpu_version(), "rates": rates}
    return {**row, **remembered(key, lambda: _compile(case, chip, shape, kernels, rates, timeout))}


def cache_folder() -> Path:
    """Returns the folder of cached answers."""
    return cache.folder("static")


def remembered(key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the cached answer for `key`, else makes and caches it."""
    return cache.remembered(cache_folder(), key, make)[0]


def versions(case: str) -> dict[str, str]:
    """Returns what an answer about `case` depends on beside its shape: versions of packages, and our sources."""
    versions = {"jax": jax.__version__, "sources": _sources(not CASES[case].module)}
    if module := CASES[case].module:
        versions[module] = importlib.metadata.version(module.replace("_", "-"))
    return versions


@functools.cache
def _sources(ours: bool) -> str:
    """Hashes the sources that decide what is compiled and how it is counted; for `ours` also those of the kernels."""
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    counting = [here / f"{name}.py" for name in ("bundles", "tpu", "rates")]
    formulas = [root / "mask.py", *(root / "cost" / f"{name}.py" for name in ("flops", "pairs", "hardware"))]
    kernels = [*(here / "cases").rglob("*.py"), *((root / "ops").rglob("*.py") if ours else ())]
    kernels = [path for path in kernels if path.name != "tuned.py"]  # cases name their block sizes themselves
    return cache.sources([*counting, *formulas, *kernels])


def _compile(
    case: str, chip: str, shape: Shape, kernels: Sequence[Kernel], rates: Mapping[str, float] | None, timeout: float
) -> dict[str, Any]:
    core = hardware.TENSOR_CORES[chip]
    with tempfile.TemporaryDirectory(prefix="longattn_static_") as name:
        folder = Path(name)
        request = {"case": case, "chip": chip, "shape": shape.as_json()}
        environment = compilers.tpu_environment(_FLAGS.format(folder=folder / "dump"))
        answer = compilers.call("longattn.aot.kernels.tpu:compile_here", request, environment, timeout)
        if "reason" in answer:
            return {"reason": " ".join(answer["reason"].split())[:500]}
        try:
            dumps = _dumped(folder / "dump")
            scheduled = [name for name in answer["vmem"] if name in dumps]
            chosen = [_only(kernel.name, scheduled) for kernel in kernels]
            schedules = [
                parse(dumps[name].read_text(), _utilisation_of(dumps[name], name).read_text()) for name in chosen
            ]
            weighted = [weigh(s, kernel, core.per_device, rates) for s, kernel in zip(schedules, kernels)]
            if case != "matmul" and shape.H % max(w.cores for w in weighted):
                raise ValueError(f"H={shape.H} heads are not divided evenly over the cores: choose an even number")
        except ValueError as error:
            return {"reason": str(error)}
    cycles = sum(w.cycles for w in weighted)
    after = sum(k.after_bytes for k in kernels) / hardware.hbm_bytes_per_cycle(chip)
    busy = {slot: sum(w.busy[slot] for w in weighted) for slot in SLOTS}
    hbm_bytes = sum(k.hbm_bytes for k in kernels)
    hbm_cycles = hbm_bytes / hardware.hbm_bytes_per_cycle(chip)
    floor = sum(k.flops for k in kernels) / core.mxu_flops / core.per_device
    busiest = max(busy, key=lambda slot: busy[slot])
    return {
        "cycles": cycles,
        "cycles_worst": sum(w.cycles_worst for w in weighted),
        "rates": rates,
        "hbm_bytes": hbm_bytes,
        "hbm_cycles": hbm_cycles,
        "after_cycles": after,
        "compare_cycles": max(cycles, hbm_cycles) + after,
        "floor_cycles": floor,
        "efficiency": floor / (max(cycles, hbm_cycles) + after),
        "bound": "HBM" if hbm_cycles > cycles else busiest,
        "utilisation": {slot: busy[slot] / cycles for slot in SLOTS},
        "cores": min(w.cores for w in weighted),
        "spills": sum(w.spills for w in weighted),
        "vmem_bytes": max((n for name in chosen if (n := answer["vmem"][name]) is not None), default=None),
        "kernels": [{**asdict(w), "along": along(s, w)} for s, w in zip(schedules, weighted)],
        "not_counted": sorted(name for name in dumps if name not in chosen and name != "TLP"),
    }


def _dumped(folder: Path) -> dict[str, Path]:
    """Returns the files of libtpu's schedules by kernel."""
    found = {m["name"]: path for path in sorted(folder.glob("*")) if (m := _DUMPED.fullmatch(path.name))}
    found = {name: path for name, path in found.items() if not name.endswith("schedule-analysis")}
    if not found:
        raise ValueError("libtpu wrote no schedule: this version is not known")
    return found


def _only(prefix: str, names: Sequence[str]) -> str:
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
