"""Makes the tables of a report: the opening one, those of each section, and the comparison of two studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from longattn.study.report.load import Cell, Study, Table, way_title
from longattn.study.report.sentences import UNRESOLVED, common_T, separate

CHIPS = ("v5e", "h100")  # columns of the opening table; the memory section has every chip


def headline(study: Study) -> Table:
    """Returns the opening table: time, memory, recall and longest T of each way that was timed or trained."""
    store, T = study.store, common_T(study.store)
    hardest = next((n.at for n in store.select("recall", "accuracy", task="mqar")), {"task": "mqar"})
    columns: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"forward + backward at T = {T:,}" if T else "forward + backward", "cost", "seconds_forward_backward",
         {"T": T}),
        ("time ~ T^", "cost", "exponent_time_training", {}),
        ("scratch", "cost", "scratch_forward_backward", {"T": T}),
        ("scratch ~ T^", "cost", "exponent_memory", {}),
        *((f"longest T on {c}", "memory", "longest_T", {"chip": c, "remat": "attention"}) for c in CHIPS),
        ("MQAR recall", "recall", "accuracy", hardest),
    ]  # fmt: skip
    rows = []
    for way in study.main:
        cells: list[Cell] = [store.one(part, quantity, way, **at) for _, part, quantity, at in columns]
        rows.append((way_title(way), *cells))
    return Table("At a glance", ("way to attend", *(heading for heading, *_ in columns)), tuple(rows))


def _matrix(
    study: Study,
    title: str,
    part: str,
    columns: Sequence[tuple[str, str, dict[str, Any]]],
    rows: Sequence[tuple[str, dict[str, Any]]],
    note: str = "",
) -> Table:
    """Returns a table of rows (way, labels) by columns (heading, quantity, labels), recorded studies included."""
    made: list[tuple[Cell, ...]] = []
    for label, source in [("", study.store), *((r.label, r.store) for r in study.recorded)]:
        for way, labels in rows:
            cells = tuple(source.one(part, quantity, way, **{**labels, **more}) for _, quantity, more in columns)
            if any(cells):
                name = ", ".join([way_title(way), *(_label(k, v) for k, v in labels.items())])
                made.append((name + (f" ({label})" if label else ""), *cells))
    return Table(title, ("way", *(heading for heading, *_ in columns)), tuple(made), note)


def _label(name: str, value: Any) -> str:
    return f"T = {value:,}" if name == "T" else str(value) if name == "task" else f"{name} {value}"


def _rows(study: Study, part: str, quantity: str, labels: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for s in (study, *study.recorded):
        for n in s.store.select(part, quantity):
            row = n.way, {k: n.at[k] for k in labels if k in n.at}
            found.setdefault(repr(row), row)
    return list(found.values())


def tables(study: Study) -> dict[str, list[Table]]:
    """Returns the tables of each section of the page."""
    made = {
        "cost": _cost(study),
        "memory": _memory(study),
        "recall": _recall(study),
        "context": _context(study),
        "sequence": [_sequence(study)],
        "pod": [_pod(study)],
    }
    return {section: [t for t in found if t.rows] for section, found in made.items()}


def _listed(values: Iterable[int]) -> str:
    return "/".join(f"{v:,}" for v in values)


def _cost(study: Study) -> list[Table]:
    exponents = [
        (f"{title}{kind}", f"{prefix}_{name}", {})
        for name, title in (
            ("time", "forward time"),
            ("time_training", "forward + backward time"),
            ("memory", "scratch memory"),
        )
        for prefix, kind in (("exponent", ""), ("theory", ", theory"))
    ]
    longest = sorted({n.at["T"] for n in study.store.select("cost", "state_elements")})[-1:]
    return [
        _matrix(
            study,
            "Exponents of T",
            "cost",
            exponents,
            _rows(study, "cost", "exponent_time_training", []),
            "Least squares in logarithms over the three largest lengths.",
        ),
        _matrix(
            study,
            f"State and reads of one layer at T = {_listed(longest)}",
            "cost",
            [
                (heading, quantity, {"T": T})
                for T in longest
                for heading, quantity in (
                    ("state", "state_elements"),
                    ("read per token", "bytes_read"),
                    ("sequential", "sequential_steps"),
                )
            ],
            _rows(study, "cost", "state_elements", []),
            "Keys and values are bfloat16, states of recurrences float32. Sequential steps: those of a forward pass "
            "that must run one after the other.",
        ),
    ]


def _memory(study: Study) -> list[Table]:
    chips = list(dict.fromkeys(n.at["chip"] for n in study.store.select("memory", "chip_bytes")))
    kinds = list(dict.fromkeys(n.quantity for n in study.store.numbers.values() if n.quantity.startswith("held_")))
    held = [(name.removeprefix("held_"), name, {}) for name in kinds]
    policies = _rows(study, "memory", "longest_T", ["remat"])
    held_at = {n.at["T"] for n in study.store.select("memory", "held_total")}
    batch = {n.at["T"] for n in study.store.select("memory", "largest_batch")}
    drawn = {n.at["chip"] for n in study.store.select("memory", "held_total")}
    return [
        _matrix(
            study, "Longest T of one sequence", "memory", [(c, "longest_T", {"chip": c}) for c in chips], policies,
            "What fits in one device's memory, by the formulas of `longattn plan --analytic`.",
        ),
        _matrix(
            study, f"Largest batch at T = {_listed(batch)}", "memory",
            [(c, "largest_batch", {"chip": c}) for c in chips], policies,
        ),
        _matrix(
            study, f"Memory of a training step at T = {_listed(held_at)} on a {'/'.join(drawn)}", "memory", held,
            _rows(study, "memory", "held_total", ["remat"]), "By kind, at the peak.",
        ),
    ]  # fmt: skip


def _recall(study: Study) -> list[Table]:
    columns = [
        ("right", "accuracy", {}),
        ("chance", "chance", {}),
        ("state per layer", "state_elements", {}),
        ("read per token", "bytes_read", {}),
    ]
    rows = _rows(study, "recall", "accuracy", ["task", "T", "pairs", "digits"])
    return [_matrix(study, "Recall", "recall", columns, rows)]


def _context(study: Study) -> list[Table]:
    lengths = sorted({n.at["T"] for s in (study, *study.recorded) for n in s.store.select("context", "bits_per_byte")})
    ks = sorted({n.at["k"] for s in (study, *study.recorded) for n in s.store.select("context", "tail_excess")})
    return [
        _matrix(
            study,
            "Held-out bits per byte",
            "context",
            [(f"T = {T:,}", "bits_per_byte", {"T": T}) for T in lengths],
            _rows(study, "context", "bits_per_byte", []),
        ),
        _matrix(
            study,
            "Extra bits per byte when everything further back than k is replaced",
            "context",
            [(f"k = {k}", "tail_excess", {"k": k}) for k in ks],
            _rows(study, "context", "tail_excess", []),
        ),
    ]


def _sequence(study: Study) -> Table:
    """Returns the table of strategies and layouts by their cost."""
    store = study.store
    rows: list[tuple[Cell, ...]] = []
    machines = list(dict.fromkeys(n.at["machine"] for n in store.select("sequence", "total")))
    for idle in store.select("sequence", "idle"):
        number = lambda quantity, at=idle.at, **more: store.one("sequence", quantity, "", **at, **more)
        cells = [number(f"received_{passed}") for passed in ("forward", "backward")]
        for machine in machines:
            cells += [number(quantity, machine=machine) for quantity in ("exposed", "total")]
        rows.append((f"{idle.at['strategy']}, {idle.at['layout']}", idle, *cells))
    times = (heading for m in machines for heading in (f"exposed on {m}", f"all on {m}"))
    head = ("strategy, layout", "idle", "received, forward", "backward", *times)
    note = "One layer, forward and backward. Exposed: the time that messages add."
    return Table("Strategies to shard attention along the sequence", head, tuple(rows), note)


def _pod(study: Study) -> Table:
    """Returns the table of models by machines."""
    rows: list[tuple[Cell, ...]] = []
    for needs in study.store.select("pod", "needs"):
        number = lambda quantity, at=needs.at: study.store.one("pod", quantity, "", **at)
        has = number("has")
        fits = None if has is None else "yes" if needs.value <= has.value else "no"
        name = f"{needs.at['model']}, T = {needs.at['T']:,}, B = {needs.at['B']:,} on {needs.at['machine']}"
        rows.append((name, needs, has, fits, number("step_bound"), number("mfu_bound")))
    head = ("model and machine", "needs, per device", "has", "fits", "step, at least", "MFU, at most")
    return Table("Training steps of public models", head, tuple(rows), "Parameters float32, products bfloat16, AdamW.")


def compared(a: Study, b: Study) -> Table:
    """Returns the numbers that both studies have: values, ratio, and whether the intervals separate.

    Leaves out formulas with the same value in both.
    """
    rows: list[tuple[Cell, ...]] = []
    for key, x in a.store.numbers.items():
        y = b.store.numbers.get(key)
        if y is None or (x.badge == "predicted" and x.value == y.value):
            continue
        ratio = f"{y.value / x.value:.3g}" if x.value else "-"
        verdict = (
            ("apart" if separate(x, y) else UNRESOLVED)
            if x.low is not None
            else ("equal" if x.value == y.value else "")
        )
        rows.append((key, x, y, ratio, verdict))
    return Table(
        "Numbers that both studies have", ("number", a.name, b.name, f"{b.name} / {a.name}", "intervals"), tuple(rows)
    )
