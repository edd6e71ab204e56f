"""A report for people, as tables and as a page of HTML. All numbers come from the document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from longattn.bench.timing import Interval
from longattn.display import device_text, plain_table, seconds_text, style

WIDTH = 132  # of the tables: a narrower terminal wraps them and loses no digits
_PLACES = 3  # number of places named after a reason
Rows = list[tuple[str, ...]]
MEMORY = ("step", "plan", "its compiler here", "peak here", "peak / plan")
TIMING = (
    "direction", "contestant", "time", "by", "ratio", "of peak", "of HBM", "static", "measured", "measured / static",
)  # fmt: skip
VERDICTS = {
    "passed": "Every case was tried, and every back end that accepts it agrees.",
    "failed": "Something is wrong: see what was found.",
    "incomplete": "Not everything was tried; what was agrees.",
}


def numerics(document: Mapping[str, Any]) -> tuple[tuple[str, ...], Rows]:
    """Returns the heading and a row for each case, with a column for each back end."""
    rows = document["numerics"]["rows"]
    names = tuple(dict.fromkeys(row["back_end"] for row in rows))
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["back_end"]] = _outcome(row)
    return ("case", *names), [(case, *(cells.get(name, "-") for name in names)) for case, cells in cases.items()]


def _outcome(row: Mapping[str, Any]) -> str:
    if "worst" not in row:
        return row["outcome"]
    worst = row["results"][row["worst"]]
    error, allowed = ("-" if worst[key] is None else f"{worst[key]:.1e}" for key in ("error", "allowed"))
    return f"{row['outcome']}: {error} of {allowed} ({row['worst']})"


def memory(document: Mapping[str, Any]) -> Rows:
    """Returns a row for each training step."""
    size = lambda n: "-" if n is None else f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.2f} MiB"
    return [
        (row["step"], *(size(row.get(f"{key}_bytes")) for key in ("predicted", "compiled", "measured")),
         f"{row['ratio']:.2f}" if row.get("ratio") else "-")
        for row in document["memory"]["rows"]
    ]  # fmt: skip


def timing(document: Mapping[str, Any]) -> Rows:
    """Returns a row for each contestant and direction."""
    percent = lambda x: "-" if x is None else f"{x:.1%}"
    cycles = lambda n: "-" if n is None else f"{n / 1e6:.3f} M"
    rows = []
    for row in document["timing"]["rows"]:
        first = row["what"].replace("_", " + "), row["contestant"]
        if row["outcome"] != "timed":
            rows.append((*first, row["outcome"], *("-" for _ in TIMING[3:])))
            continue
        ratio = row.get("static_ratio")
        rows.append(
            (*first, seconds_text(row["seconds"]), row["clock"],
             str(Interval(**row["ratio"])) if row.get("ratio") else "-",
             percent(row.get("share_of_peak_flops")), percent(row.get("share_of_bandwidth")),
             cycles(row.get("static_cycles")), cycles(row.get("measured_cycles")), f"{ratio:.2f}" if ratio else "-")
        )  # fmt: skip
    return rows


def notes(document: Mapping[str, Any], part: str) -> list[str]:
    """Returns the reasons why a part or its rows are incomplete; equal reasons are joined."""
    found: dict[str, list[str]] = {}
    for row in document[part]["rows"]:
        who = row.get("back_end") or row.get("contestant") or ""
        for key in ("reason", "clock_note", "static_note", "predicted_reason", "measured_reason"):
            if row.get(key):
                about = [who, {"predicted_reason": "plan", "measured_reason": "peak"}.get(key, "")]
                about += ["static cycles"] * (key == "static_note") + ["device time"] * (key == "clock_note")
                where = row["case"] if "case" in row else row.get("what", "").replace("_", " + ")
                found.setdefault(f"{', '.join(filter(None, about))}: {row[key]}", []).append(where)
    own = [document[part][key] for key in ("reason", "note") if key in document[part]]

    def of(where: list[str]) -> str:
        places = list(dict.fromkeys(filter(None, where)))
        more = f"; {len(places) - _PLACES} more" if len(places) > _PLACES else ""
        return f" ({'; '.join(places[:_PLACES])}{more})" if places else ""

    return [*own, *(f"{reason}{of(where)}" for reason, where in found.items())]


def heads(document: Mapping[str, Any]) -> Iterable[tuple[str, str, Sequence[str], Rows]]:
    """Yields (part, caption, heading, rows) of each table."""
    against = document["numerics"].get("against", "the reference")
    heading, rows = numerics(document)
    cell = "the result or gradient nearest to its limit: error, limit (twice a plain implementation's error)"
    yield "numerics", f"Against {against}: {cell}", heading, rows
    yield "memory", "Device memory of a training step", MEMORY, memory(document)
    problems = {row["problem"]: None for row in document["timing"]["rows"] if "problem" in row}
    caption = f"Time of attention, {', '.join(problems) or 'not taken'}; cycles of a core"
    yield "timing", caption, TIMING, timing(document)


def facts(document: Mapping[str, Any]) -> str:
    """Returns one line on where the report was made: device, versions, commit, time, command."""
    e = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    platform = " ".join(document["platform_version"].split())
    return (
        f"{e['device']['count']} x {device_text(e)} ({e['device']['kind']}), {platform}; {versions}; commit "
        f"{e['commit'] or 'unknown'}; {e['time']}; {' '.join(e['command'])}"
    )


def tables(console: Console, document: Mapping[str, Any], path: Path) -> None:
    """Prints the report as tables."""
    for part, caption, heading, rows in heads(document):
        if rows:
            table = plain_table(caption)
            for i, name in enumerate(heading):
                table.add_column(name, justify="right" if i > 1 and part != "numerics" else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table, markup=False)
        for note in notes(document, part):
            console.print(f"{part}: {note}", highlight=False, markup=False, soft_wrap=True)
    for finding in document["findings"]:
        console.print(finding, highlight=False, markup=False, soft_wrap=True, style="bold")
    console.print(
        f"{document['generation']}: {document['verdict']}. {VERDICTS[document['verdict']]}\n"
        f"To send back: {path} and {path.with_suffix('.html')}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def page(document: Mapping[str, Any]) -> str:
    """Returns the report as a self-contained page of HTML."""
    folder = resources.files("longattn.bench.bringup")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(document=document, show=globals(), style=style())
