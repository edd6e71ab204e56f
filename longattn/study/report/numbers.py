"""Formats a number: three digits, unit, interval, badge and provenance."""

from __future__ import annotations

import dataclasses
import math

from markupsafe import Markup, escape

from longattn.study.report.load import Study
from longattn.study.store import BADGES, Number, Store


def show(n: Number) -> str:
    """Formats a number with three digits and its unit."""
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
    if unit in ("tokens", "sequences", "elements", "steps"):
        return f"{v:,.0f}"
    if n.quantity.startswith(("exponent", "theory")):
        return f"{v:.2f}"
    return f"{v:.3f} {unit}".strip()


def interval_text(n: Number) -> str:
    """Returns " [low .. high]", or "" if there is no finite interval."""
    if n.low is None or n.high is None or not (math.isfinite(n.low) and math.isfinite(n.high)):
        return ""
    low, high = (show(dataclasses.replace(n, value=v, unit=n.unit)) for v in (n.low, n.high))
    return (
        f" [{low.split(' ')[0]} .. {high.split(' ')[0]}]"
        if low.split(" ")[1:] == high.split(" ")[1:]
        else f" [{low} .. {high}]"
    )


def provenance(n: Number, store: Store) -> str:
    """Returns a number's provenance in one line."""
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
    """Returns a number with its badge, as HTML."""
    store = next((s.store for s in (study, *study.recorded) if s.store.numbers.get(n.key) is n), study.store)
    text = f"<span class=i>{escape(interval_text(n))}</span>" if interval else ""
    return Markup(
        f'<data class="n" value="{n.value!r}" data-key="{escape(n.key)}" title="{escape(provenance(n, store))}">'
        f"{escape(show(n))}{' cut short' * n.cut_short}"
        f'<abbr class="b {n.badge}" title="{n.badge}">{n.badge[0].upper()}</abbr>{text}</data>'
    )


def number_text(n: Number) -> str:
    """Returns a number with its interval and the badge's first letter, for the terminal."""
    return f"{show(n)}{interval_text(n)}{' cut short' * n.cut_short} ({n.badge[0].upper()})"
