"""Several real processes, joined by jax.distributed on this machine: what they read, compute, save, and survive."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from longattn.config import ByteLM, Config, Mesh, Model, Needle, Optimiser, Run, to_json
from longattn.launch import INTERRUPTED, LOST, STOPPED
from longattn.train import data, distributed, evaluate, record
from longattn.train.evaluate import restore_params
from longattn.train.step import context_of, init_state, train_step
from tests.train import worker

ROOT = Path(__file__).parents[2]
SOURCES = str(ROOT / "longattn" / "train" / "*.py")
MODEL = Model(N=1, E=16, F=24, H=2, K=1, D=8, dtype="float32")
MESHES = ({"seq": 4}, {"data": 2, "seq": 2})
STEPS = [0, 5]


def config(folder: Path, **run: Any) -> Config:
    settings = {"name": "a", "steps": 80, "log_every": 1, "eval_every": 0, "eval_batches": 2, "save_every": 5, **run}
    return Config(
        model=MODEL,
        data=ByteLM(glob=SOURCES, T=32, B=4, valid=0.3),
        mesh=Mesh(seq=4),  # the ring crosses processes
        optimiser=Optimiser(lr=3e-3, warmup=3, loss_chunk=32),
        run=Run(dir=str(folder), **settings),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(
    command: list[str], processes: int, devices: int, told: tuple[int, ...] | None = None, **env: str
) -> Iterator[list[subprocess.Popen]]:
    """Runs the command in several processes, none of which outlives the block.

    told: how many processes each is told that there are, if not as many as there are.
    """
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": "",
        "LONGATTN_HEARTBEAT": "10",
        "LONGATTN_CONNECT": "120",
        **env,
    }
    port = free_port()
    running = []
    try:
        for i in range(processes):
            count = told[i] if told else processes
            launch = {"LONGATTN_COORDINATOR": f"127.0.0.1:{port}", "LONGATTN_PROCESSES": str(count)}
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    env={**os.environ, **shared, **launch, "LONGATTN_PROCESS": str(i)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def ended(running: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Returns how each process ended: exit code, standard output, standard error. Fails after `seconds` in all."""
    end = time.monotonic() + seconds
    results = []
    for process in running:
        out, err = process.communicate(timeout=max(1, end - time.monotonic()))
        results.append((process.returncode, out, err))
    return results


