"""Steps that others measured, beside what `longattn plan` says of the same model, mesh and batch.

`python experiments/plan_calibration/run.py` asks the compiler for its account of the cases that `results.json` lacks
(`longattn.aot.train_step.accounts`), one at a time, writes the file after each, and prints the tables of the README.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from longattn.aot import train_step
from longattn.config import ByteLM, Config, Mesh, Model, RoPE, Softmax, to_json
from longattn.cost import topology
from longattn.plan import MODELS

RESULTS = Path(__file__).with_name("results.json")
KEPT = (
    "reason", "fits", "hbm_bytes", "hbm_limit", "flops", "attention_flops_by_formula", "model_flops", "hbm_traffic",
    "seconds", "mfu_bound", "collectives", "collectives_missing", "compile_seconds",
)  # fmt: skip

# Table 1 of arXiv:2307.09288; keys and values of all 32 heads.
LLAMA2_7B = Model(
    N=32, E=4096, F=11_008, H=32, K=32, D=128, W=32_000, mixers=(Softmax(rope=RoPE()),), tie=False, norm_eps=1e-5,
    remat="attention",
)  # fmt: skip


class Measured(NamedTuple):
    """A step that was measured, and the same step as this project compiles it."""

    name: str
    seconds: float  # of a step
    tflops: float  # per second and device, as reported: the model's, a causal mask halving attention's
    topology: str
    config: Config


def _step(strategy: str, layout: str) -> Config:
    """2**21 tokens in rows of 32,768 over 64 chips, 16 along the sequence."""
    return Config(LLAMA2_7B, ByteLM(T=32_768, B=64), Mesh(fsdp=4, seq=16, strategy=strategy, layout=layout))


# The recipes' variant of Llama 3.1 8B: the same width of attention in fewer heads.
_WIDE_HEADS = dataclasses.replace(MODELS["llama3_8b"], H=16, K=4, D=256)


def _recipe(where: str, T: int, B: int, cp: int, seconds: float, tflops: float, remat: str = "attention") -> Measured:
    """A row of the recipes: B sequences of T tokens, `cp` devices along each, a ring over a zigzag layout."""
    machine = topology.parse(where)
    mesh = Mesh(fsdp=machine.size // cp, seq=cp, strategy="ring", layout="zigzag")
    model = dataclasses.replace(_WIDE_HEADS, remat=remat)
    name = f"{where}, T {T:,}, {cp} along the sequence"
    return Measured(name, seconds, tflops, where, Config(model, ByteLM(T=T, B=B), mesh))


# github.com/AI-Hypercomputer/maxtext/pull/4687, llama2-7b, v5p-128 (64 chips), 32K context, cp=16.
CASES = (
    Measured("all_gather, zigzag", 8.83, 242.7, "v5p:4x4x4", _step("all_gather", "zigzag")),
    Measured("ulysses", 8.90, 239.4, "v5p:4x4x4", _step("ulysses", "contiguous")),
    Measured("ring, zigzag", 16.38, 130.8, "v5p:4x4x4", _step("ring", "zigzag")),
    # github.com/AI-Hypercomputer/tpu-recipes at 1898d3e, training/{v5p,ironwood}/Llama3.1-8B-LongContext-Maxtext/
    # cluster_toolkit/README.md. TFLOP/s at 64K, and at 1M on v5p, are the stated MFU times the peak.
    _recipe("v5p:4x4x4", 65_536, 32, 4, 10.25, 0.673 * 459),
    _recipe("v5p:4x4x4", 1_048_576, 2, 64, 90.30, 0.6875 * 459),
    _recipe("v5p:4x4x4", 10_485_760, 1, 64, 8056.40, 168.6, remat="full"),
    _recipe("tpu7x:4x4x4", 65_536, 64, 2, 5.31, 0.517 * 1153.5),
    _recipe("tpu7x:4x4x4", 1_048_576, 4, 32, 49.58, 574.8),
    _recipe("tpu7x:4x4x4", 10_485_760, 1, 128, 1124.12, 604.2),
)


def main() -> None:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for case in CASES:
        if case.name in found:
            continue
        print(case.name, file=sys.stderr, flush=True)
        answer = train_step.accounts(case.config, topology.parse(case.topology), 1800.0)
        measured = {"seconds": case.seconds, "tflops_per_second": case.tflops}
        row = {"topology": case.topology, "measured": measured, "config": json.loads(to_json(case.config))["config"]}
        found[case.name] = row | {key: answer[key] for key in KEPT if key in answer}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("| step | measured, s | model TFLOP a device: theirs, ours | bound, s | bound / measured | GiB |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        if "reason" in row:
            print(f"| {name} | {row['measured']['seconds']} | {row['reason'].splitlines()[0]} | | | |")
            continue
        seconds, bound = row["measured"]["seconds"], row["seconds"]["bound"]
        theirs = seconds * row["measured"]["tflops_per_second"]
        print(
            f"| {name} | {seconds:,} | {theirs:,.1f}, {row['model_flops'] / 1e12:,.1f} | {bound:,.2f} | "
            f"{bound / seconds:.2f} | {row['hbm_bytes'] / 2**30:.1f} |"
        )


if __name__ == "__main__":
    main()
