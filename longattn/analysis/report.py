"""The study's page, its summary in the terminal, and the page that compares two studies: all read from study.jsonl.

A number on the page is an element `<data value=... data-key=...>` whose value is the JSONL's, and whose title says
where it comes from. Nothing is computed here that is not in the JSONL, but for the words around it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from longattn.analysis import figures
from longattn.analysis.store import BADGES, FILE, Number, Store, family

VERSION = 1
UNRESOLVED = "not resolved by this preset"
CHIPS = ("v5e", "h100")  # of the opening table; the memory section has all of them

Cell = Number | str | None


@dataclass(frozen=True)
class Study:
    """One study's numbers, and the recorded ones to show beside it."""

    name: str
    preset: str
    store: Store
    recorded: tuple[Study, ...] = ()

    @property
    def titles(self) -> dict[str, str]:
        """What each way is called in words."""
        names = {n.way: "" for n in self.store.numbers.values() if n.way}
        return {name: _title(name) for name in names}

    @property
    def label(self) -> str:
        """For legends: where a recorded study was made."""
        return f"recorded, {device(self.store)}"


@dataclass(frozen=True)
class Table:
    """A table of words and numbers; a None is an empty cell."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def _title(way: str) -> str:
    name, _, size = way.partition("_")
    known = {"exact": "exact, blockwise", "dense": "exact, dense", "window": f"window {size}".strip()}
    return known.get(name, way.replace("_", " "))


def device(store: Store) -> str:
    """The device that the newest start of a study ran on, in words."""
    if not store.environments:
        return "unknown device"
    e = list(store.environments.values())[-1]
    d = e["device"]
    return (
        f"{e['host']['cpu']}, {e['host']['cores']} cores" if d["platform"] == "cpu" else f"{d['count']} x {d['kind']}"
    )


def load(folder: Path, recorded: str = "") -> Study:
    """A study's folder, and the studies recorded under `recorded`. Raises ValueError where there is none."""
    about = folder / "study.json"
    if not about.is_file() or not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} is no study: it has no study.json and {FILE}; give a folder that `longattn study` wrote"
        )
    others = []
    for path in sorted(Path(recorded).glob(f"*/{FILE}")) if recorded else []:
        if path.parent.resolve() != folder.resolve():
            others.append(dataclasses.replace(load(path.parent), store=_as_recorded(Store(path))))
    return Study(folder.name, json.loads(about.read_text())["preset"], Store(folder / FILE), tuple(others))


def _as_recorded(store: Store) -> Store:
    store.numbers = {
        key: dataclasses.replace(n, badge="recorded") if n.badge == "measured" else n
        for key, n in store.numbers.items()
    }
    return store


# ---- how numbers look


def show(n: Number) -> str:
    """The number as people read it: three digits and a unit."""
    v, unit = n.value, n.unit
    if not math.isfinite(v):
        return "-"
    if unit == "s":
        return f"{v:.3g} s" if v >= 10 else f"{v * 1e3:.3g} ms" if v >= 1e-3 else f"{v * 1e6:.3g} us"
    if unit == "B":
        for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(v) >= size:
                return f"{v / size:.3g} {name}"
        return f"{v:.0f} B"
    if unit == "FLOP":
        return f"{v / 1e9:.3g} GFLOP"
    if unit == "tokens/s":
        return f"{v / 1e3:.3g}k tokens/s"
    if unit == "share":
        return f"{v:.1%}"
    if unit in ("tokens", "sequences", "elements"):
        return f"{v:,.0f}"
    if n.quantity.startswith(("exponent", "theory")):
        return f"{v:.2f}"
    return f"{v:.3f} {unit}".strip()


def _interval(n: Number) -> str:
    if n.low is None or n.high is None or not (math.isfinite(n.low) and math.isfinite(n.high)):
        return ""
    low, high = (show(dataclasses.replace(n, value=v, unit=n.unit)) for v in (n.low, n.high))
    return (
        f" [{low.split(' ')[0]} .. {high.split(' ')[0]}]"
        if low.split(" ")[1:] == high.split(" ")[1:]
        else f" [{low} .. {high}]"
    )


