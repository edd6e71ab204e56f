"""Shows a plan as tables in the terminal and as a page. All numbers come from the document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longattn.cost import hardware
from longattn.cost.collective import BUFFER_KINDS
from longattn.display import seconds_text as seconds
from longattn.display import style
from longattn.plan import calibration
from longattn.plan.sequence import show as sequence

_GiB = 2**30
_SHOWN = 12  # buffers and collectives in a table
FOOT = (
    "Compiled, not run. Times are lower bounds: every instruction runs at the chip's published peak or bandwidth, and "
    "every transfer at the bandwidth of its links (in a TPU slice, those of the shortest route). Softmax attention is "
    "counted by formula where its loops depend on data. Real steps take longer."
)


def formulas() -> str:
    """Returns a sentence about the accuracy of estimates by formula."""
    errors = [abs(error) for error in calibration.memory_errors().values()]
    return (
        f"By formula; over {len(errors)} compiled programs (scanned layers, causal masks) the memory was off by "
        f"{sum(errors) / len(errors):.0%} on average and {max(errors):.0%} at most."
    )


def gib(n: float) -> str:
    """Formats bytes as GiB, or as MiB below 10 MiB."""
    return f"{n / _GiB:.2f} GiB" if n >= 10 * 2**20 else f"{n / 2**20:.2f} MiB"


def title(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Describes the compiled program."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in row.get("mesh", {}).items() if n > 1)
    where = f"{row['topology']} ({row['devices']} devices{': ' + mesh if mesh else ''})"
    model = f"{document['model']}, {document['parameters'] / 1e9:.3g} B parameters"
    return f"{model}, T {row['T']:,}, B {row['B']:,} on {where}{spread(row)}"


def spread(row: Mapping[str, Any]) -> str:
    """Returns how the sequence is spread over devices, ", ring, zigzag"; nothing if each device has whole sequences."""
    mesh = row.get("mesh", {})
    alone = mesh.get("ring", 1) * mesh.get("seq", 1) == 1
    return "" if alone else f", {row['strategy']}, {row['layout']}"


def verdict(row: Mapping[str, Any]) -> str:
    """Says whether a program fits."""
    if "reason" in row:
        return f"No program: {row['reason']}"
    spare = row["hbm_limit"] - row["hbm_bytes"]
    need = f"each device needs {gib(row['hbm_bytes'])} and has {gib(row['hbm_limit'])}"
    if row["topology"].partition(":")[0] in hardware.GPUS:
        need += " (JAX takes 75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more)"
    return (
        f"Fits: {need}, {gib(spare)} to spare." if row["fits"] else f"Does not fit: {need}, {gib(-spare)} too little."
    )


def memory_rows(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns the bytes of each kind of buffer at the peak, and the gaps between buffers."""
    parts = [(kind, row["by_kind"][kind]) for kind in BUFFER_KINDS if row["by_kind"][kind]]
    between = row["hbm_bytes"] - sum(n for _, n in parts)
    return [*parts, ("between buffers", between)] if between > 0 else parts


def buffer_rows(row: Mapping[str, Any]) -> list[tuple[str, str, str, int]]:
    """Returns (name, kind, type, bytes) of the largest buffers; buffers that agree in the first three share a row."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for b in row.get("buffers", ()):
        rows.setdefault((b["name"], b["kind"], b["type"]), []).append(b["bytes"])
    found = [
        (name, kind, f"{len(n)} x {type_}" if len(n) > 1 else type_, sum(n)) for (name, kind, type_), n in rows.items()
    ]
    return sorted(found, key=lambda r: -r[3])[:_SHOWN]


def collective_rows(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns (kind, over, runs, bytes, time, hidden, where) of the largest collectives, and their total."""
    collectives = row.get("collectives", ())
    rows = [
        (
            c["kind"],
            f"{c['axes'] or '-'} ({c['devices']})",
            f"{c['runs']:,.0f}",
            gib(c["bytes"]),
            seconds(c["seconds"]),
            ("all" if c["exposed_seconds"] <= 1e-3 * c["seconds"] else f"{1 - c['exposed_seconds'] / c['seconds']:.0%}")
            if c["asynchronous"]
            else "none",
            c["scope"] or "-",
        )
        for c in collectives[:_SHOWN]
    ]
    total = lambda key: sum(c[key] for c in collectives)
    more = f"all {len(collectives)}" if len(collectives) > _SHOWN else "all"
    hidden = f"{1 - total('exposed_seconds') / total('seconds'):.0%}" if total("seconds") else "-"
    return [*rows, (more, "", f"{total('runs'):,.0f}", gib(total("bytes")), seconds(total("seconds")), hidden, "")]


