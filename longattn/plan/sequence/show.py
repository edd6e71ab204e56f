"""Tables of what sequence parallelism costs. Nothing is computed here that is not in the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longattn.cost.sequence.strategies import named
from longattn.display import bytes_text, plain_table, seconds_text

_STEPS, _RANKS = 40, 16  # of a schedule that are shown
FOOT = (
    "By formula, from the schedules that the strategies walk along: products at the rate and messages at the bandwidth "
    "stated, nothing else costs time. Received: by the device that gets most, of one layer on average, all its rows."
)


WAYS = ("strategy, layout", "idle slots", "idle time", "received", "backward", "forward", "backward", "exposed", "all")
WAYS_TITLE = "Attention over the devices along the sequence, a layer"


def way_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Every way, as WAYS has it: who idles, what is sent, how long it takes."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        if "reason" in row:
            found.append((named(row), row["reason"]))
            continue
        s, received = row["seconds"], row["received"]
        times = s["forward"]["total"], s["backward"]["total"], s["exposed"], s["total"]
        sizes = received["forward"], received["backward"]
        shares = row["idle_slots"], row["idle"]
        cells = (*(f"{x:.1%}" for x in shares), *map(bytes_text, sizes), *map(seconds_text, times))
        found.append((named(row), *cells))
    return found


def ways_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """`way_rows` for the terminal."""
    table = plain_table(WAYS_TITLE)
    for i, heading in enumerate(WAYS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for cells in way_rows(rows):
        table.add_row(*map(escape, cells))
    return table


def tables(console: Console, document: Mapping[str, Any]) -> None:
    """Print what `longattn profile sequence` found."""
    say = lambda text, **style: console.print(text, highlight=False, markup=False, soft_wrap=True, **style)
    p, m = document["problem"], document["machine"]
    heads = f"{p['H']} heads, {p['K']} of keys, D {p['D']}" + (f", V {p['V']}" if p["V"] else "")
    squares = f" in squares of {p['block']}" if p["block"] > 1 else ""
    say(
        f"T {p['T']:,}, B {p['B']}, {heads}, {p['dtype']}, {p['mask']}{squares}, on {document['topology']}: "
        f"{document['devices']} devices along the sequence, {m['flops'] / 1e12:,.0f} TFLOP/s, {m['link'] / 1e9:,.3g} "
        f"GB/s {'a link and direction' if m['torus'] else 'through a switch'}, {m['latency'] * 1e6:g} us a message",
        style="bold",
    )
    if "rows" in document:
        console.print(ways_table(document["rows"]))
        say(f"Recommended: {document['recommended']}", style="bold")
    else:
        _way(console, say, document["way"])
    if "packed" in document:
        console.print(packed_table(document["packed"]))
        console.print(groups_table(document["groups"]))
    say(FOOT, style="dim")


def _way(console: Console, say: Any, way: Mapping[str, Any]) -> None:
    steps, P = len(way["pairs"]), len(way["pairs"][0])
    table = plain_table(f"{way['name']}: whose queries and whose keys, by step and device; in % of the largest share")
    for heading in ("step", *(f"{i}" for i in range(min(P, _RANKS)))):
        table.add_column(heading, justify="right", no_wrap=True)
    most = max(map(max, way["pairs"]))
    for t in range(min(steps, _STEPS)):
        table.add_row(f"{t}", *(_cell(way, t, i, most) for i in range(min(P, _RANKS))))
    console.print(table, markup=False)
    if steps > _STEPS or P > _RANKS:
        say(f"Of {steps} steps and {P} devices the first are shown; --json has all.")
    say(
        f"Idle: {way['idle_slots']:.1%} of all slots, {way['idle']:.1%} of the time where all wait for the slowest; "
        f"{way['critical']:,.0f} pairs of a mean head on the critical path."
    )
    table = plain_table("What devices receive, forward and backward")
    counted = any("measured" in m for m in way["messages"])
    for i, heading in enumerate(
        ("pass", "scope", "messages", "most", "mean", *(["compiled, most"] if counted else []))
    ):
        table.add_column(heading, justify="right" if i > 1 else "left", no_wrap=True)
    for m in way["messages"]:
        found = [bytes_text(m["measured"])] if counted else []
        table.add_row(m["pass"], m["scope"], f"{m['messages']}", bytes_text(m["most"]), bytes_text(m["mean"]), *found)
    console.print(table, markup=False)
    for name, u in way["units"].items():
        usual = "-" if u["usual"] is None else f"{u['usual']:.3f}"
        say(f"{name}: {u['most']:.3f} at most, {u['mean']:.3f} on average, usual figure {usual}, in T H D elements")
    say(f"Where they differ: {way['differs']}.")
    for name, s in way["seconds"].items():
        say(
            f"{name}: {seconds_text(s['total'])}, of it computing {seconds_text(s['compute'])}, waiting for slower "
            f"devices {seconds_text(s['imbalance'])}, for messages {seconds_text(s['exposed'])}"
        )


def _cell(way: Mapping[str, Any], t: int, i: int, most: float) -> str:
    """ "7<3 100%": queries of 7, keys of 3; "+" where a device helps; "-" where it idles."""
    pairs = way["pairs"][t][i]
    if not pairs:
        return "-"
    name = lambda device: "all" if device < 0 else f"{device}"
    lent = "+" if way["helps"][t][i] else ""
    return f"{lent}{name(way['queries'][t][i])}<{name(way['keys'][t][i])} {pairs / most:.0%}"


def packed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Imbalance of packed documents along the sequence."""
    table = plain_table("Packed documents: work of the device that has most over the mean")
    for i, heading in enumerate(("T", "devices", "layout", "documents a row", "mean", "worst", "by tokens")):
        table.add_column(heading, justify="left" if i == 2 else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            f"{r['T']:,}", f"{r['P']}", r["layout"], f"{r['documents_per_row']:.1f}", f"{r['mean']:.2f}",
            f"{r['worst']:.2f}", f"{r['by_tokens']:.2f}",
        )  # fmt: skip
    return table


def groups_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Imbalance of packed rows over data-parallel groups."""
    table = plain_table("Packed rows over groups instead: pairs of the group that has most over the mean")
    for heading in ("T", "groups", "rows of each", "steps", "in order", "--data.balance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in rows:
        sizes = (f"{r[key]:,}" for key in ("T", "groups", "rows_each", "steps"))
        table.add_row(*sizes, f"{r['before']:.2f}", f"{r['after']:.2f}")
    return table
