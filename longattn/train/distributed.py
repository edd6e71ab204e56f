"""Joins several processes, keeps their decisions equal, and notices when one is lost.

Everything here waits on JAX's coordination service, which tolerates any delay. Collectives on devices do not: Gloo, on
CPUs, gives up when processes reach the first one more than 30 seconds apart.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from longattn import launch, terminal
from longattn.compat import coordination_client
from longattn.train import record

_WAIT = 24 * 3600 * 1000  # ms at a barrier: heartbeats find a process that never comes


class Lost(RuntimeError):
    """Another process is gone."""


def first() -> bool:
    """Returns whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def initialize(found: launch.Launch) -> None:
    """Joins the other processes. Call it before JAX touches a device.

    From here on file descriptor 1 goes to standard error; `sys.stdout` still carries the results. Raises ValueError if
    the port of process 0 is taken.
    """
    # Gloo prints the ranks it connected to file descriptor 1.
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", 1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    # The preemption service's handler would swallow a SIGTERM that comes before training listens for it.
    jax.config.update("jax_enable_preemption_service", False)
    waits = {"initialization_timeout": found.connect, "heartbeat_timeout_seconds": found.heartbeat}
    if found.coordinator is None:
        jax.distributed.initialize(**waits)
    else:
        if found.process == 0:
            terminal.say(f"longattn: {found}")
            _insist_on_port(found.coordinator)
        # Process 0 listens where the others were told to ask; left out, JAX would listen on every interface.
        bind = found.coordinator if found.process == 0 else None
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process, coordinator_bind_address=bind,
            cluster_detection_method="deactivate", **waits,
        )  # fmt: skip
        _insist_on_count(found)
    if found.coordinator is None and first():
        terminal.say(f"longattn: {found}: {jax.process_count()} processes")


def _insist_on_count(found: launch.Launch) -> None:
    """Raises ValueError, on every process, if they were told different numbers of processes."""
    client = coordination_client()
    client.key_value_set(f"longattn/processes/{found.process}", str(found.processes))
    client.wait_at_barrier("longattn/processes", found.connect * 1000)
    told = {int(k.rpartition("/")[2]): int(v) for k, v in client.key_value_dir_get("longattn/processes/")}
    for process, count in sorted(told.items()):
        if count != told[0]:
            raise ValueError(
                f"process 0 was told that there are {told[0]} processes, and process {process} that there are {count}: "
                "start all with the same number"
            )


def _insist_on_port(coordinator: str) -> None:
    """Raises ValueError if another process listens there: two services on one port take each other's processes."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # no such address family here: the service reports it
            raise ValueError(
                f"port {port} of the coordinator, {coordinator}, is taken on this machine: end the process that holds "
                "it, or give all processes another port (in LONGATTN_COORDINATOR, or LONGATTN_PORT)"
            ) from error


_blocks = itertools.count()  # all processes enter the same blocks in the same order


@contextlib.contextmanager
def consensus() -> Iterator[dict[str, Any]]:
    """Runs a block that succeeds on all processes or on none.

    Yields a dictionary; the block puts into it, as JSON, what must be equal on all processes.

    Raises:
      ValueError: another process raised an exception in its block (with its message), or the dictionaries differ.
    """
    facts: dict[str, Any] = {}
    if jax.process_count() == 1:
        yield facts
        return
    error: Exception | None = None
    try:
        yield facts
    except Exception as mine:
        error = mine
    client, key, me = coordination_client(), f"longattn/{next(_blocks)}", jax.process_index()
    outcome = {"facts": json.loads(json.dumps(facts)), "error": error and " ".join(str(error).split())}
    client.key_value_set(f"{key}/{me}", json.dumps(outcome))
    client.wait_at_barrier(key, _WAIT)
    if error is not None:
        raise error
    outcomes = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(f"{key}/")}
    for process, other in sorted(outcomes.items()):
        if other["error"] is not None:
            raise ValueError(f"process {process} refused: {other['error']}")
    for process, other in sorted(outcomes.items()):
        difference = record.first_difference(outcomes[0]["facts"], other["facts"])
        if difference is not None:
            path, ours, theirs = difference
            raise ValueError(
                f"the processes disagree: {path} is {ours} on process 0 and {theirs} on process {process}; start all "
                "with the same command, the same files, and run.dir on a file system that they share"
            )


def leave(code: int) -> int:
    """Returns the exit code of one of several processes; after a mistake or a loss, ends the process itself.

    A normal exit of Python would wait for the other processes to exit too. After a mistake this waits a moment for
    those that fail for the same reason: if process 0 went first, they would report its loss instead.
    """
    if code in (0, launch.STOPPED):
        return code
    launch.settle(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != launch.LOST and (client := coordination_client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier("longattn/leave", 5000)
    os._exit(code)


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, so that the loop saves before it ends. Only the main thread gets signals."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python


class SharedEvent:
    """An event that all processes see once it is set on any of them."""

    def __init__(self, event: threading.Event):
        self.event = event
        self._before: Any = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
            self._each = jax.NamedSharding(mesh, jax.P("all"))
            self._any = jax.jit(lambda flags: flags.any(), out_shardings=jax.NamedSharding(mesh, jax.P()))

    def poll(self) -> bool:
        """Returns whether the event was set on any process at the previous call; all processes call it equally often.

        The answer is one call late, so that no device waits for the host. A single process answers at once.
        """
        if jax.process_count() == 1:
            return self.event.is_set()
        mine = np.full(1, self.event.is_set())
        flags = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: mine)
        before, self._before = self._before, self._any(flags)
        return before is not None and bool(before)


# Words in the errors of JAX's runtimes and of orbax when another process is gone.
_LOSS = re.compile(r"gloo|nccl|coordination|barrier|heartbeat|connection (closed|reset|refused)|socket|peer", re.I)


@contextlib.contextmanager
def detect_loss(goes_on: Callable[[], str]) -> Iterator[None]:
    """Turns an error that another process's end caused into `Lost`: one line, which ends with `goes_on()`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError) as error:
        message = str(error.__cause__ or error)
        if jax.process_count() == 1 or not _LOSS.search(message):
            raise
        reason = message.strip().split("\n")[0][:200]
        me = f"process {jax.process_index()} of {jax.process_count()}"
        raise Lost(f"{me} lost another one, whose own log says why ({reason}); {goes_on()}") from error
