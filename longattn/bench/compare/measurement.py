"""The comparison itself: contestants take turns under one trace, which gives a row for each, a plot and a log."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from longattn.bench import attention, trace
from longattn.bench.compare.admission import admit
from longattn.bench.compare.options import CompareOptions
from longattn.bench.compare.picture import plot
from longattn.bench.compare.roofline import static_seconds
from longattn.bench.timing import ratio, turns, two_speeds
from longattn.cost import hardware
from longattn.display import seconds_text
from longattn.environment import environment
from longattn.files import json_text
from longattn.ops.attention.api import BACK_ENDS
from longattn.ops.linear.api import BACK_ENDS as LINEAR_BACK_ENDS

VERSION = 2
FILE = "compare.jsonl"


def measure(options: CompareOptions) -> dict[str, Any]:
    """Runs the comparison and returns its document. Writes a plot and FILE, and keeps the trace.

    Raises:
      ValueError: for inputs that exceed this machine's memory.
    """
    progress = Console(stderr=True)
    options = options.resolved()
    attention.check_memory(options.problem.numbers(), options.T)
    folder, load = Path(options.out), os.getloadavg()[0]
    device = hardware.detect()
    with progress.status("compiling, and comparing results with the reference"), _compiled_anew():
        against, fns, known = admit(options)
    rows = [{"contestant": name, "about": options.known[name].about, **known[name]} for name in options.names]
    document: dict[str, Any] = {
        "version": VERSION,
        "kind": "compare",
        "options": {**asdict(options), "mask": str(options.mask)},
        "environment": environment(),
        "load": load,  # the machine's load from other work
        "checked_against": f"{against}, float32",
        "peak": {
            "flops": device.peak_flops,
            "measured": device.measured,
            "hbm_bandwidth": device.chip.hbm_bandwidth / device.chip.devices if device.chip else None,
        },
        "trace": None,
        "rows": rows,
    }
    if fns:
        folder.mkdir(parents=True, exist_ok=True)
        with progress.status(f"{options.rounds} rounds of {', '.join(fns)}"):
            host, session = _record(fns, options.rounds, folder)
        document["trace"] = str(session)
        recorded = trace.read(trace.find(session).read_bytes())
        base: list[float] = []
        for row in rows:
            if (name := row["contestant"]) not in fns:
                continue
            row["host_seconds"] = [seconds for _, seconds in host[name]]
            executions, calls = recorded.of(f"jit_compare_{name}"), host[name][-1][0] + 1
            if len(executions) != calls:
                row["reason"] = f"the trace shows {len(executions)} executions of {calls} calls"
                if recorded.unknown_seconds:
                    row["reason"] += (
                        f"; {seconds_text(recorded.unknown_seconds)} of kernels name no program, as in CUDA graphs: "
                        "launch them one by one with XLA_FLAGS=--xla_gpu_enable_command_buffer="
                    )
                continue
            row |= _row(name, options, [executions[i] for i, _ in host[name]], device)
            base = base or row["samples"]
            row["two_speeds"] = two_speeds(row["samples"])
            row["ratio"] = None if row["two_speeds"] or two_speeds(base) else asdict(ratio(row["samples"], base))
    document["differences"] = differences(rows)
    _write(document, folder)
    return document


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """Keeps JAX from reusing a program that was compiled with other named scopes; its cache key ignores them."""
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def _record(
    fns: Mapping[str, Callable[[], Any]], rounds: int, folder: Path
) -> tuple[dict[str, list[tuple[int, float]]], Path]:
    """Runs the contestants in turns under one trace; returns the calls to keep, as `turns`, and the trace's folder.

    The trace includes the calls that are not kept. Its folder is unique: another comparison may write beside it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python's calls would slow the run down
    options.session_id = f"{time.strftime('%Y_%m_%d_%H_%M_%S')}_{uuid.uuid4().hex[:8]}"
    with jax.profiler.trace(str(folder), profiler_options=options):
        calls = turns(fns, rounds)
    return calls, folder / "plugins" / "profile" / options.session_id


def _row(
    name: str, options: CompareOptions, executions: Sequence[trace.Execution], device: hardware.Device
) -> dict[str, Any]:
    """Returns what the trace says about one contestant."""
    samples = [e.seconds for e in executions]
    seconds = trace.Spread.of(samples)
    problem = options.given(name)
    flops, moved = problem.flops(options.what), problem.least_bytes(options.what)
    chip = device.chip
    bandwidth = chip.hbm_bandwidth / chip.devices if chip else None
    by_compute = flops / device.peak_flops if device.peak_flops else None
    by_memory = moved / bandwidth if bandwidth else None
    static, why = static_seconds(name, options, device)
    return {
        "samples": samples,
        "device_seconds": asdict(seconds),
        "idle": float(np.median([1 - e.busy / e.seconds for e in executions])),
        "flops": flops,
        "flops_per_second": flops / seconds.median,
        "share_of_peak_flops": None if by_compute is None else by_compute / seconds.median,
        "bytes": moved,
        "bytes_per_second": moved / seconds.median,
        "share_of_bandwidth": None if by_memory is None else by_memory / seconds.median,
        "roofline": None if by_compute is None else max(by_compute, by_memory or 0.0) / seconds.median,
        "bound": None if by_compute is None or by_memory is None else "memory" if by_memory > by_compute else "compute",
        "static_seconds": static,
        "static_ratio": None if static is None else seconds.median / static,
        "static_note": why,
        "kernels": [asdict(p) for p in trace.kernels(executions)],
        "scopes": [asdict(p) for p in trace.scopes(executions, _align)],
    }


def _align(scope: trace.Scope) -> str:
    """Returns a scope's name without the op and the back end, so that scopes of two back ends can be compared."""
    op, *path = scope.path or ("",)
    if op not in ("attention", "linear_attention"):
        return str(scope)
    if path and path[0] in {**BACK_ENDS, **LINEAR_BACK_ENDS}:
        path = path[1:]
    return "/".join(path) or op


def differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns by how much each scope of each contestant differs from the first contestant, largest first."""
    ran = [row for row in rows if "scopes" in row]
    result = []
    parts = lambda row: {(p["name"], p["phase"]): p["seconds"] for p in row["scopes"]}
    for row in ran[1:]:
        mine, first = parts(row), parts(ran[0])
        for key in dict.fromkeys([*mine, *first]):
            a, b = mine.get(key, 0.0), first.get(key, 0.0)
            result.append(
                {"contestant": row["contestant"], "scope": key[0], "phase": key[1], "seconds": a, "first_seconds": b,
                 "difference": a - b}
            )  # fmt: skip
    return sorted(result, key=lambda d: -abs(d["difference"]))


def _write(document: dict[str, Any], folder: Path) -> None:
    """Appends a line per contestant to FILE and draws the plot. Writes nothing if nothing ran."""
    document["plot"] = None
    if document["trace"] is None:
        return
    shared = {k: v for k, v in document.items() if k not in ("rows", "differences", "plot")}
    with open(folder / FILE, "a") as file:
        file.write("".join(json_text({**shared, **row}) + "\n" for row in document["rows"]))
    if not any("samples" in row for row in document["rows"]):
        return
    path = Path(document["trace"]) / "compare.png"
    plot(document).savefig(path, dpi=150)
    document["plot"] = str(path)
