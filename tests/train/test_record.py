"""The files of a run folder: comparison, truncation on restart, groups of positions."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from longattn.config import Config, Model, Run, from_json, to_json
from longattn.environment import available_memory, peak_memory
from longattn.train import record


def test_by_position_groups() -> None:
    nll, weight = np.arange(1.0, 12.0), np.ones(11)
    weight[5] = nll[5] = 0
    groups = record.by_position(nll, weight)
    assert [(g["from"], g["to"]) for g in groups] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    assert groups[3]["nll"] == pytest.approx((5 + 7 + 8) / 3)
    assert sum(g["weight"] for g in groups) == 10


def test_first_difference_names_the_path() -> None:
    a = {"model": {"D": 8, "mixers": [{"mask": "Causal()"}]}, "run": 1}
    assert record.first_difference(a, a) is None
    b = {"model": {"D": 8, "mixers": [{"mask": "Full()"}]}, "run": 2}
    assert record.first_difference(a, b) == ("model.mixers.0.mask", "Causal()", "Full()")
    assert record.first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])


def test_history_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    )
    assert [r["step"] for r in record.history(tmp_path, until=2)] == [1, 2]
    assert [r["step"] for r in record.history(tmp_path)] == [1, 2, 3]
    assert record.history(tmp_path / "none") == []


def recorder(folder: Path, start: int, **changes) -> record.Recorder:
    config = Config(run=Run(dir=str(folder.parent), name=folder.name, steps=10, **changes))
    return record.Recorder(folder, config, Console(quiet=True), start=start, ideal_seconds=0.1, info={})


METRICS = {"loss": 1.0, "nll": 1.0, "grad_norm": 1.0, "lr": 1e-3, "weight_sum": 3.0}


def test_recorder_continues_where_the_checkpoint_was(tmp_path: Path) -> None:
    with recorder(tmp_path, 0) as r:
        for step in range(1, 5):
            r.time(0.2, 0.05)
            r.write(step, METRICS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss"')
    with recorder(tmp_path, 3) as r:
        assert [x["step"] for x in r.history] == [1, 2, 3]
        r.time(0.2, 0.05)
        r.write(4, METRICS, {"nll": 2.0, "accuracy": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert lines[-1]["mfu"] == pytest.approx(0.5)
    assert lines[-1]["data_wait"] == pytest.approx(0.25)
    assert lines[-1]["eta_seconds"] == pytest.approx(6 * 0.2)
    assert lines[-1]["valid"] == {"nll": 2.0, "accuracy": 0.5}
    env = json.loads((tmp_path / "env.json").read_text())
    assert [s["step"] for s in env["starts"]] == [0, 3]
    assert {"versions", "device", "commit", "command", "data"} <= env.keys()


def test_line_shows_everything(tmp_path: Path) -> None:
    with recorder(tmp_path, 0) as r:
        r.time(0.2, 0.05)
        r.write(2, METRICS, {"nll": 2.0, "accuracy": 0.5, "bits_per_byte": 2.9})
        text = record.line(r.history[-1], r.config)
    for part in ("2/10", "1.0000", "2.9000 bits/byte", "tok/s", "MFU 50.0%", "data 25.0%", "grad 1.00", "GiB", "ETA"):
        assert part in text, text


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    config = Config(run=Run(dir=str(tmp_path), name="a"))
    folder = tmp_path / "a"
    assert record.check_folder(folder, config, resume=True) is False
    with record.claim(folder, config), pytest.raises(ValueError, match="another process"), record.claim(folder, config):
        pass
    assert record.check_folder(folder, config, resume=True) is True
    other = dataclasses.replace(config, model=Model(D=32))
    with pytest.raises(ValueError, match=r"model\.D=64, now 32; choose another --run.name"):
        record.check_folder(folder, other, resume=True)
    with pytest.raises(ValueError, match="resume=False"):
        record.check_folder(folder, config, resume=False)
    moved = dataclasses.replace(config, run=Run(dir="elsewhere", name="b", log_every=3, profile=(2, 2)))
    assert record.check_folder(folder, moved, resume=True) is True
    (folder / "config.json").write_text(to_json(config).replace('"version": 4', '"version": 0'))
    with pytest.raises(ValueError, match="another version"):
        record.check_folder(folder, config, resume=True)
    text = (Path(__file__).parents[1] / "config_version_3.json").read_text()
    (folder / "config.json").write_text(text)
    assert record.check_folder(folder, from_json(text), resume=True) is True
    newer = from_json(text.replace('"V": 32', '"V": 32, "scale": null'))
    with pytest.raises(ValueError, match=r"model\.mixers\.1\.scale=1\.0, now None; choose another"):
        record.check_folder(folder, newer, resume=True)
    (folder / "config.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"config\.json"):
        record.check_folder(folder, config, resume=True)
    (folder / "config.json").unlink()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"without its config\.json"):
        record.check_folder(folder, config, resume=True)


def test_memory_is_known() -> None:
    assert peak_memory() > 2**20
    available = available_memory()
    assert available is None or available > 2**20


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        record.scalar_writer()
    written = []

    class SummaryWriter:
        def __init__(self, folder: str):
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with recorder(tmp_path, 0, tensorboard=True) as r:
        r.write(1, METRICS, {"nll": 2.0, "accuracy": 0.5, "by_position": []})
    assert ("train/loss", 1.0, 1) in written
    assert ("valid/nll", 2.0, 1) in written
    assert written[-1] == "closed"


# ---- what others did to the files


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("", "line 2, is damaged: it is no JSON"),
        ('"step"', "line 2, is damaged: it holds a str, not an object"),
        ('{"step": 2}', "line 2, is damaged: its 'loss' must be a JSON number"),
        ('{"step": 1, "loss": 2.0}', "line 2, is damaged: step 1 after step 1"),
    ],
)
def test_a_line_that_no_run_wrote_is_refused_by_name(tmp_path: Path, second: str, reason: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 3.0}}\n{second}\n{{"step": 3, "loss": 1.0}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, {reason}.*; put the file back, or delete it"):
        record.history(tmp_path)


def test_a_checkpoint_knows_the_lines_before_it(tmp_path: Path) -> None:
    with recorder(tmp_path, 0) as r:
        for step in range(1, 5):
            r.write(step, METRICS)
            if step == 3:
                saved = r.settle()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    of = lambda text: (path.write_text(text), record.history(tmp_path, 3))[1]
    for text in (whole, whole + '{"step": 5, "lo', "".join(whole.splitlines(True)[:3])):
        record.insist_on_lines(tmp_path, of(text), 3, saved)
    lines = whole.splitlines(True)
    for text, what in (
        ("".join(lines[:2]), "holds 2 of 3 lines"),
        ("".join(lines[1:]), "holds 2 of 3 lines"),
        ("", "holds 0 of 3 lines"),
        (whole.replace('"loss": 1.0', '"loss": 0.9', 1), "has other lines"),
    ):
        found = of(text)
        with pytest.raises(ValueError, match=f"metrics.jsonl was changed: .* step 3 it {what} .*; put it back, or del"):
            record.insist_on_lines(tmp_path, found, 3, saved)
        record.insist_on_lines(tmp_path, found, 3, None)  # a checkpoint of an earlier version knows nothing
    path.unlink()
    record.insist_on_lines(tmp_path, [], 3, saved)  # whoever deletes it goes on without


def test_a_record_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with recorder(tmp_path, 0) as r:
        r.write(1, {**METRICS, "lr": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lr"] is None


@pytest.mark.parametrize("content", ["", "[]", '{"starts": 3, "data": {}}', '{"starts": [], "data": {"train": 1}}'])
def test_a_damaged_environment_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "env.json").write_text(content)
    with pytest.raises(ValueError, match=r"env\.json is damaged: .*; move it away to go on"):
        record.check_data(tmp_path, {"train": {}})
