"""Compares the formulas of `longattn.cost.step` with compiled programs, whose figures are kept in `longattn/recorded`.

`python -m longattn.plan.calibration` compiles the cases that the file lacks, and prints the errors of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from longattn.aot import train_step
from longattn.config import (
    GLA,
    Based,
    ByteLM,
    Config,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mesh,
    Mixer,
    Model,
    Optimiser,
    Performer,
    RetNet,
)
from longattn.cost import step, topology
from longattn.display import plain_table
from longattn.plan.models import MODELS
from longattn.recorded import load, path

_SMALL = Model(N=8, E=1024, F=2816, H=16, K=4, D=64, W=32_000, remat="attention")
_WIDE = Model(N=12, E=1536, F=4096, H=12, K=4, D=128, W=50_304, tie=False, remat="attention")
_1_3B = Model(N=24, E=2048, F=5632, H=16, K=16, D=128, W=50_304, tie=False, remat="attention")
_3B = Model(N=16, E=2560, F=6912, H=20, K=20, D=128, W=50_304, remat="attention")
_1B, _8B, _70B = (MODELS[f"llama3_{size}"] for size in ("1b", "8b", "70b"))


def _of(base: Model, *mixers: Mixer, **changes: Any) -> Model:
    return replace(base, mixers=mixers, **changes)


class Case(NamedTuple):
    """A training step to compile."""

    name: str
    topology: str
    config: Config


def _case(name: str, where: str, model: Model, T: int, B: int, accumulate: int = 1, **mesh: Any) -> Case:
    config = Config(
        model, ByteLM(T=T, B=B), Mesh(**{"strategy": "all_gather", **mesh}), Optimiser(accumulate=accumulate)
    )
    sizes = " ".join(f"{axis} {n}" for axis, n in mesh.items())
    return Case(f"{name} {where} T{T} B{B} {sizes or 'alone'}", where, config)


# Half of them do not fit: a compiler refuses such a program within seconds, and still reports the memory it needs.
CASES = (
    _case("small", "v5e:2x2", _SMALL, 524_288, 4, fsdp=4),
    _case("small remat none", "v5e:2x2", replace(_SMALL, remat="none"), 131_072, 4, fsdp=4),
    _case("small remat full", "v5e:2x2", replace(_SMALL, remat="full"), 524_288, 4, fsdp=4),
    _case("small remat dots", "v5e:2x2", replace(_SMALL, remat="dots"), 131_072, 4, fsdp=4),
    _case("small", "v5e:2x2", _SMALL, 524_288, 4, fsdp=2, seq=2),
    _case("small", "v5e:2x2", _SMALL, 524_288, 4, tensor=4),
    _case("wide accumulate 2", "v5e:2x2", _WIDE, 131_072, 16, accumulate=2, fsdp=4),
    _case("wide float32", "v6e:2x2", replace(_WIDE, dtype="float32"), 131_072, 8, fsdp=4),
    _case("wide", "v6e:2x2", _WIDE, 1_048_576, 1, seq=4),
    _case("1b", "v5e:4x4", _1B, 131_072, 16, fsdp=16),
    _case("1b", "v5e:4x4", _1B, 524_288, 4, fsdp=4, seq=4),
    _case("1b remat full", "v5e:4x4", replace(_1B, remat="full"), 2_097_152, 1, seq=16),
    _case("1b", "v5e:4x4", _1B, 131_072, 8, fsdp=8, tensor=2),
    _case("8b", "v6e:4x4", _8B, 65_536, 16, fsdp=16),
    _case("8b remat full", "v6e:4x4", replace(_8B, remat="full"), 262_144, 4, fsdp=4, seq=4),
    _case("8b", "v5p:2x2x2", _8B, 131_072, 8, fsdp=8),
    _case("8b", "tpu7x:2x2x1", _8B, 131_072, 8, fsdp=8),
    _case("8b", "v5e:16x16", _8B, 1_048_576, 16, fsdp=16, seq=16),
    _case("70b", "v5p:4x4x4", _70B, 65_536, 64, fsdp=64),
    _case("small", "v5e:2x2", _SMALL, 8192, 4, fsdp=4),
    _case("small", "v5e:2x2", _SMALL, 65_536, 1, seq=4),
    _case("small", "v5e:2x2", _SMALL, 8192, 4, data=4),
    _case("1b", "v5e:4x4", _1B, 32_768, 4, fsdp=4, seq=4),
    _case("small", "h100:1", _SMALL, 8192, 2),
    _case("1b", "h100:8", _1B, 8192, 16, fsdp=8),
    _case("8b", "h100:8", _8B, 8192, 8, fsdp=8),
    _case("8b remat full", "h100:8", replace(_8B, remat="full"), 65_536, 1, seq=8),
    _case("small", "v5e:2x2", _SMALL, 1_048_576, 1, seq=4, strategy="ring", layout="zigzag"),
    _case("1b", "v5e:4x4", _1B, 4_194_304, 1, seq=16, strategy="ring", layout="zigzag"),
    _case("8b", "v6e:4x4", _8B, 524_288, 4, fsdp=4, seq=4, strategy="ring"),
    _case("8b", "v5p:2x2x2", _8B, 2_097_152, 1, seq=8, strategy="ring", layout="zigzag"),
    _case("small", "v5e:2x2", _SMALL, 1_048_576, 1, seq=4, strategy="balanced"),
    _case("small", "v5e:2x2", _SMALL, 1_048_576, 1, seq=4, strategy="ulysses"),
    _case("1b", "v5e:4x4", _1B, 4_194_304, 1, ring=4, seq=4, strategy="usp", layout="zigzag"),
    _case(
        "1b remat full", "v5e:4x4", replace(_1B, remat="full"), 4_194_304, 1, seq=16, strategy="ring", layout="zigzag"
    ),
    # Linear attention. The three cases of 65,536 tokens and the shortest ones of Mamba-2 and KDA fit.
    _case("small gated delta", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 524_288, 4, fsdp=4),
    _case("small gated delta", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 131_072, 16, fsdp=4),
    _case("small gated delta", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 2_097_152, 1, seq=4),
    _case("small gated delta", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 524_288, 4, tensor=4),
    _case("small gated delta remat full", "v5e:2x2", _of(_SMALL, GatedDeltaNet(), remat="full"), 524_288, 4, fsdp=4),
    _case("small gated delta offload", "v5e:2x2", _of(_SMALL, GatedDeltaNet(), remat="offload"), 524_288, 4, fsdp=4),
    _case("small gated delta mlp_chunk", "v5e:2x2", _of(_SMALL, GatedDeltaNet(), mlp_chunk=16_384), 524_288, 4, fsdp=4),
    _case("small gated delta accumulate 2", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 524_288, 8, accumulate=2, fsdp=4),
    _case("wide gated delta", "v6e:2x2", _of(_WIDE, GatedDeltaNet()), 262_144, 4, fsdp=4),
    _case("wide gated delta float32", "v6e:2x2", _of(_WIDE, GatedDeltaNet(), dtype="float32"), 262_144, 4, fsdp=4),
    _case("1.3b gated delta V 128", "v5e:4x4", _of(_1_3B, GatedDeltaNet(V=128)), 262_144, 16, fsdp=16),
    _case("1.3b gated delta", "v5e:4x4", _of(_1_3B, GatedDeltaNet()), 524_288, 4, fsdp=4, seq=4),
    _case("3b gated delta", "v5e:4x4", _of(_3B, GatedDeltaNet()), 131_072, 32, fsdp=16),
    _case("small gla", "v5e:2x2", _of(_SMALL, GLA()), 524_288, 4, fsdp=4),
    _case("small gla", "v5e:2x2", _of(_SMALL, GLA()), 524_288, 4, tensor=4),
    _case("small gla remat full", "v5e:2x2", _of(_SMALL, GLA(), remat="full"), 524_288, 4, fsdp=4),
    _case("wide gla", "v6e:2x2", _of(_WIDE, GLA()), 1_048_576, 1, seq=4),
    _case("small mamba2", "v5e:2x2", _of(_SMALL, Mamba2()), 524_288, 4, fsdp=4),
    _case("small mamba2", "v5e:2x2", _of(_SMALL, Mamba2()), 524_288, 4, tensor=4),
    _case("1.3b mamba2", "v5e:4x4", _of(_1_3B, Mamba2()), 2_097_152, 1, seq=16),
    _case("small kda", "v5e:2x2", _of(_SMALL, KimiDeltaAttention()), 524_288, 4, fsdp=4),
    _case("small kda remat full", "v5e:2x2", _of(_SMALL, KimiDeltaAttention(), remat="full"), 524_288, 4, fsdp=4),
    _case("1.3b kda", "v5p:2x2x2", _of(_1_3B, KimiDeltaAttention()), 262_144, 8, fsdp=8),
    _case("3b kda", "v5e:4x4", _of(_3B, KimiDeltaAttention()), 131_072, 16, fsdp=16),
    _case("small retnet", "v5e:2x2", _of(_SMALL, RetNet()), 524_288, 4, fsdp=4),
    _case("1.3b retnet", "v6e:4x4", _of(_1_3B, RetNet()), 262_144, 16, fsdp=16),
    _case("small elu+1", "v5e:2x2", _of(_SMALL, LinearAttention()), 524_288, 4, fsdp=4),
    _case("small performer", "v5e:2x2", _of(_SMALL, Performer()), 262_144, 4, fsdp=4),
    _case("small gated delta", "v5e:2x2", _of(_SMALL, GatedDeltaNet()), 65_536, 4, fsdp=4),
    _case("small gla", "v5e:2x2", _of(_SMALL, GLA()), 65_536, 4, fsdp=4),
    _case("small retnet", "v5e:2x2", _of(_SMALL, RetNet()), 65_536, 4, fsdp=4),
    _case("small mamba2", "v5e:2x2", _of(_SMALL, Mamba2()), 131_072, 1, seq=4),
    _case("small kda", "v5e:2x2", _of(_SMALL, KimiDeltaAttention()), 32_768, 4, fsdp=4),
    _case("small based", "v5e:2x2", _of(_SMALL, Based()), 524_288, 4, fsdp=4),
)

KEPT = (
    "fits", "hbm_bytes", "hbm_limit", "by_kind", "argument_bytes", "flops", "linear_attention_flops", "model_flops",
    "hbm_traffic", "seconds", "mfu_bound", "collectives", "compile_seconds",
)  # fmt: skip


def recorded() -> dict[str, dict[str, Any]]:
    """Returns the compilers' figures by case."""
    return load("calibration")


