"""Compiles the project's training step for a machine that is not attached, and reads the program.

`facts` runs in the calling process; `compile_step` runs in its child, which has the machine's compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from longattn import cache as caches
from longattn.aot import buffers, compilers, hlo
from longattn.aot.schedule import Rates, Totals, backward, bound, softmax, walk
from longattn.config import Config, from_json, to_json
from longattn.cost import flops, step, topology
from longattn.cost.collective import axes_of
from longattn.cost.topology import Topology
from longattn.models.context import Context
from longattn.parallel import mesh as meshes
from longattn.train.step import batch_shapes, batch_sharding, context_of, state_shapes, train_step


def cache_folder() -> Path:
    """Returns the folder that keeps the facts of compiled programs."""
    return caches.folder("plan")


def facts(config: Config, where: Topology, timeout: float, cache: Path | None = None) -> dict[str, Any]:
    """Returns the answer of `compile_step`, or {"reason": why there is no program}.

    Args:
      config: the model, its data, mesh and optimiser; the mesh has as many devices as `where`.
      where: the machine.
      timeout: seconds for the compiler.
      cache: a folder of earlier answers by the hash of the lowered program; None keeps nothing.

    Raises:
      ValueError: the machine's compiler is not installed.
    """
    request = {"config": to_json(config), "topology": where.name, "cache": None if cache is None else str(cache)}
    return compilers.call("longattn.aot.train_step:compile_step", request, compilers.environment_of(where), timeout)


def accounts(config: Config, where: Topology, timeout: float, cache: Path | None = None) -> dict[str, Any]:
    """Returns most of `facts` in a fraction of the time, without compiling kernels. For several TPUs.

    The step gets one more argument, which fills the device's memory: the compiler schedules the program, assigns its
    buffers, and then refuses it. The argument's bytes are subtracted again. FLOPs and messages equal those of `facts`;
    schedule and memory almost do, because the compiler still sees that memory is short.

    Raises:
      ValueError: the mesh has one device, the machine has GPUs, or its compiler is not installed.
    """
    if where.is_gpu or config.mesh.size == 1:
        raise ValueError(f"accounts are of TPUs, several of them: compile for {where.name} as a whole")
    request = {
        "config": to_json(config), "topology": where.name, "cache": None if cache is None else str(cache), "fill": True,
    }  # fmt: skip
    return compilers.call("longattn.aot.train_step:compile_step", request, compilers.environment_of(where), timeout)


def compile_step(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a training step; returns memory, collectives, FLOPs and a lower bound on its time for one device.

    If the compiler refuses the program for its memory, the answer has `fits` false and the memory, but no time.
    """
    config, where = from_json(request["config"]), topology.parse(request["topology"])
    devices = compilers.devices_of(where)
    context, state, batch = _arguments(config, devices)
    began = time.perf_counter()
    function: Any = train_step(config, context)
    arguments: tuple[Any, ...] = state, batch
    filled = 0
    if request.get("fill"):
        assert context is not None  # accounts are of several devices
        fill = filler(where, context.mesh)
        plain, arguments, filled = function, (state, batch, fill), fill.shape[1] * fill.dtype.itemsize
        function = jax.jit(lambda state, batch, fill: plain(state, batch), donate_argnums=0, keep_unused=True)
    with _target(where, context, devices):
        lowered = function.trace(*arguments).lower()

    def compiled() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="longattn_plan_") as name:
            answer = _compiled(lowered, config, where, context and context.mesh, state, Path(name), filled)
        return answer | {"compile_seconds": time.perf_counter() - began}

    if not request["cache"]:
        return compiled() | {"cached": False}
    here = Path(__file__).parent
    counting_code = [*here.glob("*.py"), *(here.parent / "cost").rglob("*.py")]
    key = {
        "topology": where.name,
        "compiler": _compiler(where),
        "jax": jax.__version__,
        "sources": caches.sources(counting_code),
        "program": hashlib.sha256(lowered.as_text(debug_info=True).encode()).hexdigest(),
    }
    answer, cached = caches.remembered(Path(request["cache"]), key, compiled)
    return answer | {"cached": cached}


def _compiler(where: Topology) -> str:
    return json.dumps(compilers.cuda_versions()) if where.is_gpu else compilers.libtpu_version()


def _arguments(config: Config, devices: list[Any]) -> tuple[Context | None, Any, Any]:
    """Returns the context, and the sharded shapes of state and batch."""
    c = config.mesh
    if c.size == 1:
        alone = SingleDeviceSharding(devices[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone)
        return None, jax.tree.map(place, state_shapes(config)), jax.tree.map(place, batch_shapes(config))
    context = context_of(config, devices)
    assert context is not None  # the mesh has several devices
    sharding = batch_sharding(config, context)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch_shapes(config))
    return context, state_shapes(config, context), batch


