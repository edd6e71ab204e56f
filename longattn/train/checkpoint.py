"""Checkpoints of a run: written in the background by orbax (its v1 API), the newest N and the best kept.

orbax writes into a temporary folder and renames it when complete, so a checkpoint is either whole or absent. Old
checkpoints are deleted only after the new one is in place. Beside each array stands its checksum: what a disk changed
later is found when it is read.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from orbax.checkpoint import v1 as ocp

from longattn.train.distributed import Lost
from longattn.train.step import Params, State

# orbax logs every save, and a traceback beside each exception that it raises. This file makes one line of them.
for _name in ("absl", "concurrent.futures"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", r"coroutine '(PyTreeHandler|Store)\._.*' was never awaited", RuntimeWarning)


def whole_steps(folder: Path) -> list[int]:
    """Returns the steps of the whole checkpoints under a folder, ascending."""
    return sorted(int(p.name) for p in _numbered(folder) if _whole(p))


def _numbered(folder: Path) -> list[Path]:
    """Returns the folders that have a step's name."""
    return [p for p in folder.iterdir() if p.name.isascii() and p.name.isdecimal()] if folder.is_dir() else []


def _whole(path: Path) -> bool:
    """Returns whether orbax wrote a folder: it adds the metadata last. Raises PermissionError if it may not be read."""
    try:
        with os.scandir(path) as entries:
            return any(fnmatch.fnmatch(entry.name, "_*METADATA*") for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False


def goes_on(folder: Path) -> str:
    """Returns how to go on after the loss of a process, for an error's one line."""
    whole = whole_steps(folder)
    begins = f"it goes on from step {whole[-1]}" if whole else "it begins anew, for no checkpoint was whole yet"
    return f"start again with the same command: {begins}"


def _quality(metrics: dict[str, float]) -> float:
    return -metrics["nll"] if math.isfinite(metrics["nll"]) else -math.inf


class Checkpoints:
    """The checkpoints under one folder. Use as a context manager: leaving it waits for the save in progress."""

    def __init__(self, folder: Path, keep: int = 1, *, read_only: bool = False):
        if read_only and not folder.is_dir():
            raise ValueError(f"{folder} has no checkpoints: it must be the folder of a run that saved at least once")
        self.folder = folder.absolute()
        if foreign := [p.name for p in _numbered(folder) if not _whole(p)]:
            raise ValueError(f"{folder / foreign[0]} is no checkpoint, but has the name of one: move it away")
        kept = ocp.training.preservation_policies
        newest = kept.LatestN(keep)
        best = kept.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=kept.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=not read_only,  # of a run that is being read, one may be a save in progress
        )
        self._saving: ocp.AsyncResponse[bool] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Lost):
            return  # a save in progress waits for a process that is gone
        try:
            with self._disk_errors():
                try:
                    self._finish()
                finally:
                    self._checkpointer.close()
        except OSError:
            if error is None:  # else a failed save would hide why the block was left
                raise

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def best(self) -> int | None:
        """Returns the step with the lowest finite validation loss; the newest where none was evaluated."""
        scored = [(c.metrics["nll"], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        scored = [(nll, step) for nll, step in scored if math.isfinite(nll)]
        return min(scored)[1] if scored else self.latest()

    def save(self, step: int, state: State, nll: float | None, lines: dict[str, int] | None = None) -> None:
        """Starts writing a state; `nll` is its validation loss if it was evaluated, `lines` its `record.mark`.

        Waits for the save before this one, and raises OSError if that one failed.
        """
        if jax.devices()[0].platform == "cpu":
            # orbax reads CPU buffers without copying, while the next step, to which they are donated, overwrites them.
            state = jax.tree.map(lambda a: a.copy(), state)
        items: dict[str, Any] = {"params": state.params, "rest": state._asdict() | {"params": None}}
        items |= {_sums(name): checksums(item) for name, item in items.items()}
        metrics = None if nll is None else {"nll": nll}
        with self._disk_errors():
            self._finish()  # else orbax would put this save's handlers under the save in progress
            # force: the trainer decides when to save; orbax's own policy skips a save while one is in progress.
            self._saving = self._checkpointer.save_checkpointables_async(
                step, items, metrics=metrics, force=True, custom_metadata={"lines": lines} if lines else None
            )

    def lines(self, step: int) -> dict[str, int] | None:
        """Returns the `record.mark` that was saved with a step; None for none, and where no such step is."""
        if step not in whole_steps(self.folder):
            return None
        return (self._metadata(step).custom_metadata or {}).get("lines")

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises OSError if it failed."""
        with self._disk_errors():
            self._finish()

    def poll(self) -> None:
        """Raises OSError if the save in progress has failed already; does not wait."""
        if not self._checkpointer.is_saving_in_progress():
            self.wait()

    def _finish(self) -> None:
        """Waits for the save in progress. Raises what it failed with, once: its response alone is sure to know."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, like: State) -> State | None:
        """Returns the newest state, or None where there is none.

        Args:
          like: shapes and dtypes of the state, as ShapeDtypeStructs. The state comes back with their shardings, or on
            one device where they have none, whatever mesh saved it.
        """
        step = self.latest()
        if step is None:
            return None
        saved = self._items(step)
        params = self._params(like.params, step, saved)
        rest = self._load(step, "rest", like._asdict() | {"params": None}, saved)
        return State(**{**rest, "params": params})

    def params(self, like: Params, step: int) -> Params:
        """Returns the parameters of one step. Raises ValueError naming the first one that differs from `like`."""
        return self._params(like, step, self._items(step))

    def _params(self, like: Params, step: int, saved: dict[str, Any]) -> Params:
        if not jax.tree.leaves(saved.get("params")):
            raise self._damaged(step, "its parameters cannot be read")
        check_same(saved["params"], like, f"the checkpoint {self.folder}/{step}")
        return self._load(step, "params", like, saved)

    def _items(self, step: int) -> dict[str, Any]:
        """Returns the shapes of what a checkpoint holds."""
        return self._metadata(step).metadata

    def _metadata(self, step: int) -> Any:
        try:
            return self._checkpointer.checkpointables_metadata(step)
        except Exception as error:
            raise self._unreadable(step, "metadata", error) from error

    def _load(self, step: int, name: str, like: Any, saved: dict[str, Any]) -> Any:
        """Returns an item of a checkpoint, compared with its checksums; those of earlier versions have none.

        saved: what `_items` returned.
        """
        wanted = {name: like}
        if _sums(name) in saved:
            wanted[_sums(name)] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.uint32), like)
        try:
            found = self._checkpointer.load_checkpointables(step, _placed(wanted))
        except (ValueError, OSError, LookupError) as error:  # whatever orbax raises for files that are gone or short
            raise self._unreadable(step, {"params": "parameters", "rest": "optimiser state"}[name], error) from error
        if _sums(name) in found:
            now, then = jax.device_get((checksums(found[name]), found[_sums(name)]))  # they lie on different devices
            for path, same in jax.tree_util.tree_flatten_with_path(jax.tree.map(np.equal, now, then))[0]:
                if not same:
                    raise self._damaged(step, f"{name}/{_path(path)} is not what was saved")
        return found[name]

    def _unreadable(self, step: int, what: str, error: BaseException) -> ValueError:
        """Returns the error for a part of a checkpoint at whose reading `error` was raised."""
        chain: list[BaseException] = [error]
        while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(before)
        if any(re.search(r"permission.denied", str(one), re.I) for one in chain):
            names = (one.filename for one in chain if isinstance(one, OSError) and one.filename)
            file = next(names, f"{self.folder}/{step}")
            return ValueError(f"the checkpoint {self.folder}/{step} may not be read: permission denied for {file}")
        return self._damaged(step, f"its {what} cannot be read")

    def _damaged(self, step: int, what: str) -> ValueError:
        others = [other for other in whole_steps(self.folder) if other != step]
        then = f"go on from step {others[-1]}" if others else "begin anew, for there is no other"
        return ValueError(f"the checkpoint {self.folder}/{step} is damaged: {what}; delete it to {then}")

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns whatever orbax raises for a failed write into one OSError that says what is still there."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(Exception):  # a save that was in progress may still become whole
                self._checkpointer.wait()
            whole = whole_steps(self.folder)
            good = (
                f"the last good checkpoint, step {whole[-1]}, is untouched"
                if whole
                else "no checkpoint is complete yet"
            )
            reason = "no space left on device" if "No space left" in str(error) else _first_line(error)
            raise OSError(
                f"cannot write a checkpoint under {self.folder}: {reason}; {good}; "
                "make room and start again with the same command"
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _sums(name: str) -> str:
    """Returns the name of the checksums of an item."""
    return f"{name}_checksums"


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def checksums(tree: Any) -> Any:
    """Returns the checksum of each array of a tree, uint32: the same however the array is spread over devices.

    It is a sum of one number per word of 32 bits or fewer. A word that changes changes its number, by its place too, so
    one that changed alone is always found, and more of them in all but one of some 2**32 cases.
    """

    def checksum(x: Array) -> Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}").astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(words.shape):
            place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        mixed = words * (2 * place + 1)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def _placed(tree: Any) -> Any:
    """Gives every ShapeDtypeStruct a sharding: without one orbax looks for the devices that saved the array."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one), tree)


def check_same(saved: Any, wanted: Any, source: str) -> None:
    """Raises ValueError naming the first path at which two trees of arrays differ in structure or shape."""

    def leaves(tree: Any) -> dict[str, tuple[int, ...]]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {_path(path): tuple(leaf.shape) for path, leaf in flat}

    have, want = leaves(saved), leaves(wanted)
    for path in sorted(have.keys() | want.keys()):
        if have.get(path) != want.get(path):
            old, new = (f"shape {list(t[path])}" if path in t else "nothing" for t in (have, want))
            raise ValueError(
                f"{source} is of another model: at {path} it holds {old}, this config's model {new}; "
                "give both the same model.* fields"
            )
