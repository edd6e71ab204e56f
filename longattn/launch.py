"""Finds out which of several processes this one is, and reports in one line when another one is lost.

`longattn train` and `longattn eval` run on as many processes as the environment says. The first of these that is set
decides:

  LONGATTN_COORDINATOR, LONGATTN_PROCESSES, LONGATTN_PROCESS   host:port of process 0, how many, which one: all three
  TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES                   a TPU on GKE; JAX finds out the rest
  SLURM_STEP_NUM_TASKS, SLURM_PROCID, ...                      a task of `srun`; process 0 is on the step's first node
  JOBSET_NAME, JOB_COMPLETION_INDEX, ...                       a pod of a JobSet; the manifest passes them on
  the metadata server                                          a worker of a Cloud TPU; JAX finds out the rest

LONGATTN_PORT is process 0's port under SLURM and in a JobSet. LONGATTN_CONNECT is how many seconds processes wait for
each other at the start, 300 by default. LONGATTN_HEARTBEAT is how many seconds of silence make a process count as lost,
60 by default.

When a process is lost, JAX's coordination service aborts the others with a C++ stack trace, which they cannot prevent.
So each of several processes starts a child that does the work. The parent forwards signals and output, and explains an
abort in one line. Nothing here touches a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longattn import terminal

LOST = 75  # exit code if another process is lost: EX_TEMPFAIL of sysexits.h, "try again"
STOPPED = 128 + signal.SIGTERM  # exit code after SIGTERM and saving
INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C
_PATIENCE = 10  # seconds from Ctrl-C until the child is killed
# Environment of the child: the supervisor's process id, and the file descriptor for its exit code.
_SUPERVISED, _VERDICT = "LONGATTN_SUPERVISED", "LONGATTN_VERDICT"
_EXPLICIT = ("LONGATTN_COORDINATOR", "LONGATTN_PROCESSES", "LONGATTN_PROCESS")
_PORT = 8476
# PCI ids of Google and its TPUs, as in the Makefile.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x0083", "0x007c")


@dataclass(frozen=True)
class Launch:
    """One process of several."""

    source: str  # where the environment says so
    coordinator: str | None  # host:port of process 0; None: JAX finds it out, and which process this is
    processes: int | None
    process: int | None
    connect: int  # seconds to wait for all processes at the start
    heartbeat: int  # seconds of silence after which a process counts as lost

    def __str__(self) -> str:
        if self.coordinator is None:
            return f"a process of several, by {self.source}"
        return f"process {self.process} of {self.processes}, by {self.source}, coordinator {self.coordinator}"


# ---- what the environment says


def detect(env: Mapping[str, str]) -> Launch | None:
    """Returns which of several processes the environment says that this is; None if it is the only one.

    Raises ValueError, naming the variable, for settings that are incomplete or contradictory.
    """
    connect = _whole(env, "LONGATTN_CONNECT", 1, 300)
    heartbeat = _whole(env, "LONGATTN_HEARTBEAT", 5, 60)
    if any(name in env for name in _EXPLICIT):
        source, found = "LONGATTN_COORDINATOR", _explicit(env)
    elif _workers_on_gke(env) > 1:
        return Launch("Cloud TPU", None, None, None, connect, heartbeat)
    elif "SLURM_STEP_NUM_TASKS" in env:
        source, found = "SLURM", _slurm(env)
    elif "JOBSET_NAME" in env:
        source, found = "JobSet", _jobset(env)
    elif _workers_of_cloud_tpu(env) > 1:
        return Launch("Cloud TPU", None, None, None, connect, heartbeat)
    else:
        return None
    coordinator, processes, process = found
    return Launch(source, coordinator, processes, process, connect, heartbeat) if processes > 1 else None


def _text(env: Mapping[str, str], name: str, why: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} must be set {why}")
    return env[name]


def _whole(env: Mapping[str, str], name: str, least: int, default: int | None = None, why: str = "") -> int:
    """Returns an integer of at least `least`. A missing one is `default`, or else the mistake that `why` explains."""
    if default is not None and not env.get(name):
        return default
    text = _text(env, name, why)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r} must be an integer of at least {least}: correct it, or unset it")
    return int(text)


def _explicit(env: Mapping[str, str]) -> tuple[str, int, int]:
    given = " and ".join(name for name in _EXPLICIT if name in env)
    why = f"where {given} is: set all of {', '.join(_EXPLICIT)}, on each process, or none of them"
    coordinator = _text(env, "LONGATTN_COORDINATOR", why)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"LONGATTN_COORDINATOR={coordinator!r} must be host:port: the name or address of process 0's machine and a "
            "port that is free there, such as 10.0.0.1:8476"
        )
    processes = _whole(env, "LONGATTN_PROCESSES", 1, why=why)
    process = _whole(env, "LONGATTN_PROCESS", 0, why=why)
    if process >= processes:
        raise ValueError(
            f"LONGATTN_PROCESS={process} must be less than LONGATTN_PROCESSES={processes}: processes count from 0"
        )
    return coordinator, processes, process


def _slurm(env: Mapping[str, str]) -> tuple[str, int, int]:
    why = "in a task of srun, where SLURM_STEP_NUM_TASKS is: start by srun, or set " + ", ".join(_EXPLICIT)
    processes = _whole(env, "SLURM_STEP_NUM_TASKS", 1)
    if processes == 1:
        return "", 1, 0
    process = _whole(env, "SLURM_PROCID", 0, why=why)
    if process >= processes:
        raise ValueError(
            f"SLURM_PROCID={process} must be less than SLURM_STEP_NUM_TASKS={processes}: start by srun, or set "
            + ", ".join(_EXPLICIT)
        )
    # Jobs may share a node, so the port depends on the job. Linux gives out no ports of this range by itself.
    port = _whole(env, "LONGATTN_PORT", 1, 61440 + _whole(env, "SLURM_JOB_ID", 0, why=why) % 4096)
    return f"{first_host(_text(env, 'SLURM_STEP_NODELIST', why))}:{port}", processes, process


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: gpu003 for "gpu[003-007,9],cpu1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern matches the empty string too
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _jobset(env: Mapping[str, str]) -> tuple[str, int, int]:
    why = "in a pod of a JobSet, where JOBSET_NAME is: pass it on as configs/launch/gke_jobset.yaml does"
    name, job = env["JOBSET_NAME"], _text(env, "REPLICATED_JOB_NAME", why)
    pods = _whole(env, "PROCESSES_IN_JOB", 1, why=why)
    jobs, job_index = _whole(env, "JOB_REPLICAS", 1, why=why), _whole(env, "JOB_INDEX", 0, why=why)
    pod = _whole(env, "JOB_COMPLETION_INDEX", 0, why="in a pod of a JobSet: say `completionMode: Indexed` in its Job")
    for index, count in (("JOB_INDEX", "JOB_REPLICAS"), ("JOB_COMPLETION_INDEX", "PROCESSES_IN_JOB")):
        if int(env[index]) >= int(env[count]):
            raise ValueError(
                f"{index}={env[index]} must be less than {count}={env[count]}: PROCESSES_IN_JOB must be the Job's "
                "parallelism, JOB_REPLICAS the JobSet's replicas"
            )
    # The JobSet's headless service gives the first pod of the first job this name.
    coordinator = f"{name}-{job}-0-0.{name}:{_whole(env, 'LONGATTN_PORT', 1, _PORT)}"
    return coordinator, jobs * pods, job_index * pods + pod


def _has_tpu(env: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Returns whether this machine has a TPU that JAX may use."""
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return False

    def is_tpu(device: Path) -> bool:
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
            return vendor == _GOOGLE and kind in _TPUS
        return False

    return devices.is_dir() and any(map(is_tpu, devices.iterdir()))