@contextlib.contextmanager
def _target(where: Topology, context: Context | None, devices: list[Any]) -> Iterator[None]:
    """Makes back ends and kernels choose for the machine, not for this process's own device."""
    mesh = None if context is None else context.mesh
    if mesh is None:
        mesh = meshes.make_mesh(devices=devices[:1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        if where.is_gpu:  # Mosaic asks the default device
            stack.enter_context(jax.default_device(devices[0]))
        yield


def filler(where: Topology, mesh: Any) -> jax.ShapeDtypeStruct:
    """Returns an argument that fills the memory of every device, so that no program with it fits."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((where.size, where.hbm_bytes // 4), np.float32, sharding=sharding)


def compiled_text(lowered: Any, folder: Path, *, filled: bool) -> tuple[Any, str, str | None]:
    """Returns the compiled program or None, its scheduled text, and the reason of a refusal or None.

    XLA writes its dump into `folder`, also for a program that it refuses as too large: it schedules first.
    """
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    if (
        filled
    ):  # keep XLA from saving memory, by rematerialising values and delaying transfers, only because of the filler
        options["xla_tpu_rematerialization_min_size_in_bytes"] = str(2**60)
        options["xla_tpu_scheduler_percent_shared_memory_limit"] = "1000"
    try:
        compiled = lowered.compile(compiler_options=options)
        return compiled, compiled.as_text(), None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        return None, buffers.read(folder, ".txt"), " ".join(str(error).split("\n")[0].split())


def _compiled(
    lowered: Any, config: Config, where: Topology, mesh: Mesh | None, state: Any, folder: Path, filled: int
) -> dict[str, Any]:
    compiled, text, refused = compiled_text(lowered, folder, filled=filled > 0)
    program = hlo.parse(text)
    needed, alive = buffers.account(folder, program, _weights(state))
    if filled:
        needed, alive, refused = needed - filled, [b for b in alive if b.name != "fill"], None
    answer: dict[str, Any] = {
        "fits": refused is None and needed <= where.hbm_bytes,
        "refused": refused,
        "hbm_bytes": needed,
        "hbm_limit": where.hbm_bytes,
        "instructions": sum(len(c.instructions) for c in program.computations.values()),
        "by_kind": buffers.by_kind(alive),
        "buffers": [vars(b) for b in alive[:40]],
    }
    if filled:
        return answer | _time(program, config, where, mesh)
    if refused is None:
        stats = compiled.memory_analysis()
        answer |= {
            "argument_bytes": stats.argument_size_in_bytes,
            "output_bytes": stats.output_size_in_bytes,
            "aliased_bytes": stats.alias_size_in_bytes,
            "temporary_bytes": needed - stats.argument_size_in_bytes,
            "code_bytes": stats.generated_code_size_in_bytes,
            "host_bytes": stats.host_temp_size_in_bytes,
            **_time(program, config, where, mesh),
        }
    return answer


def _weights(state: Any) -> Iterator[tuple[int, ...]]:
    """Yields the shapes in which matrices appear: sharded, and gathered, but never gathered for all layers at once."""
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        stacked = re.search(meshes.STACKED, jax.tree_util.keystr(path, simple=True, separator="/"))
        local = x.sharding.shard_shape(x.shape)
        yield local
        yield x.shape[1:] if stacked else x.shape
        if stacked:
            yield local[1:]


def published_rates(where: Topology, mesh: Mesh | None) -> Rates:
    """Returns the published peak rates of a device; `mesh` is None for a program on one device."""
    torus = None if mesh is None else where.torus(mesh.devices.flat)
    return Rates(
        where.peak_flops, where.hbm_bandwidth, where.link_bandwidth, where.network_bandwidth, where.node, torus
    )


def _time(program: hlo.Program, config: Config, where: Topology, mesh: Mesh | None) -> dict[str, Any]:
    """Returns FLOPs, bytes, collectives and the lower bound on the step's time."""
    rates = published_rates(where, mesh)
    # Loops of softmax attention run as often as the mask needs, which the program does not say: a formula counts them.
    # Loops of linear attention have known lengths, and its kernels state their FLOPs.
    totals = walk(program, rates)
    passes = {backward(scope) for scope in totals.unknown if softmax(scope)}
    by_formula = {p: f for p, f in zip((False, True), step.attention_flops(config)) if p in passes}
    attention = sum(by_formula.values())
    totals = bound(program, rates, totals, {p: f / rates.flops for p, f in by_formula.items()})
    host = totals.host_bytes / where.host_bandwidth  # both directions in turn: nothing returns before all is there
    seconds = max(totals.seconds + attention / rates.flops, host)
    model = flops.step_flops(config) / where.size
    return {
        "flops": totals.flops + attention,
        "attention_flops_by_formula": attention,
        "linear_attention_flops": totals.linear,
        "model_flops": model,
        "hbm_traffic": totals.hbm_bytes,
        "host_traffic": totals.host_bytes,
        "seconds": {
            "bound": seconds,
            "compute": totals.compute + attention / rates.flops,
            "exposed": totals.exposed,
            "products": (totals.flops + attention) / rates.flops,
            "hbm": totals.hbm_bytes / rates.hbm,
            "host": host,
        },
        "mfu_bound": model / rates.flops / seconds,
        "collectives": collectives(totals, rates, mesh),
        "not_counted": sorted(scope for scope in totals.unknown if not softmax(scope)),
        "collectives_missing": totals.missing,
    }


def collectives(totals: Totals, rates: Rates, mesh: Mesh | None) -> list[dict[str, Any]]:
    """Returns a row per kind of collective and scope, most bytes first."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    times = rates.times(what for what, _ in totals.collectives)
    for (what, asynchronous), runs in totals.collectives.items():
        axes = axes_of(what.pairs, mesh.shape) if mesh is not None and what.pairs else what.axes
        key = (what.kind, len(what.group), axes, buffers.short(what.scope), asynchronous)
        row = rows.setdefault(
            key,
            {
                "kind": what.kind, "devices": len(what.group), "axes": axes, "scope": key[3],
                "asynchronous": asynchronous, "runs": 0.0, "beside_attention": 0.0, "bytes": 0.0,
                "exposed_seconds": 0.0, "seconds": 0.0,
            },
        )  # fmt: skip
        row["runs"] += runs
        row["beside_attention"] += totals.beside[what, asynchronous]
        row["bytes"] += runs * what.bytes
        row["seconds"] += runs * float(times[what].max())
        row["exposed_seconds"] += totals.waits[what, asynchronous]
    return sorted(rows.values(), key=lambda row: -row["bytes"])
