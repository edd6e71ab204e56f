"""Whole runs of a tiny model: resuming after any end, refusals, and the files of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from longattn.config import ByteLM, Config, Mesh, Model, Optimiser, RoPE, Run, Softmax, to_json
from longattn.train import checkpoint, compilation, data, evaluate, load_params, record, train

SOURCES = str(Path(__file__).parents[2] / "longattn" / "train" / "*.py")
MODEL = Model(N=2, E=16, F=24, H=2, K=1, D=8, dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Runs of one model share their compiled programs, also with the processes that the tests start."""
    import jax

    folder = str(tmp_path_factory.mktemp("cache"))
    before = {name: getattr(jax.config, name) for name in (_CACHE, _TIME)}
    jax.config.update(_CACHE, folder)
    jax.config.update(_TIME, 0.1)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


_CACHE, _TIME = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


def config(folder: Path, **run) -> Config:
    settings = {"name": "a", "steps": 12, "log_every": 2, "eval_every": 6, "eval_batches": 2, "save_every": 4, **run}
    return Config(
        model=MODEL,
        data=ByteLM(glob=SOURCES, T=32, B=2, valid=0.3),
        optimiser=Optimiser(lr=3e-3, warmup=3, loss_chunk=32),
        run=Run(dir=str(folder), **settings),
    )


