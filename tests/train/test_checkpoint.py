"""Tests of longattn.train.checkpoint apart from a run: what it keeps, and checkpoints of orbax's earlier API."""

import dataclasses
import errno
import functools
import os
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longattn.config import ByteLM, Config, Model, Optimiser, Run
from longattn.train.checkpoint import Checkpoints, checksums, whole_steps
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


# ---- damage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_any_word_that_changes_alone_changes_the_checksum(dtype: str) -> None:
    x = np.asarray(jax.random.bits(jax.random.key(0), (3, 5, 7), "uint32") % 2**20).astype(dtype)
    kept = checksums(x)
    size, rng = x.dtype.itemsize, np.random.default_rng(0)
    for _ in range(30):
        changed = bytearray(x.tobytes())
        place, bit = rng.integers(x.size), 0 if dtype == "bool" else rng.integers(8 * size)
        changed[place * size + bit // 8] ^= 1 << (bit % 8)
        assert checksums(np.frombuffer(changed, x.dtype).reshape(x.shape)) != kept
    assert checksums(np.roll(x, 1, axis=2)) != kept or dtype == "bool"  # also by place


def test_a_checksum_is_of_the_array_and_not_of_its_pieces() -> None:
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (P("a", "b"), P("b"), P(None, "b"), P()):
        assert checksums(jax.device_put(x, NamedSharding(mesh, spec))) == checksums(x)


def _largest(folder: Path, item: str) -> Path:
    return max((p for p in (folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a bit": lambda folder: _flip(_largest(folder, "params/ocdbt.process_0")),
    "half a file": lambda folder: os.truncate(_largest(folder, "params/ocdbt.process_0"), 5000),
    "no file": lambda folder: _largest(folder, "params/d").unlink(),
    "no metadata": lambda folder: (folder / "params" / "_METADATA").unlink(),
    "half of the metadata": lambda folder: os.truncate(folder / "rest" / "_METADATA", 900),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_says_how_to_go_on(kind: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(28, state(), None)
        checkpoints.save(30, state(), None)
    DAMAGE[kind](tmp_path / "30")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as found:
        checkpoints.restore(shapes())
    said = re.fullmatch(
        rf"the checkpoint {tmp_path}/30 is damaged: (.*); delete it to go on from step 28", str(found.value)
    )
    assert said, found.value
    assert re.fullmatch(r"params/\S+ is not what was saved|its (parameters|optimiser state) cannot be read", said[1])
    shutil.rmtree(tmp_path / "30")
    with Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore(shapes()), state())


def test_a_changed_value_is_named_with_its_array(tmp_path: Path, monkeypatch) -> None:
    """A disk that changes what compression does not notice."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(30, state(), None)
    with Checkpoints(tmp_path) as checkpoints:
        load = checkpoints._checkpointer.load_checkpointables

        def changed(step, wanted):
            found = load(step, wanted)
            if "params" in found:
                found["params"]["layer_0"]["mlp"]["up"] = found["params"]["layer_0"]["mlp"]["up"].at[3, 5].add(1e-6)
            return found

        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", changed)
        remedy = "delete it to begin anew, for there is no other"
        with pytest.raises(ValueError, match=f"params/layer_0/mlp/up is not what was saved; {remedy}"):
            checkpoints.restore(shapes())


def test_the_best_was_evaluated_and_finite(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, nll in ((1, 2.0), (2, float("nan")), (3, 3.0)):
            checkpoints.save(step, state(), nll, {"count": step, "crc32": 7})
        checkpoints.wait()
        assert checkpoints.best() == 1
        assert checkpoints.lines(3) == {"count": 3, "crc32": 7}
        assert checkpoints.lines(2) is None  # it is not kept
    assert whole_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EACCES, "Permission denied", "/x/d"), ValueError("PERMISSION_DENIED: Error opening")],
)
def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch, error: Exception) -> None:
    """By Python, and by the words of TensorStore."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(30, state(), None)

    def closed(*_: object) -> None:
        raise ValueError("cannot restore") from error

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", closed)
        with pytest.raises(ValueError, match=f"the checkpoint {tmp_path}/30 may not be read: permission denied for /"):
            checkpoints.restore(shapes())


def test_a_folder_that_may_not_be_read_is_no_foreign_one(tmp_path: Path, monkeypatch) -> None:
    def scandir(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "30").mkdir()
    monkeypatch.setattr("longattn.train.checkpoint.os.scandir", scandir)
    with pytest.raises(PermissionError, match="Permission denied: .*/30"):
        whole_steps(tmp_path)
