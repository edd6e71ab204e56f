"""`longattn profile run RUN`: device time of a training run's steps, from the trace that the run recorded.

A step's wall time lasts from its first op to the first op of the next step, so it includes waiting, such as for data.
Idle is the share of it in which no op ran, of this program or another. The last step has no next one: its wall time
ends with its completion, and the medians of wall time and idle leave it out if there are other steps.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from longattn.bench import trace
from longattn.config.checks import typed, usable_path
from longattn.display import plain_table, seconds_text
from longattn.files import json_text
from longattn.train.record import read_config

VERSION = 2
WIDTH = 120


@dataclass(frozen=True)
class RunProfileOptions:
    """Show the device time of a training run's steps, by op and by named scope, from the trace that it recorded."""

    run: str  # the folder that `longattn train` wrote, or any folder of a jax.profiler trace
    program: str | None = None  # the compiled program to read; none: the one that kept the device busy longest
    depth: int = 3  # number of parts of a scope's name that are kept
    top: int = 10  # number of kernels to show
    json: bool = False  # print one JSON document instead of the tables

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "run")
        if self.depth < 1 or self.top < 0:
            raise ValueError(f"depth={self.depth} must be at least 1 and top={self.top} not negative")


def _find(folder: Path) -> tuple[Path, int]:
    """Returns the newest trace and the number of its first step. Raises ValueError, with the remedy, for none."""
    first, is_run = 1, (folder / "config.json").is_file()
    if is_run:
        window = read_config(folder).run.profile
        first = window[0] if window else 1
    try:
        return trace.find(folder), first
    except ValueError as error:
        remedy = "give a run, or a folder of a jax.profiler trace"
        if is_run:
            remedy = (
                f"record one while it trains: longattn train {folder}/config.json --run.profile FIRST COUNT, with "
                "steps that it has not yet done"
            )
        raise ValueError(f"{error}; {remedy}") from None


def part_of(scope: trace.Scope, depth: int) -> str:
    """Returns a scope cut to `depth` parts and the same for all layers, such as layer/mixer/attention.

    An op that belongs to no single part belongs to "model".
    """
    path = [re.sub(r"^layer_\d+$", "layer", name) for name in scope.path]
    path = [name for name in path if name not in ("layers", "Transformer") and not name.startswith("Transformer.")]
    return "/".join(path[:depth]) or ("model" if scope.path else "(no scope)")


def read(options: RunProfileOptions) -> dict[str, Any]:
    """Returns the document. Raises ValueError for a folder without a trace, or a program that the trace lacks."""
    path, first = _find(Path(options.run))
    recorded = trace.read(path.read_bytes())
    program = options.program or recorded.busiest()
    executions = recorded.of(program)
    busy: dict[str, float] = defaultdict(float)
    runs: dict[str, int] = defaultdict(int)
    for e in recorded.executions:
        busy[e.program] += e.busy
        runs[e.program] += 1
    if not executions:
        raise ValueError(f"the trace holds no program {program!r}; it has {', '.join(sorted(busy))}")
    by_device: dict[str, list[trace.Execution]] = defaultdict(list)
    for e in executions:
        by_device[e.device].append(e)
    steps, whole = [], []  # all steps, and those with a known wall time
    for device, mine in by_device.items():
        everything = [e for e in recorded.executions if e.device == device]
        for i, (e, after) in enumerate(zip(mine, [*mine[1:], None])):
            end = after.start if after else e.end
            wall, worked = (end - e.start) * 1e-9, trace.busy(everything, e.start, end)
            steps.append(
                {"step": first + i, "device": device, "wall_seconds": wall, "device_seconds": e.seconds,
                 "busy_seconds": worked, "idle": 1 - worked / wall if wall else 0.0}
            )  # fmt: skip
            whole += [steps[-1]] if after else []
    whole = whole or steps
    kernels = trace.kernels(executions)
    return {
        "version": VERSION,
        "kind": "profile run",
        "trace": str(path.parent),
        "program": program,
        "devices": len(by_device),
        "hosts": len(list(path.parent.glob("*.xplane.pb"))),
        "steps": steps,
        "wall_seconds": asdict(trace.Spread.of([s["wall_seconds"] for s in whole])),
        "device_seconds": asdict(trace.Spread.of([s["device_seconds"] for s in steps])),
        "idle": float(np.median([s["idle"] for s in whole])),
        "kernels": [asdict(p) for p in kernels],
        "scopes": [asdict(p) for p in trace.scopes(executions)],
        "parts": [asdict(p) for p in trace.scopes(executions, lambda scope: part_of(scope, options.depth))],
        "other_programs": [
            {"program": name, "executions": runs[name], "busy_seconds": busy[name]} for name in busy if name != program
        ],
        "unknown_seconds": recorded.unknown_seconds,
    }


def run(options: RunProfileOptions, console: Console | None = None) -> dict[str, Any]:
    """Prints the tables (or the JSON document) and returns the document."""
    document = read(options)
    if options.json:
        print(json_text(document))
    else:
        _print(console or Console(width=max(WIDTH, Console().width)), document, options.top)
    return document


def _print(console: Console, document: Mapping[str, Any], top: int) -> None:
    table = plain_table(f"{document['program']}: steps")
    for heading in ("step", "wall", "on the device", "busy", "idle"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for s in document["steps"]:
        by_step[s["step"]].append(s)
    for step, devices in sorted(by_step.items()):
        middle = lambda key, devices=devices: float(np.median([s[key] for s in devices]))
        times = (seconds_text(middle(f"{kind}_seconds")) for kind in ("wall", "device", "busy"))
        table.add_row(f"{step}", *times, f"{middle('idle'):.1%}")
    console.print(table, markup=False)

    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for p in document["parts"]:
        parts[p["name"]][p["phase"]] += p["seconds"]
    total = sum(sum(phases.values()) for phases in parts.values())
    table = plain_table("By named scope, a step")
    for heading in ("scope", "forward", "recompute", "backward", "all", "share"):
        left = heading == "scope"
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for name, phases in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        mine = sum(phases.values())
        shown = (seconds_text(phases[p]) if p in phases else "" for p in ("forward", "recompute", "backward"))
        table.add_row(name, *shown, seconds_text(mine), f"{mine / total:.1%}" if total else "-")
    console.print(table, markup=False)
    if top:
        console.print(trace.parts_table("Top kernels, a step", document["kernels"][:top], total), markup=False)
    wall, notes = document["wall_seconds"], []
    notes.append(
        f"Step {seconds_text(wall['median'])}, quartiles {seconds_text(wall['low'])} .. {seconds_text(wall['high'])}, "
        f"idle {document['idle']:.1%}: medians over {len(document['steps'])} executions on {document['devices']} "
        f"device{'s' if document['devices'] > 1 else ''}; ops are summed over threads or streams."
    )
    others = (
        f"{p['program']} ({p['executions']}, {seconds_text(p['busy_seconds'])})" for p in document["other_programs"]
    )
    if listed := ", ".join(others):
        notes.append(f"Other programs, their executions and busy time in all: {listed}.")
    if document["hosts"] > 1:
        notes.append(f"The trace of one host; those of {document['hosts'] - 1} more lie beside it.")
    if document["unknown_seconds"]:
        notes.append(f"{seconds_text(document['unknown_seconds'])} of kernels name no program and are left out.")
    console.print("\n".join([*notes, trace.opening(document["trace"])]), highlight=False, markup=False, soft_wrap=True)
