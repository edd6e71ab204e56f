"""`longattn profile kernel`: the options, the table, the JSON document."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longattn.aot import compilers
from longattn.aot.kernels.bundles import SLOTS
from longattn.aot.kernels.cases import CASES, Shape
from longattn.aot.kernels.options import check
from longattn.aot.kernels.rates import small
from longattn.aot.kernels.tpu import profile
from longattn.config.checks import typed, usable_path
from longattn.cost import hardware
from longattn.display import plain_table
from longattn.environment import commit
from longattn.files import json_text
from longattn.mask import Causal, Mask

VERSION = 3
HEADING = "static cycles (no DMA wait, not run)"
WIDTH = 180  # of the table: a narrower terminal wraps it and loses no digits
_AT_ONCE = 2  # compilers that run at once; each takes a core and a gigabyte
_BLOCKS = ("bT", "bS", "bC", "bR")


@dataclass(frozen=True)
class ProfileOptions:
    """Count the cycles of Pallas kernels on TPUs you don't have, from their compiler's own schedule. Nothing runs."""

    cases: tuple[str, ...]  # kernels to compile; the error for none lists their names
    target: Literal["tpu"] = "tpu"  # whose compiler; `--target gpu --help` lists the options for GPUs
    chips: tuple[Literal["v5e", "v5p", "v6e", "tpu7x"], ...] = ("v5e", "v5p", "v6e", "tpu7x")
    T: int = 8192  # number of queries and of keys; matmul: rows of its square matrices
    H: int = 8  # heads
    K: int | None = None  # key/value heads; none: H
    D: int = 128  # head size
    V: int | None = None  # head size of values; none: D
    mask: Mask = Causal()  # an expression such as "Window(4095)"
    documents: int = 0  # number of packed documents, of random lengths; 0: no segment ids
    kind: str = "scalar"  # longattn_linear: decay none, scalar or vector; append _delta for the delta rule
    bT: int = 1024  # queries of a block; matmul: its rows, and its columns
    bS: int = 1024  # keys of a block; matmul: its part of the summed dimension
    bC: int | None = None  # keys of one product; none: bS, or the kernel's own; longattn_linear: tokens of a chunk
    bR: int | None = None  # queries of one product, for flywheel and longattn; longattn_linear: heads
    best: int = 0  # try all suitable block sizes and show this many of the fastest; 0: the blocks above
    plot: Path | None = None  # draw how busy the units are along the schedules: a .png, .svg or .pdf
    timeout: float = 300  # seconds for one compilation
    verbose: bool = False  # name the XLA operations that are not counted
    json: bool = False  # print one JSON document instead of the table

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "plot")
        check(self, CASES)
        if self.best < 0:
            raise ValueError(f"best={self.best} must not be negative")
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot={self.plot} must end in .png, .svg or .pdf")
        blocks = (self.bT, self.bS, self.bC, self.bR)
        if self.best and blocks != (1024, 1024, None, None):
            raise ValueError(f"best={self.best} chooses the blocks: leave bT, bS, bC and bR out")
        _ = self.shape  # checks the sizes

    @property
    def shape(self) -> Shape:
        blocks = (self.T, self.T) if self.best else (self.bT, self.bS, self.bC, self.bR)
        return Shape(self.T, self.H, self.K, self.D, self.V, self.mask, self.documents, *blocks, kind=self.kind)

    def shapes(self, case: str) -> list[Shape]:
        """Returns the shapes to compile for a case.

        Raises:
          ValueError: if no block sizes suit the case.
        """
        if not self.best:
            return [self.shape]
        if not (tried := CASES[case].blocks(self.shape)):
            raise ValueError(f"{case} has no block sizes that suit T={self.T}: try a multiple of 1024, at least 2048")
        return tried


def run(options: ProfileOptions, console: Console | None = None) -> dict[str, Any]:
    """Compiles every case for every chip and prints the table (or, with `json`, the document that is returned)."""
    console = console or Console(width=WIDTH)
    compilers.libtpu_folder()  # raises with the remedy where there is none
    document: dict[str, Any] = {
        "version": VERSION,
        "heading": HEADING,
        "options": {**vars(options), "mask": str(options.mask), "plot": options.plot and str(options.plot)},
        "versions": {"libtpu": compilers.libtpu_version(), "jax": jax.__version__},
        "commit": commit(),
    }
    rows = list(_rows(options))
    document["rows"] = [_without_picture(row) for row in rows]
    shown = _shown(rows, options.best)
    if options.json:
        print(json_text(document))
    else:
        _print(console, document, shown)
    if options.plot is not None:
        from longattn.aot.kernels import picture

        picture.save(options.plot, shown)
    return document


def _without_picture(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without the data that only the picture needs."""
    if "kernels" not in row:
        return row
    return {**row, "kernels": [{k: v for k, v in kernel.items() if k != "along"} for kernel in row["kernels"]]}


