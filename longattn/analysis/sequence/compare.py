"""All ways to spread a model's attention over a machine side by side, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from longattn.analysis.sequence.load import load
from longattn.analysis.sequence.problem import Problem, Way, ways
from longattn.analysis.sequence.simulate import Machine, Pass, simulate
from longattn.analysis.sequence.traffic import traffic
from longattn.analysis.text import seconds_text


def compare(layers: Mapping[Problem, int], P: int, machine: Machine, *, again: bool = False) -> list[dict[str, Any]]:
    """One row for each way to spread attention over P devices: load, bytes, time, or the reason why it does not serve.

    Args:
      layers: the attention of each kind of layer, and how many layers there are of it.
      P: devices along the sequence.
      machine: what they can do.
      again: the forward pass runs once more in the backward pass (remat "full"), attention included.

    Returns:
      rows of JSON values. Bytes are what a device receives at most, ids left out, and seconds those of one layer on
      average, both of all its rows; `idle_slots` and `idle` are `Load.idle_slots` and the share of time in which
      devices wait for slower ones.
    """
    K = min(problem.K for problem in layers)
    return [_row(layers, way, machine, again) for way in ways(P, K)]


def _row(layers: Mapping[Problem, int], way: Way, machine: Machine, again: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": way.strategy, "layout": way.layout, "sizes": list(way.sizes)}
    n = sum(layers.values())
    passes, received, slots = [Pass(0.0, 0.0, 0.0, 0.0)] * 2, [0.0, 0.0], 0.0
    try:
        for problem, times in layers.items():
            slots += times / n * load(problem, way).idle_slots
            for i, (took, sent) in enumerate(zip(simulate(problem, way, machine), traffic(problem, way), strict=True)):
                passes[i] = passes[i] + took * (times / n)
                received[i] += times / n * sent.most
    except (ValueError, NotImplementedError) as error:
        return row | {"reason": str(error)}
    if again:
        passes[1], received[1] = passes[1] + passes[0], received[1] + received[0]
    whole = passes[0] + passes[1]
    return row | {
        "idle_slots": slots,
        "idle": whole.imbalance / (whole.compute + whole.imbalance),
        "received": {"forward": received[0], "backward": received[1]},
        "seconds": {"forward": asdict(passes[0]), "backward": asdict(passes[1]), **asdict(whole)},
    }


def named(row: Mapping[str, Any]) -> str:
    """A row's way, in words."""
    return str(Way(row["strategy"], row["layout"], tuple(row["sizes"])))


def recommended(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: which way, and why. Of ways within a hundredth of the fastest the first, which is the simplest."""
    served = [row for row in rows if "reason" not in row]
    if not served:
        return f"None: no way serves this attention; {rows[0]['reason']}" if rows else "None: one device needs none."
    fastest = min(row["seconds"]["total"] for row in served)
    best = next(row for row in served if row["seconds"]["total"] <= 1.01 * fastest)
    others = [row for row in served if row["strategy"] != best["strategy"]]
    said = f"{named(best)}: {_cost(best)}"
    if others:
        other = min(others, key=lambda row: row["seconds"]["total"])
        said += f"; the best of another strategy, {named(other)}: {_cost(other)}"
    return said + "."


def _cost(row: Mapping[str, Any]) -> str:
    s = row["seconds"]
    return (
        f"{seconds_text(s['total'])} a layer, forward and backward, of it {s['imbalance'] / s['total']:.0%} waiting "
        f"for slower devices and {s['exposed'] / s['total']:.0%} for messages"
    )
