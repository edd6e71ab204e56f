"""`longattn bringup`: its parts in turn, each within its time, the report written as they go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from longattn.bench.bringup import memory, numerics, show, timing
from longattn.bench.bringup.options import PARTS, BringupOptions
from longattn.bench.bringup.report import Report

# The memory part comes before the timed calls, whose peers hold more than its step does; each may take that share of
# the time that is left.
_RUN: dict[str, tuple[Callable[[BringupOptions, Report], None], float]] = {
    "numerics": (numerics.run, 0.65),
    "memory": (memory.run, 0.4),
    "timing": (timing.run, 1.0),
}


def _asked(options: BringupOptions) -> dict[str, Any]:
    """What was asked for, with the sizes that were chosen, and without places on this machine."""
    asked = {name: x for name, x in asdict(options).items() if name not in ("out", "json")}
    asked |= {"parts": list(options.parts), "cases": list(options.cases)}
    return asked | {"T": options.length, "timed_T": options.timed_length, "rounds": options.calls}


def run(options: BringupOptions, console: Console | None = None) -> dict[str, Any]:
    """Try everything and print the tables (or, with `json`, the document that is returned).

    A part that raises is a part of the report; KeyboardInterrupt ends all, what was found by then is on disk.
    """
    report = Report(_asked(options), PARTS, options.folder, options.seconds)
    with report:
        for name in (part for part in PARTS if part in options.parts):
            part, share = _RUN[name]
            report.begin(name, share)
            try:
                part(options, report)
            except Exception as error:  # whatever a new device and its compiler may raise is what is asked for
                report.end(error)
            else:
                report.end()
        report.finish()
    if options.json:
        print(json.dumps(report.document))
    else:
        show.tables(console or Console(width=max(show.WIDTH, Console().width)), report.document, report.path)
    return report.document