def _rows(options: ProfileOptions) -> Iterator[dict[str, Any]]:
    """Yields a row per case, chip and shape, in this order."""
    work = [(case, chip, shape) for case in options.cases for chip in options.chips for shape in options.shapes(case)]
    stderr = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        task = progress.add_task("", total=len(work))
        futures = [pool.submit(profile, *each, options.timeout) for each in work]
        said = ""
        try:
            for future, (case, chip, _) in zip(futures, work):
                description = f"compiling {case} for {chip}"
                if description != said and not stderr.is_terminal:
                    stderr.print(description, highlight=False)
                said = description
                progress.update(task, description=description)
                yield future.result()
                progress.advance(task)
        except BaseException:  # interrupted: end the compilers too
            compilers.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _shown(rows: Sequence[dict[str, Any]], best: int) -> list[dict[str, Any]]:
    """Returns the table's rows: all, or the `best` of each case and chip, or one with the reason why there are none."""
    if not best:
        return list(rows)
    shown = []
    for case, chip in dict.fromkeys((row["case"], row["chip"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["chip"]) == (case, chip)]
        good = sorted((row for row in mine if "reason" not in row), key=lambda row: row["compare_cycles"])
        shown += good[:best] or mine[:1]
    return shown


def _blocks(row: Mapping[str, Any]) -> str:
    return " ".join(f"{row[name]}" for name in _BLOCKS if row[name])


def _print(console: Console, document: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> None:
    options = document["options"]
    names = ("T", "H", "K", "D", "V", "documents")
    sizes = " ".join(f"{name}{options[name]}" for name in names if options[name])
    table = plain_table(f"{sizes} {options['mask']} bfloat16, per core")
    some_depend = any(row.get("rates") for row in shown)
    headings = ["case", "chip", "blocks", HEADING, *(["worst case"] if some_depend else []), "HBM-bound cycles"]
    headings += ["larger", "MXU floor", "floor / larger", "bound", *SLOTS, "spills", "VMEM MiB", "HBM MiB"]
    for heading in headings:
        left = heading in ("case", "chip", "blocks", "bound")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    notes = []
    for row in shown:
        first = [row["case"], row["chip"], _blocks(row)]
        if "reason" in row:
            table.add_row(*first, "-")
            notes.append(f"{row['case']} on {row['chip']}: {row['reason']}")
            continue
        core = hardware.TENSOR_CORES[row["chip"]]
        vmem = "-" if row["vmem_bytes"] is None else f"{row['vmem_bytes'] / 2**20:.1f}"
        worst = [f"{row['cycles_worst'] / 1e6:.3f} M" if row["rates"] else ""] if some_depend else []
        table.add_row(
            *first,
            f"{row['cycles'] / 1e6:.3f} M",
            *worst,
            *(f"{row[key] / 1e6:.3f} M" for key in ("hbm_cycles", "compare_cycles", "floor_cycles")),
            f"{row['efficiency']:.0%}",
            row["bound"],
            *(f"{row['utilisation'][slot]:.0%}" for slot in SLOTS),
            f"{row['spills']:,}",
            f"{vmem} of {core.vmem_bytes / 2**20:.0f}",
            f"{row['hbm_bytes'] / 2**20:.0f}",
        )
        if row["cores"] < core.per_device:
            notes.append(f"{row['case']} on {row['chip']}: its grid runs on {row['cores']} of {core.per_device} cores.")
    console.print(table)
    if options["best"]:
        notes += _failures(document["rows"])
    rates = {(row["case"], name): rate for row in shown for name, rate in (row.get("rates") or {}).items()}
    notes += [
        f"{case}: the branch {name} depends on the data; it ran {rate:.0%} of the times it was asked, in interpret "
        f"mode on N(0, 1) inputs at T {small(Shape()).T}, and in the worst case always, "
        "unless one that excludes it costs more."
        for (case, name), rate in rates.items()
    ]
    others = sorted({name for row in shown for name in row.get("not_counted", ())})
    which = ", ".join(others) if options["verbose"] else f"{len(others)}; --verbose names them"
    around = f"XLA's operations around these kernels ({which})" if others else "no XLA operation around these kernels"
    notes += [
        "Blocks: of queries, of keys, keys of one product, queries of one product, where named.",
        "Compare by the larger of static and HBM-bound cycles: a win that vanishes under it is none. Where XLA sums "
        "what a kernel leaves in shares, the cycles in which HBM moves these are added to it.",
        "The floor is the products of visible pairs alone, on all matrix units of all cores.",
        f"Not counted: {around}.",
        f"libtpu {document['versions']['libtpu']}, jax {document['versions']['jax']}; commit "
        f"{(document['commit'] or 'unknown')[:12]}. Nothing was run.",
    ]
    console.print("\n".join(notes), highlight=False, markup=False)


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line per case and chip on the block sizes that gave no number, and why."""
    tried = Counter((row["case"], row["chip"]) for row in rows)
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        if "reason" in row:
            reasons.setdefault((row["case"], row["chip"]), Counter())[row["reason"][:160]] += 1
    return [
        f"{case} on {chip}: {sum(why.values())} of {tried[case, chip]} block sizes gave no number: "
        + "; ".join(f"{reason} ({n})" for reason, n in why.most_common(3))
        for (case, chip), why in reasons.items()
        if sum(why.values()) < tried[case, chip] or len(why) > 1
    ]
