"""Training from a config to a finished run folder, read downwards."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console

from longattn.config import Config, to_json
from longattn.models.context import Context
from longattn.train import data, distributed, kernel_check, record
from longattn.train.checkpoint import Checkpoints, goes_on, whole_steps
from longattn.train.evaluate import evaluation_config, initial_params, run_evaluation
from longattn.train.step import (
    State,
    batch_shapes,
    context_of,
    eval_step,
    init_state,
    on_mesh,
    state_shapes,
    train_step,
)


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_dir: Path
    status: Literal["finished", "already finished", "stopped"]  # stopped: by SIGTERM, after saving
    steps: int  # done
    nll: float | None  # of the last evaluation, nats per weighted token
    bits: float | None  # the same in bits: bits per byte for ByteLM
    accuracy: float | None  # share of weighted tokens predicted exactly
    history: list[dict[str, Any]]  # the records of metrics.jsonl


def train(config: Config, *, resume: bool = True, quiet: bool = False, console: Console | None = None) -> Summary:
    """Train as the config says, continuing from the run folder's newest checkpoint, whatever mesh saved it.

    Of several processes (see distributed.py) each calls it with the same config, the first writes and speaks, and a
    SIGTERM to any stops all; the mesh must be of all their devices, the run's folder on a file system they share.

    Raises ValueError for a folder that holds another run, data that cannot be read, a mesh of another number of devices
    or a step that does not fit in memory, all before anything is written, and on all processes where one refuses;
    FloatingPointError when the loss is no longer finite, of the class `bringup.Disagreement` when kernels are wrong
    that never ran on such a chip; OSError when the disk is full; distributed.Lost when another process is gone.
    """
    console = console or Console(stderr=True, quiet=quiet or not distributed.first())
    folder = Path(config.run.dir, config.run.name)
    remedy = functools.partial(goes_on, folder / "checkpoints")
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.others(remedy))
        # Until it has something to save one process ends at once. Of several, none may leave the others.
        stop = stack.enter_context(_sigterm()) if jax.process_count() > 1 else None
        with distributed.together() as facts:
            started = record.check_folder(folder, config, resume=resume)
            steps = whole_steps(folder / "checkpoints")
            facts |= {"config": json.loads(to_json(config))["config"], "run": {"steps saved": steps}}
            finished = started and steps and steps[-1] >= config.run.steps
            if not finished:
                job = _prepare(config, folder, console, started, facts)
        if finished:
            console.print(f"{folder} is finished: {steps[-1]} steps; choose another --run.name to train again")
            return _summary(folder, config, "already finished", steps[-1], record.history(folder))

        with distributed.together():
            stack.enter_context(record.claim(folder, config))
            kernels = kernel_check.check(config, job.context, console)
        with distributed.together() as facts:
            facts["run folder"] = {"is there": (folder / "config.json").exists()}
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.run.keep))
        stack.enter_context(distributed.others(remedy))  # once more: leaving the checkpoints depends on it
        state = checkpoints.restore(job.shapes)
        if state is None:
            state = init_state(config, config.run.seed, job.context)
            if config.run.init_from:
                state = state._replace(params=job.loaded or initial_params(config, job.context))
        start = int(state.step)
        mesh = None if job.context is None else job.context.described()
        if start:
            moved = record.read_config(folder).mesh != config.mesh
            what = f" on {mesh or 'one device'}; it began on another mesh, whose sums round otherwise" if moved else ""
            console.print(f"continuing {folder} after step {start}{what}", highlight=False)
        ideal = ideal_seconds(config, job.sources["train"].lengths)
        recorder = stack.enter_context(
            record.Recorder(
                folder, config, console, start=start, ideal_seconds=ideal, info=job.info, kernels=kernels, mesh=mesh
            )
        )
        with distributed.together():
            kernel_check.insist(kernels)
        agreed = distributed.Agreed(stop or stack.enter_context(_sigterm()))
        done = _loop(config, state, job.step_fn, job.eval_fn, job.sources, checkpoints, recorder, agreed)
        checkpoints.wait()
        status = "finished" if done == config.run.steps else "stopped"
        return _summary(folder, config, status, done, recorder.history)


class _Job(NamedTuple):
    """What is read and compiled before anything is written."""

    context: Context | None
    sources: dict[str, Any]  # by split
    info: dict[str, Any]  # of the sources
    shapes: State
    loaded: Any  # the parameters of run.init_from, where a new run begins with them
    step_fn: Any
    eval_fn: Any


def _prepare(config: Config, folder: Path, console: Console, started: bool, facts: dict[str, Any]) -> _Job:
    if config.run.tensorboard:
        record.scalar_writer()
    context = context_of(config)
    evaluation = evaluation_config(config)
    groups = config.mesh.data * config.mesh.fsdp * config.optimiser.accumulate
    sources: dict[str, Any] = {
        "train": data.source(config.data, seed=config.run.seed, split="train", groups=groups),
        "valid": data.source(evaluation.data, seed=config.run.seed, split="valid"),
    }
    facts["data"] = info = {split: source.info for split, source in sources.items()}
    if context is not None:
        for split, c in (("train", config), ("valid", evaluation)):
            sources[split] = on_mesh(sources[split], c, context)
    record.check_data(folder, info)
    shapes = state_shapes(config, context)
    loaded = initial_params(config, context) if config.run.init_from and not started else None
    size = sum(a.size for a in jax.tree.leaves(shapes.params))
    where = "" if context is None else f" on {context.described()}"
    console.print(f"compiling {size:,} parameters at B={config.data.B}, T={config.data.T}{where}", highlight=False)
    step_fn = compile_step(config, shapes, context)
    eval_fn = record.compile_program(
        evaluation, eval_step(evaluation, context), shapes.params, batch_shapes(evaluation)
    )
    return _Job(context, sources, info, shapes, loaded, step_fn, eval_fn)


def _loop(
    config: Config,
    state: State,
    step_fn: Any,
    eval_fn: Any,
    sources: dict[str, Any],
    checkpoints: Checkpoints,
    recorder: record.Recorder,
    stop: distributed.Agreed,
) -> int:
    """Trains until the last step or a SIGTERM; returns the number of steps done."""
    run = config.run
    start = step = int(state.step)
    profiler = record.Profiler(Path(run.dir, run.name, "profile"), run.profile if distributed.first() else None)
    batches = iter(data.loader(sources["train"], start))
    pending: Any = None  # (step, its metrics on the device, seconds waited for its batch)
    clock = time.perf_counter()

    def settle() -> dict[str, float]:
        """Wait for the pending step's metrics; refuse to go on unless they are finite."""
        nonlocal clock
        at, metrics, wait = pending
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        recorder.time(now - clock, wait)
        clock = now
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            good = checkpoints.latest()
            raise FloatingPointError(
                f"step {at}: loss={metrics['loss']}, grad_norm={metrics['grad_norm']}; stopped; "
                + (f"the last good checkpoint is step {good}" if good else "no checkpoint was saved yet")
                + f"; lower --optimiser.lr={config.optimiser.lr} or raise --optimiser.warmup={config.optimiser.warmup}"
            )
        return metrics

    stopping = False
    while step < run.steps and not stopping:
        profiler.before(step + 1, state)
        asked = time.perf_counter()
        _, batch = next(batches)
        wait = time.perf_counter() - asked
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = step_fn(state, batch)
        # The metrics of step n-1 are fetched after step n is dispatched, so that the device never waits for the host.
        if pending is not None:
            settled = settle()
            if step % run.log_every == 0:
                recorder.write(step, settled)
        step += 1
        pending = (step, metrics, wait)
        profiler.after(step, state)

        last, stopping = step == run.steps, stop.poll()
        evaluate_now = last or (run.eval_every and step % run.eval_every == 0)
        if evaluate_now or step % run.save_every == 0 or stopping:
            # Only a state whose loss was seen finite is saved, and only after its line is on disk (see record.py).
            settled, pending, valid = settle(), None, None
            if evaluate_now:
                count = run.eval_batches * config.optimiser.accumulate  # batches of as many rows as a micro-batch
                valid = run_evaluation(config, eval_fn, state.params, sources["valid"], count)
            if evaluate_now or step % run.log_every == 0:
                recorder.write(step, settled, valid)
            checkpoints.save(step, state, valid["nll"] if valid else None)
            clock = time.perf_counter()
        elif step % run.log_every == 0:
            checkpoints.poll()
    profiler.close()
    return step


