"""`longattn profile kernel --target gpu`: the options, the table, the JSON document."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from rich.console import Console

from longattn.aot import compilers
from longattn.aot.kernels.cases.gpu import CASES, Shape
from longattn.aot.kernels.gpu import profile
from longattn.aot.kernels.options import check
from longattn.config.checks import typed
from longattn.cost import hardware
from longattn.display import plain_table
from longattn.environment import commit
from longattn.files import json_text
from longattn.mask import Causal, Mask

VERSION = 2
HEADING = "compiled, not run"
WIDTH = 164  # of the table: a narrower terminal wraps it and loses no digits


@dataclass(frozen=True)
class ProfileOptions:
    """Count registers, spills and instructions of Pallas kernels on GPUs you don't have. Nothing runs."""

    cases: tuple[str, ...]  # kernels to compile; the error for none lists their names
    target: Literal["gpu"] = "gpu"  # whose compiler
    archs: tuple[Literal["sm_80", "sm_90a", "sm_100a"], ...] = ("sm_80", "sm_90a", "sm_100a")  # A100, H100, B200
    T: int = 8192  # number of queries and of keys; matmul: rows of its square matrices
    H: int = 8  # heads
    D: int = 128  # head size
    mask: Mask = Causal()  # an expression such as "Full()"
    bT: int | None = None  # queries of a warpgroup's block; matmul: rows; none: the case's own
    bS: int | None = None  # keys of a block; matmul: columns; none: the case's own
    stages: int | None = None  # number of blocks in flight; none: the case's own
    timeout: float = 300  # seconds for one compilation
    json: bool = False  # print one JSON document instead of the table

    def __post_init__(self) -> None:
        typed(self)
        check(self, CASES)
        _ = self.shape  # checks the sizes

    @property
    def shape(self) -> Shape:
        return Shape(self.T, self.H, self.D, self.mask, self.bT, self.bS, self.stages)


def run(options: ProfileOptions, console: Console | None = None) -> dict[str, Any]:
    """Compiles every case for every GPU and prints the table (or, with `json`, the document that is returned)."""
    console = console or Console(width=WIDTH)
    document: dict[str, Any] = {
        "version": VERSION,
        "heading": HEADING,
        "options": {**vars(options), "mask": str(options.mask)},
        "versions": {"jax": jax.__version__, **compilers.cuda_versions()},
        "commit": commit(),
        "rows": [],
    }
    for case in options.cases:
        for arch in options.archs:
            print(f"compiling {case} for {arch}", file=sys.stderr)
            document["rows"] += profile(case, arch, options.shape, options.timeout)
    if options.json:
        print(json_text(document))
    else:
        _print(console, document)
    return document


def _print(console: Console, document: Mapping[str, Any]) -> None:
    options = document["options"]
    table = plain_table(f"T{options['T']} H{options['H']} D{options['D']} {options['mask']}: {HEADING}")
    for heading in ("case", "arch", "kernel", "blocks"):
        table.add_column(heading, no_wrap=True)
    for heading in ("threads", "registers", "spill st/ld B", "stack B", "shared memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("tensor core", "copies"):
        table.add_column(heading)
    table.add_column("all", justify="right")
    notes: dict[str, None] = {}
    for row in document["rows"]:
        blocks = "x".join(map(str, row["blocks"].values())) if row["blocks"] else "its own"
        first = [row["case"], row["arch"]]
        if "reason" in row:
            table.add_row(*first, "-", blocks)
            notes[f"{row['case']} on {row['arch']}: {row['reason']}"] = None
            continue
        if not row["pallas"]:
            continue
        if row["sets_registers"]:
            notes[
                "*: warps hand registers to one another as they run (setmaxnreg), so the number is what the launch "
                "gives each thread; spills are the sign of too few."
            ] = None
        shared = row["shared_static_bytes"] + row["shared_dynamic_bytes"]
        most = hardware.GPUS[row["chip"]].shared_bytes_per_block
        table.add_row(
            *first,
            row["kernel"],
            blocks,
            f"{row['threads']}",
            f"{row['registers']}{'*' if row['sets_registers'] else ''}",
            f"{row['spill_store_bytes']}/{row['spill_load_bytes']}",
            f"{row['stack_bytes']}",
            f"{shared / 2**10:.1f} of {most / 2**10:.0f} KiB",
            _listed(row["tensor_core"]),
            _listed(row["copies"]),
            f"{row['instructions']:,}",
        )
        for warning in row["warnings"]:
            notes[f"ptxas on {row['case']}, {row['kernel']}, {row['arch']}: {warning}"] = None
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    others = sorted({row["kernel"] for row in document["rows"] if not row.get("pallas", True)})
    closing = [
        "Instructions are counted as they stand in the program, each once, however often it runs; blocks are of "
        "queries x keys x stages (matmul: rows x columns x stages).",
        f"XLA's own kernels, not shown: {', '.join(others) or 'none'}.",
        f"{versions}; commit {(document['commit'] or 'unknown')[:12]}. {HEADING.capitalize()}.",
    ]
    console.print("\n".join([*notes, *closing]), highlight=False, markup=False)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "-"