def provenance(n: Number, store: Store) -> str:
    """Where a number comes from, in one line."""
    e = store.environments.get(n.environment)
    parts = [BADGES[n.badge]]
    if e:
        d, v = e["device"], e["versions"]
        where = e["host"]["cpu"] if d["platform"] == "cpu" else d["kind"]
        parts += [
            f"{where} x {d['count']}",
            f"jax {v.get('jax')}, longattn {v.get('longattn', 'from source')}",
            f"commit {str(e['commit'])[:12]}",
        ]
    if n.seeds:
        parts.append(f"seeds {', '.join(map(str, n.seeds))}")
    if n.note:
        parts.append(n.note)
    if e:
        parts.append(f"remake: {n.command or e['command']}")
    return "; ".join(parts)


def number_html(n: Number, study: Study, interval: bool = True) -> Markup:
    """A number with its badge."""
    store = next((s.store for s in (study, *study.recorded) if s.store.numbers.get(n.key) is n), study.store)
    text = f"<span class=i>{escape(_interval(n))}</span>" if interval else ""
    return Markup(
        f'<data class="n" value="{n.value!r}" data-key="{escape(n.key)}" title="{escape(provenance(n, store))}">'
        f'{escape(show(n))}<abbr class="b {n.badge}" title="{n.badge}">{n.badge[0].upper()}</abbr>{text}</data>'
    )


def number_text(n: Number) -> str:
    """A number for the terminal: its interval and the badge's first letter."""
    return f"{show(n)}{_interval(n)} ({n.badge[0].upper()})"


# ---- what may be said


def separate(a: Number, b: Number) -> bool:
    """Whether both have intervals and these do not touch."""
    if any(x is None for x in (a.low, a.high, b.low, b.high)):
        return False
    return a.high < b.low or b.high < a.low  # type: ignore[operator]


def ranking(numbers: Sequence[Number], word: str) -> str:
    """ "x is WORD than y" for the neighbours that separate when sorted by value, "x and y: not resolved ..." for
    the others.
    """
    ordered = sorted(numbers, key=lambda n: n.value)
    said = []
    for a, b in zip(ordered, ordered[1:], strict=False):
        names = _title(a.way), _title(b.way)
        whole = not (a.note.startswith("stopped") or b.note.startswith("stopped"))
        said.append(
            f"{names[0]} {word} {names[1]}"
            if whole and separate(a, b)
            else f"{names[0]} against {names[1]}: {UNRESOLVED}"
        )
    return "; ".join(said)


Sentence = list[str | Number]


def _listed(numbers: Iterable[Number]) -> Sentence:
    parts: Sentence = []
    for n in numbers:
        parts += [", " if parts else "", f"{_title(n.way)} ", n]
    return parts


def sentences(store: Store) -> list[Sentence]:
    """At most five sentences about the numbers of a study. One ranks two ways only if their intervals separate."""
    return [s for s in (f(store) for f in (_time, _growth, _longest, _recalled, _context)) if s]


def _common_T(store: Store) -> int | None:
    times = store.select("cost", "seconds_forward_backward")
    counts = {T: sum(n.at["T"] == T for n in times) for T in {n.at["T"] for n in times}}
    return max(counts, key=lambda T: (counts[T], T), default=None)


def _time(store: Store) -> Sentence | None:
    T = _common_T(store)
    times = store.select("cost", "seconds_forward_backward", T=T)
    if len(times) < 2:
        return None
    return [
        f"One attention layer, forward and backward at T = {T:,}, takes: ",
        *_listed(times),
        f" ({ranking(times, 'is faster than')}).",
    ]


def _growth(store: Store) -> Sentence | None:
    time, memory = (store.select("cost", f"exponent_{q}") for q in ("time_training", "memory"))
    if not time or not memory:
        return None
    return [
        "Over the three largest lengths time grows as T to the power ",
        *_listed(time),
        "; scratch memory as ",
        *_listed(memory),
        ".",
    ]


def _longest(store: Store) -> Sentence | None:
    found = [n for n in store.select("memory", "longest_T", chip="v5e") if n.at["remat"] == "attention"]
    if not found:
        return None
    return [
        "The longest sequence whose training step fits into a v5e (85 million parameters, remat: attention): ",
        *_listed(found),
        " tokens.",
    ]


