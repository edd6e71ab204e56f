"""Device time of every attention kernel, against its rivals and against its compiler's own schedule."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longattn.bench import compare
from longattn.bench.bringup.options import BringupOptions
from longattn.bench.bringup.report import Report
from longattn.bench.compare.admission import admit
from longattn.bench.timing import interleave
from longattn.cost import hardware
from longattn.ops import dispatch
from longattn.ops.attention.api import BACK_ENDS

_KEPT = (
    "error", "reason", "device_seconds", "ratio", "idle", "flops", "share_of_peak_flops", "share_of_bandwidth",
    "static_ratio", "static_note",
)  # fmt: skip


def run(options: BringupOptions, report: Report) -> None:
    """Adds a row for each contestant and direction."""
    part = report.part("timing")
    kind, known = dispatch.target().kind, ", ".join(hardware.TENSOR_CORES)
    chip = hardware.chip_of(kind)
    if chip is None or chip.name not in hardware.TENSOR_CORES:
        part["note"] = f"static cycles are known of Pallas kernels on {known}, this is {kind}"
    for case, what in ((c, w) for c, w in compare.CASES.items() if compare.known(c) is compare.CONTESTANTS):
        if report.late:
            row = {"what": what, "contestant": "all", "outcome": "not run", "reason": "the time for this part was over"}
            part["rows"].append(row)
            continue
        report.at(f"{case} of all contestants")
        rows = _rows(_options(options, case))
        part["rows"] += [{"what": what, **row} for row in rows]
        for row in rows:
            report.say(f"{what}, {row['contestant']}: {row['outcome']}")
        report.write()


def _options(options: BringupOptions, case: str) -> compare.CompareOptions:
    H, D = (2, 64) if options.small else (8, 128)
    return compare.CompareOptions(case, T=options.timed_length, H=H, D=D, rounds=options.calls)


def _rows(options: compare.CompareOptions) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="longattn_bringup_") as folder:
        try:
            rows = compare.measure(replace(options, out=folder))["rows"]
        except Exception as error:  # a profiler that does not work on a new device may raise anything
            rows = _by_the_host(options)
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows = [row | {"clock_note": why} for row in rows]
    return [_row(row, options) for row in rows]


def _by_the_host(options: compare.CompareOptions) -> list[dict[str, Any]]:
    """Returns rows with wall-clock seconds of the contestants whose results are right."""
    options = options.resolved()
    _, fns, known = admit(options)
    seconds = interleave(fns, options.rounds)
    return [
        {"contestant": name, **known[name], **({"host_seconds": seconds[name]} if name in fns else {})}
        for name in options.names
    ]


def _row(row: Mapping[str, Any], options: compare.CompareOptions) -> dict[str, Any]:
    """Returns what the report keeps of a comparison's row."""
    name, made = row["contestant"], {key: row[key] for key in _KEPT if key in row}
    sizes = f"B {options.B} T {options.T:,} H {options.H} D {options.D}"
    made |= {"contestant": name, "problem": f"{sizes} {options.problem.dtype} {options.mask}"}
    if "samples" in row:
        made |= {"outcome": "timed", "seconds": row["device_seconds"]["median"], "clock": "device"}
    elif "host_seconds" in row:
        note = row.get("clock_note") or made.pop("reason", "")
        made |= {"outcome": "timed", "seconds": statistics.median(row["host_seconds"]), "clock": "host"}
        made["clock_note"] = note
    else:
        # A rival may disagree or be refused by its compiler; our own back ends may not.
        wrong = name in BACK_ENDS and ("error" in row or re.match(r"\w+Error: ", row["reason"]))
        made["outcome"] = "failed" if wrong else "refused"
    made |= _cycles(row)
    return made


def _cycles(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns static and measured cycles of a core, or {} unless both are known."""
    chip = hardware.chip_of(dispatch.target().kind)
    if row.get("static_seconds") is None or chip is None:
        return {}
    clock = hardware.tpu_clock(chip.name)
    cycles = row["static_seconds"] * clock, row["device_seconds"]["median"] * clock
    return {"static_cycles": cycles[0], "measured_cycles": cycles[1]}
