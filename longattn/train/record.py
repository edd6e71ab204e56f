"""Writes the record of a run: config.json, env.json, metrics.jsonl and a line per logged step on the terminal.

metrics.jsonl holds one JSON object per logged step. A step's line is on disk before its checkpoint is begun, and a
restart drops the lines after the restored step. So each step appears once, however often the run was killed. A
checkpoint keeps the number and a checksum of the lines before it, so a restart finds a file that others changed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import statistics
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from longattn.config import Config, from_json, to_json
from longattn.environment import environment, peak_memory
from longattn.files import json_object, json_text, locked, read_object, read_text, write_whole

# Fields of `Run` that do not change what is computed: a run may continue with other values, as on another mesh.
_FREE = ("name", "dir", "log_every", "save_every", "keep", "profile", "tensorboard")


# ---- the folder


def read_config(folder: Path) -> Config:
    """Reads the config of a run folder. Raises ValueError if it is missing or was written by another version."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run: it has no config.json; give the folder that `longattn train` wrote")
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; train again under another --run.name") from error


def check_folder(folder: Path, config: Config, *, resume: bool) -> bool:
    """Returns whether `folder` already holds this run; writes nothing. Raises ValueError if it holds anything else."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise ValueError(f"{there} is no folder; choose another --run.{'name' if there == folder else 'dir'}")
    if not (folder / "config.json").exists():
        if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            raise ValueError(f"{folder} holds a run without its config.json; choose another --run.name")
        _insist_on_writing(there)
        return False
    saved = read_config(folder)
    if not resume:
        raise ValueError(f"{folder} already holds a run and resume=False; choose another --run.name")
    have, want = (json.loads(to_json(c))["config"] for c in (saved, config))
    have["mesh"] = want["mesh"]
    for name in _FREE:
        have["run"][name] = want["run"][name]
    if (difference := first_difference(have, want)) is not None:
        path, old, new = difference
        raise ValueError(f"{folder} was trained with {path}={old}, now {new}; choose another --run.name to keep both")
    history(folder)
    _insist_on_writing(there)
    return True


def _insist_on_writing(folder: Path) -> None:
    """Raises ValueError unless a folder can be made in `folder`: permissions do not tell for every file system."""
    try:
        with tempfile.TemporaryDirectory(prefix=".longattn-", dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}); choose another --run.dir") from error


def check_data(folder: Path, info: dict[str, Any]) -> None:
    """Raises ValueError if the files changed that a started run was reading."""
    before = _starts(folder)["data"]
    for split in info.keys() & before.keys():
        old, new = (d[split].get("corpus_sha256") for d in (before, info))
        if old != new:
            raise ValueError(
                f"the corpus changed since {folder} was started (sha256 {str(old)[:12]}, now {str(new)[:12]}); "
                "restore the files or choose another --run.name"
            )


def _starts(folder: Path) -> dict[str, Any]:
    """Returns the contents of env.json: "starts", a list, and "data", by split. Both are empty for a new run."""
    path, remedy = folder / "env.json", "move it away to go on without the record of earlier starts"
    if not path.exists():
        return {"starts": [], "data": {}}
    found = read_object(path, remedy, starts=list, data=dict)
    for split, facts in found["data"].items():
        if not isinstance(facts, dict):
            raise ValueError(f"{path} is damaged: its data {split!r} must be a JSON object; {remedy}")
    return found


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first field at which two JSON values differ (dotted path and both values), or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        inner = [(f"{path}.{k}".strip("."), a.get(k), b.get(k)) for k in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        inner = [(f"{path}.{i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (path, a, b)
    return next((d for p, x, y in inner if (d := first_difference(x, y, p)) is not None), None)


@contextlib.contextmanager
def claim(folder: Path, config: Config) -> Iterator[None]:
    """Locks a run folder and writes its config.json; of several processes, process 0 does so.

    The operating system releases the lock however the process ends.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"another process is training in {folder}; stop it or choose another --run.name"):
        # Another process may have begun a run here since `check_folder`, and ended.
        if not check_folder(folder, config, resume=True):
            write_whole(folder / "config.json", to_json(config) + "\n")
        yield


# ---- metrics