def _recalled(store: Store) -> Sentence | None:
    found = store.select("recall", "accuracy", task="mqar")
    settings = list(dict.fromkeys((n.at["T"], n.at["pairs"]) for n in found))
    hardest = [n for n in found if (n.at["T"], n.at["pairs"]) == settings[0]] if settings else []
    if not hardest:
        return None
    text = f"Associative recall of {settings[0][1]} pairs within {settings[0][0]} tokens: "
    rank = f" ({ranking(hardest, 'recalls less than')})" if len(hardest) > 1 else ""
    return [text, *_listed(hardest), f"{rank}."]


def _context(store: Store) -> Sentence | None:
    excess = [n for n in store.select("context", "tail_excess") if n.way == "exact"] or store.select(
        "context", "tail_excess"
    )
    used = [n for n in excess if n.low is not None and n.low > 0]
    if not excess:
        return None
    if not used:
        return [f"Text: use of bytes further back than k = {min(n.at['k'] for n in excess)} is {UNRESOLVED}."]
    far, tail = max(used, key=lambda n: n.at["k"]), excess[0].at["tail"]
    return [
        f"Text: replacing everything further back than {far.at['k']} bytes costs {_title(far.way)} ",
        far,
        f" per byte on the last {tail}; beyond that, use of context is {UNRESOLVED}.",
    ]


# ---- tables


def headline(study: Study) -> Table:
    """Per family of ways: time, memory, recall, longest T."""
    store, T = study.store, _common_T(study.store)
    names = list(dict.fromkeys(family(w) for w in study.titles))
    first = lambda numbers, name: next((n for n in numbers if family(n.way) == name), None)
    head = [
        "way to attend",
        f"forward + backward, T = {T:,}" if T else "forward + backward",
        "time ~ T^",
        "scratch",
        "scratch ~ T^",
    ]
    head += [*(f"longest T on {c}" for c in CHIPS), "MQAR recall"]
    rows = []
    for name in names:
        longest = [
            first([n for n in store.select("memory", "longest_T", chip=c) if n.at["remat"] == "attention"], name)
            for c in CHIPS
        ]
        recalled = [n for n in store.select("recall", "accuracy", task="mqar") if family(n.way) == name]
        rows.append((
            {"exact": "exact, blockwise", "dense": "exact, dense"}.get(name, name),
            first(store.select("cost", "seconds_forward_backward", T=T), name),
            first(store.select("cost", "exponent_time_training"), name),
            first(store.select("cost", "scratch_forward_backward", T=T), name),
            first(store.select("cost", "exponent_memory"), name),
            *longest,
            recalled[0] if recalled else ("as exact, blockwise" if name == "dense" else None),
        ))  # fmt: skip
    windows = {
        part: sorted(
            {
                w
                for w in (n.way for n in store.numbers.values() if n.part == part and n.quantity != "attention_share")
                if family(w) == "window"
            }
        )
        for part in ("cost", "memory", "recall")
    }
    said = ", ".join(
        f"{part} {' and '.join(_title(w).split()[-1] for w in found)}" for part, found in windows.items() if found
    )
    return Table("At a glance", tuple(head), tuple(rows), f"Window sizes: {said}." if said else "")


def _matrix(
    study: Study,
    title: str,
    part: str,
    columns: Sequence[tuple[str, str, dict[str, Any]]],
    rows: Sequence[tuple[str, dict[str, Any]]],
    note: str = "",
) -> Table:
    """Rows (way, labels) by columns (heading, quantity, labels), of this study and of the recorded ones."""
    made: list[tuple[Cell, ...]] = []
    for label, source in [("", study.store), *((r.label, r.store) for r in study.recorded)]:
        for way, labels in rows:
            cells = tuple(source.one(part, quantity, way, **{**labels, **more}) for _, quantity, more in columns)
            if any(cells):
                name = ", ".join([_title(way), *(f"{k} {v}" for k, v in labels.items())])
                made.append((name + (f" ({label})" if label else ""), *cells))
    return Table(title, ("way", *(heading for heading, *_ in columns)), tuple(made), note)


