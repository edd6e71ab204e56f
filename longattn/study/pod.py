"""Part 5, on a pod: whether public models fit machines that the reader does not have, and what bounds their step.

Nothing runs: `longattn plan` compiles the training step. Without its compilers, or without time left, the figures come
from `longattn/recorded/pods.json`; `python -m longattn.study.pod` compiles the cases that the file lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from longattn.aot import compilers, train_step
from longattn.config import ByteLM, Config, Mesh
from longattn.cost import topology
from longattn.plan import calibration
from longattn.plan.calibration import Case
from longattn.plan.models import MODELS
from longattn.recorded import load, path
from longattn.study.presets import PodPlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit


def _case(model: str, machine: str, T: int, B: int, **mesh: Any) -> Case:
    config = Config(MODELS[model], ByteLM(T=T, B=B), Mesh(**mesh, strategy="all_gather"))
    return Case(f"{model} {machine} T={T} B={B}", machine, config)


CASES = (
    _case("llama3_8b", "v5e:16x16", 131_072, 16, fsdp=16, seq=16),
    _case("llama3_8b", "v5e:16x16", 1_048_576, 1, seq=256),
    _case("llama3_8b", "v5p:4x4x4", 1_048_576, 4, fsdp=4, seq=16),
    _case("llama3_8b", "h100:8x8", 131_072, 8, fsdp=8, seq=8),
    _case("llama3_70b", "v5p:4x4x8", 131_072, 16, fsdp=16, seq=8),
    _case("llama3_70b", "h100:8x8", 32_768, 16, fsdp=16, seq=4),
)


def recorded() -> dict[str, dict[str, Any]]:
    """Returns the figures compiled earlier, by case."""
    return load("pods")


def units(plan: PodPlan, store: Store) -> list[Unit]:
    """Returns a unit per case. All of them run: those without time take the figures compiled earlier."""
    return [
        Unit(f"pod/{case.name}", lambda clock, case=case: _numbers(case, clock), always=True)
        for case in CASES[: plan.cases]
    ]


def _numbers(case: Case, clock: Clock) -> Iterable[Number]:
    found, note = _compiled(case, clock)
    badge: Any = "compiled" if found else "recorded"
    found = found or recorded()[case.name]
    model, machine, *_ = case.name.split(" ")
    at = {"model": model, "machine": machine, "T": case.config.data.T, "B": case.config.data.B}
    command = f"longattn plan {model} --topology {machine} --T {at['T']} --B {at['B']} --mesh.strategy all_gather"
    figures = [("needs", found["hbm_bytes"], "B"), ("has", found["hbm_limit"], "B")]
    if found["fits"]:
        figures += [("step_bound", found["seconds"]["bound"], "s"), ("mfu_bound", found["mfu_bound"], "share")]
    for quantity, value, unit in figures:
        yield Number("pod", quantity, "", float(value), unit, badge, at, note=note, command=command)


def _compiled(case: Case, clock: Clock) -> tuple[dict[str, Any] | None, str]:
    """Compiles a case now; returns None and the reason if that is not possible."""
    where = topology.parse(case.topology)
    try:
        compilers.environment_of(where)
    except ValueError:
        return None, "compiled earlier: the machine's compiler is not installed here"
    if clock.over:
        return None, "compiled earlier: no time was left"
    found = train_step.facts(case.config, where, max(1.0, clock.left), train_step.cache_folder())
    return (None, f"compiled earlier: {found['reason']}") if "reason" in found else (found, "compiled, not run")


if __name__ == "__main__":
    calibration.record(path("pods"), CASES)
