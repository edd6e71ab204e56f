"""Several processes that train or evaluate together: how they meet, and what they agree on.

What is written here waits by JAX's coordination service, which bears any delay, where devices would not: the CPU's
collectives (Gloo) give up on processes that come to the first one more than 30 seconds apart.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from longattn import launch
from longattn.train import record

_WAIT = 24 * 3600 * 1000  # ms at a barrier: who does not come is found by the heartbeats


class Lost(RuntimeError):
    """Another process is gone."""


def first() -> bool:
    """Whether this is process 0, the one that writes and speaks."""
    return jax.process_index() == 0


def initialize(found: launch.Launch) -> None:
    """Join the other processes; before JAX touches a device. From here on standard output carries results alone.

    Raises ValueError where process 0's port is taken.
    """
    # Gloo writes to standard output which ranks are connected.
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", 1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    # Its handler would swallow every SIGTERM before training listens.
    jax.config.update("jax_enable_preemption_service", False)
    waits = {"initialization_timeout": found.connect, "heartbeat_timeout_seconds": found.heartbeat}
    if found.coordinator is None:
        jax.distributed.initialize(**waits)
    else:
        if found.process == 0:
            print(f"longattn: {found}", file=sys.stderr)
            _insist_on_port(found.coordinator)
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process, cluster_detection_method="deactivate", **waits
        )
    if found.coordinator is None and first():
        print(f"longattn: {found}: {jax.process_count()} processes", file=sys.stderr)


def _insist_on_port(coordinator: str) -> None:
    """Raise ValueError where another process listens: two services on one port take each other's processes."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # no such family here: the service finds out by itself
            raise ValueError(
                f"port {port} of the coordinator, {coordinator}, is taken on this machine: end the process that holds "
                "it, or give all processes another port (in LONGATTN_COORDINATOR, or LONGATTN_PORT)"
            ) from error


def _client() -> Any:
    """Of JAX's coordination service, which has no public way to its barriers; orbax takes this one too."""
    from jax._src.distributed import global_state

    return global_state.client


_blocks = itertools.count()  # processes come to the same blocks in the same order


@contextlib.contextmanager
def together() -> Iterator[dict[str, Any]]:
    """A block that all processes leave at once: where one refuses, all do.

    Yields a dictionary for what must be equal on all processes, as JSON.

    Raises:
      ValueError: where another process raised an exception inside, with its message; or for facts that differ.
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
    client, key, me = _client(), f"longattn/{next(_blocks)}", jax.process_index()
    said = {"facts": json.loads(json.dumps(facts)), "error": error and " ".join(str(error).split())}
    client.key_value_set(f"{key}/{me}", json.dumps(said))
    client.wait_at_barrier(key, _WAIT)
    if error is not None:
        raise error
    everyone = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(f"{key}/")}
    for process, other in sorted(everyone.items()):
        if other["error"] is not None:
            raise ValueError(f"process {process} refused: {other['error']}")
    for process, other in sorted(everyone.items()):
        difference = record.first_difference(everyone[0]["facts"], other["facts"])
        if difference is not None:
            path, ours, theirs = difference
            raise ValueError(
                f"the processes disagree: {path} is {ours} on process 0 and {theirs} on process {process}; start all "
                "with the same command, the same files, and run.dir on a file system that they share"
            )


def leave(code: int) -> int:
    """The exit code of a process of several; after a mistake or a loss it ends here.

    Python's way out would wait for the others to come to theirs. Those that end for the same reason are waited for a
    moment: the end of process 0 would hide it.
    """
    if code in (0, launch.STOPPED):
        return code
    launch.settle(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != launch.LOST and (client := _client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier("longattn/leave", 5000)
    os._exit(code)


class Agreed:
    """An event that counts on all processes once it is set on any."""

    def __init__(self, event: threading.Event):
        self.event = event
        self._before: Any = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
            self._each = jax.NamedSharding(mesh, jax.P("all"))
            self._any = jax.jit(lambda flags: flags.any(), out_shardings=jax.NamedSharding(mesh, jax.P()))

    def poll(self) -> bool:
        """Whether the event was set anywhere when this was called before; all processes call it equally often.

        Only what is already known is waited for, so that no device waits for the host. One process alone knows at once.
        """
        if jax.process_count() == 1:
            return self.event.is_set()
        mine = np.full(1, self.event.is_set())
        flags = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: mine)
        before, self._before = self._before, self._any(flags)
        return before is not None and bool(before)


# What the runtimes of JAX's platforms and orbax say where others are gone.
_OF_OTHERS = re.compile(r"gloo|nccl|coordination|barrier|heartbeat|connection (closed|reset|refused)|socket|peer", re.I)


@contextlib.contextmanager
def others(goes_on: Callable[[], str]) -> Iterator[None]:
    """Turns the errors that come of another process's end into `Lost`, of one line that ends as `goes_on` says."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError) as error:
        said = str(error.__cause__ or error)
        if jax.process_count() == 1 or not _OF_OTHERS.search(said):
            raise
        reason = said.strip().split("\n")[0][:200]
        me = f"process {jax.process_index()} of {jax.process_count()}"
        raise Lost(f"{me} lost another one, whose own log says why ({reason}); {goes_on()}") from error
