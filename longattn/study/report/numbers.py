"""Formats numbers: three digits, unit, interval, badge and provenance; in a table the unit is that of the column."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from longattn.display import bytes_text, digits, seconds_text
from longattn.study.report.load import Cell, Study, Table
from longattn.study.store import BADGES, Number, Store

COUNTS = ("tokens", "sequences", "elements", "steps", "parameters")
_SCALES = {
    "s": ((10.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (0.0, 1e-6, "us")),
    "B": ((2.0**40, 2.0**40, "TiB"), (2.0**30, 2.0**30, "GiB"), (2.0**20, 2.0**20, "MiB"), (2.0**10, 2.0**10, "KiB"),
          (0.0, 1.0, "B")),
    "FLOP": ((0.0, 1e9, "GFLOP"),),
    "tokens/s": ((0.0, 1e3, "thousand tokens/s"),),
    "share": ((0.0, 0.01, "%"),),
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """The unit of a column: numbers are divided by `scale`."""

    name: str
    scale: float = 1.0


def unit_of(numbers: Sequence[Number]) -> Unit | None:
    """Returns the unit that suits the median of the numbers; None if they have several units or none."""
    if len({n.unit for n in numbers}) != 1:
        return None
    unit, values = numbers[0].unit, sorted(abs(n.value) for n in numbers)
    middle = values[len(values) // 2]
    for least, scale, name in _SCALES.get(unit, ()):
        if middle >= least:
            return Unit(name, scale)
    return Unit(unit)


def columns(table: Table) -> tuple[str, tuple[str, ...], list[Unit | None]]:
    """Returns a table's title and heads with the units of its columns, each stated once, and the units."""
    cells = [[row[j] for row in table.rows if isinstance(row[j], Number)] for j in range(len(table.head))]
    units = [unit_of(column) for column in cells]  # type: ignore[arg-type]
    names = {unit.name for unit in units if unit}
    if len(names) == 1 and len([u for u in units if u]) > 1 and (name := next(iter(names))):
        unit = next(u for u in units if u)
        if all(u in (None, unit) for u in units):
            return f"{table.title} ({name})", table.head, units
    heads = (f"{h} ({u.name})" if u and u.name else h for h, u in zip(table.head, units, strict=True))
    return table.title, tuple(heads), units


def show(n: Number, unit: Unit | None = None) -> str:
    """Formats a number with three digits, and with its unit unless its column states one."""
    v = n.value
    if not math.isfinite(v):
        return "-"
    if unit is not None and n.unit in ("s", "B", "FLOP", "tokens/s"):
        return digits(v / unit.scale)
    if n.unit == "s":
        return seconds_text(v)
    if n.unit == "B":
        return bytes_text(v)
    if n.unit == "share":
        return f"{100 * v:.1f}" if unit else f"{v:.1%}"
    if n.unit == "FLOP":
        return f"{digits(v / 1e9)} GFLOP"
    if n.unit == "tokens/s":
        return f"{v:,.0f} tokens/s"
    if n.unit in COUNTS:
        return f"{v:,.0f}" if unit else f"{v:,.0f} {n.unit}"
    if n.quantity.startswith(("exponent", "theory")):
        return f"{v:.2f}"
    return f"{v:.3f}" if unit else f"{v:.3f} {n.unit}".strip()


def interval_text(n: Number, unit: Unit | None = None) -> str:
    """Returns " [low .. high]", or "" if there is no finite interval."""
    if n.low is None or n.high is None or not (math.isfinite(n.low) and math.isfinite(n.high)):
        return ""
    low, high = (show(dataclasses.replace(n, value=v), unit) for v in (n.low, n.high))
    if low.split(" ")[1:] == high.split(" ")[1:]:
        return f" [{low.split(' ')[0]} .. {high.split(' ')[0]}]"
    return f" [{low} .. {high}]"


def provenance(n: Number, store: Store) -> str:
    """Returns a number's provenance in one line."""
    e = store.environments.get(n.environment)
    parts = [BADGES[n.badge]]
    if e and n.badge != "recorded":
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


def number_html(n: Number, study: Study, interval: bool = True, unit: Unit | None = None) -> Markup:
    """Returns a number with its badge, as HTML."""
    store = next((s.store for s in (study, *study.recorded) if s.store.numbers.get(n.key) is n), study.store)
    text = f"<span class=i>{escape(interval_text(n, unit))}</span>" if interval else ""
    refused = f" {n.refused}" if n.refused else ""
    return Markup(
        f'<data class="n" value="{n.value!r}" data-key="{escape(n.key)}" title="{escape(provenance(n, store))}">'
        f"{escape(show(n, unit))}{refused}"
        f'<abbr class="b {n.badge}" title="{n.badge}">{n.badge[0].upper()}</abbr>{text}</data>'
    )


def number_text(n: Number) -> str:
    """Returns a number with its interval and the badge's first letter, for the terminal."""
    refused = f" {n.refused}" if n.refused else ""
    return f"{show(n)}{interval_text(n)}{refused} ({n.badge[0].upper()})"


def badges_of(cells: Iterable[Cell]) -> str:
    """Returns the first letters of the badges of a column's numbers."""
    return "/".join(sorted({c.badge[0].upper() for c in cells if isinstance(c, Number)}))
