"""Steps that others measured, beside what `longattn plan` says of the same model, mesh and batch.

`python experiments/plan_calibration/run.py` compiles the cases that `results.json` lacks, one at a time, writes
it after each, and prints the table of the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from longattn.aot import train_step
from longattn.config import ByteLM, Config, Mesh, Model, RoPE, Softmax, to_json
from longattn.cost import topology

RESULTS = Path(__file__).with_name("results.json")
KEPT = (
    "reason", "fits", "hbm_bytes", "hbm_limit", "flops", "attention_flops_by_formula", "model_flops", "hbm_traffic",
    "seconds", "mfu_bound", "collectives", "compile_seconds",
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


# github.com/AI-Hypercomputer/maxtext/pull/4687, llama2-7b, v5p-128 (64 chips), 32K context, cp=16.
CASES = (
    Measured("all_gather, zigzag", 8.83, 242.7, "v5p:4x4x4", _step("all_gather", "zigzag")),
    Measured("ulysses", 8.90, 239.4, "v5p:4x4x4", _step("ulysses", "contiguous")),
    Measured("ring, zigzag", 16.38, 130.8, "v5p:4x4x4", _step("ring", "zigzag")),
)


def main() -> None:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for case in CASES:
        if case.name in found:
            continue
        print(case.name, file=sys.stderr, flush=True)
        answer = train_step.facts(case.config, topology.parse(case.topology), 1800.0, train_step.cache_folder())
        measured = {"seconds": case.seconds, "tflops_per_second": case.tflops}
        row = {"topology": case.topology, "measured": measured, "config": json.loads(to_json(case.config))["config"]}
        found[case.name] = row | {key: answer[key] for key in KEPT if key in answer}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("| strategy, layout | measured, s | model TFLOP a device: theirs, ours | bound, s | bound / measured | GiB |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        seconds, bound = row["measured"]["seconds"], row["seconds"]["bound"]
        theirs = seconds * row["measured"]["tflops_per_second"]
        print(
            f"| {name} | {seconds} | {theirs:,.1f}, {row['model_flops'] / 1e12:,.1f} | {bound:.2f} | "
            f"{bound / seconds:.2f} | {row['hbm_bytes'] / 2**30:.1f} |"
        )


if __name__ == "__main__":
    main()