def by_position(nll: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    """Returns the mean loss (nats) by the number of tokens read before: 1, 2, 3-4, 5-8, ... (`from` to `to`)."""
    T, low, groups = len(nll), 1, []
    while low <= T:
        high = min(T, 1 << (low - 1).bit_length())
        total = float(weight[low - 1 : high].sum())
        if total > 0:
            groups.append({"from": low, "to": high, "nll": float(nll[low - 1 : high].sum()) / total, "weight": total})
        low = high + 1
    return groups


def history(folder: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """Reads the records of metrics.jsonl up to and including step `until`; drops a torn last line.

    Raises ValueError, which names the line, for one that no run wrote there.
    """
    path, remedy = folder / "metrics.jsonl", "put the file back, or delete it to go on without it"
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    lines = read_text(path, remedy).splitlines()
    for i, line in enumerate(lines, start=1):
        where = f"{path}, line {i},"
        try:
            record = json_object(line, where, remedy, step=int, loss=float)
        except ValueError:
            if i < len(lines):
                raise
            break  # a kill tore it
        if records and record["step"] <= records[-1]["step"]:
            raise ValueError(f"{where} is damaged: step {record['step']} after step {records[-1]['step']}; {remedy}")
        records.append(record)
    return [record for record in records if record["step"] <= until]


def finished_history(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Reads the records of a finished run. Raises ValueError if they do not end with its last step, `steps`."""
    records = history(folder)
    if not records or records[-1]["step"] < steps:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} was changed: it lacks the line of step {steps}, the last one; put it back"
        )
    return records


def mark(records: list[dict[str, Any]]) -> dict[str, int]:
    """Returns the number of these records and the checksum of their lines."""
    return {"count": len(records), "crc32": zlib.crc32("".join(map(_text, records)).encode())}


def _text(record: dict[str, Any]) -> str:
    return json_text(record) + "\n"


def insist_on_lines(folder: Path, records: list[dict[str, Any]], step: int, saved: dict[str, int] | None) -> None:
    """Raises ValueError if metrics.jsonl lacks lines up to `step`, or has other ones than when the step was saved.

    Args:
      records: what it holds up to that step.
      saved: the `mark` in the checkpoint; None in those of earlier versions.
    """
    path = folder / "metrics.jsonl"
    if saved is None or mark(records) == saved or not path.exists():
        return
    what = f"holds {len(records)} of {saved['count']} lines" if len(records) != saved["count"] else "has other lines"
    raise ValueError(
        f"{path} was changed: up to the checkpoint of step {step} it {what} that were written; put it back, or delete "
        "it to go on without them"
    )


class Recorder:
    """Writes metrics.jsonl and env.json and prints one line per record. Use as a context manager.

    Of several processes, process 0 writes and prints; the others keep the same history.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        console: Console,
        *,
        start: int,
        ideal_seconds: float | None,
        info: dict[str, Any],
        kernels: dict[str, Any] | None = None,
        mesh: str | None = None,
        lines: dict[str, int] | None = None,
    ):
        """Continues after step `start`.

        Args:
          ideal_seconds: seconds of a step at the devices' peak rate, for the MFU; None if unknown.
          info: `Source.info` by split.
          kernels: result of `kernel_check.check` before this start.
          mesh: the devices in words.
          lines: `mark` of the lines before the checkpoint that was restored.

        Raises:
          ValueError: metrics.jsonl is not what it was when the checkpoint was saved.
        """
        self.config, self.console, self.ideal_seconds = config, console, ideal_seconds
        self.history = history(folder, start)
        insist_on_lines(folder, self.history, start, lines)
        if lines and not (folder / "metrics.jsonl").exists():
            console.print(f"metrics.jsonl is gone: it begins anew after step {start}", highlight=False)
        self.file = self.board = None
        if jax.process_index() == 0:
            write_whole(folder / "metrics.jsonl", "".join(map(_text, self.history)))
            self._write_environment(folder, start, info, {"kernels": kernels, "mesh": mesh})
            self.file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115  (closed in __exit__)
            self.board = scalar_writer()(str(folder / "tensorboard")) if config.run.tensorboard else None
        self.seconds: list[float] = []  # wall-clock of each step since the last record
        self.waits: list[float] = []
        self.steps = 0  # steps taken since this start
        self.paused = 0.0  # seconds of saves and evaluations since this start

    def _write_environment(self, folder: Path, start: int, info: dict[str, Any], notes: dict[str, Any]) -> None:
        path = folder / "env.json"
        starts = _starts(folder)["starts"]
        now = environment(info)
        notes = {name: note for name, note in notes.items() if note is not None}
        starts.append({"step": start, **{k: now[k] for k in ("time", "command", "commit", "device")}, **notes})
        write_whole(path, json_text({**now, "starts": starts}, indent=2) + "\n")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def time(self, seconds: float, wait: float) -> None:
        """Notes the wall-clock of a step, and how much of it was spent waiting for its batch."""
        self.seconds.append(seconds)
        self.waits.append(wait)
        self.steps += 1

    def pause(self, seconds: float) -> None:
        """Notes the time that a save or an evaluation took: no step's, but it counts for when the run will end."""
        self.paused += seconds

    def settle(self) -> dict[str, int]:
        """Waits until the lines are on disk, and returns their `mark` for the checkpoint that comes after them."""
        if self.file:
            os.fsync(self.file.fileno())
        return mark(self.history)

    def write(self, step: int, metrics: dict[str, float], valid: dict[str, Any] | None = None) -> None:
        """Writes a line of metrics.jsonl and prints one on the terminal."""
        data = self.config.data
        record: dict[str, Any] = {"step": step, **metrics}
        if self.seconds:
            middle, total = statistics.median(self.seconds), sum(self.seconds)
            low, high = np.percentile(self.seconds, [10, 90])
            record |= {
                "tokens_per_second_per_device": data.B * data.T * len(self.seconds) / (total * self.config.mesh.size),
                "step_seconds": middle,
                "step_spread": float(high - low) / middle,  # 10th to 90th percentile, as a share of the median
                "data_wait": sum(self.waits) / total,
                "mfu": None if self.ideal_seconds is None else self.ideal_seconds / middle,
                "eta_seconds": (self.config.run.steps - step) * (total / len(self.seconds) + self.paused / self.steps),
            }
        record["peak_memory_bytes"] = peak_memory()
        if valid is not None:
            record["valid"] = valid
        self.history.append(record)
        self.seconds, self.waits = [], []
        if self.file is None:
            return
        self.file.write(_text(record))
        self.file.flush()
        self.console.print(line(record, self.config), soft_wrap=True, highlight=False)
        if self.board:
            for name, value in _scalars(record):
                self.board.add_scalar(name, value, step)


def line(record: dict[str, Any], config: Config) -> str:
    """Formats one record as a line of rich markup."""
    width = len(str(config.run.steps))
    parts = [f"[bold]step {record['step']:>{width}}/{config.run.steps}[/]", f"loss [bold cyan]{record['loss']:.4f}[/]"]
    if "valid" in record:
        valid = record["valid"]
        bits = (
            f", {valid['bits_per_byte']:.4f} bits/byte"
            if "bits_per_byte" in valid
            else f", accuracy {valid['accuracy']:.1%}"
        )
        parts.append(f"[bold green]valid {valid['nll']:.4f}{bits}[/]")
    if "step_seconds" in record:
        rate = record["tokens_per_second_per_device"]
        parts.append(f"{rate / 1000:.1f}k tok/s" if rate >= 1000 else f"{rate:.0f} tok/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"step {record['step_seconds'] * 1000:.0f} ms ±{record['step_spread'] / 2:.0%}")
        parts.append(f"data {record['data_wait']:.1%}")
    parts.append(f"grad {record['grad_norm']:.2f}")
    parts.append(f"{record['peak_memory_bytes'] / 2**30:.2f} GiB")
    if "eta_seconds" in record:
        parts.append(f"ETA {datetime.timedelta(seconds=round(record['eta_seconds']))}")
    return " [dim]·[/] ".join(parts)


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name == "valid":
            yield from ((f"valid/{k}", v) for k, v in value.items() if isinstance(v, float))
        elif name != "step" and value is not None:
            yield f"train/{name}", value


def scalar_writer() -> Any:
    """Returns the class that writes TensorBoard scalars. Raises ValueError with the remedy if it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "run.tensorboard=True needs tensorboardX: pip install tensorboardX, or leave it off (metrics.jsonl has all)"
        ) from error
    return SummaryWriter


class Profiler:
    """Traces the steps first .. first + count - 1 with jax.profiler, where `window` is (first, count)."""

    def __init__(self, folder: Path, window: tuple[int, int] | None):
        self.folder, self.window, self.running = folder, window, False

    def before(self, step: int, state: Any) -> None:
        if self.window and step == self.window[0]:
            jax.block_until_ready(state)  # keeps the previous step out of the trace
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would fill the trace and slow the steps down
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running = True

    def after(self, step: int, state: Any) -> None:
        if self.running and self.window and step == sum(self.window) - 1:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
