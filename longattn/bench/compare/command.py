"""`longattn compare CASE`: attention kernels side by side on this machine's device, under one jax.profiler trace.

The contestants are this project's back ends and their rivals. For linear attention they are its back ends, and exact
attention of the same tokens and heads as a yardstick. A contestant that cannot run here becomes a row with the reason.
Results (and gradients) must agree with a float32 reference before anything is timed. Then the contestants take turns,
each call waited for, while the profiler records when each op began and ended. Those with gigabytes of scratch come
last, since they disturb what follows them. `bench/trace/` reads the record, so times are the device's, without Python's
dispatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from longattn.bench.compare.measurement import measure
from longattn.bench.compare.options import CompareOptions, heading
from longattn.bench.timing import Interval
from longattn.bench.trace import opening, parts_table
from longattn.display import device_text, digits, plain_table, seconds_text
from longattn.files import json_text

WIDTH = 132  # of the tables: a narrower terminal wraps them and loses no digits
TOP = 5  # kernels shown of each contestant; twice as many differences


def run(options: CompareOptions, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints the tables (or the JSON document) on stdout, and returns the document."""
    document = measure(options)
    if options.json:
        print(json_text(document))
    else:
        _print(console or Console(width=max(WIDTH, Console().width)), document)
    return document


def _print(console: Console, document: Mapping[str, Any]) -> None:
    rows = document["rows"]
    ran = [row for row in rows if "samples" in row]
    console.print(_contestants(heading(document["options"]), rows), markup=False)
    for row in ran:
        total = sum(kernel["seconds"] for kernel in row["kernels"])
        console.print(parts_table(f"{row['contestant']}: top kernels", row["kernels"][:TOP], total), markup=False)
    if document["differences"]:
        console.print(_differences(document["differences"][: 2 * TOP], ran[0]["contestant"]), markup=False)
    console.print("\n".join(_notes(document, ran)), highlight=False, markup=False, soft_wrap=True)
    if document["trace"]:
        console.print(opening(document["trace"]), highlight=False, markup=False, soft_wrap=True)
        if document["plot"]:
            console.print(f"Plot: {document['plot']}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print("Nothing could be timed here.", highlight=False)


def _contestants(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table with a row for each contestant."""
    table = plain_table(title)
    headings = (
        "contestant", "device time", "quartiles", "ratio", "idle", "GFLOP/s", "of peak", "GB/s", "of HBM", "vs static",
        "error",
    )  # fmt: skip
    for column in headings:
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for row in rows:
        error = f"{row['error']:.0e}" if "error" in row else ""
        if "samples" not in row:
            table.add_row(row["contestant"], *["-"] * 9, error)
            continue
        s = row["device_seconds"]
        table.add_row(
            row["contestant"],
            seconds_text(s["median"]),
            f"{seconds_text(s['low'])} .. {seconds_text(s['high'])}",
            "-" if row["ratio"] is None else str(Interval(**row["ratio"])),
            f"{row['idle']:.0%}",
            digits(row["flops_per_second"] / 1e9),
            _percent(row["share_of_peak_flops"]),
            digits(row["bytes_per_second"] / 1e9),
            _percent(row["share_of_bandwidth"]),
            "-" if row["static_ratio"] is None else f"{row['static_ratio']:.2f}",
            error,
        )
    return table


def _differences(differences: Sequence[Mapping[str, Any]], base: str) -> Table:
    """Returns a table of the scopes whose time differs from that of the contestant `base`."""
    table = plain_table(f"Largest differences to {base} by named scope")
    for column in ("contestant", "scope", "pass", "its time", base, "difference"):
        left = column in ("contestant", "scope", "pass")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for d in differences:
        sign = "+" if d["difference"] > 0 else "-"
        table.add_row(
            d["contestant"], d["scope"], d["phase"], seconds_text(d["seconds"]), seconds_text(d["first_seconds"]),
            sign + seconds_text(abs(d["difference"])),
        )  # fmt: skip
    return table


def _notes(document: Mapping[str, Any], ran: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines below the tables."""
    notes, environment, peak = [], document["environment"], document["peak"]
    for row in document["rows"]:
        if "samples" not in row:
            notes.append(f"{row['contestant']}: {row['reason']}.")
            continue
        if row["two_speeds"]:
            notes.append(f"{row['contestant']} ran at two speeds: no ratio. Repeat it when the machine is quiet.")
        if row["static_note"]:
            notes.append(f"{row['contestant']}: no static cycles: {row['static_note']}")
    if peak["flops"]:
        how = "a float32 matrix product measured here" if peak["measured"] else "published, bfloat16"
        notes.append(f"Peak {peak['flops'] / 1e9:,.0f} GFLOP/s ({how}); GB/s count each argument and result once.")
    if ran:
        notes += [
            f"The ratio is of median device times to that of {ran[0]['contestant']}, its 95% interval in brackets; "
            "idle: no op ran, within a call.",
            f"Before timing, results agreed with {document['checked_against']}; the error is the largest relative one.",
        ]
    notes.append(
        f"{device_text(environment)}, load {document['load']:.1f} before; {document['options']['rounds']} rounds in "
        f"turns; jax {environment['versions']['jax']}; commit {(environment['commit'] or 'unknown')[:12]}."
    )
    return notes


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
