"""Tests of longattn.train.checkpoint apart from a run: what it keeps, and checkpoints of orbax's earlier API."""

import dataclasses
import errno
import functools
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest

from longattn.config import ByteLM, Config, Model, Optimiser, Run
from longattn.train.checkpoint import Checkpoints, whole_steps
from longattn.train.step import State, init_state

CONFIG = Config(
    model=Model(N=1, E=16, F=24, H=2, K=1, D=8, W=257, dtype="float32"),
    data=ByteLM(T=11, B=4),
    optimiser=Optimiser(lr=1e-2, warmup=3, loss_chunk=7),
    run=Run(steps=10),
)


@functools.cache
def state() -> State:
    return init_state(CONFIG, 0)


def shapes() -> State:
    return jax.eval_shape(lambda s: s, state())


def same(a: State, b: State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_checkpoints_of_the_earlier_api_are_restored(tmp_path: Path) -> None:
    """Runs before orbax's v1 API were saved by its CheckpointManager; a run goes on in their folder."""
    s = state()
    items = {"params": s.params, "rest": s._replace(params=None)._asdict()}
    with orbax.CheckpointManager(
        tmp_path,
        options=orbax.CheckpointManagerOptions(best_fn=lambda metrics: -metrics["nll"]),
        item_handlers={name: orbax.StandardCheckpointHandler() for name in items},
    ) as manager:
        for step, nll in ((2, 1.0), (4, 3.0), (6, None)):
            args = orbax.args.Composite(**{name: orbax.args.StandardSave(item) for name, item in items.items()})
            manager.save(step, args=args, metrics=nll and {"nll": nll})
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)
        same(checkpoints.restore(shapes()), s)
        checkpoints.save(8, s, None)
    assert whole_steps(tmp_path) == [2, 8]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(shapes()) is None
        for step, nll in ((1, 5.0), (2, 1.0), (3, 4.0), (4, None), (5, 3.0)):
            checkpoints.save(step, state(), nll)
            checkpoints.poll()
    assert whole_steps(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
        same(state()._replace(params=checkpoints.params(shapes().params, 2)), state())
        other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, F=32))
        with pytest.raises(ValueError, match="is of another model"):
            checkpoints.params(jax.eval_shape(lambda: init_state(other, 0)).params, 2)


def _poll_for_a_minute(checkpoints: Checkpoints) -> None:
    for _ in range(600):
        checkpoints.poll()
        time.sleep(0.1)


def test_a_failure_in_the_background_is_found_without_waiting(tmp_path: Path, monkeypatch) -> None:
    def full(self, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), None)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(orbax.CheckpointManager, "_finalize_checkpoint", full)
            checkpoints.save(2, state(), None)
            with pytest.raises(OSError, match="no space left on device"):
                _poll_for_a_minute(checkpoints)
