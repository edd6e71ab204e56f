"""Kernels that have not run on this generation of chips are tried before training relies on them.

`longattn bringup` leaves a report per generation. Until there is one that passed, training compares output and
gradients of its own attention, and of its linear attention, with the form that is plain XLA, before step 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from longattn import cache, numerics
from longattn.config import Config, Mixer, Softmax
from longattn.cost import hardware
from longattn.models import MIXERS
from longattn.models.context import Context
from longattn.models.layers import rope_temperature
from longattn.models.linear import Linear
from longattn.numerics import LinearProblem
from longattn.ops import dispatch

KIND, VERSION = "bringup", 2  # of the reports; since 2 rows of the numerics say of which operation they are
CHECKOUT = Path(__file__).parents[2]
TRUSTED = ("xla", "reference")  # no kernels of ours: XLA's own programs
_SECONDS = 10.0


class Disagreement(FloatingPointError):
    """A kernel's results are not what they should be."""


# ---- reports


def generation(kind: str) -> str:
    """The chip that JAX calls `kind`, as `hardware.CHIPS` names it, else the kind itself, fit for a file's name."""
    chip = hardware.chip_of(kind)
    return chip.name if chip else re.sub(r"\W+", "_", kind.lower()).strip("_")


def folders() -> tuple[Path, ...]:
    """Where reports are kept: in a checkout of this package, and in the user's cache folder."""
    return CHECKOUT / "experiments" / "bringup", cache.folder("bringup")


def report(name: str, back_end: str, op: str = numerics.Problem.op) -> Path | None:
    """A report of the chip generation `name` that passed and in which `back_end` of the operation ran, or None."""
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
    """The attention, linear or not, of each kind of layer of the model, as one device meets it: by its name."""
    m, T = config.model, config.data.T
    found: dict[str, numerics.AnyProblem] = {}
    for mixer in dict.fromkeys(x for x in m.layers if isinstance(x, Softmax)):
        found[f"{mixer.mask}, T {T:,}"] = numerics.Problem(
            T=T, H=m.H // config.mesh.tensor, K=m.K // config.mesh.tensor, D=m.D, dtype=m.dtype, mask=mixer.mask,
            documents=min(4, T), scale=m.D**-0.5 * rope_temperature(mixer.rope), softcap=mixer.softcap,
            sinks=mixer.sinks,
        )  # fmt: skip
    for layer in dict.fromkeys(x for x in m.layers if issubclass(MIXERS[type(x).__name__], Linear)):
        p = _heard(layer, config)
        heads = "/".join(map(str, p.heads or ()))
        found[f"{type(layer).__name__}, heads {heads}, D {p.D}, V {p.V}, T {T:,}"] = p
    return found


@dataclasses.dataclass(frozen=True)
class _Listening(Context):
    """Linear attention computes nothing here: its arguments are kept."""

    heard: list[tuple[Any, ...]] = dataclasses.field(default_factory=list, compare=False)

    def linear_attention(self, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
        self.heard.append((q, k, v, options))
        return jnp.zeros((*q.shape[:2], max(x.shape[2] for x in (q, k, v)), v.shape[3]), v.dtype), None


def _heard(mixer: Mixer, config: Config) -> LinearProblem:
    """The call of linear attention that a layer makes."""
    m, T, parts, context = config.model, config.data.T, config.mesh.tensor, _Listening()
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    layer = MIXERS[type(mixer).__name__](mixer, m, context)
    jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, T, m.E), m.dtype), ids, ids)
    *arrays, options = context.heard[-1]
    heads = tuple(x.shape[2] // parts if x.shape[2] % parts == 0 else x.shape[2] for x in arrays)
    q, _, v = arrays
    decay = options.get("log_decay")
    return LinearProblem(
        T=T, H=max(heads), D=q.shape[3], V=v.shape[3], heads=heads, dtype=q.dtype.name, delta="beta" in options,
        decay="none" if decay is None else "vector" if decay.ndim == 4 else "scalar", documents=min(4, T),
        scale=options.get("scale", 1.0),
    )  # fmt: skip


def check(config: Config, context: Context | None, console: Console) -> dict[str, Any] | None:
    """What `compare` says of the kernels that this run is about to use and that no report of this chip speaks of.

    None where there is nothing to compare: on a CPU, where XLA's own programs run, or with a report that passed.
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
    """The first of these back ends that accepts the problem on this device, as a call would choose it."""
    for name in names:
        with contextlib.suppress(NotImplementedError):
            numerics.check(problem, name)
            return name
    return None


def compare(wanted: dict[str, tuple[str, numerics.AnyProblem]], seconds: float = _SECONDS) -> dict[str, Any]:
    """Results and gradients of back ends against those of XLA's own programs at float32.

    Args:
      wanted: by layer the back end, and its problem; a shorter one of the same kind is compared.
      seconds: after which no further layer is begun.

    Returns:
      JSON: a row for each layer, as `agreement.tried` makes it, or with the outcome "not run"; and the `outcome` of
      all, "passed" or "failed".
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
    for row in (verdict or {"rows": ()})["rows"]:
        if row["outcome"] == "failed":
            raise Disagreement(
                f"{row['back_end']} does not agree with xla on {verdict['device']}, {row['layer']}: {row['reason']}; "
                "stopped before step 0: longattn bringup tells more, and its report is worth sending"
            )
