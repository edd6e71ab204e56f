"""Trains the study's small models: several seeds side by side in one program, steps fixed in advance so that
numbers repeat.
"""

from __future__ import annotations

import concurrent.futures
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longattn.analysis.study.work import Clock
from longattn.config import Config
from longattn.train import data
from longattn.train.step import State, eval_step, init_state, train_step


@dataclass(frozen=True)
class Learned:
    """Models of one config, stacked along a leading axis of seeds."""

    config: Config
    params: Any
    seeds: tuple[int, ...]
    steps: int  # taken; fewer than config.run.steps where the budget ended
    loss: np.ndarray  # [steps, seeds] training loss, nats per weighted token

    @property
    def note(self) -> str:
        return (
            ""
            if self.steps == self.config.run.steps
            else f"stopped by its budget at step {self.steps} of {self.config.run.steps}"
        )


def _start(config: Config, seed: Any, spread: bool) -> State:
    state = init_state(config, seed)
    if spread:
        # Rows of the embedding start with RMS 1 instead of 0.5 / sqrt(E), so that the first blocks' outputs do not
        # drown the tokens that recall has to compare, and logits with deviation 2 instead of 0.5: MQAR is then
        # learned in about 100 steps, else in more than 500.
        state.params["embedding"] = state.params["embedding"] * (2 * math.sqrt(config.model.E))
        state.params["head"] = state.params["head"] * 4
    return state


def learn(config: Config, seeds: tuple[int, ...], clock: Clock, *, spread: bool = False) -> Learned:
    """Train one model per seed (of parameters and data) for `config.run.steps`, or until the clock is over."""
    sources = [data.source(config.data, seed=seed, split="train") for seed in seeds]

    def batch(step: int) -> data.Batch:
        return jax.tree.map(lambda *rows: np.stack(rows), *(source.batch(step) for source in sources))

    state = jax.jit(jax.vmap(lambda seed: _start(config, seed, spread)))(jnp.array(seeds, jnp.uint32))
    step = jax.jit(jax.vmap(train_step(config)), donate_argnums=0)
    losses: list[Any] = []
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        following = reader.submit(batch, 0)
        for i in range(config.run.steps):
            now, following = following.result(), reader.submit(batch, i + 1)
            state, metrics = step(state, now)
            losses.append(metrics["loss"])
            if i % 5 == 4:
                jax.block_until_ready(state.step)
                clock.report((i + 1) / config.run.steps)
                if clock.over:
                    break
    loss = np.array(jax.device_get(losses))
    if not np.isfinite(loss).all():
        raise FloatingPointError(
            f"{config.data} with {config.model.mixers}: loss is not finite after {len(loss)} steps"
        )
    return Learned(config, state.params, seeds, len(losses), loss)


def score(model: Learned, batches: int) -> dict[str, np.ndarray]:
    """`eval_step`'s sums over the first held-out batches (at most one pass), with a leading axis of seeds."""
    source = data.source(model.config.data, seed=0, split="valid")
    step = jax.jit(jax.vmap(eval_step(model.config), in_axes=(0, None)))
    sums = [step(model.params, source.batch(i)) for i in range(min(batches, source.num_batches))]
    return jax.tree.map(lambda *parts: np.sum(np.stack(parts), 0, dtype=np.float64), *map(jax.device_get, sums))
