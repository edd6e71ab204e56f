"""Trains from a config to a finished run folder. The main path reads downwards."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console

from longattn.config import Config, to_json
from longattn.cost import flops, hardware
from longattn.models.context import Context
from longattn.train import data, distributed, kernel_check, record
from longattn.train.checkpoint import Checkpoints, goes_on, whole_steps
from longattn.train.compilation import compile_program, compile_step
from longattn.train.evaluate import evaluation_config, initial_params, run_evaluation
from longattn.train.step import (
    State,
    all_finite,
    batch_shapes,
    context_of,
    eval_step,
    init_state,
    on_mesh,
    state_shapes,
)


@dataclass(frozen=True)
class Summary:
    """How a run ended. The scores are those of its last evaluation."""

    run_dir: Path
    status: Literal["finished", "already finished", "stopped"]  # stopped: by SIGTERM, after saving
    steps: int  # number of steps done
    nll: float | None  # nats per weighted token
    bits: float | None  # `nll` in bits: bits per byte for ByteLM
    accuracy: float | None  # share of weighted tokens predicted exactly
    history: list[dict[str, Any]]  # the records of metrics.jsonl


def train(config: Config, *, resume: bool = True, quiet: bool = False, console: Console | None = None) -> Summary:
    """Trains as the config says. A started run continues from its newest checkpoint, whatever mesh saved it.

    With several processes (see distributed.py) each calls this with the same config. The mesh covers the devices of all
    of them, and the run folder is on a file system they share. Process 0 writes and prints; SIGTERM to any stops all.

    Raises, before anything is written and on all processes:
      ValueError: the folder holds another run, the data cannot be read, the mesh has another number of devices, or the
        step does not fit in memory.

    Raises while training:
      FloatingPointError: the loss, its validation, the parameters or the moments are no longer finite.
        `kernel_check.Disagreement`, a subclass: a kernel that never ran on this kind of chip is wrong.
      OSError: the disk is full.
      distributed.Lost: another process is gone.
    """
    console = console or Console(stderr=True, quiet=quiet or not distributed.first())
    folder = Path(config.run.dir, config.run.name)
    remedy = functools.partial(goes_on, folder / "checkpoints")
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.detect_loss(remedy))
        # A single process may simply die until it has something to save; one of several must not desert the others.
        stop = stack.enter_context(distributed.sigterm()) if jax.process_count() > 1 else None
        with distributed.consensus() as facts:
            started = record.check_folder(folder, config, resume=resume)
            saved = whole_steps(folder / "checkpoints")
            facts |= {"config": json.loads(to_json(config))["config"], "run": {"steps saved": saved}}
            finished = started and saved and saved[-1] >= config.run.steps
            if not finished:
                job = _prepare(config, folder, console, started, facts)
        if finished:
            console.print(
                f"{folder} is finished: {saved[-1]} steps; choose another --run.name to train again", markup=False
            )
            return _summary(folder, config, "already finished", saved[-1], record.finished_history(folder, saved[-1]))

        with distributed.consensus():
            stack.enter_context(record.claim(folder, config))
            kernels = kernel_check.check(config, job.context, console)
        with distributed.consensus() as facts:
            facts["run folder"] = {"is there": (folder / "config.json").exists()}
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.run.keep))
        # Entered a second time: closing the checkpoints waits for the other processes too.
        stack.enter_context(distributed.detect_loss(remedy))
        state = _initial_state(config, folder, job, checkpoints, console)
        start, mesh = int(state.step), _described(job.context)
        ideal = ideal_seconds(config, job.sources["train"].lengths)
        recorder = stack.enter_context(
            record.Recorder(
                folder,
                config,
                console,
                start=start,
                ideal_seconds=ideal,
                info=job.info,
                kernels=kernels,
                mesh=mesh,
                lines=checkpoints.lines(start),
            )
        )
        with distributed.consensus():
            kernel_check.insist(kernels)
        stop_all = distributed.SharedEvent(stop or stack.enter_context(distributed.sigterm()))
        done = _loop(config, state, job, checkpoints, recorder, stop_all)
        checkpoints.wait()
        status = "finished" if done == config.run.steps else "stopped"
        return _summary(folder, config, status, done, recorder.history)


class _Job(NamedTuple):
    """Data, shapes and compiled programs of a run."""

    context: Context | None
    sources: dict[str, Any]  # by split
    info: dict[str, Any]  # `Source.info` by split
    shapes: State
    loaded: Any  # parameters of `run.init_from` for a new run, else None
    step_fn: Any
    eval_fn: Any


def _prepare(config: Config, folder: Path, console: Console, started: bool, facts: dict[str, Any]) -> _Job:
    """Reads the data and compiles both programs; writes nothing. `facts` gains what all processes must agree on."""
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
    warmup, steps = config.optimiser.warmup, config.run.steps
    if warmup >= steps:
        console.print(
            f"the learning rate never reaches its peak: warmup={warmup} of {steps} steps", highlight=False, markup=False
        )
    size = sum(a.size for a in jax.tree.leaves(shapes.params))
    where = "" if context is None else f" on {context.described()}"
    console.print(
        f"compiling {size:,} parameters at B={config.data.B}, T={config.data.T}{where}", highlight=False, markup=False
    )
    step_fn = compile_step(config, shapes, context)
    eval_fn = compile_program(evaluation, eval_step(evaluation, context), shapes.params, batch_shapes(evaluation))
    return _Job(context, sources, info, shapes, loaded, step_fn, eval_fn)


def _initial_state(config: Config, folder: Path, job: _Job, checkpoints: Checkpoints, console: Console) -> State:
    """Restores the newest checkpoint; without one, initialises the state from the seed or `run.init_from`."""
    state = checkpoints.restore(job.shapes)
    if state is None:
        state = init_state(config, config.run.seed, job.context)
        if config.run.init_from:
            state = state._replace(params=job.loaded or initial_params(config, job.context))
        return state
    where = ""
    if record.read_config(folder).mesh != config.mesh:
        where = f" on {_described(job.context) or 'one device'}; it began on another mesh, whose sums round otherwise"
    _note(console, f"continuing {folder} after step {int(state.step)}{where}")
    return state


def _note(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)  # a folder's name may hold brackets


def _described(context: Context | None) -> str | None:
    return None if context is None else context.described()


def _loop(
    config: Config, state: State, job: _Job, checkpoints: Checkpoints, recorder: record.Recorder,
    stop: distributed.SharedEvent,
) -> int:  # fmt: skip
    """Trains until the last step or SIGTERM, and returns the number of steps done."""
    run = config.run
    start = step = int(state.step)
    profiler = record.Profiler(Path(run.dir, run.name, "profile"), run.profile if distributed.first() else None)
    batches = iter(data.loader(job.sources["train"], start))
    pending: Any = None  # (step, its metrics on the device, seconds waited for its batch)
    clock, waited = time.perf_counter(), 0.0  # when the step before was done; seconds waited for batches since

    def settle() -> dict[str, float]:
        """Waits for the metrics of the pending step and returns them. Refuses to go on unless they are finite."""
        nonlocal clock, waited
        step, metrics, wait = pending
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        # Since the step before, the host waited for the next step's batch; this one's wait came earlier.
        recorder.time(max(now - clock - waited, 0.0) + wait, wait)
        clock, waited = now, 0.0
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise _diverged(config, step, f"loss={metrics['loss']}, grad_norm={metrics['grad_norm']}", checkpoints)
        return metrics

    stopping = False
    while step < run.steps and not stopping:
        profiler.before(step + 1, state)
        asked = time.perf_counter()
        _, batch = next(batches)
        wait = time.perf_counter() - asked
        waited += wait
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = job.step_fn(state, batch)
        # Fetched one step late, with the next step already dispatched, so that the device never waits for the host.
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
            # A state is saved only once it and its loss are known to be finite and its line is on disk (see record.py).
            settled, pending, valid = settle(), None, None
            if not all_finite(state):
                raise _diverged(config, step, "the update left parameters or moments not finite", checkpoints)
            if evaluate_now:
                count = run.eval_batches * config.optimiser.accumulate  # evaluation batches are micro-batches
                valid = run_evaluation(config, job.eval_fn, state.params, job.sources["valid"], count)
                if not math.isfinite(valid["nll"]):
                    raise _diverged(config, step, f"nll={valid['nll']} on the validation data", checkpoints)
            if evaluate_now or step % run.log_every == 0:
                recorder.write(step, settled, valid)
            checkpoints.save(step, state, valid["nll"] if valid else None, recorder.settle())
            recorder.pause(time.perf_counter() - clock)
            clock = time.perf_counter()
        elif step % run.log_every == 0:
            checkpoints.poll()
    profiler.close()
    return step


def _diverged(config: Config, step: int, what: str, checkpoints: Checkpoints) -> FloatingPointError:
    c, good = config.optimiser, checkpoints.latest()
    remedy = f"lower --optimiser.lr={c.lr} or raise --optimiser.warmup={c.warmup}"
    if c.eps == 0:
        remedy = "raise --optimiser.eps=0.0: a parameter that no gradient reached is divided by its root mean square, 0"
    saved = f"the last good checkpoint is step {good}" if good else "no checkpoint was saved yet"
    return FloatingPointError(f"step {step}: {what}; stopped; {saved}; {remedy}")


def ideal_seconds(config: Config, documents: Mapping[int, float]) -> float | None:
    """Returns the seconds of one step at the devices' peak rate, or None where the peak is not known.

    Counts model FLOPs: attention over the visible pairs of its mask and the packed `documents` (as in
    `flops.step_flops`), and no rematerialisation.
    """
    peak = hardware.detect().peak_flops
    if not peak:
        return None
    return flops.step_flops(config, documents) / (peak * config.mesh.size)


def _summary(folder: Path, config: Config, status: Any, steps: int, history: list[dict[str, Any]]) -> Summary:
    valid = next((r["valid"] for r in reversed(history) if "valid" in r), None)
    nll = valid and valid["nll"]
    return Summary(folder, status, steps, nll, nll and nll / math.log(2), valid and valid["accuracy"], history)