def cache(folder: Path) -> dict[str, str]:
    """Returns variables that keep compiled programs for the next start."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def worked(
    folder: Path, c: Config, processes: int, devices: int, meshes: Any = MESHES, trains: bool = True
) -> list[dict[str, Any]]:
    """Returns the answers of the processes of tests/train/worker.py."""
    job = folder / "job.json"
    job.write_text(json.dumps({"config": json.loads(to_json(c)), "meshes": meshes, "steps": STEPS, "trains": trains}))
    with started(["tests.train.worker", str(job)], processes, devices, **cache(folder)) as running:
        for code, out, err in ended(running):
            assert (code, out) == (0, ""), err
    return [json.loads((folder / f"job.{i}.json").read_text()) for i in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    c = config(folder)
    return c, worked(folder, c, 2, 2)


def assert_batches(c: Config, seen: list[dict[str, Any]], rows: dict[str, list[list[int]]]) -> None:
    source = data.source(c.data, seed=c.run.seed, split="train")
    hashes = [worker.digest(source.batch(step)) for step in STEPS]
    for sizes in rows:
        assert [process[sizes]["hashes"] for process in seen] == [hashes] * len(seen)
        assert [process[sizes]["rows"] for process in seen] == rows[sizes]


@pytest.mark.slow
def test_batches_are_those_of_one_process_and_only_their_rows_are_read(two) -> None:
    whole = [0, 1, 2, 3]
    assert_batches(*two, {str(MESHES[0]): [whole, whole], str(MESHES[1]): [[0, 1], [2, 3]]})


@pytest.mark.slow
def test_all_refuse_where_one_does_and_where_they_disagree(two) -> None:
    refused = [process["refused"] for process in two[1]]
    assert refused == ["process 1 refused: no files here", "no files here"]
    for process in two[1]:
        assert "corpus.hash is 0 on process 0 and 1 on process 1" in process["differs"]


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step_and_they_go_on(two) -> None:
    (mine, steps), theirs = (process["stopped"] for process in two[1])
    assert theirs == [mine, steps] == ["stopped", steps]
    assert steps in (3, 4)  # sent before the third step, it is known to all a step later
    assert [r["step"] for r in two[1][0]["history"]] == list(range(1, 81))


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device(two) -> None:
    c, seen = two
    alone = dataclasses.replace(c, mesh=Mesh())
    source = data.source(alone.data, seed=0, split="train")
    step_fn, state = train_step(alone, None), init_state(alone, 0)
    mine, theirs = (process["history"] for process in seen)
    for i in range(12):
        state, metrics = step_fn(state, source.batch(i))
        # The first step sums 128 float32 losses, and their gradients, in another order. Later steps also differ by
        # Adam's updates, whose first ones are the signs of gradients, however small.
        np.testing.assert_allclose(mine[i]["loss"], float(metrics["loss"]), rtol=1e-4 if i else 1e-5)
        if i == 0:
            np.testing.assert_allclose(mine[i]["grad_norm"], float(metrics["grad_norm"]), rtol=1e-5)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in mine] == [r[name] for r in theirs]
    assert mine[-1]["valid"] == theirs[-1]["valid"]
    # Process 0 writes for all.
    assert record.history(Path(c.run.dir, c.run.name)) == mine
    env = json.loads(Path(c.run.dir, c.run.name, "env.json").read_text())
    assert (env["device"]["count"], env["device"]["processes"]) == (4, 2)


@pytest.mark.slow
def test_checkpoints_return_to_any_mesh_and_evaluations_agree(two) -> None:
    c, seen = two
    folder = Path(c.run.dir, c.run.name)
    wide = dataclasses.replace(c, mesh=Mesh(data=2, seq=4))
    one, eight = (
        restore_params(folder, x, newest=True, context=context_of(x))
        for x in (dataclasses.replace(c, mesh=Mesh()), wide)
    )
    assert one[1] == eight[1] == 80
    assert len(jax.tree.leaves(eight[0])[0].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, one[0], eight[0])
    alone, spread = evaluate(folder, newest=True), evaluate(folder, newest=True, mesh=wide.mesh)
    assert seen[0]["eval"] == seen[1]["eval"]
    for result in (seen[0]["eval"], spread):
        assert (result["tokens"], result["xz"]) == (alone["tokens"], alone["xz"])
        np.testing.assert_allclose(result["nll"], alone["nll"], rtol=1e-6)
        for mine, theirs in zip(result["by_position"], alone["by_position"], strict=True):
            np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-5)


def command(c: Config, folder: Path) -> list[str]:
    (folder / "c.json").write_text(to_json(c))
    return ["longattn", "train", str(folder / "c.json")]


def wait_for_step(c: Config, step: int, running: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 150
    while time.monotonic() < end:
        if max((r["step"] for r in record.history(Path(c.run.dir, c.run.name))), default=0) >= step:
            return
        for process in running:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def newest(c: Config) -> int:
    return max(int(p.name) for p in Path(c.run.dir, c.run.name, "checkpoints").iterdir() if p.name.isdigit())


def assert_lost(code: int, out: str, err: str, c: Config) -> None:
    """The error is one line, with the remedy and without a traceback."""
    assert (code, out) == (LOST, ""), err
    *_, last = (line for line in err.splitlines() if line.startswith("longattn: process "))
    assert "lost" in last, err
    assert last.endswith(f"start again with the same command: it goes on from step {newest(c)}")
    assert "Traceback" not in err and "stack trace" not in err and "coordination_service" not in err, err


@pytest.mark.slow
def test_killed_one_of_two_and_finished_by_one(two, tmp_path: Path) -> None:
    c, programs = config(tmp_path), cache(Path(two[0].run.dir))
    with started(command(c, tmp_path), 2, 2, **programs) as running:
        wait_for_step(c, 15, running)
        running[1].kill()
        killed = time.monotonic()
        survivor = ended(running)[0]
        # The heartbeat's 10 s, and the time that a busy machine takes to end a process.
        assert time.monotonic() - killed < 60
    assert_lost(*survivor, c)
    assert survivor[2].startswith("longattn: process 0 of 2, by LONGATTN_COORDINATOR, coordinator 127.0.0.1:")
    assert "[Gloo]" not in survivor[2]

    at = newest(c)
    with started(command(c, tmp_path), 1, 4, **programs) as running:
        ((code, out, err),) = ended(running)
    assert code == 0, err
    assert f"after step {at}" in " ".join(err.split())
    assert "finished, 80 steps" in out
    whole, records = two[1][0]["history"], record.history(Path(c.run.dir, c.run.name))
    assert [r["step"] for r in records] == list(range(1, 81))
    assert [r["loss"] for r in records[:at]] == [r["loss"] for r in whole[:at]]
    np.testing.assert_allclose(records[at]["loss"], whole[at]["loss"], rtol=1e-5)  # sums have another order


def test_a_coordinator_out_of_reach_is_one_line_in_time(tmp_path: Path) -> None:
    c = config(tmp_path)
    begin = time.monotonic()
    with started(command(c, tmp_path), 2, 2, LONGATTN_CONNECT="1") as running:
        running[0].kill()
        code, out, err = ended(running)[1]
    assert (code, out, err.count("\n")) == (LOST, "", 1), err
    assert "cannot reach the coordinator within 1 s (LONGATTN_CONNECT)" in err
    assert time.monotonic() - begin < 90  # JAX reports it 5 s later, and a busy machine imports slowly
    assert not Path(c.run.dir, c.run.name).exists()


@pytest.mark.slow
def test_four_processes_read_the_rows_that_they_share(tmp_path: Path) -> None:
    c = dataclasses.replace(config(tmp_path), data=Needle(glob=SOURCES, T=128, B=4, digits=2))
    seen = worked(tmp_path, c, 4, 1, MESHES[1:], trains=False)
    assert_batches(c, seen, {str(MESHES[1]): [[0, 1], [0, 1], [2, 3], [2, 3]]})


@pytest.mark.slow
def test_the_loss_of_the_coordinator_and_signals_to_all(two, tmp_path: Path) -> None:
    c, programs = config(tmp_path, profile=(3, 2)), cache(Path(two[0].run.dir))
    with started(command(c, tmp_path), 2, 2, **programs) as running:
        wait_for_step(c, 15, running)
        running[0].kill()
        assert_lost(*ended(running)[1], c)
    assert len(list(Path(c.run.dir, c.run.name, "profile").rglob("*.xplane.pb"))) == 1  # the first process's
    interrupted = "longattn: train was interrupted; what was saved stays"
    for sent, ending in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, STOPPED)):
        with started(command(c, tmp_path), 2, 2, **programs) as running:
            wait_for_step(c, record.history(Path(c.run.dir, c.run.name))[-1]["step"] + 1, running)  # one of its own
            for process in running:  # `two` has a signal to one alone
                process.send_signal(sent)
            (first, out, err), (second, *silent) = ended(running)
        assert (first, second, out, silent[0]) == (ending, ending, "", ""), err
        said = f"longattn: stopped by SIGTERM after saving step {newest(c)}" if ending == STOPPED else interrupted
        assert said in err and "Traceback" not in err, err
        assert silent[1].strip() == ("" if ending == STOPPED else interrupted)


@pytest.mark.slow
def test_evaluation_from_the_command_line_and_a_port_that_is_taken(two, tmp_path: Path) -> None:
    c, programs = two[0], cache(Path(two[0].run.dir))
    folder = str(Path(c.run.dir, c.run.name))
    arguments = ["longattn", "eval", folder, "--mesh.seq", "4", "--json"]
    with started(arguments, 2, 2, **programs) as running:
        (code, out, err), (other, *silent) = ended(running)
    assert (code, other, silent) == (0, 0, ["", ""]), err
    np.testing.assert_allclose(json.loads(out)["nll"], evaluate(folder)["nll"], rtol=1e-6)
    with started(arguments[:-3], 2, 2) as running:  # no mesh for four devices
        for code, _, err in ended(running):
            assert (code, "must be the number of devices, 4" in err) == (2, True), err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {"LONGATTN_COORDINATOR": f"127.0.0.1:{taken.getsockname()[1]}", "LONGATTN_PROCESSES": "2"}
        done = subprocess.run(
            [sys.executable, "-m", *command(config(tmp_path), tmp_path)],
            env={**os.environ, **env, "LONGATTN_PROCESS": "0"}, cwd=ROOT, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 2 and "is taken on this machine" in done.stderr, done.stderr


@pytest.mark.slow
def test_processes_that_were_told_different_numbers_refuse(tmp_path: Path) -> None:
    c = config(tmp_path)
    with started(command(c, tmp_path), 2, 2, told=(2, 3)) as running:
        for code, out, err in ended(running):
            assert (code, out) == (2, ""), err
            said = "process 0 was told that there are 2 processes, and process 1 that there are 3: start all with"
            assert said in err.splitlines()[-1]
    assert not Path(c.run.dir, c.run.name).exists()


def test_one_process_agrees_with_itself() -> None:
    import threading

    event = threading.Event()
    agreed = distributed.SharedEvent(event)
    assert not agreed.poll()
    event.set()
    assert agreed.poll()
    with pytest.raises(OSError, match="connection reset"), distributed.detect_loss(lambda: "again"):
        raise OSError("connection reset")  # of something else than another process
