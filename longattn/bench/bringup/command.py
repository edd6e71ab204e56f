"""`longattn bringup`: runs its parts in turn, each within its time, and keeps the report up to date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from longattn.bench.bringup import memory, numerics, show, timing
from longattn.bench.bringup.options import PARTS, BringupOptions
from longattn.bench.bringup.report import Report
from longattn.files import json_text

# In order, with the share of the remaining time that each part may take. Memory comes before timing, since rivals that
# are timed hold more memory than its training step, whose peak would then be hidden.
_RUN: dict[str, tuple[Callable[[BringupOptions, Report], None], float]] = {
    "numerics": (numerics.run, 0.65),
    "memory": (memory.run, 0.4),
    "timing": (timing.run, 1.0),
}


def _asked(options: BringupOptions) -> dict[str, Any]:
    """Returns the options with the chosen sizes, and without paths of this machine."""
    asked = {name: x for name, x in asdict(options).items() if name not in ("out", "json")}
    asked |= {"parts": list(options.parts), "cases": list(options.cases)}
    return asked | {"T": options.length, "timed_T": options.timed_length, "rounds": options.calls}


def run(options: BringupOptions, console: Console | None = None) -> dict[str, Any]:
    """Try everything and print the tables (or, with `json`, the document that is returned).

    A part that raises is reported as failed. After KeyboardInterrupt the report on disk has what was found by then.
    """
    report = Report(_asked(options), PARTS, options.folder, options.seconds)
    with report:
        for name in (part for part in PARTS if part in options.parts):
            part, share = _RUN[name]
            report.begin(name, share)
            try:
                part(options, report)
            except Exception as error:  # a new device and its compiler may raise anything, and that is the finding
                report.end(error)
            else:
                report.end()
        report.finish()
    if options.json:
        print(json_text(report.document))
    else:
        show.tables(console or Console(width=max(show.WIDTH, Console().width)), report.document, report.path)
    return report.document