def memory_errors() -> dict[str, float]:
    """Returns the relative error of the formulas' memory by case."""
    compiled = recorded()
    predicted = lambda case: step.memory(case.config, topology.parse(case.topology))["total"]
    return {case.name: predicted(case) / compiled[case.name]["hbm_bytes"] - 1 for case in CASES}


def errors() -> list[dict[str, Any]]:
    """Returns a row per case: the compiler's figures, the formulas', and the relative error of the memory."""
    programs, off, rows = recorded(), memory_errors(), []
    for case in CASES:
        compiled, formula = programs[case.name], step.estimate(case.config, topology.parse(case.topology))
        row = {
            "case": case.name,
            "hbm_bytes": compiled["hbm_bytes"],
            "hbm_bytes_by_formula": formula["hbm_bytes"],
            "error": off[case.name],
        }
        if "flops" in compiled:
            sent = sum(c["bytes"] for c in compiled["collectives"])
            row |= {
                "flops": compiled["flops"],
                "flops_by_formula": formula["flops"],
                "received": sent,
                "received_by_formula": sum(formula["messages"].values()),
            }
        rows.append(row)
    return rows


def record(file: Path, cases: Sequence[Case] = CASES, timeout: float = 3600.0) -> None:
    """Compiles every case that the file lacks, and writes the file after each."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    found = {case.name: found[case.name] for case in cases if case.name in found}
    for case in cases:
        if case.name in found:
            continue
        print(case.name, file=sys.stderr)
        answer = train_step.facts(case.config, topology.parse(case.topology), timeout)
        if "reason" in answer:
            raise RuntimeError(f"{case.name}: {answer['reason']}")
        found[case.name] = {key: answer[key] for key in KEPT if key in answer}
        file.write_text(json.dumps(found, indent=1) + "\n")


def _print(console: Console) -> None:
    table = plain_table("Formulas against compiled programs, per device")
    for heading in ("case", "needs, GiB", "by formula", "error", "PFLOP", "error", "received, GiB", "by formula"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in errors():
        cells = [f"{row[key] / 2**30:.2f}" for key in ("hbm_bytes", "hbm_bytes_by_formula")] + [f"{row['error']:+.1%}"]
        if "flops" in row:
            off = row["flops_by_formula"] / row["flops"] - 1
            cells += [f"{row['flops'] / 1e15:.3f}", f"{off:+.2%}"]
            cells += [f"{row[key] / 2**30:.2f}" for key in ("received", "received_by_formula")]
        table.add_row(row["case"], *cells)
    console.print(table)


if __name__ == "__main__":
    record(path("calibration"))
    _print(Console(width=150))
