"""`longattn profile --static tpu`: cycles of a Pallas kernel on TPUs that are not there, by their compiler's schedule.

libtpu compiles for any TPU without one. A TPU core is in order and runs one bundle of instructions per cycle, and the
compiler writes down the bundles it packed, with their loops and branches, and how many slots of each unit a bundle
fills. So

    static cycles = sum over regions of bundles x how often the region runs.

Trip counts of loops stand in the schedule; how often branches run comes from the mask's geometry (`analysis/cases.py`).
What is declared must fit what was compiled: the grid's loop must run for the declared steps, and there must be as many
branches as the source has; else the row says so instead of giving a number.

Not in the figure: waits for DMA (so the cycles in which device memory moves the kernel's bytes are shown beside it, and
the larger of the two is what to compare), bank conflicts of VMEM, instruction fetch, clocks, and the XLA operations
around the kernel, which are named. Nothing here has run on a TPU.

Each compilation is a process of its own: libtpu reads its flags once, when it loads, and a compiler that aborts must
not take the rest of a table with it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from rich import box
from rich.console import Console
from rich.table import Table

from longattn import mask
from longattn.analysis import hardware
from longattn.analysis.cases import CASES, Kernel, Shape
from longattn.mask import Causal, Mask
from longattn.train.record import commit

VERSION = 1
LIBTPU = "LONGATTN_LIBTPU"  # a folder that `pip install --target` put libtpu into
HEADING = "static cycles (no DMA wait, not run)"
WIDTH = 164  # the table's: a narrower terminal wraps it rather than losing digits

# ---- the schedule, parsed

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)?:(?: >)* +\{", re.MULTILINE)
_BRANCH = re.compile(r"\bsbr\.(?:rel|abs)\s*(?:\(!?%\w+\)\s*)?target bundleno = (\d+)")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_DELAY = 5  # a branch's own bundle and its four delay slots run before it takes effect
# Columns of the utilisation file; versions of libtpu differ in the first one's name. It counts the cycles for which
# products keep a unit busy.
_SLOTS = {
    "MATMUL": "MXU", "MXU": "MXU", "XLU": "XLU", "VALU": "VALU", "EUP": "EUP", "VLOAD": "load", "VSTORE": "store",
    "VLOAD:FILL": "fill", "VSTORE:SPILL": "spill",
}  # fmt: skip
SLOTS = ("MXU", "XLU", "VALU", "EUP", "load", "store")


@dataclass
class Region:
    """Bundles [start, end) that run together, without those of the regions inside."""

    kind: Literal["kernel", "loop", "branch"]
    start: int
    end: int
    trips: int | None = None  # a loop's, where the schedule holds it as a constant
    inside: list[Region] = field(default_factory=list)
    bundles: int = 0
    slots: dict[str, int] = field(default_factory=dict)  # slots filled

    def walk(self) -> Iterator[Region]:
        """This region and all inside it, in the order of the program."""
        yield self
        for region in self.inside:
            yield from region.walk()

    def total(self, slot: str) -> int:
        """Slots filled here and inside, each region once."""
        return sum(region.slots[slot] for region in self.walk())


@dataclass(frozen=True)
class Schedule:
    """What the compiler wrote down about one kernel."""

    root: Region
    capacity: dict[str, int]  # slots of a bundle


def parse(bundles: str, utilisation: str) -> Schedule:
    """The regions of one kernel from its `packed-bundles-post-ra` and utilisation dumps.

    Raises:
      ValueError: for texts that are not of this form, as another version of libtpu may write them.
    """
    heads = list(_BUNDLE.finditer(bundles))
    n = len(heads)
    if not n or [int(head[1], 16) for head in heads] != list(range(n)):
        raise ValueError("the bundles of libtpu's schedule are not numbered 0, 1, 2, ...: this version is not known")
    ends = [head.start() for head in heads[1:]] + [len(bundles)]
    text = [bundles[head.end() : end] for head, end in zip(heads, ends)]
    capacity, used = _utilisation(utilisation)
    if len(used) != n:
        raise ValueError(f"libtpu's schedule has {n} bundles, its utilisation {len(used)}: this version is not known")

    regions = []
    for i, bundle in enumerate(text):
        for match in _BRANCH.finditer(bundle):
            target, after = int(match[1]), min(i + _DELAY, n)
            if target <= i:
                regions.append(Region("loop", target, after))
            elif after < target:
                regions.append(Region("branch", after, target))
    root = Region("kernel", 0, n)
    stack = [root]
    for region in sorted(regions, key=lambda r: (r.start, -r.end, r.kind != "loop")):
        while region.start >= stack[-1].end:
            stack.pop()
        if region.end > stack[-1].end:
            raise ValueError(f"bundles {region.start} to {region.end} of the schedule overlap another region's end")
        stack[-1].inside.append(region)
        stack.append(region)

    sums = {slot: np.concatenate([[0], np.cumsum(column)]) for slot, column in zip(capacity, used.T)}
    for region in root.walk():
        parts = [(region.start, region.end, 1), *((r.start, r.end, -1) for r in region.inside)]
        region.bundles = sum(sign * (end - start) for start, end, sign in parts)
        region.slots = {s: int(sum(sign * (c[end] - c[start]) for start, end, sign in parts)) for s, c in sums.items()}
        if region.kind == "loop":
            inner = {i for r in region.inside for i in range(r.start, r.end)}
            tests = [m for i in range(region.start, region.end) if i not in inner for m in _TRIPS.finditer(text[i])]
            region.trips = int(tests[-1][1]) if tests else None
    return Schedule(root, capacity)


def _utilisation(text: str) -> tuple[dict[str, int], np.ndarray]:
    """(slots of a bundle by name, slots filled [bundles slots])."""
    names = next((line.replace(" ", "").split(",") for line in text.splitlines() if "VALU," in line), [])
    rows = [line.split() for line in text.splitlines() if re.fullmatch(r"[\d ]+", line) and line.strip()]
    keep = {_SLOTS[name]: i for i, name in enumerate(names) if name in _SLOTS}
    if set(keep) != set(_SLOTS.values()) or not rows or any(len(row) != len(names) for row in rows):
        raise ValueError(
            f"libtpu's utilisation has the columns {', '.join(names) or 'none'}: this version is not known"
        )
    table = np.array(rows, dtype=np.int64)[:, list(keep.values())]
    return dict(zip(keep, table[0].tolist())), table[1:]


# ---- the schedule, weighted


@dataclass(frozen=True)
class Executions:
    """How often one region runs, on the busiest core."""

    kind: str
    what: str  # of a branch of the source
    bundles: int
    runs: float
    trips: int | None
    start: int


@dataclass(frozen=True)
class Weighted:
    """One kernel's cycles and slots, on the busiest core."""

    name: str
    cycles: float
    busy: dict[str, float]  # cycles for which each unit would be busy if nothing else were in the way
    cores: int  # that the grid spreads over
    spills: int  # spilling stores in the schedule, each counted once
    regions: tuple[Executions, ...]


