"""The check of kernels before step 0 of a training.

`longattn bringup` writes a report per chip generation. Where none has passed, training compares the output and the
gradients of its own calls of attention and linear attention with the back end `xla`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from longattn import cache, numerics
from longattn.config import Config
from longattn.cost import hardware
from longattn.models import Context, module_of
from longattn.ops import dispatch
from longattn.ops.calls import AttentionCall, LinearCall

KIND, VERSION = "bringup", 2  # of the reports; since version 2, rows of the numerics name their operation
CHECKOUT = Path(__file__).parents[2]
TRUSTED = ("xla", "reference")  # no kernels of ours: XLA's own programs
_SECONDS = 10.0


class Disagreement(FloatingPointError):
    """A kernel's results differ from those of the back end `xla` by more than is allowed."""


# ---- reports


def generation(kind: str) -> str:
    """The name in `hardware.CHIPS` of the chip that JAX calls `kind`, else the kind itself in a file name's letters."""
    chip = hardware.chip_of(kind)
    return chip.name if chip else re.sub(r"\W+", "_", kind.lower()).strip("_")


def folders() -> tuple[Path, ...]:
    """The folders of reports: one in a checkout of this package, one in the user's cache folder."""
    return CHECKOUT / "experiments" / "bringup", cache.folder("bringup")


def report(name: str, back_end: str, op: str = numerics.Problem.op) -> Path | None:
    """The newest passed report of the chip generation `name` in which `back_end` of the operation ran, or None."""
    for path in sorted((p for folder in folders() for p in folder.glob("*.json")), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a file of another kind is no report
            document = json.loads(path.read_text())
            rows = document["numerics"]["rows"]
            ran = {(row["op"], row["back_end"]) for row in rows if row["outcome"] == "passed"}
            known = (document["kind"], document["version"], document["generation"], document["verdict"])
            if known == (KIND, VERSION, name, "passed") and (op, back_end) in ran:
                return path
    return None


# ---- before step 0


def problems(config: Config) -> dict[str, numerics.AnyProblem]:
    """The calls of attention and linear attention that one device makes in the model, by what they are called."""
    m, T = config.model, config.data.T
    found: dict[str, numerics.AnyProblem] = {}
    for mixer in dict.fromkeys(m.layers):
        for call in module_of(mixer).calls(mixer, m, T):
            if isinstance(call, AttentionCall):
                found[f"{call.mask}, T {call.T:,}"] = _attention(call, config.mesh.tensor)
            elif isinstance(call, LinearCall):
                p = _linear(call, config.mesh.tensor)
                heads = "/".join(map(str, p.heads or ()))
                found[f"{type(mixer).__name__}, heads {heads}, D {p.D}, V {p.V}, T {p.T:,}"] = p
    return found


def _attention(call: AttentionCall, tensor: int) -> numerics.Problem:
    """A call of attention on one of the devices that share heads, with packed documents."""
    documents = min(4, call.T) if call.keys == call.T else 0
    return numerics.Problem(**vars(call.shared(tensor)), documents=documents)


def _linear(call: LinearCall, tensor: int) -> numerics.LinearProblem:
    """A call of linear attention on one of the devices that share heads, with packed documents."""
    call = call.shared(tensor)
    return numerics.LinearProblem(
        T=call.T, H=call.H, D=call.D, V=call.V, heads=(call.Hq, call.Hk, call.Hv), dtype=call.dtype, decay=call.decay,
        delta=call.delta, documents=min(4, call.T), scale=call.scale,
    )  # fmt: skip


def check(config: Config, context: Context | None, console: Console) -> dict[str, Any] | None:
    """The result of `compare` for the kernels that this run uses and that no passed report of this chip covers.

    None where nothing needs comparing: on a CPU, with XLA's own programs, or with a report that passed.
    """
    target = dispatch.target()
    if target.platform == "cpu":
        return None
    asked = context.implementation if context else None
    wanted = {}
    for layer, problem in problems(config).items():
        names = dispatch.candidates(asked, tuple(problem.api.BACK_ENDS), problem.api.DEFAULT)
        name = chosen(problem, names)
        if name is not None and name not in TRUSTED and report(generation(target.kind), name, problem.op) is None:
            wanted[layer] = name, problem
    if not wanted:
        return None
    used = " and ".join(dict.fromkeys(name for name, _ in wanted.values()))
    console.print(f"no bring-up report of {target.kind} that {used} passed: comparing with xla first", highlight=False)
    verdict = compare(wanted)
    for row in verdict["rows"]:
        console.print(sentence(row), highlight=False, markup=False, soft_wrap=True)
    return verdict


def chosen(problem: numerics.AnyProblem, names: Iterable[str]) -> str | None:
    """The first of these back ends that accepts the problem on this device, which is the one a call would choose."""
    for name in names:
        with contextlib.suppress(NotImplementedError):
            numerics.check(problem, name)
            return name
    return None


def compare(wanted: dict[str, tuple[str, numerics.AnyProblem]], seconds: float = _SECONDS) -> dict[str, Any]:
    """Compares results and gradients of back ends with those of `xla` in float32.

    Args:
      wanted: the back end and its problem by layer. What is compared is a shorter problem of the same kind.
      seconds: the time after which no further layer begins.

    Returns:
      JSON: a row for each layer, as `numerics.tried` makes it or with the outcome "not run", and the `outcome` of all,
      "passed" or "failed".
    """
    end, rows = time.monotonic() + seconds, []
    for layer, (name, whole) in wanted.items():
        problem = whole.shorter()
        row = {"layer": layer, "back_end": name, "T": problem.T, "dtype": problem.dtype}
        if rows and time.monotonic() > end:
            rows.append({**row, "outcome": "not run", "reason": f"{seconds:g} s were over"})
            continue
        drawn = numerics.draws(problem)
        truth = numerics.truth(problem, "xla", drawn, np.float32)
        rows.append(row | numerics.tried(problem, name, drawn, truth, numerics.plain(problem, drawn)))
    outcome = "failed" if any(row["outcome"] == "failed" for row in rows) else "passed"
    return {"against": "xla, float32", "device": dispatch.target().kind, "outcome": outcome, "rows": rows}


def sentence(row: dict[str, Any]) -> str:
    """A row of `compare` in words."""
    what = f"{row['back_end']} at {row['layer']} (compared at T {row['T']:,}, {row['dtype']})"
    if row["outcome"] != "passed":
        return f"{what} {row['outcome']}: {row['reason']}"
    worst = row["results"][row["worst"]]
    return (
        f"{what} agrees with xla: largest error {worst['error']:.1e} of {worst['allowed']:.1e} allowed "
        f"({row['worst']}), {row['seconds']:.1f} s"
    )


def insist(verdict: dict[str, Any] | None) -> None:
    """Raises Disagreement, in one line, unless all that was compared agrees."""
    if not verdict:
        return
    for row in verdict["rows"]:
        if row["outcome"] == "failed":
            raise Disagreement(
                f"{row['back_end']} does not agree with xla on {verdict['device']}, {row['layer']}: {row['reason']}; "
                "stopped before step 0: longattn bringup tells more, and its report is worth sending"
            )
