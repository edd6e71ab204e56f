"""Trains the study's small models, one per seed; the number of steps is fixed in advance so that numbers repeat."""

from __future__ import annotations

import concurrent.futures
import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from longattn.config import Config
from longattn.study.store import STOPPED
from longattn.study.units import Clock
from longattn.train import data
from longattn.train.step import State, eval_step, init_state, train_step


@dataclass(frozen=True)
class Learned:
    """Models of one config, one per seed."""

    config: Config
    params: tuple[Any, ...]
    seeds: tuple[int, ...]
    steps: int  # steps of the shortest training: fewer than config.run.steps if the budget ended
    loss: tuple[float, ...]  # loss at each model's last step, nats per weighted token

    @property
    def note(self) -> str:
        if self.steps == self.config.run.steps:
            return ""
        return f"{STOPPED} at step {self.steps} of {self.config.run.steps}"


def learn(config: Config, seeds: tuple[int, ...], clock: Clock) -> Learned:
    """Trains one model per seed (of parameters and data) for `config.run.steps`, or until its share of the time ends.

    Raises FloatingPointError if a loss is not finite.
    """
    params, losses, steps = [], [], config.run.steps
    for i, seed in enumerate(seeds):
        left = (clock.deadline - time.monotonic()) / (len(seeds) - i)
        end = time.monotonic() + left
        state, loss, taken = _train(
            config, init_state(config, seed), seed, end, steps, lambda f, i=i: clock.report((i + f) / len(seeds))
        )
        steps = min(steps, taken)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of {config.model.mixers} on {config.data} is {loss} at step {taken}")
        params.append(state.params)
        losses.append(loss)
    return Learned(config, tuple(params), seeds, steps, tuple(losses))


def _train(config: Config, state: State, seed: int, end: float, steps: int, report: Any) -> tuple[State, float, int]:
    """Returns the state, loss and number of steps of one training. A thread makes batches while the device computes."""
    source, step = data.source(config.data, seed=seed, split="train"), train_step(config)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        following = reader.submit(source.batch, 0)
        for i in range(steps):
            batch, following = following.result(), reader.submit(source.batch, i + 1)
            state, metrics = step(state, batch)
            if i % 5 == 4:
                jax.block_until_ready(metrics)
                report((i + 1) / steps)
                if time.monotonic() > end:
                    break
    return state, float(metrics["loss"]), i + 1


def score(model: Learned, batches: int) -> dict[str, np.ndarray]:
    """Returns `eval_step`'s sums over the first held-out batches (at most one pass), with a leading axis of seeds."""
    source = data.source(model.config.data, seed=0, split="valid")
    held_out = [source.batch(i) for i in range(min(batches, source.num_batches))]
    return evaluate(model, held_out)


def evaluate(model: Learned, held_out: list[data.Batch]) -> dict[str, np.ndarray]:
    """Returns `eval_step`'s sums over some batches, with a leading axis of seeds."""
    step = eval_step(model.config)
    sums = []
    for params in model.params:
        parts = [jax.device_get(step(params, batch)) for batch in held_out]
        sums.append(jax.tree.map(lambda *p: np.sum(np.stack(p), 0, dtype=np.float64), *parts))
    return jax.tree.map(lambda *s: np.stack(s), *sums)
