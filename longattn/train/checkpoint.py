"""Checkpoints of a run: written in the background by orbax, the newest N and the best kept.

orbax writes into a temporary folder and renames it when complete, so a checkpoint is either whole or absent; old ones
are deleted only after the new one is in place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from longattn.train.distributed import Lost
from longattn.train.step import Params, State

# orbax logs every save, and tracebacks beside each exception that it raises and this file turns into one line.
for _name in ("absl", "concurrent.futures"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def whole_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints under a folder, ascending."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def goes_on(folder: Path) -> str:
    """Where a run that lost a process goes on: the remedy, for an error's one line."""
    whole = whole_steps(folder)
    begins = f"it goes on from step {whole[-1]}" if whole else "it begins anew, for no checkpoint was whole yet"
    return f"start again with the same command: {begins}"


def _quality(metrics: dict[str, float]) -> float:
    return -metrics["nll"]


class Checkpoints:
    """The checkpoints under one folder. Use as a context manager: leaving it waits for the save in progress."""

    def __init__(self, folder: Path, keep: int = 1, *, read_only: bool = False):
        if read_only and not folder.is_dir():
            raise ValueError(f"{folder} has no checkpoints: it must be the folder of a run that saved at least once")
        self.folder = folder.absolute()
        newest = LatestN(keep)
        best = BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([newest, best]),
                best_fn=_quality,  # without it orbax does not store the metrics
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            ),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ("params", "rest")},
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Lost):
            return  # a save in progress waits for a process that is gone
        try:
            with self._disk_errors():
                self._manager.close()
        except OSError:
            if error is None:  # else a failed save would hide why the block was left
                raise

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest validation loss; the newest where none was evaluated."""
        scored = [(m["nll"], step) for step in self._manager.all_steps() if (m := self._manager.metrics(step))]
        return min(scored)[1] if scored else self.latest()

    def save(self, step: int, state: State, nll: float | None) -> None:
        """Start writing a state; `nll` is its validation loss if it was evaluated.

        Waits for the save before this one, and raises OSError if that one failed.
        """
        if jax.devices()[0].platform == "cpu":
            # orbax reads CPU buffers without copying, while the next step, to which they are donated, overwrites them.
            state = jax.tree.map(lambda a: a.copy(), state)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "rest": ocp.args.StandardSave(state._replace(params=None)._asdict()),
        }
        metrics = None if nll is None else {"nll": nll}
        with self._disk_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def wait(self) -> None:
        """Block until the save in progress is complete; raises OSError if it failed."""
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, like: State) -> State | None:
        """The newest state, or None where there is none.

        like: its shapes and dtypes as ShapeDtypeStructs; it comes back with their shardings, or on one device where
        they have none, whatever mesh saved it.
        """
        step = self.latest()
        if step is None:
            return None
        params = self.params(like.params, step)
        rest = _placed(like._replace(params=None)._asdict())
        rest = self._manager.restore(step, args=ocp.args.Composite(rest=ocp.args.StandardRestore(rest)))
        return State(**{**rest["rest"], "params": params})

    def params(self, like: Params, step: int) -> Params:
        """The parameters of one step. Raises ValueError naming the first parameter that differs from `like`."""
        check_same(self._manager.item_metadata(step)["params"], like, f"the checkpoint {self.folder}/{step}")
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_placed(like)))
        return self._manager.restore(step, args=args)["params"]

    def poll(self) -> None:
        """Raise OSError if the save in progress has failed already; does not wait."""
        with self._disk_errors():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns whatever orbax raises for a failed write into one OSError that says what is still there."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(Exception):  # a save that was in progress may still become whole
                self._manager.wait_until_finished()
            whole = whole_steps(self.folder)
            good = (
                f"the last good checkpoint, step {whole[-1]}, is untouched"
                if whole
                else "no checkpoint is complete yet"
            )
            reason = (
                "no space left on device" if "No space left" in str(error) else str(error).strip().split("\n")[0][:300]
            )
            raise OSError(
                f"cannot write a checkpoint under {self.folder}: {reason}; {good}; "
                "make room and start again with the same command"
            ) from error


def _placed(tree: Any) -> Any:
    """ShapeDtypeStructs that all say where they lie: else orbax looks for the devices that saved them."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), tree)


def check_same(saved: Any, wanted: Any, source: str) -> None:
    """Raise ValueError naming the first path at which two trees of arrays differ in structure or shape."""

    def leaves(tree: Any) -> dict[str, tuple[int, ...]]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in flat}

    have, want = leaves(saved), leaves(wanted)
    for path in sorted(have.keys() | want.keys()):
        if have.get(path) != want.get(path):
            old, new = (f"shape {list(t[path])}" if path in t else "nothing" for t in (have, want))
            raise ValueError(
                f"{source} is of another model: at {path} it holds {old}, this config's model {new}; "
                "give both the same model.* fields"
            )
