"""Detecting the launcher from the environment, the meaning of an abort, and the launchers' scripts."""

from __future__ import annotations

import http.server
import re
import subprocess
import threading
from pathlib import Path

import pytest

from longattn import launch
from longattn.launch import detect

EXPLICIT = {"LONGATTN_COORDINATOR": "10.0.0.1:8476", "LONGATTN_PROCESSES": "4", "LONGATTN_PROCESS": "2"}
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004],cpu1",
}
JOBSET = {
    "JOBSET_NAME": "longattn",
    "REPLICATED_JOB_NAME": "train",
    "JOB_INDEX": "1",
    "JOB_REPLICAS": "2",
    "PROCESSES_IN_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
}
LAUNCHERS = Path(__file__).parents[1] / "configs" / "launch"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (EXPLICIT, ("10.0.0.1:8476", 4, 2)),
        (EXPLICIT | SLURM, ("10.0.0.1:8476", 4, 2)),
        (SLURM, (f"gpu003:{61440 + 70001 % 4096}", 3, 1)),
        (SLURM | {"LONGATTN_PORT": "99"}, ("gpu003:99", 3, 1)),
        (JOBSET, ("longattn-train-0-0.longattn:8476", 8, 7)),
    ],
)
def test_detected(env: dict[str, str], expected: tuple[str, int, int]) -> None:
    found = detect(env)
    assert (found.coordinator, found.processes, found.process) == expected
    assert (found.connect, found.heartbeat) == (300, 60)


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LONGATTN_COORDINATOR": "a:1", "LONGATTN_PROCESSES": "1", "LONGATTN_PROCESS": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, no task of srun
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"JOB_COMPLETION_INDEX": "3"},  # an indexed Job of pods that work alone
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # without a TPU
    ],
)
def test_one_process(env: dict[str, str]) -> None:
    assert detect(env) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LONGATTN_PROCESSES": "2"}, "LONGATTN_COORDINATOR must be set where LONGATTN_PROCESSES is: set all of"),
        ({**EXPLICIT, "LONGATTN_PROCESS": ""}, "LONGATTN_PROCESS must be set where"),
        ({**EXPLICIT, "LONGATTN_PROCESS": "4"}, "LONGATTN_PROCESS=4 must be less than LONGATTN_PROCESSES=4"),
        ({**EXPLICIT, "LONGATTN_PROCESSES": "-4"}, "LONGATTN_PROCESSES='-4' must be an integer of at least 1"),
        ({**EXPLICIT, "LONGATTN_COORDINATOR": "here"}, "LONGATTN_COORDINATOR='here' must be host:port"),
        ({**EXPLICIT, "LONGATTN_COORDINATOR": "here:70000"}, "must be host:port"),
        ({"LONGATTN_HEARTBEAT": "1"}, "LONGATTN_HEARTBEAT='1' must be an integer of at least 5"),
        ({**SLURM, "SLURM_PROCID": "3"}, "SLURM_PROCID=3 must be less than SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID must be set in a task of srun"),
        ({**JOBSET, "PROCESSES_IN_JOB": "3"}, "JOB_COMPLETION_INDEX=3 must be less than PROCESSES_IN_JOB=3"),
        ({"JOBSET_NAME": "a"}, "REPLICATED_JOB_NAME must be set in a pod of a JobSet"),
    ],
)
def test_incomplete_or_contradictory(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        detect(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],x2", "node001"),
        ("rack[2,4]-n[07-09]", "rack2-n07"),
        ("a,b[1-2]", "a"),
    ],
)
def test_first_host_of_slurm_s_lists(nodes: str, host: str) -> None:
    assert launch.first_host(nodes) == host