def of_model(c: Config, **changes) -> Config:
    return dataclasses.replace(c, model=dataclasses.replace(c.model, **changes))


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records]
    assert steps == sorted(set(steps)), steps  # each step once
    return {r["step"]: r["loss"] for r in records}


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def quiet(c: Config, **kwargs):
    return train(c, quiet=True, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    c = config(tmp_path_factory.mktemp("runs"))
    summary = quiet(c)
    assert (summary.status, summary.steps) == ("finished", 12)
    return c


def folder(c: Config) -> Path:
    return Path(c.run.dir, c.run.name)


def test_what_a_run_leaves(finished: Config) -> None:
    assert list(losses(folder(finished))) == [2, 4, 6, 8, 10, 12]
    records = record.history(folder(finished))
    assert [r["step"] for r in records if "valid" in r] == [6, 12]
    assert records[-1]["valid"]["bits_per_byte"] == pytest.approx(records[-1]["valid"]["nll"] / np.log(2))
    fields = {
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second_per_device",
        "mfu",
        "data_wait",
        "step_spread",
        "peak_memory_bytes",
    }
    assert fields | {"eta_seconds"} <= records[0].keys()
    env = json.loads((folder(finished) / "env.json").read_text())
    assert env["data"]["train"]["corpus_sha256"]
    assert record.read_config(folder(finished)) == finished
    best = min((r for r in records if "valid" in r), key=lambda r: r["valid"]["nll"])["step"]
    assert steps_saved(folder(finished)) == sorted({8, 12, best})  # the newest two and the best


def test_finished_again_says_so_and_changes_nothing(finished: Config) -> None:
    before = (folder(finished) / "metrics.jsonl").read_bytes()
    console = Console(record=True, file=io.StringIO())
    summary = train(finished, console=console)
    assert (summary.status, summary.steps) == ("already finished", 12)
    assert summary.nll == record.history(folder(finished))[-1]["valid"]["nll"]
    assert "is finished" in console.export_text()
    assert (folder(finished) / "metrics.jsonl").read_bytes() == before


def lose_power(c: Config, monkeypatch: pytest.MonkeyPatch, step: int = 7) -> None:
    """Trains until the data of one step fail to come."""
    loader = data.loader

    def failing(source, start):
        for i, batch in loader(source, start):
            if i == step:
                raise RuntimeError("the power went")
            yield i, batch

    with monkeypatch.context() as patch:
        patch.setattr(data, "loader", failing)
        with pytest.raises(RuntimeError, match="power"):
            quiet(c)


def test_stopped_in_process_and_continued_bitwise(finished: Config, tmp_path: Path, monkeypatch) -> None:
    c = config(tmp_path)
    lose_power(c, monkeypatch)
    assert max(losses(folder(c))) >= 6
    with open(folder(c) / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 3.')
    assert quiet(c).status == "finished"
    assert losses(folder(c)) == losses(folder(finished))
    mine, theirs = load_params(folder(c), newest=True)[1], load_params(folder(finished), newest=True)[1]
    import jax

    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


def test_a_signal_at_any_time_ends_in_a_checkpoint(finished: Config, tmp_path: Path, monkeypatch) -> None:
    """A signal before the first step counts too: one step is taken and saved."""
    c = config(tmp_path)

    @contextlib.contextmanager
    def sent():
        event = threading.Event()
        event.set()
        yield event

    with monkeypatch.context() as patch:
        patch.setattr("longattn.train.distributed.sigterm", sent)
        summary = quiet(c)
    assert (summary.status, summary.steps, steps_saved(folder(c))) == ("stopped", 1, [1])
    assert quiet(c).status == "finished"
    assert losses(folder(c)).items() <= losses(folder(finished)).items()


@pytest.mark.slow
def test_evaluation_takes_a_micro_batch_at_a_time(finished: Config, tmp_path: Path) -> None:
    """Evaluation sees the same rows as without accumulation."""
    c = config(tmp_path)
    c = dataclasses.replace(c, optimiser=dataclasses.replace(c.optimiser, accumulate=2))
    quiet(c)
    mine, theirs = (record.history(folder(x))[-1]["valid"] for x in (c, finished))
    assert mine["tokens"] == theirs["tokens"]
    np.testing.assert_allclose(mine["nll"], theirs["nll"], rtol=1e-4)  # twelve steps of gradients in another order


@pytest.mark.slow
def test_on_a_mesh_stopped_and_continued_bitwise(finished: Config, tmp_path: Path, monkeypatch) -> None:
    """Eight devices see the losses of one; a checkpoint returns to the mesh, and to one device for an evaluation."""
    whole = dataclasses.replace(config(tmp_path, name="whole"), mesh=Mesh(data=2, seq=4, layout="zigzag"))
    assert quiet(whole).status == "finished"
    (began,) = json.loads((folder(whole) / "env.json").read_text())["starts"]
    assert began["mesh"] == "8 devices: data 2 x seq 4, ring, zigzag"
    for step, loss in losses(folder(finished)).items():
        # Adam's first updates are the signs of gradients, however small.
        assert losses(folder(whole))[step] == pytest.approx(loss, rel=1e-4)

    c = dataclasses.replace(config(tmp_path), mesh=Mesh(data=2, seq=4, layout="zigzag"))
    lose_power(c, monkeypatch)
    assert quiet(c).status == "finished"
    assert losses(folder(c)) == losses(folder(whole))
    result = evaluate(folder(c), batches=2, newest=True)
    assert result["nll"] == pytest.approx(record.history(folder(c))[-1]["valid"]["nll"], rel=1e-5)


@pytest.mark.slow
def test_continued_on_other_meshes(finished: Config, tmp_path: Path, monkeypatch) -> None:
    """A run moves from one device, after power cuts, to eight, and then to another mesh of eight."""
    alone = config(tmp_path, log_every=1, save_every=1)
    lose_power(alone, monkeypatch)
    on = lambda **mesh: dataclasses.replace(alone, mesh=Mesh(**mesh))
    eight = on(data=2, seq=4, layout="zigzag")
    other = on(fsdp=2, seq=4, strategy="ulysses")
    lose_power(eight, monkeypatch, step=10)
    console = Console(file=io.StringIO(), width=1000)
    assert train(other, console=console).status == "finished"
    starts = json.loads((folder(other) / "env.json").read_text())["starts"]
    (_, first, second), meshes = zip(*((s["step"], s.get("mesh")) for s in starts))
    assert 0 < first < second < 12
    assert meshes == (None, "8 devices: data 2 x seq 4, ring, zigzag", "8 devices: fsdp 2 x seq 4, ulysses, contiguous")
    assert f"after step {second} on {meshes[-1]}; it began on another mesh" in console.file.getvalue()
    for step, loss in losses(folder(finished)).items():
        # As in the test before.
        assert losses(folder(other))[step] == pytest.approx(loss, rel=1e-4)


def start(c: Config, cache: str, tmp_path: Path, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    (tmp_path / "c.json").write_text(to_json(c))
    env = {**os.environ, _CACHE.upper(): cache, _TIME.upper(): "0.1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "longattn", "train", str(tmp_path / "c.json")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    return process


def wait_for_step(c: Config, step: int) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if max((r["step"] for r in record.history(folder(c))), default=0) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def _largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.slow
def test_a_storm_leaves_the_losses_of_a_run_without_one(compiled_once: str, tmp_path: Path) -> None:
    """Kills, signals, a full disk, a damaged checkpoint and a lost pipe, at steps drawn by a seed."""
    long = {"steps": 400, "log_every": 1, "eval_every": 0, "save_every": 20}
    c, draw = config(tmp_path, **long), random.Random(0)
    done = lambda: max(losses(folder(c)), default=0) if (folder(c) / "metrics.jsonl").exists() else 0

    def struck(number: int) -> str:
        """Sends a signal some steps after a start; returns the last line on stderr."""
        process = start(c, compiled_once, tmp_path)
        wait_for_step(c, done() + draw.randint(25, 45))
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors
        assert "Traceback" not in errors, errors
        return errors.splitlines()[-1]

    def refused(**limits: int) -> str:
        process = start(c, compiled_once, tmp_path, **limits)
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 2 and "Traceback" not in errors, errors
        return errors.splitlines()[-1]

    struck(signal.SIGKILL)
    assert struck(signal.SIGTERM).startswith("longattn: stopped by SIGTERM after saving step")
    assert max(steps_saved(folder(c))) == max(losses(folder(c)))  # it saved where it stopped
    assert struck(signal.SIGINT) == "longattn: train was interrupted; what was saved stays"

    size = (folder(c) / "metrics.jsonl").stat().st_size
    assert "File too large" in refused(largest_file=size + 4096)  # as a full disk, and within a line

    newest = max(steps_saved(folder(c)))
    os.truncate(_largest_file(folder(c) / "checkpoints" / str(newest) / "params"), 100)
    assert f"checkpoints/{newest} is damaged" in (said := refused())
    assert re.search(r"; delete it to go on from step \d+$", said)
    shutil.rmtree(folder(c) / "checkpoints" / str(newest))

    last = start(c, compiled_once, tmp_path)
    last.stderr.close()  # as `2>&1 | head` does
    with last.stdout as results:
        assert "finished, 400 steps" in results.read()
    assert last.wait() == 0

    whole = config(tmp_path, **long, name="whole")
    reference = start(whole, compiled_once, tmp_path)
    reference.communicate(timeout=240)
    assert losses(folder(c)) == losses(folder(whole))
    assert list(losses(folder(c))) == list(range(1, 401))


def test_half_written_checkpoints_are_not_picked_up(finished: Config, tmp_path: Path) -> None:
    c = config(tmp_path)
    shutil.copytree(folder(finished), folder(c))
    newest = folder(c) / "checkpoints" / "12"
    newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))  # as a kill during the save leaves it
    assert quiet(c).status == "finished"
    assert losses(folder(c)) == losses(folder(finished))
    assert 12 in steps_saved(folder(c))


def test_nan_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch) -> None:
    c, loader = config(tmp_path), data.loader

    def poisoned(source, start):
        for step, batch in loader(source, start):
            yield step, batch._replace(weights=batch.weights * (np.float32("nan") if step == 7 else 1))

    monkeypatch.setattr(data, "loader", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 8: loss=nan.*last good checkpoint is step 6"):
        quiet(c)
    assert steps_saved(folder(c)) == [4, 6]
    assert all(np.isfinite(list(losses(folder(c)).values())))


def test_rates_beside_saves_and_evaluations_are_those_of_slow_data(tmp_path: Path, monkeypatch) -> None:
    """64 tokens every 0.05 s are at most 1,280 tokens a second, also beside saves; no wait is longer than its step."""
    c, loader = config(tmp_path, log_every=1, save_every=3, eval_every=4), data.loader

    def slow(source, start):
        for step, batch in loader(source, start):
            time.sleep(0.05)
            yield step, batch

    monkeypatch.setattr(data, "loader", slow)
    quiet(c)
    for r in record.history(folder(c)):
        assert r["tokens_per_second_per_device"] <= 64 / 0.05
        assert r["step_seconds"] >= 0.05
        assert 0 < r["data_wait"] <= 1
        assert r["eta_seconds"] >= 0.05 * (12 - r["step"])


def test_an_update_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Without eps, rows of an embedding that no token has are 0 / 0 after a step whose loss is finite."""
    c = of_model(config(tmp_path, save_every=1), tie=False)
    c = dataclasses.replace(c, optimiser=dataclasses.replace(c.optimiser, eps=0.0))
    with pytest.raises(
        FloatingPointError, match=r"step 1: the update left .* no checkpoint was saved yet; raise .*eps"
    ):
        quiet(c)
    assert steps_saved(folder(c)) == []


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("longattn.train.run.run_evaluation", lambda *_: {"nll": float("nan"), "accuracy": 0.0})
    c = config(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 6: nll=nan on the validation data; .* checkpoint is step 4"):
        quiet(c)
    assert "NaN" not in (folder(c) / "metrics.jsonl").read_text()


def test_full_disk_is_an_error_and_the_last_good_checkpoint_stays(
    finished: Config, tmp_path: Path, monkeypatch
) -> None:
    c, save = config(tmp_path), checkpoint.ocp.training.Checkpointer.save_checkpointables_async

    def full(self, step, *args, **kwargs):
        if step > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full)
        with pytest.raises(OSError, match="no space left on device; the last good checkpoint, step 4, is untouched"):
            quiet(c)
    assert steps_saved(folder(c)) == [4]
    assert quiet(c).status == "finished"
    assert losses(folder(c)) == losses(folder(finished))


@pytest.mark.parametrize("name", ["7", "13"])
def test_what_is_no_checkpoint_is_never_gone_on_from(finished: Config, tmp_path: Path, name: str) -> None:
    c = config(tmp_path)
    shutil.copytree(folder(finished), folder(c))
    shutil.rmtree(folder(c) / "checkpoints" / "12")
    (folder(c) / "checkpoints" / "²").mkdir()
    (folder(c) / "checkpoints" / name).mkdir()
    with pytest.raises(ValueError, match=f"/{name} is no checkpoint, but has the name of one: move it away"):
        quiet(c)
    (folder(c) / "checkpoints" / name).rmdir()
    assert quiet(c).status == "finished"


def copied(finished: Config, tmp_path: Path, steps: int = 12) -> Config:
    """A copy of the finished run, without the checkpoints after `steps`."""
    c = config(tmp_path)
    shutil.copytree(folder(finished), folder(c))
    for step in steps_saved(folder(c)):
        if step > steps:
            shutil.rmtree(folder(c) / "checkpoints" / str(step))
    return c


def test_metrics_that_others_emptied_or_deleted(finished: Config, tmp_path: Path) -> None:
    """An empty file is refused; a deleted one is said to be gone, and the run goes on."""
    c = copied(finished, tmp_path, steps=8)
    metrics = folder(c) / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl was changed: .* step 8 it holds 0 of 4 lines"):
        quiet(c)
    assert metrics.read_text() == ""
    metrics.unlink()
    console = Console(file=io.StringIO(), width=1000)
    assert train(c, console=console).status == "finished"
    assert "metrics.jsonl is gone: it begins anew after step 8" in console.file.getvalue()
    assert list(losses(folder(c))) == [10, 12]
    metrics.write_text(metrics.read_text().splitlines(True)[0])  # of a finished run
    with pytest.raises(ValueError, match=r"metrics\.jsonl was changed: it lacks the line of step 12"):
        quiet(c)


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl"])
def test_files_of_another_content_are_refused_before_anything_runs(finished: Config, tmp_path: Path, name: str) -> None:
    c = copied(finished, tmp_path, steps=8)
    (folder(c) / name).write_bytes(b'[1, 2]\n\xff\n{"step": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{folder(c) / name}")) as found:
        quiet(c)
    assert "\n" not in str(found.value)


def test_lines_are_on_disk_before_their_checkpoint_is_begun(tmp_path: Path, monkeypatch) -> None:
    seen, c = [], config(tmp_path)
    fsync, save = os.fsync, checkpoint.Checkpoints.save

    def saving(self, step, *arguments):
        assert json.loads((folder(c) / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
        seen.append(("save", step))
        save(self, step, *arguments)

    def syncing(number: int) -> None:
        if os.readlink(f"/proc/self/fd/{number}").endswith("metrics.jsonl"):
            seen.append(("fsync", 0))
        fsync(number)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", saving)
    monkeypatch.setattr(record.os, "fsync", syncing)
    quiet(c)
    assert seen == [kept for step in (4, 6, 8, 12) for kept in (("fsync", 0), ("save", step))]


def test_an_evaluation_chooses_again_where_its_checkpoint_was_replaced(finished: Config, tmp_path, monkeypatch) -> None:
    """A run that trains deletes the best checkpoint once it has a better one."""
    c, params, asked = copied(finished, tmp_path), checkpoint.Checkpoints.params, []

    def late(self, like, step):
        asked.append(step)
        if len(asked) == 1:
            shutil.rmtree(folder(c) / "checkpoints" / str(step))
        return params(self, like, step)

    monkeypatch.setattr(checkpoint.Checkpoints, "params", late)
    assert load_params(folder(c))[0] == record.read_config(folder(c))
    first, second = asked
    assert first != second


def test_brackets_in_a_folder_s_name_are_shown_as_they_are(finished: Config, tmp_path: Path) -> None:
    shutil.copytree(finished.run.dir, tmp_path / "[red]a[b]")
    c = dataclasses.replace(finished, run=dataclasses.replace(finished.run, dir=str(tmp_path / "[red]a[b]")))
    console = Console(file=io.StringIO(), width=1000)
    train(c, console=console)
    assert f"{tmp_path}/[red]a[b]/a is finished: 12 steps" in console.file.getvalue()


def test_a_run_that_began_between_the_check_and_the_claim_is_refused(finished: Config) -> None:
    with (
        pytest.raises(ValueError, match=r"model\.F=24, now 28"),
        record.claim(folder(finished), of_model(finished, F=28)),
    ):
        pass


def test_a_folder_that_cannot_be_written_to_is_refused_before_compiling() -> None:
    """No permission tells that /proc takes no folders."""
    with pytest.raises(ValueError, match=r"/proc cannot be written to \(.*\); choose another --run.dir"):
        record.check_folder(Path("/proc/runs/a"), config(Path("/proc/runs")), resume=True)


def test_a_folder_of_another_run_is_refused(finished: Config) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder(finished).rglob("*")}
    with pytest.raises(ValueError, match=r"model\.F=24, now 28; choose another --run.name"):
        quiet(of_model(finished, F=28))
    with pytest.raises(ValueError, match="resume=False"):
        quiet(finished, resume=False)
    assert before == {p: p.stat().st_mtime_ns for p in folder(finished).rglob("*")}


@pytest.mark.parametrize("T", [2**20, 2**30])
def test_too_long_for_memory_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch, T: int) -> None:
    monkeypatch.setattr(compilation, "available_memory", lambda: 2**26)
    c = config(tmp_path)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, T=T))
    with pytest.raises(ValueError, match=f"T={T}.*lower"):
        quiet(c)
    assert list(tmp_path.iterdir()) == []


def test_compiled_memory_decides(tmp_path: Path, monkeypatch) -> None:
    """A length whose parameters and layer inputs fit, but whose step does not."""
    monkeypatch.setattr(compilation, "available_memory", lambda: 150_000)
    with pytest.raises(ValueError, match=r"data\.T=32 with data.B=2 needs .* GiB"):
        quiet(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    c = config(tmp_path / "runs")
    with pytest.raises(ValueError, match="glob"):
        quiet(dataclasses.replace(c, data=dataclasses.replace(c.data, glob=str(tmp_path / "*.none"))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_init_from_another_length_and_scaling(finished: Config, tmp_path: Path) -> None:
    c = config(tmp_path, init_from=str(folder(finished)), steps=2, log_every=1)
    c = of_model(c, mixers=(Softmax(rope=RoPE(scaling="linear", factor=2.0)),))
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, T=64))
    fresh = dataclasses.replace(c, run=dataclasses.replace(c.run, name="fresh", init_from=""))
    quiet(c)
    quiet(fresh)
    assert losses(folder(c))[1] < losses(folder(fresh))[1]  # it starts from what was learned: the same batch costs less
    wrong = of_model(dataclasses.replace(c, run=dataclasses.replace(c.run, name="wrong")), E=32)
    with pytest.raises(ValueError, match=r"of another model: at embedding it holds shape \[257, 16\].* \[257, 32\]"):
        quiet(wrong)
    with pytest.raises(ValueError, match="is no run"):
        quiet(config(tmp_path, name="b", init_from="nowhere"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "fresh"]


def test_evaluate_reads_every_byte_once(finished: Config) -> None:
    result = evaluate(folder(finished))
    assert result["tokens"] == result["data"]["bytes"]
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / np.log(2))
    assert sum(g["weight"] for g in result["by_position"]) == result["tokens"]
    assert sum(g["weight"] * g["nll"] for g in result["by_position"]) == pytest.approx(result["nll"] * result["tokens"])
    assert 0 < result["xz"]["concatenated"] < result["xz"]["per_file"] < 8
    longer = evaluate(folder(finished), T=64, batches=1)
    assert (longer["T"], "xz" in longer) == (64, False)
    others = evaluate(folder(finished), glob=SOURCES)  # given by name, all files are held out
    assert others["data"]["bytes"] == result["data"]["corpus_bytes"]
    with pytest.raises(ValueError, match="is no run"):
        evaluate(folder(finished).parent)


@pytest.mark.slow
def test_corpus_that_changed_is_refused(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"some words {i} " * 30)
    c = config(tmp_path)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, glob=str(tmp_path / "*.txt")))
    quiet(c)
    (folder(c) / "checkpoints" / "12").rename(tmp_path / "gone")
    (tmp_path / "3.txt").write_text("other words")
    with pytest.raises(ValueError, match=r"corpus.*changed"):
        quiet(c)


@pytest.mark.slow
def test_profile_window(tmp_path: Path) -> None:
    c = config(tmp_path, profile=(3, 2))
    quiet(c)
    assert list((folder(c) / "profile").rglob("*.xplane.pb"))
