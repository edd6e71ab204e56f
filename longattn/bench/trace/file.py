"""Finds and reads the file of a trace."""

from __future__ import annotations

import re
from pathlib import Path

from jax.profiler import ProfileData

from longattn.bench.trace import devices
from longattn.bench.trace.program import Stored
from longattn.bench.trace.protobuf import event_metadata, fields
from longattn.bench.trace.timeline import Execution, Trace


def find(folder: Path) -> Path:
    """Returns the newest trace in a folder or below it. Raises ValueError if there is none."""
    files = sorted(
        [*folder.glob("*.xplane.pb"), *folder.glob("**/plugins/profile/*/*.xplane.pb")],
        key=lambda path: path.stat().st_mtime,
    )
    if not files:
        raise ValueError(f"{folder} holds no trace (plugins/profile/*/*.xplane.pb)")
    return files[-1]


def read(data: bytes) -> Trace:
    """Returns the trace in a serialised XSpace, the content of a file `*.xplane.pb`.

    Raises ValueError for data that is no trace.
    """
    try:
        metadata, profile = event_metadata(data), ProfileData.from_serialized_xspace(data)
    except (IndexError, KeyError, RuntimeError) as error:
        raise ValueError("the trace is cut off or no protocol buffer; record it again") from error
    programs: dict[int, Stored] = {}
    for name, event in metadata.get("/host:metadata", {}).items():
        if proto := event.stats.get("Hlo Proto"):
            name, number = devices.numbered(name)
            programs[number] = Stored(name, fields(memoryview(proto))[1][-1])  # HloProto.hlo_module = 1

    executions: list[Execution] = []
    unknown = 0.0
    for plane in profile.planes:
        if plane.name == "/host:CPU":
            executions += devices.cpu(plane, programs)
        elif re.fullmatch(r"/device:TPU:\d+", plane.name):
            executions += devices.tpu(plane, metadata.get(plane.name, {}), programs)
        elif re.fullmatch(r"/device:GPU:\d+", plane.name):
            found, rest = devices.gpu(plane, programs)
            executions += found
            unknown += rest
    return Trace(tuple(sorted(executions, key=lambda e: e.start)), unknown)
