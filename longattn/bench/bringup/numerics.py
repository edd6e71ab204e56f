"""Results and gradients of every back end that accepts this device, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from longattn import numerics
from longattn.bench.bringup.options import BringupOptions
from longattn.bench.bringup.report import Report
from longattn.mask import Mask
from longattn.numerics.cases import problems


def run(options: BringupOptions, report: Report) -> None:
    """Adds a row for each case and back end, and writes the report after each."""
    every = problems(options.length)
    cpu = _cpu()
    part = report.part("numerics")
    part["against"] = "reference in float64 on this machine's CPU" if cpu else "reference in float32 on this device"
    part["of"] = len(every)
    for case in options.cases or tuple(every):
        problem = every[case]
        back_ends = [name for name in problem.api.BACK_ENDS if name != "reference"]
        about = {"case": case, "op": problem.op, "problem": _json(problem)}
        if report.late:
            over = {"outcome": "not run", "reason": "the time for this part was over"}
            part["rows"] += [{**about, "back_end": name, **over} for name in back_ends]
            continue
        report.at(f"the truth of {case!r}")
        drawn = numerics.draws(problem)
        truth, plain = _truth(problem, drawn, cpu), numerics.plain(problem, drawn)
        for name in back_ends:
            report.at(f"{name} at {case!r}")
            row = numerics.tried(problem, name, drawn, truth, plain)
            part["rows"].append({**about, "back_end": name, **row})
            report.say(f"{name}, {case}: {row['outcome']}" + (f" ({row['reason']})" if "reason" in row else ""))
            report.write()
    if all(row["outcome"] == "not run" for row in part["rows"]):
        part["reason"] = "no time was left for any case"


def _cpu() -> jax.Device | None:
    """Returns this machine's CPU if JAX may use it: JAX_PLATFORMS=tpu forbids it, tpu,cpu allows it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _truth(problem: numerics.AnyProblem, drawn: Sequence[numerics.Drawn], cpu: jax.Device | None) -> numerics.Results:
    if cpu is None:
        return numerics.truth(problem, "reference", drawn, np.float32)
    with jax.enable_x64(True), jax.default_device(cpu):
        return numerics.truth(problem, "reference", drawn, np.float64)


def _json(problem: numerics.AnyProblem) -> dict[str, Any]:
    plain = lambda x: str(x) if isinstance(x, Mask) else list(x) if isinstance(x, tuple) else x
    return {name: plain(x) for name, x in vars(problem).items()}