def _rows(study: Study, part: str, quantity: str, labels: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for s in (study, *study.recorded):
        for n in s.store.select(part, quantity):
            row = n.way, {k: n.at[k] for k in labels if k in n.at}
            found.setdefault(repr(row), row)
    return list(found.values())


def tables(study: Study) -> dict[str, list[Table]]:
    """The tables of each section of the page."""
    exponents = [
        (f"{title}{kind}", f"{what}_{name}", {})
        for name, title in (
            ("time", "forward time"),
            ("time_training", "forward + backward time"),
            ("memory", "scratch memory"),
        )
        for what, kind in (("exponent", ""), ("theory", ", theory"))
    ]
    chips = list(dict.fromkeys(n.at["chip"] for n in study.store.select("memory", "chip_bytes")))
    held = [(name, f"held_{name}", {}) for name in ("parameters", "optimiser", "gradients", "attention", "activations")]
    policies = _rows(study, "memory", "longest_T", ["remat"])
    checked = {n.at["T"] for n in study.store.select("memory", "fit_error")}
    batch = {n.at["T"] for n in study.store.select("memory", "largest_batch")}
    recalled = _rows(study, "recall", "accuracy", ["task", "T", "pairs", "digits"])
    lengths = sorted({n.at["T"] for s in (study, *study.recorded) for n in s.store.select("context", "bits_per_byte")})
    ks = sorted({n.at["k"] for s in (study, *study.recorded) for n in s.store.select("context", "tail_excess")})
    made = {
        "cost": [
            _matrix(
                study,
                "Exponents of T",
                "cost",
                exponents,
                _rows(study, "cost", "exponent_time_training", []),
                "Least squares in logarithms over the three largest lengths.",
            )
        ],
        "memory": [
            _matrix(
                study,
                "Longest T of one sequence",
                "memory",
                [(c, "longest_T", {"chip": c}) for c in chips],
                policies,
                "Tokens; 90% of the memory of one device.",
            ),
            _matrix(
                study,
                f"Largest batch at T = {'/'.join(f'{b:,}' for b in batch)}",
                "memory",
                [(c, "largest_batch", {"chip": c}) for c in chips],
                policies,
                "Sequences.",
            ),
            _matrix(
                study,
                f"What a step holds at T = {'/'.join(f'{c:,}' for c in checked)}",
                "memory",
                [*held, ("error of the fit there", "fit_error", {})],
                policies,
                "Attention: scratch of one layer, compiled alone.",
            ),
        ],
        "recall": [
            _matrix(
                study,
                "Recall",
                "recall",
                [
                    ("right", "accuracy", {}),
                    ("chance", "chance", {}),
                    ("state, elements per layer", "state_elements", {}),
                    ("read per token", "bytes_read", {}),
                ],
                recalled,
            )
        ],
        "context": [
            _matrix(
                study,
                "Held-out bits per byte",
                "context",
                [(f"T = {T:,}", "bits_per_byte", {"T": T}) for T in lengths],
                _rows(study, "context", "bits_per_byte", []),
            ),
            _matrix(
                study,
                "Extra bits per byte when all further back than k is replaced",
                "context",
                [(f"k = {k}", "tail_excess", {"k": k}) for k in ks],
                _rows(study, "context", "tail_excess", []),
            ),
        ],
    }
    return {section: [t for t in found if t.rows] for section, found in made.items()}


# ---- pages


def _template() -> jinja2.Template:
    text = resources.files("longattn.analysis").joinpath("report.html.j2").read_text()
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def _figures(study: Study) -> dict[str, Markup]:
    """The SVGs by section."""
    old = [(r.label, r.store) for r in study.recorded]
    made: dict[str, str | None] = {
        "headline": figures.recall(study.store, study.titles, old),
        "cost": figures.cost(study.store, study.titles, old),
        "share": figures.share(study.store, study.titles),
        "memory": figures.memory(study.store, study.titles),
        "context": figures.context(study.store, study.titles),
    }
    return {name: Markup(svg) for name, svg in made.items() if svg}


TEXTS = {
    "cost": (
        "Cost against length",
        "One attention layer, its projections shrunk to nothing, so that any mixer is timed the same way. Ways take "
        "turns; bands hold the median with 95%. Exact attention costs the square of T either way; blockwise "
        "only keeps the memory linear. What a whole model costs is a matter of attention's share.",
    ),
    "memory": (
        "Memory of a training step",
        "The training step is compiled from shapes alone; dots are compiled programs, lines are fitted to the three "
        "shortest and checked at the longest. Remat policies say what the backward pass recomputes: nothing (none), "
        "all but attention (attention), everything (full).",
    ),
    "recall": (
        "Recall",
        "Two-layer models: the first layer sees two tokens and is the same for all, the second is the way under test. "
        "Intervals are the wider of the one over seeds and the one over questions.",
    ),
    "context": (
        "Real text",
        "A byte-level language model. Loss by position suggests what more context is worth; the control tells if it "
        "is used: the same last bytes are predicted with everything further back than k bytes before them taken from "
        "another document.",
    ),
}


def _sections(study: Study) -> list[dict[str, Any]]:
    pictures = {"cost": ("cost", "share"), "memory": ("memory",), "recall": (), "context": ("context",)}
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
    """Device, versions and commit of every start."""
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
    """The study as one self-contained HTML page."""
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
        n=lambda x, interval=True: number_html(x, study, interval),
        is_number=lambda x: isinstance(x, Number),
        provenance=lambda x: provenance(x, study.store),
        device=device(study.store),
    )