def weigh(schedule: Schedule, kernel: Kernel, cores: int) -> Weighted:
    """The schedule of `kernel` weighted by the steps it really executes, on a device of `cores` cores.

    Raises:
      ValueError: where what was compiled does not fit what the case declares.
    """
    root = schedule.root
    grid = next((r for r in root.walk() if r.kind == "loop" and r.total("MXU")), None)
    if grid is None or grid.trips is None:
        raise ValueError(f"{kernel.name}: the schedule has no loop over the grid with a known number of trips")
    # Pallas pipelines the grid: the first trip only fetches, the last only waits for what was stored.
    steps = grid.trips - 2
    used = kernel.steps // steps if steps > 0 else 0
    if used not in (1, cores) or used * steps != kernel.steps:
        raise ValueError(
            f"{kernel.name}: the schedule walks over {steps} grid steps per core, the case counts {kernel.steps} over "
            f"{cores} cores"
        )
    body = [r for r in grid.inside if r.kind == "branch" and r.total("MXU")]
    if len(body) != 1:
        raise ValueError(
            f"{kernel.name}: {len(body)} regions of the grid's loop hold matrix products, one was expected"
        )
    found = [r for r in body[0].walk() if r.kind == "branch"][1:]
    if len(found) != len(kernel.branches):
        raise ValueError(
            f"{kernel.name}: the schedule's step has {len(found)} branches, its source {len(kernel.branches)}"
        )
    declared = {id(region): branch for region, branch in zip(found, kernel.branches)}
    rows: list[Executions] = []
    cycles, filled = 0.0, dict.fromkeys(schedule.capacity, 0.0)

    def add(region: Region, runs: float) -> None:
        nonlocal cycles
        what = ""
        if region is body[0]:
            runs, what = float(steps), "grid step"
        elif id(region) in declared:
            branch = declared[id(region)]
            runs, what = branch.runs / used, branch.what
        elif region.kind == "loop":
            if region.trips is None:
                raise ValueError(f"{kernel.name}: the loop at bundle {region.start} has no constant number of trips")
            runs *= region.trips
        # Any other branch lies outside of a step and is charged whenever it is reached.
        cycles += runs * region.bundles
        for slot, n in region.slots.items():
            filled[slot] += runs * n
        rows.append(Executions(region.kind, what, region.bundles, runs, region.trips, region.start))
        for inner in region.inside:
            add(inner, runs)

    add(root, 1.0)
    busy = {slot: n / schedule.capacity[slot] for slot, n in filled.items()}
    return Weighted(kernel.name, cycles, busy, used, root.total("spill"), tuple(rows))


