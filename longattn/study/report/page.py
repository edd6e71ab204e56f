"""Writes the study's page and terminal summary, and the page that compares two studies, from study.jsonl.

A number on the page is an element `<data value=... data-key=...>` with the value in study.jsonl; its title gives the
provenance. No number is computed here.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from longattn.display import style
from longattn.study.report import figures
from longattn.study.report.load import Study, Table, device
from longattn.study.report.numbers import badges_of, columns, number_html, number_text, provenance, show
from longattn.study.report.sentences import common_T, sentences
from longattn.study.report.tables import CHIPS, compared, headline, tables
from longattn.study.store import BADGES, Number

VERSION = 1


def _template() -> jinja2.Template:
    folder = resources.files("longattn.study.report")
    text, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.j2", "sort.js"))
    script = Markup(script)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text, globals={"style": style(), "script": script, "columns": columns})


def _figures(study: Study) -> dict[str, Markup]:
    """Draws the figures; returns their SVGs by section."""
    old = [(r.label, r.store) for r in study.recorded]
    made: dict[str, str | None] = {
        "headline": figures.recall(study.store, study.titles, old),
        "cost": figures.cost(study.store, study.titles, old),
        "share": figures.share(study.store, study.titles),
        "memory": figures.memory(study.store, study.titles, study.main),
        "context": figures.context(study.store, study.titles),
        "sequence": figures.schedules(study.store),
    }
    return {name: Markup(svg) for name, svg in made.items() if svg}


TEXTS = {
    "cost": (
        "Cost against length",
        "One attention layer with tiny projections, so that every mixer is timed in the same way. The ways are timed "
        "in turns, those with gigabytes of scratch last; bands cover the median with 95%. Exact attention takes time "
        "proportional to T squared, blockwise or "
        "dense; blockwise keeps the memory linear. In a whole model the cost depends on attention's share.",
    ),
    "memory": (
        "Memory of a training step",
        "By the formulas of `longattn plan --analytic`, which were checked against compiled programs; nothing here has "
        "run. A way that no formula knows has no row. The remat policy says what the backward pass recomputes: nothing "
        "(none), everything but attention (attention), or everything (full).",
    ),
    "recall": (
        "Recall",
        "Models of two layers. The first sees two tokens and is the same for all; the second is the way under test. "
        "Recurrences take more steps to learn this task, and get them. "
        "Intervals are the wider of the one over seeds and the one over questions.",
    ),
    "context": (
        "Real text",
        "A byte-level language model. Loss by position suggests what more context is worth. Where there is a control, "
        "it shows whether the model uses it: the same last bytes are predicted with everything further back than k "
        "bytes before them taken from another document. A short study shows a run that was trained earlier.",
    ),
    "sequence": (
        "Over devices along the sequence",
        "Causal attention of one layer, with the sequence sharded over devices. The figures are counted from the "
        "strategies' schedules; nothing here has run. Idle is the share of the devices' time spent waiting for the "
        "slowest at each step. Received is the largest number of bytes that a device receives per layer. Times count "
        "products and messages at published rates and nothing else.",
    ),
    "pod": (
        "On a pod",
        "The training step of public models (forward, backward and optimiser), compiled for machines that you need "
        "not have; nothing here has run. The table gives the memory that each device needs, and a lower bound on the "
        "step time at published peak rates.",
    ),
}


def _sections(study: Study) -> list[dict[str, Any]]:
    pictures = {
        "cost": ("cost", "share"),
        "memory": ("memory",),
        "recall": (),
        "context": ("context",),
        "sequence": ("sequence",),
        "pod": (),
    }
    drawn, tabled = _figures(study), tables(study)
    sections = []
    for name, (title, text) in TEXTS.items():
        part = study.store.parts.get(name, {})
        if any(n.part == name for n in study.store.numbers.values()):
            sections.append(
                {
                    "name": name,
                    "title": title,
                    "text": text,
                    "figures": [drawn[f] for f in pictures[name] if f in drawn],
                    "tables": tabled[name],
                    "skipped": part.get("skipped", []),
                }
            )
    return sections


def _facts(study: Study) -> list[tuple[str, str]]:
    """Returns time, device, versions, commit and command of every start."""
    facts = []
    for e in study.store.environments.values():
        d, v = e["device"], e["versions"]
        where = (
            f"{e['host']['cpu']}, {e['host']['cores']} cores"
            if d["platform"] == "cpu"
            else f"{d['count']} x {d['kind']}"
        )
        facts.append(
            (
                e["time"],
                f"{where}; " + ", ".join(f"{k} {x}" for k, x in v.items()) + f"; commit {e['commit']}; {e['command']}",
            )
        )
    return facts


def page(study: Study) -> str:
    """Renders the study as one self-contained HTML page."""
    return _template().render(
        mode="study",
        study=study,
        figure=_figures(study).get("headline"),
        headline=headline(study),
        sentences=sentences(study.store),
        sections=_sections(study),
        facts=_facts(study),
        badges=BADGES,
        numbers=list(study.store.numbers.values()),
        n=lambda x, interval=True, unit=None: number_html(x, study, interval, unit),
        is_number=lambda x: isinstance(x, Number),
        provenance=lambda x: provenance(x, study.store),
        device=device(study.store),
    )


def document(study: Study) -> dict[str, Any]:
    """Returns the study as one versioned JSON document."""
    return {
        "version": VERSION,
        "kind": "study",
        "name": study.name,
        "preset": study.preset,
        "sentences": ["".join(p if isinstance(p, str) else number_text(p) for p in s) for s in sentences(study.store)],
        "environments": study.store.environments,
        "parts": study.store.parts,
        "numbers": [{"key": n.key, **vars(n)} for n in study.store.numbers.values()],
    }


SHORT = {  # headings of the opening table in the terminal, by how they begin on the page
    "way": "way", "forward": "fwd+bwd", "time": "time~T^", "scratch ~": "mem~T^", "scratch": "scratch",
    "longest T on ": "", "MQAR": "recall",
}  # fmt: skip


def _rich(table: Table) -> RichTable:
    """Returns the opening table for a terminal of 80 columns: numbers without intervals, units in the headings."""
    _, _, units = columns(table)
    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i, (name, unit) in enumerate(zip(table.head, units, strict=True)):
        begins = next(b for b in SHORT if name.startswith(b))
        short = SHORT[begins] or name.removeprefix(begins)
        lines = [short, unit.name if unit else "", badges_of(row[i] for row in table.rows)] if i else [short]
        made.add_column("\n".join(lines), justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        cells = (
            f"{show(c, unit)}{'*' * bool(c.refused)}" if isinstance(c, Number) else c or "-"
            for c, unit in zip(row, units, strict=True)
        )  # fmt: skip
        made.add_row(*cells)
    return made


def summary(study: Study, console: Console, page: Path) -> None:
    """Prints the opening table and sentences."""
    table, T = headline(study), common_T(study.store)
    console.print(f"[bold]{escape(study.name)}[/] · preset {study.preset} · {device(study.store)}", highlight=False)
    console.print(_rich(table), highlight=False)
    notes = [f"fwd+bwd and scratch: one layer at T = {T:,}"] if T else []
    notes += [f"{', '.join(CHIPS)}: longest training sequence", "recall: MQAR"]
    notes += [f"{b[0].upper()} {b}" for b in BADGES]
    if any(isinstance(c, Number) and c.refused for row in table.rows for c in row):
        notes.append("* cut short or at two speeds")
    console.print("; ".join(notes), style="dim", highlight=False)
    for s in sentences(study.store):
        console.print(
            "• " + "".join(p if isinstance(p, str) else number_text(p) for p in s), highlight=False, markup=False
        )
    console.print(f"{page}", soft_wrap=True, markup=False)


# ---- two studies


def compare_page(a: Study, b: Study) -> str:
    """Renders two studies on one page, figure by figure and number by number."""
    drawn = [_figures(a), _figures(b)]
    pairs: list[dict[str, Any]] = []
    for name, title in (("headline", "Recall"), ("cost", "Cost"), ("memory", "Memory"), ("context", "Real text")):
        # The figures of both studies have the same ids, which must be unique in a page.
        prefix = "recall" if name == "headline" else name
        both = [
            (study.name, Markup(str(made[name]).replace(f"{prefix}-", f"{prefix}-{i}-")))
            for i, (study, made) in enumerate(zip((a, b), drawn, strict=True))
            if name in made
        ]
        if both:
            pairs.append({"title": title, "figures": both})
    stores = {id(n): s for s in (a, b) for n in s.store.numbers.values()}
    return _template().render(
        mode="compare",
        a=a,
        b=b,
        pairs=pairs,
        tables=[(s.name, headline(s)) for s in (a, b)],
        compared=compared(a, b),
        facts=_facts(a) + _facts(b),
        badges=BADGES,
        n=lambda x, interval=True, unit=None: number_html(x, stores[id(x)], interval, unit),
        is_number=lambda x: isinstance(x, Number),
        device=None,
    )


def compare_document(a: Study, b: Study) -> dict[str, Any]:
    """Returns the numbers that both studies have, as one versioned JSON document."""
    rows = compared(a, b).rows
    numbers = [{"key": key, "a": vars(x), "b": vars(y), "intervals": verdict} for key, x, y, _, verdict in rows]
    return {"version": VERSION, "kind": "study comparison", "a": a.name, "b": b.name, "numbers": numbers}


def compare_summary(a: Study, b: Study, console: Console, page: Path) -> None:
    """Prints the numbers whose intervals are apart."""
    table = compared(a, b)
    apart: list[tuple[Any, ...]] = [row for row in table.rows if row[-1] == "apart"]
    console.print(f"[bold]{escape(a.name)}[/] ({device(a.store)}) and [bold]{escape(b.name)}[/] ({device(b.store)})")
    console.print(f"{len(table.rows)} numbers in both, the intervals of {len(apart)} are apart")
    for key, x, y, ratio, _ in apart[:20]:
        console.print(f"  {key}: {number_text(x)}, {number_text(y)}, x{ratio}", soft_wrap=True, markup=False)
    console.print(f"{page}", soft_wrap=True, markup=False)