def test_has_tpu_reads_the_bus(tmp_path: Path) -> None:
    for name, vendor, device in (("a", "0x8086", "0x0063"), ("network", "0x1ae0", "0x0042")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(device + "\n")
    assert not launch._has_tpu({}, tmp_path)
    (tmp_path / "network" / "device").write_text("0x0063\n")
    assert launch._has_tpu({}, tmp_path)
    assert not launch._has_tpu({"JAX_PLATFORMS": "cpu"}, tmp_path)


def test_cloud_tpu_asks_the_metadata_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_tpu", lambda env: True)
    answers = {
        "worker-network-endpoints": "u:0:10.0.0.1,u:1:10.0.0.2",
        "tpu-env": "MEGASCALE_NUM_SLICES: '3'\nZONE: 'z'",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers[self.path.rpartition("/")[2]].encode()
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    try:
        assert launch._workers_of_cloud_tpu(env) == 6
        assert detect(env).coordinator is None
        answers.update({"worker-network-endpoints": "u:0:10.0.0.1", "tpu-env": ""})
        assert detect(env) is None
        assert detect(env | {"TPU_SKIP_MDS_QUERY": "1"}) is None
    finally:
        server.shutdown()
        server.server_close()
    assert detect(env) is None  # nobody answers
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b"}).source == "Cloud TPU"


@pytest.mark.parametrize(
    ("report", "process", "said"),
    [
        ("(stopped sending heartbeats):\n1\n3\nThe tasks have crashed", 0, "lost process 1, 3: silent for 60 s"),
        ("Failed to send RPC to coordination service. Either", 2, "lost process 0, the coordinator"),
        (
            "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask",
            0,
            "not all others came within",
        ),
        ("DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", 1, "cannot reach the coord"),
        ("0 unexpectedly tried to connect with a different incarnation.", 1, "lost the others: a process came twice"),
        (
            "F1 client.h:86] Terminating. absl::Status: INTERNAL: Shutdown barrier has failed.",
            1,
            "Shutdown barrier has",
        ),
    ],
)
def test_meaning_of_what_the_coordination_service_reports(report: str, process: int, said: str) -> None:
    found = detect(EXPLICIT | {"LONGATTN_PROCESS": str(process)})
    assert said in launch.meaning(report, found)
    assert "\n" not in launch.meaning(report, found)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("echo 'longattn: a mistake' >&2; printf '\\002' >&$LONGATTN_VERDICT; kill -ABRT $$", 2, "longattn: a mistake"),
        ("echo 'longattn: a warning' >&2; kill -ABRT $$", 128 + 6, "ended by SIGABRT: start again"),
        ("echo 'F1125 c.h:8] Terminating. RPC to coordination service' >&2; kill -ABRT $$", 75, "lost process 0"),
        ("printf '\\002' >&$LONGATTN_VERDICT; exit 3", 3, ""),
        ("printf 'connected peer ranks: 1connected peer ranks: 0\\n\\n' >&2; exit 0", 0, ""),
    ],
)  # fmt: skip
def test_an_abort_does_not_change_what_was_settled(script, code, said, tmp_path, monkeypatch, capfd) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(fake))
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    assert launch.supervise(["train"], detect(EXPLICIT), lambda: "start again") == code
    err = capfd.readouterr().err.splitlines()
    assert (said in err[-1] and len(err) <= 2) if said else err == []


def test_launchers_parse_and_name_what_is_read() -> None:
    import yaml

    for script in LAUNCHERS.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    job = yaml.safe_load((LAUNCHERS / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    env = {e["name"]: e.get("value") for e in job["template"]["spec"]["containers"][0]["env"]}
    assert JOBSET.keys() - env.keys() == {"JOB_COMPLETION_INDEX"}  # Kubernetes sets it
    assert int(env["PROCESSES_IN_JOB"]) == job["parallelism"] == job["completions"]
    written = "".join(path.read_text() for path in LAUNCHERS.iterdir())
    assert set(re.findall(r"LONGATTN_[A-Z]+", written)) <= set(re.findall(r"LONGATTN_[A-Z]+", launch.__doc__))
