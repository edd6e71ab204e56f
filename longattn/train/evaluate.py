"""Evaluates a run on held-out data, and loads its parameters."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longattn.config import ByteLM, Config, Mesh, to_json
from longattn.models.context import Context
from longattn.train import data, distributed, record
from longattn.train.checkpoint import Checkpoints
from longattn.train.compilation import compile_program
from longattn.train.step import Params, batch_shapes, context_of, eval_step, on_mesh, state_shapes

EVALUATION_VERSION = 1


def run_evaluation(config: Config, step_fn: Any, params: Params, source: Any, batches: int) -> dict[str, Any]:
    """Returns the scores of `step_fn` (a `step.eval_step`) over the first `batches` batches of a source (0: all).

    Keys: `nll` (nats per weighted token), `accuracy`, `tokens` (sum of the weights), `by_position` (see
    `record.by_position`), and for ByteLM `bits_per_byte`. The result is deterministic.
    """
    count = min(batches or source.num_batches, source.num_batches)
    parts = jax.device_get([step_fn(params, source.batch(i)) for i in range(count)])
    sums = {k: np.sum([np.asarray(p[k], np.float64) for p in parts], axis=0) for k in parts[0]}
    tokens = max(1.0, float(sums["weight_sum"]))
    nll = float(sums["nll_sum"]) / tokens
    bits = {"bits_per_byte": nll / math.log(2)} if isinstance(config.data, ByteLM) else {}
    positions = record.by_position(sums["nll_by_position"], sums["weight_by_position"])
    return {
        "nll": nll,
        **bits,
        "accuracy": float(sums["correct_sum"]) / tokens,
        "tokens": tokens,
        "by_position": positions,
    }


def evaluation_config(config: Config) -> Config:
    """Returns the config with batches as large as one micro-batch of its training."""
    rows = config.data.B // config.optimiser.accumulate
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, B=rows),
        optimiser=dataclasses.replace(config.optimiser, accumulate=1),
    )


def load_params(run_dir: str | Path, *, newest: bool = False) -> tuple[Config, Params]:
    """Loads a run's config and the parameters of its best (or newest) checkpoint."""
    config = record.read_config(Path(run_dir))
    return config, restore_params(Path(run_dir), config, newest=newest)[0]


def restore_params(
    folder: Path, config: Config, *, newest: bool = False, context: Context | None = None
) -> tuple[Params, int]:
    """Restores the parameters of a run's best (or newest) checkpoint, on one device or the context's mesh.

    Returns the parameters and the checkpoint's step. Raises ValueError if there is no checkpoint of this model.
    """
    before = None
    while True:
        with Checkpoints(folder / "checkpoints", read_only=True) as saved:
            step = saved.latest() if newest else saved.best()
            if step is None:
                raise ValueError(f"{folder} has no complete checkpoint yet; let it train to its first save")
            try:
                return saved.params(state_shapes(config, context).params, step), step
            except ValueError:
                if step == before:
                    raise
        before = step  # the run that is training may have replaced it: choose again


def initial_params(config: Config, context: Context | None = None) -> Params:
    """Loads the best parameters of the run that `run.init_from` names. Raises ValueError if its model differs."""
    folder = Path(config.run.init_from)
    if not folder.is_dir():
        folder = Path(config.run.dir, config.run.init_from)
    record.read_config(folder)
    return restore_params(folder, config, context=context)[0]


def evaluate(
    run_dir: str | Path,
    *,
    T: int | None = None,
    B: int | None = None,
    glob: str | None = None,
    overlap: int | None = None,
    batches: int = 0,
    newest: bool = False,
    mesh: Mesh = Mesh(),
) -> dict[str, Any]:
    """Evaluates a run's best checkpoint on its held-out data, optionally at another length or on other files.

    Runs on one device, or on `mesh`, whatever mesh trained the model; several processes call it as they call `train`.

    Args:
      overlap: for ByteLM, how many bytes each piece of a long file repeats from the piece before, without loss. They
        give its first predictions a context.
      batches: 0 is the whole held-out set, for ByteLM with the bits per byte of `xz -9` beside it.

    Raises:
      ValueError: an option does not apply, the run has no checkpoint, or the mesh has another number of devices.
      distributed.Lost: another process is gone.
    """
    if batches < 0:
        raise ValueError(f"{batches=} must not be negative; 0 is the whole held-out set")
    given = {"T": T, "B": B, "glob": glob, "overlap": overlap}
    with distributed.detect_loss(lambda: "start again with the same command"):
        with distributed.consensus() as facts:
            config, params, step, step_fn, source = _prepare(Path(run_dir), given, newest, mesh)
            facts |= {"config": json.loads(to_json(config))["config"], "checkpoint": {"step": step}}
            facts["data"] = source.info
        result = run_evaluation(config, step_fn, params, source, batches)
    if isinstance(config.data, ByteLM) and not batches:
        result["xz"] = xz_bits_per_byte(source.source if isinstance(source, data.Spread) else source)
    return {
        "version": EVALUATION_VERSION,
        "run": str(run_dir),
        "step": step,
        "T": config.data.T,
        **result,
        "data": source.info,
    }


def _prepare(folder: Path, given: dict[str, Any], newest: bool, mesh: Mesh) -> tuple[Config, Params, int, Any, Any]:
    """Returns the config with the `given` values, the parameters, their step, the compiled evaluation and its data."""
    config = record.read_config(folder)
    known = {f.name for f in dataclasses.fields(config.data)}
    for name in given.keys() - known:
        if given[name] is not None:
            raise ValueError(
                f"{name}={given[name]!r} does not apply to {type(config.data).__name__} data; leave it out"
            )
    changed: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if given["glob"] is not None and isinstance(config.data, ByteLM):
        changed["valid"] = 1.0  # the run did not train on these files: all are held out
    config = evaluation_config(config)
    config = dataclasses.replace(config, mesh=mesh, data=dataclasses.replace(config.data, **changed))
    context = context_of(config)
    source: Any = data.source(config.data, seed=config.run.seed, split="valid")
    if context is not None:
        source = on_mesh(source, config, context)
    params, step = restore_params(folder, config, newest=newest, context=context)
    shapes = state_shapes(config, context).params
    step_fn = compile_program(config, eval_step(config, context), shapes, batch_shapes(config))
    return config, params, step, step_fn, source


def xz_bits_per_byte(source: Any) -> dict[str, float]:
    """Returns the bits per byte that `xz -9` needs for a source's documents, one by one and concatenated."""
    texts = [source.corpus.read(d) for d in source.documents]
    size = sum(map(len, texts))
    return {
        "per_file": 8 * sum(len(lzma.compress(t, preset=9)) for t in texts) / size,
        "concatenated": 8 * len(lzma.compress(b"".join(texts), preset=9)) / size,
    }