def compile_step(config: Config, shapes: State, context: Context | None = None) -> Any:
    """The training step compiled ahead of time. Raises ValueError if it needs more memory than there is."""

    def held_by_a_device(a: Any) -> int:
        return math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize

    held = sum(map(held_by_a_device, jax.tree.leaves(shapes)))
    itemsize = np.dtype(config.model.dtype).itemsize
    # Even full rematerialisation keeps each layer's input: refuse before tracing what would take hours to compile.
    mesh = config.mesh
    tokens = config.data.B * config.data.T // config.optimiser.accumulate // (mesh.data * mesh.fsdp * mesh.P)
    record.refuse_beyond_memory(config, held + tokens * config.model.E * itemsize * (config.model.N + 1))
    return record.compile_program(config, train_step(config, context), shapes, batch_shapes(config))


def ideal_seconds(config: Config, documents: Mapping[int, float]) -> float | None:
    """Seconds of one step at the devices' peak rate; None where the peak is not known.

    Model FLOPs: attention counts the pairs that its mask and the packed `documents` (as for `cost.step_flops`) show,
    recomputation is not counted.
    """
    from longattn.cost import flops, hardware

    peak = hardware.detect().peak_flops
    if not peak:
        return None
    return flops.step_flops(config, documents) / (peak * config.mesh.size)


def _summary(folder: Path, config: Config, status: Any, steps: int, history: list[dict[str, Any]]) -> Summary:
    valid = next((r["valid"] for r in reversed(history) if "valid" in r), None)
    nll = valid and valid["nll"]
    return Summary(folder, status, steps, nll, nll and nll / math.log(2), valid and valid["accuracy"], history)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop saves before it ends. Only the main thread may listen to signals."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python
