"""The plot of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longattn.bench.compare.options import heading
from longattn.display import device_text

SCOPES = 7  # number of scopes with a colour of their own: those with the largest shares


def plot(document: Mapping[str, Any]) -> Any:
    """Returns a matplotlib figure: each contestant's device time, a point per call, and its ops' time by scope."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in document["rows"] if "samples" in row]
    figure = Figure(
        figsize=(12, 1.7 + 0.5 * len(rows)), layout="constrained"
    )  # without pyplot, which may open a window
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
    at = np.arange(len(rows))
    for y, row in zip(at, rows):
        s = row["device_seconds"]
        left.plot(np.asarray(row["samples"]) * 1e3, np.full(len(row["samples"]), y), "o", color="C0", alpha=0.25, ms=4)
        spread = [[(s["median"] - s["low"]) * 1e3], [(s["high"] - s["median"]) * 1e3]]
        left.errorbar(s["median"] * 1e3, y, xerr=spread, fmt="D", color="black", capsize=4, ms=4)
    left.set_yticks(at, [row["contestant"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.set_xlabel("ms")
    left.set_title("device time: calls, median, quartiles", fontsize=10)

    seconds: list[dict[tuple[str, bool], float]] = []  # by (scope, whether it is in the backward pass)
    share: dict[str, float] = {}
    for row in rows:
        seconds.append({})
        for part in row["scopes"]:
            key = part["name"], part["phase"] != "forward"
            seconds[-1][key] = seconds[-1].get(key, 0.0) + part["seconds"]
        total = sum(seconds[-1].values())
        for name in {name for name, _ in seconds[-1]}:
            mine = sum(s for (n, _), s in seconds[-1].items() if n == name)
            share[name] = max(share.get(name, 0.0), mine / total if total else 0.0)
    shown = sorted(share, key=lambda name: -share[name])[:SCOPES]
    start = np.zeros(len(rows))
    for backward in (False, True):
        for i, name in enumerate([*shown, "other scopes"]):
            chosen = lambda n, name=name: n == name or (name == "other scopes" and n not in shown)
            width = np.array([sum(s for (n, b), s in row.items() if b == backward and chosen(n)) for row in seconds])
            color = f"C{i}" if name in shown else "0.75"
            hatch = "////" if backward else None
            right.barh(at, width * 1e3, left=start * 1e3, height=0.6, color=color, hatch=hatch, edgecolor="white")
            start += width
    colours = [Patch(color=f"C{i}", label=name) for i, name in enumerate(shown)]
    if len(share) > len(shown):
        colours.append(Patch(color="0.75", label="other scopes"))
    if any(backward for row in seconds for _, backward in row):
        colours.append(Patch(facecolor="0.4", edgecolor="white", hatch="////", label="backward"))
    right.legend(handles=colours, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    right.set_xlim(0, start.max() * 1.04e3)
    right.set_xlabel("ms")
    right.set_title("time of its ops by named scope, summed over threads or streams", fontsize=10)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"{heading(document['options'])}, {device_text(document['environment'])}", fontsize=11)
    return figure