def document(study: Study) -> dict[str, Any]:
    """The study as one versioned JSON document."""
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


def _rich(table: Table) -> RichTable:
    made = RichTable(
        title=table.title, title_justify="left", box=box.SIMPLE_HEAD, caption=table.note or None, caption_justify="left"
    )
    for i, heading in enumerate(table.head):
        made.add_column(heading, justify="right" if i else "left")
    for row in table.rows:
        made.add_row(*(number_text(c) if isinstance(c, Number) else c or "" for c in row))
    return made


def summary(study: Study, console: Console, page: Path) -> None:
    """The opening table and sentences, in the terminal."""
    console.print(f"[bold]{study.name}[/] · preset {study.preset} · {device(study.store)}")
    console.print(_rich(headline(study)))
    for s in sentences(study.store):
        console.print(
            "• " + "".join(p if isinstance(p, str) else number_text(p) for p in s), soft_wrap=True, markup=False
        )
    console.print("Badges: " + "; ".join(f"{b[0].upper()} {b}" for b in BADGES), style="dim")
    console.print(f"{page}", soft_wrap=True)


# ---- two studies


def _compared(a: Study, b: Study) -> Table:
    """Every number that both have and that has an interval, or differs: values, ratio, and whether the intervals
    separate.
    """
    rows: list[tuple[Cell, ...]] = []
    for key, x in a.store.numbers.items():
        y = b.store.numbers.get(key)
        if y is None or (x.badge == "predicted" and x.value == y.value):
            continue
        ratio = f"{y.value / x.value:.3g}" if x.value else "-"
        verdict = (
            ("apart" if separate(x, y) else UNRESOLVED.replace("preset", "pair"))
            if x.low is not None
            else ("equal" if x.value == y.value else "")
        )
        rows.append((key, x, y, ratio, verdict))
    return Table(
        "Every number that both have", ("number", a.name, b.name, f"{b.name} / {a.name}", "intervals"), tuple(rows)
    )


def compare_page(a: Study, b: Study) -> str:
    """Two studies on one page, figure by figure and number by number."""
    drawn = [_figures(a), _figures(b)]
    pairs: list[dict[str, Any]] = []
    for name, title in (("headline", "Recall"), ("cost", "Cost"), ("memory", "Memory"), ("context", "Real text")):
        # Both pages' figures have the same ids: the second one's are renamed.
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
        compared=_compared(a, b),
        facts=_facts(a) + _facts(b),
        badges=BADGES,
        n=lambda x, interval=True: number_html(x, stores[id(x)], interval),
        is_number=lambda x: isinstance(x, Number),
        device=None,
    )


def compare_summary(a: Study, b: Study, console: Console, page: Path) -> None:
    """What differs beyond the intervals, in the terminal."""
    table = _compared(a, b)
    apart: list[tuple[Any, ...]] = [row for row in table.rows if row[-1] == "apart"]
    console.print(f"[bold]{a.name}[/] ({device(a.store)}) and [bold]{b.name}[/] ({device(b.store)})")
    console.print(f"{len(table.rows)} numbers in both, the intervals of {len(apart)} are apart")
    for key, x, y, ratio, _ in apart[:20]:
        console.print(f"  {key}: {number_text(x)}, {number_text(y)}, x{ratio}", soft_wrap=True, markup=False)
    console.print(f"{page}", soft_wrap=True)
