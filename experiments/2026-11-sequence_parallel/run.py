"""Training steps of long sequences on TPU slices that are not there: what fits, what is sent, what hides it.

`python experiments/2026-11-sequence_parallel/run.py [GROUP ...]` asks the compiler for its account of the cases that
`results.json` lacks (`longattn.aot.train_step.accounts`), one at a time, writes it after each, and prints the
README's table.
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
from longattn.plan import MODELS, search

RESULTS = Path(__file__).with_name("results.json")
TIMEOUT = 900.0  # seconds for one program
KEPT = (
    "reason", "fits", "refused", "instructions", "hbm_bytes", "hbm_limit", "by_kind", "argument_bytes", "host_bytes",
    "host_traffic", "flops", "attention_flops_by_formula", "model_flops", "seconds", "mfu_bound", "collectives",
    "collectives_missing", "compile_seconds",
)  # fmt: skip

_8B, _70B = MODELS["llama3_8b"], MODELS["llama3_70b"]
_WIDE_HEADS = dataclasses.replace(_8B, H=16, K=4, D=256)
_SMALL = Model(
    N=8, E=1024, F=2816, H=8, K=4, D=128, W=32_000, mixers=(Softmax(rope=RoPE(base=500_000.0)),), remat="attention"
)
# Ways to spread a sequence over P devices; usp's all-to-all is over 4, which divide the key/value heads of all models.
WAYS: dict[str, dict[str, Any]] = {
    "ring zigzag": {"strategy": "ring", "layout": "zigzag"},
    "all_gather zigzag": {"strategy": "all_gather", "layout": "zigzag"},
    "usp zigzag": {"strategy": "usp", "layout": "zigzag"},
    "ulysses": {"strategy": "ulysses"},
    "ring": {"strategy": "ring"},
    "balanced": {"strategy": "balanced"},
}


class Case(NamedTuple):
    """One program."""

    group: str
    name: str
    topology: str
    config: Config


def case(group: str, way: str, where: str, model: Model, T: int, seq: int, **mesh: int) -> Case:
    """A step of one sequence of T tokens over `seq` devices along it."""
    split = {"ring": seq // 4, "seq": 4} if way.startswith("usp") else {"seq": seq}
    config = Config(model, ByteLM(T=T, B=1), Mesh(**WAYS[way], **split, **mesh))
    remat = "" if model.remat == "attention" else f", remat {model.remat}"
    return Case(group, f"{group}: {way}, {where}, T {T:,}{remat}", where, config)


SLICES = {4: "v5p:2x2x1", 64: "v5p:4x4x4", 16: "v5p:2x2x4", 8: "v5p:2x2x2", 32: "v5p:2x4x4"}
PER_DEVICE = 32_768
CASES = (
    *(case("growth", "ring", where, _SMALL, PER_DEVICE * P, P) for P, where in SLICES.items()),
    *(case("10M", way, "tpu7x:4x4x4", _WIDE_HEADS, 10_485_760, 128) for way in WAYS),
    case("10M", "ring zigzag", "tpu7x:4x4x4", dataclasses.replace(_WIDE_HEADS, remat="offload"), 10_485_760, 128),
    *(case("70B", way, "v5p:8x8x8", _70B, 1_048_576, 64, tensor=8) for way in WAYS),
)
SEARCHES = {  # (the machine's devices, a first guess per device)
    "v5p:4x4x4": (64, 163_840),
    "tpu7x:4x4x4": (128, 163_840),
}


def recorded() -> dict[str, dict[str, Any]]:
    """The rows of the file, by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def compiled(one: Case) -> dict[str, Any]:
    """A case's row: the file's, or compiled now."""
    found = recorded()
    if one.name not in found:
        print(one.name, file=sys.stderr, flush=True)
        answer = train_step.accounts(one.config, topology.parse(one.topology), TIMEOUT)
        row = {"group": one.group, "topology": one.topology, "config": json.loads(to_json(one.config))["config"]}
        found[one.name] = row | {key: answer[key] for key in KEPT if key in answer}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return found[one.name]


def longest(way: str, where: str) -> tuple[int | None, int | None]:
    """The longest sequence of stock Llama 3 8B there, within a sixteenth, and one that does not fit."""
    devices, guess = SEARCHES[where]
    unit = devices * 8192

    def at(T: int) -> dict[str, Any]:
        return compiled(case("longest", way, where, _8B, T, devices))

    first = at(guess * devices)
    start = round(guess * devices * first["hbm_limit"] / first["hbm_bytes"])  # nearly proportional
    return search.largest(lambda T: at(T)["fits"], start, unit, 2**27)


def main(groups: list[str]) -> None:
    for one in CASES:
        if not groups or one.group in groups:
            compiled(one)
    for where in SEARCHES if not groups or "longest" in groups else ():
        print(where, *longest("ring zigzag", where))
    table(recorded())


def _sent(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The collectives of attention's strategy. XLA names no scope for the sums of all_gather's gradients."""
    strategy, sums = row["config"]["mesh"]["strategy"], ("reduce-scatter", "all-reduce")
    summed = [c for c in row["collectives"] if strategy == "all_gather" and c["axes"] == "seq" and c["kind"] in sums]
    return summed + [c for c in row["collectives"] if f"mixer/{strategy}" in c["scope"]]


def table(rows: dict[str, dict[str, Any]]) -> None:
    """The README's, in Markdown."""
    print(
        "| program | fits | GiB of a device | TFLOP | received, GiB | of it beside attention | bound, s | MFU at most |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in sorted(rows.items()):
        if "reason" in row:
            print(f"| {name} | {row['reason'].splitlines()[0]} | | | | | | |")
            continue
        sent = _sent(row)
        total = sum(c["bytes"] for c in sent)
        beside = sum(c["bytes"] * c["beside_attention"] / c["runs"] for c in sent)
        print(
            f"| {name} | {'yes' if row['fits'] else 'no'} | {row['hbm_bytes'] / 2**30:.2f} of "
            f"{row['hbm_limit'] / 2**30:.2f} | {row['flops'] / 1e12:,.0f} | {total / 2**30:,.1f} | "
            f"{beside / total if total else 0:.0%} | {row['seconds']['bound']:,.2f} | {row['mfu_bound']:.1%} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