# ---- the compiler, in a process of its own

_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization).*"
)
_DUMPED = re.compile(r"\d+-(?P<name>[^<].*)-\d+-packed-bundles-post-ra\.txt")
_KERNEL = re.compile(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def libtpu_folder() -> Path:
    """The folder that holds the package libtpu: `LONGATTN_LIBTPU`, else where it is installed beside jax.

    Raises:
      ValueError: where there is none, with the remedy.
    """
    if named := os.environ.get(LIBTPU):
        if not (Path(named) / "libtpu" / "libtpu.so").is_file():
            raise ValueError(f"{LIBTPU}={named} holds no libtpu: pip install --no-deps --target {named} libtpu")
        return Path(named).resolve()
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise ValueError(
            f'libtpu, the compiler for TPUs, is not installed: pip install "longattn[aot]"; or, leaving other commands '
            f"alone, pip install --no-deps --target FOLDER libtpu and {LIBTPU}=FOLDER, as make profile does in a clone"
        )
    return Path(spec.origin).parents[1]


def compiler_version() -> str:
    """libtpu's version."""
    found = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_folder())])
    return next((d.version for d in found), "unknown")


def compile_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one case for one chip in this process, whose environment names libtpu's flags; see `_compile`."""
    shape = Shape(**{**request["shape"], "mask": mask.parse(request["shape"]["mask"])})
    core = hardware.TENSOR_CORES[request["chip"]]
    fn, arrays = CASES[request["case"]].build(shape)
    device = topologies.get_topology_desc(topology_name=core.topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
    text = jax.jit(fn).trace(*arrays).lower().compile().as_text()
    # An instruction ends where the next one's "%name =" begins, its attributes may hold line breaks.
    kernels = {m[1]: text[m.end() : _end(text, m.end())] for m in _KERNEL.finditer(text)}
    vmem = {name: _VMEM.search(rest) for name, rest in kernels.items()}
    return {"vmem": {name: int(m[1]) if m else None for name, m in vmem.items()}}


def _end(text: str, start: int) -> int:
    following = re.compile(r"^ *(ROOT )?%\S+ = ", re.MULTILINE).search(text, start)
    return following.start() if following else len(text)


def main() -> None:
    """The child: a request on stdin, the answer in the file that it names."""
    request = json.load(sys.stdin)
    try:
        answer = compile_here(request)
    except Exception as error:  # the compiler's refusals are of many classes; each becomes a row with its reason
        answer = {"reason": f"{type(error).__name__}: {error}"}
    Path(request["answer"]).write_text(json.dumps(answer))


def _compile(case: str, chip: str, shape: Shape, folder: Path, timeout: float) -> dict[str, Any]:
    """Compile a case in a child: {"vmem": bytes by kernel}, or {"reason": why not}. Dumps go to `folder`."""
    libtpu = libtpu_folder()
    answer = folder / "answer.json"
    request = {"case": case, "chip": chip, "shape": {**vars(shape), "mask": str(shape.mask)}, "answer": str(answer)}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(libtpu / "libtpu" / "libtpu.so"),
        "LIBTPU_INIT_ARGS": _FLAGS.format(folder=folder / "dump"),
        # No machine with a TPU is asked who it is.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", "from longattn.analysis import static; static.main()"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, said = child.communicate(json.dumps(request), timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"the compiler took more than {timeout:g} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if not answer.is_file():
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return {"reason": f"the compiler ended with {child.returncode}: {lines[-1] if lines else 'it said nothing'}"}
    return json.loads(answer.read_text())


# ---- one row


def profile(case: str, chip: str, shape: Shape, timeout: float = 300) -> dict[str, Any]:
    """One row of the table, as JSON: a case on one JAX device of `chip`; with a `reason` where there is no number."""
    row: dict[str, Any] = {"case": case, "chip": chip}
    kernels = CASES[case].kernels(shape)
    core = hardware.TENSOR_CORES[chip]
    with tempfile.TemporaryDirectory(prefix="longattn_static_") as name:
        folder = Path(name)
        answer = _compile(case, chip, shape, folder, timeout)
        if "reason" in answer:
            return {**row, "reason": " ".join(answer["reason"].split())[:500]}
        dumps = {m["name"]: path for path in sorted((folder / "dump").iterdir()) if (m := _DUMPED.fullmatch(path.name))}
        dumps = {name: path for name, path in dumps.items() if not name.endswith("schedule-analysis")}
        try:
            chosen = [_the_one(kernel.name, answer["vmem"]) for kernel in kernels]
            weighted = [
                weigh(parse(dumps[name].read_text(), _utilisation_of(dumps[name], name).read_text()), kernel,
                      core.per_device)
                for name, kernel in zip(chosen, kernels)
            ]  # fmt: skip
        except ValueError as error:
            return {**row, "reason": str(error)}
    cycles = sum(w.cycles for w in weighted)
    busy = {slot: sum(w.busy[slot] for w in weighted) for slot in SLOTS}
    hbm_bytes = sum(k.hbm_bytes for k in kernels)
    hbm_cycles = hbm_bytes / hardware.hbm_bytes_per_cycle(chip)
    floor = sum(k.flops for k in kernels) / core.mxu_flops / core.per_device
    busiest = max(busy, key=lambda slot: busy[slot])
    return {
        **row,
        "cycles": cycles,
        "hbm_bytes": hbm_bytes,
        "hbm_cycles": hbm_cycles,
        "compare_cycles": max(cycles, hbm_cycles),
        "floor_cycles": floor,
        "efficiency": floor / max(cycles, hbm_cycles),
        "bound": "HBM" if hbm_cycles > cycles else busiest,
        "utilisation": {slot: busy[slot] / cycles for slot in SLOTS},
        "cores": min(w.cores for w in weighted),
        "spills": sum(w.spills for w in weighted),
        "vmem_bytes": max((n for name in chosen if (n := answer["vmem"][name]) is not None), default=None),
        "kernels": [asdict(w) for w in weighted],
        "not_counted": sorted(name for name in dumps if name not in chosen and name != "TLP"),
    }


def _the_one(prefix: str, names: Mapping[str, Any]) -> str:
    found = [name for name in names if name.startswith(prefix)]
    if len(found) != 1:
        raise ValueError(f"{prefix}: the program has the kernels {', '.join(names) or 'none'}, one was expected")
    return found[0]


def _utilisation_of(path: Path, name: str) -> Path:
    found = [
        p for p in path.parent.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-pre-delay_hlo.*\.txt", p.name)
    ]
    if len(found) != 1:
        raise ValueError(f"{name}: libtpu wrote {len(found)} utilisation files, one was expected")
    return found[0]


# ---- the command


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
        "versions": {"libtpu": compiler_version(), "jax": jax.__version__},
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