def _workers_on_gke(env: Mapping[str, str]) -> int:
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    return len(hosts) * int(env.get("MEGASCALE_NUM_SLICES") or 1) if hosts and _has_tpu(env) else 1


def _workers_of_cloud_tpu(env: Mapping[str, str]) -> int:
    """Returns the number of workers that a Cloud TPU's metadata server reports; 1 without such a server."""
    if env.get("TPU_SKIP_MDS_QUERY") or not _has_tpu(env):
        return 1

    import urllib.request  # here: every command imports this module, and only a TPU needs this

    def attribute(name: str) -> str:
        host = env.get("GCE_METADATA_IP", "metadata.google.internal")
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()

    try:
        workers = len(attribute("worker-network-endpoints").split(","))
        slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", attribute("tpu-env"))
    except OSError:
        return 1
    return workers * (int(slices[1]) if slices else 1)


def interrupted(command: str) -> int:
    """Says that a command was interrupted, and returns its exit code."""
    terminal.say(f"longattn: {command} was interrupted; what was saved stays")
    return INTERRUPTED


# ---- two processes for one


def supervised() -> bool:
    """Returns whether `supervise` started this process."""
    return os.environ.get(_SUPERVISED) == str(os.getppid())


def settle(code: int) -> None:
    """Tells the supervisor this process's exit code, in case JAX aborts the process before it exits."""
    os.write(int(os.environ[_VERDICT]), bytes([code]))


