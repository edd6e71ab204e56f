"""`longattn profile --static tpu`: the options, the table, the JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from longattn.analysis import aot, hardware
from longattn.analysis.cases import CASES, Shape
from longattn.analysis.static.schedule import SLOTS
from longattn.analysis.static.tpu import profile
from longattn.mask import Causal, Mask
from longattn.train.record import commit

VERSION = 1
HEADING = "static cycles (no DMA wait, not run)"
WIDTH = 164  # the table's: a narrower terminal wraps it rather than losing digits


@dataclass(frozen=True)
class ProfileOptions:
    """Cycles of Pallas kernels on TPUs that are not there, by their compiler's own schedule. Nothing runs."""

    cases: tuple[str, ...]  # what to compile; the names are in longattn/analysis/cases.py
    static: Literal["tpu"] = "tpu"  # whose compiler
    chips: tuple[Literal["v5e", "v5p", "v6e", "tpu7x"], ...] = ("v5e", "v5p", "v6e", "tpu7x")
    T: int = 8192  # queries, and keys; matmul: the edge of its square matrices
    H: int = 8  # heads
    D: int = 128  # head size
    mask: Mask = Causal()  # an expression such as "Window(4095)"
    bT: int = 1024  # block of queries; matmul: of rows and of columns
    bS: int = 1024  # block of keys; matmul: of the summed dimension
    bC: int | None = None  # keys of one product within a block; none: bS
    timeout: float = 300  # seconds for one compilation
    json: bool = False  # print one JSON document instead of the table

    def __post_init__(self) -> None:
        if not self.cases or not self.chips:
            raise ValueError(f"{self.cases=} and {self.chips=} must each name at least one")
        for case in self.cases:
            if case not in CASES:
                raise ValueError(f"unknown case {case!r}; the cases are {', '.join(CASES)}")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout:g} must be positive")
        _ = self.shape  # it checks the sizes

    @property
    def shape(self) -> Shape:
        return Shape(self.T, self.H, self.D, self.mask, self.bT, self.bS, self.bC)


def run(options: ProfileOptions, console: Console | None = None) -> dict[str, Any]:
    """Compile every case for every chip and print the table (or, with `json`, the document that is returned)."""
    console = console or Console(width=WIDTH)
    document: dict[str, Any] = {
        "version": VERSION,
        "heading": HEADING,
        "options": {**vars(options), "mask": str(options.mask)},
        "versions": {"libtpu": aot.libtpu_version(), "jax": jax.__version__},
        "commit": commit(),
        "rows": [],
    }
    for case in options.cases:
        for chip in options.chips:
            print(f"compiling {case} for {chip}", file=sys.stderr)
            document["rows"].append(profile(case, chip, options.shape, options.timeout))
    if options.json:
        print(json.dumps(document))
    else:
        _print(console, document)
    return document


def _print(console: Console, document: Mapping[str, Any]) -> None:
    options = document["options"]
    sizes = " ".join(f"{name}{options[name]}" for name in ("T", "H", "D", "bT", "bS", "bC") if options[name])
    table = Table(
        title=f"{sizes} {options['mask']} bfloat16, per core", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    headings = ["case", "chip", HEADING, "HBM-bound cycles", "larger", "MXU floor", "floor / larger", "bound", *SLOTS]
    for heading in (*headings, "spills", "VMEM", "HBM"):
        left = heading in ("case", "chip", "bound")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    notes = []
    for row in document["rows"]:
        first = [row["case"], row["chip"]]
        if "reason" in row:
            table.add_row(*first, "-")
            notes.append(f"{row['case']} on {row['chip']}: {row['reason']}")
            continue
        core = hardware.TENSOR_CORES[row["chip"]]
        vmem = "-" if row["vmem_bytes"] is None else f"{row['vmem_bytes'] / 2**20:.1f}"
        table.add_row(
            *first,
            *(f"{row[key] / 1e6:.3f} M" for key in ("cycles", "hbm_cycles", "compare_cycles", "floor_cycles")),
            f"{row['efficiency']:.0%}",
            row["bound"],
            *(f"{row['utilisation'][slot]:.0%}" for slot in SLOTS),
            f"{row['spills']:,}",
            f"{vmem} of {core.vmem_bytes / 2**20:.0f} MiB",
            f"{row['hbm_bytes'] / 2**20:.0f} MiB",
        )
        if row["cores"] < core.per_device:
            notes.append(f"{row['case']} on {row['chip']}: its grid runs on {row['cores']} of {core.per_device} cores.")
    console.print(table)
    others = sorted({name for row in document["rows"] for name in row.get("not_counted", ())})
    notes += [
        "Compare by the larger of static and HBM-bound cycles: a win that vanishes under it is none.",
        "The floor is the products of visible pairs alone, on all matrix units of all cores.",
        f"Not counted: {', '.join(others) or 'no XLA operation around these kernels'}.",
        f"libtpu {document['versions']['libtpu']}, jax {document['versions']['jax']}; commit "
        f"{(document['commit'] or 'unknown')[:12]}. Nothing was run.",
    ]
    console.print("\n".join(notes), highlight=False)
