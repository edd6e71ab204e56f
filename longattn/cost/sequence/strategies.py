"""All ways to spread a model's attention over a machine side by side, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from longattn.cost.sequence.load import load
from longattn.cost.sequence.problem import Problem, Way, ways
from longattn.cost.sequence.timeline import Machine, Pass, seconds, simulate
from longattn.cost.sequence.traffic import Traffic, again, traffic
from longattn.display import seconds_text


def compare(layers: Mapping[Problem, int], P: int, machine: Machine, *, remat: str = "none") -> list[dict[str, Any]]:
    """One row for each way to spread attention over P devices: load, bytes, time, or the reason why it does not serve.

    Args:
      layers: the attention of each kind of layer, and how many layers there are of it.
      P: devices along the sequence.
      machine: what they can do.
      remat: the policy, as in `config.Model`: what the backward pass computes and sends again is part of it.

    Returns:
      rows of JSON values. Bytes are what a device receives at most, ids left out, and seconds those of one layer on
      average, both of all its rows; `idle_slots` and `idle` are `Load.idle_slots` and the share of time in which
      devices wait for slower ones.
    """
    K = min(problem.heads for problem in layers)
    return [_row(layers, way, machine, remat) for way in ways(P, K)]


def _row(layers: Mapping[Problem, int], way: Way, machine: Machine, remat: str) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": way.strategy, "layout": way.layout, "sizes": list(way.sizes)}
    n = sum(layers.values())
    passes, received, slots = [Pass(0.0, 0.0, 0.0, 0.0)] * 2, [0.0, 0.0], 0.0
    try:
        for problem, times in layers.items():
            slots += times / n * load(problem, way).idle_slots
            took, (forward, backward) = simulate(problem, way, machine), traffic(problem, way)
            repeated = again(forward, remat)
            if remat == "full":
                took = took[0], took[1] + took[0]
            else:  # before anything of the backward pass
                wait = seconds(repeated.messages, way.sizes, machine)
                took = took[0], took[1] + Pass(wait, 0.0, 0.0, wait)
            sent = forward, Traffic(forward.P, (*backward.messages, *repeated.messages))
            for i in (0, 1):
                passes[i] = passes[i] + took[i] * (times / n)
                received[i] += times / n * sent[i].most
    except (ValueError, NotImplementedError) as error:
        return row | {"reason": str(error)}
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