def supervise(command: list[str], launch: Launch, goes_on: Callable[[], str]) -> int:
    """Runs `longattn COMMAND` in a child process and returns its exit code, `LOST` if another process was lost.

    goes_on: returns what happens when the same command is started again, for the line about a lost process.
    """
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    child: list[subprocess.Popen[bytes]] = []

    def forward(*_: Any) -> None:
        for process in child:
            process.send_signal(signal.SIGTERM)

    stop = threading.Event()

    def interrupt(*_: Any) -> None:
        stop.set()
        for process in child:
            process.send_signal(signal.SIGINT)
            kill = threading.Timer(_PATIENCE, process.kill)  # it may wait for a process that is gone
            kill.daemon = True
            kill.start()

    # A launcher's SIGTERM may reach both processes; the child handles a second one like the first.
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, interrupt)
    settled, verdict = os.pipe()
    os.set_blocking(settled, False)
    own = {"PYTHONPATH": paths, _SUPERVISED: str(os.getpid()), _VERDICT: str(verdict)}
    child.append(
        subprocess.Popen(
            [sys.executable, "-P", "-m", "longattn", *command],
            env={**os.environ, **own},
            pass_fds=[verdict],
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C comes here alone, and goes on from here once
        )
    )
    if stop.is_set():
        interrupt()  # it came before there was a child
    report = _pass_on(child[0], stop)
    code = child[0].wait()
    if stop.is_set():
        return interrupted(command[0])
    with contextlib.suppress(BlockingIOError):  # nothing was settled
        if code == -signal.SIGABRT:
            return os.read(settled, 1)[0]
    if code >= 0:
        return code
    if code == -signal.SIGTERM:
        terminal.say("longattn: stopped by SIGTERM before the first step; nothing was to be saved")
        return STOPPED
    if report and code == -signal.SIGABRT:
        what = meaning(report, launch)
        remedy = f"; {goes_on()}" if what.startswith("lost") else ""
        terminal.say(f"longattn: {launch}: {what}{remedy}")
        return LOST
    name = signal.Signals(-code).name
    terminal.say(f"longattn: {launch}: ended by {name}: {goes_on()}")
    return 128 - code


def _pass_on(child: subprocess.Popen[bytes], stop: threading.Event) -> str:
    """Forwards the child's stderr, and returns the report of the coordination service.

    The report, Gloo's lines about connections and all that follows an interrupt are hidden unless LONGATTN_TRACEBACK is
    set.
    """
    everything, report, hidden = bool(os.environ.get("LONGATTN_TRACEBACK")), b"", False
    assert child.stderr is not None  # it was started with a pipe
    for line in child.stderr:
        if re.match(rb"F\d{4} |E\d{4} .*coordination_service", line) or (report and not line.startswith(b"longattn: ")):
            report += line
            hidden = True
        else:
            # Several threads write Gloo's lines, so two may share a line, and an empty one follows.
            hidden = b"connected peer ranks" in line or (hidden and not line.strip())
        if everything or not (hidden or stop.is_set()):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    return report.decode(errors="replace")


def meaning(report: str, launch: Launch) -> str:
    """Explains the coordination service's report in one line."""
    silent = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", report)
    if silent:
        lost = ", ".join(re.findall(r"\d+", silent[1]))
        return f"lost process {lost}: silent for {launch.heartbeat} s (LONGATTN_HEARTBEAT); its own log says why"
    if "RegisterTask" in report:
        missing = "not all others came" if launch.process == 0 else "cannot reach the coordinator"
        return (
            f"{missing} within {launch.connect} s (LONGATTN_CONNECT): start as many processes as were said, and let "
            f"them reach {launch.coordinator or 'process 0'}"
        )
    if "incarnation" in report or "already in error" in report:
        return "lost the others: a process came twice; start all of them again, each with a number of its own"
    if "RPC to coordination service" in report:
        return "lost process 0, the coordinator; its own log says why"
    said = re.search(r"absl::Status: (.*)", report) or re.search(r"\] (.*)", report)
    return f"lost the others: {said[1].strip() if said else 'JAX ended this process'}"


def die_with_the_supervisor() -> None:
    """Lets the kernel kill this process when its parent ends for any reason."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has prctl
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