COLLECTIVES = ("collective", "over (devices)", "runs", "received", "at link rate", "hidden", "in")


def time_rows(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the work and time of one step on one device."""
    s = row["seconds"]
    if "messages" in row:
        return [
            ("products", f"{row['flops'] / 1e12:,.2f} TFLOP"),
            ("of the model", f"{row['model_flops'] / 1e12:,.2f} TFLOP (no recomputation, mean over devices)"),
            ("products at peak", seconds(s["products"])),
            ("messages at link rate", seconds(s["link"])),
            ("MFU, at most", f"{row['mfu_bound']:.1%}"),
        ]
    by_formula, linear = row["attention_flops_by_formula"], row["linear_attention_flops"]
    parts = [f"{by_formula / row['flops']:.0%} attention, by formula"] if by_formula or not linear else []
    parts += [f"{linear / row['flops']:.0%} linear attention"] if linear else []
    return [
        ("products", f"{row['flops'] / 1e12:,.2f} TFLOP ({', '.join(parts)})"),
        ("of the model", f"{row['model_flops'] / 1e12:,.2f} TFLOP (no recomputation, mean over devices)"),
        ("HBM traffic", gib(row["hbm_traffic"]) + (", without attention's loops" if by_formula else "")),
        ("products at peak", seconds(s["products"])),
        ("HBM at its bandwidth", seconds(s["hbm"])),
        *_offloaded(row),
        ("waiting for others", seconds(s["exposed"])),
        *_left_out(row),
        ("step, at least", f"{seconds(s['bound'])}: at most {row['T'] * row['B'] / s['bound']:,.0f} tokens/s"),
        ("MFU, at most", f"{row['mfu_bound']:.1%}"),
        ("compiled in", seconds(row["compile_seconds"]) + (", earlier" if row["cached"] else "")),
    ]


def _left_out(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the bound does not count: collectives and loops in a form that is not known."""
    kinds = {"collectives": row["collectives_missing"], "loops of unknown length": row["not_counted"]}
    shown = lambda names: ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    found = [f"{len(names)} {what} ({shown(names)})" for what, names in kinds.items() if names]
    return [("not in this bound", ", ".join(found))] if found else []


def _offloaded(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the traffic with the host's memory, if there is any."""
    if not row["host_traffic"]:
        return []
    return [
        ("offloaded", f"{gib(row['host_traffic'] / 2)} to the host and back, at most {gib(row['host_bytes'])} at once"),
        ("host link at its bandwidth", seconds(row["seconds"]["host"])),
    ]


def _grid(heading: str, columns: Iterable[str], left: Iterable[int] = (0,)) -> Table:
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", overflow="fold")
    return table


def tables(console: Console, document: Mapping[str, Any]) -> None:
    """Prints a plan as tables."""
    rows = document["rows"]
    if "search" in document["options"] and document["options"]["search"]:
        _searched(console, document)
        chosen = document["found"]
    elif document["options"]["strategies"]:
        analytic = document["options"]["analytic"]
        if not analytic:
            _strategies(console, document)
        _strategies_by_formula(console, document)
        chosen = rows[0] if analytic else None
    else:
        chosen = rows[0]
    if chosen is not None:
        _one(console, document, chosen)
    if document.get("advice"):
        console.print(document["advice"], style="bold", highlight=False, markup=False, soft_wrap=True)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    foot = formulas() if document["options"]["analytic"] else FOOT
    console.print(
        f"{foot} {versions}; commit {(document['commit'] or 'unknown')[:12]}.",
        highlight=False,
        markup=False,
        style="dim",
    )


def _one(console: Console, document: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    console.print(title(document, row), style="bold", highlight=False, markup=False)
    fits = row.get("fits")
    console.print(verdict(row), style="green" if fits else "red", highlight=False, markup=False)
    if "reason" in row:
        return
    table = _grid("Memory of one device at its peak", ("", "", "of the device", ""), left=(0, 3))
    for kind, n in memory_rows(row):
        bar = round(32 * n / max(row["hbm_bytes"], row["hbm_limit"]))
        table.add_row(kind, gib(n), f"{n / row['hbm_limit']:.1%}", "█" * bar)
    console.print(table)
    table = _grid("Largest buffers", ("name", "kind", "type", "bytes"), left=(0, 1, 2))
    for name, kind, type_, n in buffer_rows(row):
        table.add_row(escape(name), kind, escape(type_), gib(n))
    if row.get("buffers"):
        console.print(table)
    if "messages" in row:
        table = _grid("What one device receives in a step", ("", ""), left=(0,))
        for name, n in row["messages"].items():
            table.add_row(name, gib(n))
        if row["messages"]:
            console.print(table)
    if "seconds" not in row:
        return
    table = _grid("Collectives of one step, as scheduled", COLLECTIVES, left=(0, 1, 6))
    for cells in collective_rows(row):
        table.add_row(*cells)
    if row.get("collectives"):
        console.print(table)
    table = _grid("One step on one device", ("", ""), left=(0, 1))
    for cells in time_rows(row):
        table.add_row(*cells)
    console.print(table)


def _searched(console: Console, document: Mapping[str, Any]) -> None:
    rows = [row for row in (document["found"], document["beyond"]) if row]
    kind = "smallest" if document["options"]["search"] == "min-devices" else "largest"
    headings = ("machine", "devices", "T", "B", "needs", "has", "fits", "step, at least")
    table = _grid(f"The {kind} that fits, and the next", headings)
    for row in sorted(rows, key=lambda row: (row["devices"], row["T"], row["B"])):
        bound = seconds(row["seconds"]["bound"]) if "seconds" in row else "-"
        cells = f"{row['devices']}", f"{row['T']:,}", f"{row['B']:,}", gib(row["hbm_bytes"]), gib(row["hbm_limit"])
        table.add_row(row["topology"], *cells, "yes" if row["fits"] else "no", bound)
    console.print(table)
    console.print(found(document), style="bold", highlight=False, markup=False)
    if not document["options"]["analytic"]:
        console.print(f"{len(document['rows'])} programs were compiled; --json has all of them.", style="dim")


def found(document: Mapping[str, Any]) -> str:
    """Returns a sentence about the search's result."""
    goal, row, beyond = document["options"]["search"], document["found"], document["beyond"]
    value = {
        "max-length": lambda r: f"T = {r['T']:,}",
        "max-batch": lambda r: f"B = {r['B']:,}",
        "min-devices": lambda r: f"{r['topology']} ({r['devices']} devices)",
    }[goal]
    if row is None:
        return f"Nothing fits: not even {value(beyond)}."
    return f"{value(row)} fits; " + (f"{value(beyond)} does not." if beyond else "the search ends there.")


def _strategies(console: Console, document: Mapping[str, Any]) -> None:
    table = _grid(
        "Strategies", ("strategy, layout", "needs", "fits", "received", "waiting", "step, at least", "MFU, at most")
    )
    for row in document["rows"]:
        if "reason" in row:
            table.add_row(f"{row['strategy']}, {row['layout']}", "-", escape(row["reason"]))
            continue
        timed = "seconds" in row
        table.add_row(
            f"{row['strategy']}, {row['layout']}",
            gib(row["hbm_bytes"]),
            "yes" if row["fits"] else "no",
            gib(sum(c["bytes"] for c in row["collectives"])) if timed else "-",
            seconds(row["seconds"]["exposed"]) if timed else "-",
            seconds(row["seconds"]["bound"]) if timed else "-",
            f"{row['mfu_bound']:.1%}" if timed else "-",
        )
    console.print(table)
    console.print(f"Recommended: {document['recommended']}", style="bold", highlight=False, markup=False)


def _strategies_by_formula(console: Console, document: Mapping[str, Any]) -> None:
    if document["sequence"]:
        console.print(sequence.ways_table(document["sequence"]))
    sentence = f"By formula: {document['recommended_by_formula']}"
    console.print(sentence, style="bold", highlight=False, markup=False, soft_wrap=True)


def page(document: Mapping[str, Any]) -> str:
    """Renders the plan as a self-contained HTML page."""
    folder = resources.files("longattn.plan")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(document=document, show=globals(), style=style())
