"""`longattn compare CASE`: attention kernels side by side on this machine's device, under one jax.profiler trace.

The contestants are this project's back ends and its rivals. One that cannot run here is a row with the reason. Nothing
is timed before its results (and gradients) were seen to agree with a float32 reference. Then they take turns, each call
waited for, while the device writes down when each of its ops began and ended; `analysis/trace.py` reads that back, so
the times are the device's and not those of Python's dispatch.

Roofline: FLOPs are those of the visible pairs, without recomputation; bytes are the least that must cross device
memory, each argument read and each result written once (the backward pass reads q, k, v, out and its cotangent again).
Peaks are the vendor's for listed chips, in bfloat16; on a CPU the float32 peak is a matrix product measured here and
the bandwidth is not known.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from longattn.analysis import bench, cases, hardware, trace
from longattn.analysis.static import tpu
from longattn.mask import Causal, Full, Mask
from longattn.ops import dispatch
from longattn.ops.attention.api import BACK_ENDS
from longattn.ops.attention.api import attention as ours
from longattn.shapes import suggest
from longattn.train.record import available_memory, environment

VERSION = 1
FILE = "compare.jsonl"
WIDTH = 132  # the tables': a narrower terminal wraps them rather than losing digits
TOP = 5  # kernels shown of each contestant, and of the differences twice as many
CASES: dict[str, Literal["forward", "forward_backward"]] = {
    "attention_forward": "forward",
    "attention_forward_backward": "forward_backward",
}

# ---- the contestants


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention [B T H D]."""

    about: str
    build: Callable[[bench.AttentionOptions], bench.Attend]  # raises NotImplementedError with the reason
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")  # where it runs
    case: str | None = None  # its name in `cases.CASES`, without "_backward", whose static cycles are known


def _blocks(options: bench.AttentionOptions) -> cases.Shape:
    """The shape of a TPU kernel's case. Raises NotImplementedError for one that it does not take."""
    (T,) = options.T
    fitting = [b for b in (1024, 512, 256, 128) if T % b == 0 and b < T]
    if not fitting:
        raise NotImplementedError(f"its blocks are multiples of 128 that divide T, and T={T} has at least two of them")
    return cases.Shape(T=T, H=options.H, D=options.D, mask=options.mask, bT=fitting[0], bS=fitting[0])


def _heads_first(attend: Callable[..., Any]) -> bench.Attend:
    """[B T H D] for a function of [B H T D]."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return attend(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return call


def _jax_flash(options: bench.AttentionOptions) -> bench.Attend:
    if options.heads != options.H:
        raise NotImplementedError(f"it has no grouped heads: K={options.heads} must be H={options.H}")
    return _heads_first(cases.CASES["jax_flash"].build(_blocks(options))[0])


def _splash(options: bench.AttentionOptions) -> bench.Attend:
    if options.heads != options.H:
        raise NotImplementedError(f"it is built without grouped heads: K={options.heads} must be H={options.H}")
    kernel = jax.vmap(cases.CASES["jax_splash"].build(_blocks(options))[0])
    scale = options.D**-0.5  # the kernel has none
    return _heads_first(lambda q, k, v: kernel((q * scale).astype(q.dtype), k, v))


def _cudnn(options: bench.AttentionOptions) -> bench.Attend:
    if options.dtype == "float32":
        raise NotImplementedError("cuDNN's attention takes bfloat16 and float16, dtype is float32")
    return bench.jax_nn(options.mask, "cudnn")


def _tokamax(options: bench.AttentionOptions) -> bench.Attend:
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("not installed here: pip install tokamax")
    import tokamax

    mask = options.mask

    def attend(q: Any, k: Any, v: Any) -> Any:
        if isinstance(mask, Causal | Full):
            return tokamax.dot_product_attention(q, k, v, is_causal=isinstance(mask, Causal))
        T = jnp.arange(q.shape[1], dtype=jnp.int32)
        return tokamax.dot_product_attention(q, k, v, mask=mask(T[:, None], T[None])[None, None])

    return attend


def _ours(name: str) -> Contestant:
    return Contestant(
        f"longattn.attention, {name}", lambda o: functools.partial(ours, mask=o.mask, implementation=name)
    )


RIVALS: dict[str, Contestant] = {
    "jax_nn": Contestant("jax.nn.dot_product_attention", lambda o: bench.jax_nn(o.mask)),
    "jax_flash": Contestant("jax's Pallas flash attention", _jax_flash, ("tpu",), "jax_flash"),
    "splash": Contestant("jax's Pallas splash attention", _splash, ("tpu",), "jax_splash"),
    "cudnn": Contestant("cuDNN, through jax.nn", _cudnn, ("gpu",)),
    "tokamax": Contestant("tokamax.dot_product_attention", _tokamax),
}
CONTESTANTS: dict[str, Contestant] = {name: _ours(name) for name in BACK_ENDS} | {
    name: rival for name, rival in RIVALS.items() if name not in BACK_ENDS
}


@dataclass(frozen=True)
class CompareOptions:
    """Compare attention kernels on this device, under one profiler trace."""

    case: str  # attention_forward or attention_forward_backward
    contestants: tuple[str, ...] = tuple(n for n in CONTESTANTS if n != "reference")  # or --with a,b: first is the base
    T: int = 2048  # length
    B: int = 1  # sequences
    H: int = 8  # query heads
    K: int | None = None  # key/value heads; none: as many as H
    D: int = 64  # head size
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # none: float32 on a CPU, bfloat16 elsewhere
    mask: Mask = Causal()  # an expression such as "Causal() & Window(512)"
    rounds: int = 15  # timed calls of each
    out: str = "runs/compare"  # folder of the trace, the plot and compare.jsonl
    json: bool = False  # print one JSON document instead of the tables

    def __post_init__(self) -> None:
        if not self.contestants:
            raise ValueError(f"--with must name at least one contestant; they are {', '.join(CONTESTANTS)}")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"unknown contestant {name!r}; {suggest(name, tuple(CONTESTANTS))}")
        if len(set(self.contestants)) < len(self.contestants):
            raise ValueError(f"--with {','.join(self.contestants)} must name each contestant once")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.case not in CASES:
            raise ValueError(f"unknown case {self.case!r}; {suggest(self.case, tuple(CASES))}")
        _ = self.problem  # it checks the sizes

    @property
    def what(self) -> Literal["forward", "forward_backward"]:
        """As `bench` calls the case."""
        return CASES[self.case]

    @property
    def problem(self) -> bench.AttentionOptions:
        """The shapes, as `bench` takes them."""
        return bench.AttentionOptions(
            T=(self.T,), B=self.B, H=self.H, K=self.K, D=self.D, mask=self.mask, window=0, what=(self.what,),
            dtype=self.dtype or ("float32" if dispatch.target().platform == "cpu" else "bfloat16"),
        )  # fmt: skip


# ---- what has to agree before anything is timed


def _refusals(name: str) -> tuple[type[Exception], ...]:
    """What becomes a row with its reason: of a rival's whatever its kernel's compiler may raise."""
    return (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) if name in BACK_ENDS else (Exception,)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def compiled(name: str, options: CompareOptions, arrays: Sequence[Any]) -> Any:
    """The contestant's compiled program, called "compare_NAME".

    Raises NotImplementedError with the reason why it does not run here, and whatever its compiler raises.
    """
    contestant, platform = CONTESTANTS[name], dispatch.target().platform
    if platform not in contestant.platforms:
        raise NotImplementedError(f"it runs on {' and '.join(contestant.platforms)}, this is {platform}")
    attend = contestant.build(options.problem)
    inner = bench.candidate(attend, options.what)

    def program(*arguments: Any) -> Any:
        return inner(*arguments)

    program.__name__ = f"compare_{name}"  # by which the trace knows it
    result = jax.jit(program).lower(*arrays).compile()
    memory = result.memory_analysis()
    if memory is not None:
        needs, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, available_memory()
        if free is not None and needs > 0.8 * free:
            raise NotImplementedError(f"it needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return result


def _expected(options: CompareOptions, drawn: Mapping[str, np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """The back end that gave them, and the results for float32 inputs: the reference's, or where its memory in
    proportion to T x T is not there, the blockwise form's.
    """
    arrays = [jnp.asarray(x) for x in drawn.values()]
    wide = replace(options, dtype="float32")
    try:
        name, program = "reference", compiled("reference", wide, arrays)
    except NotImplementedError:
        name, program = "xla", compiled("xla", wide, arrays)
    return name, [np.asarray(x) for x in program(*arrays)]


def _admit(options: CompareOptions) -> tuple[str, dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """What was compared with, the contestants that run and agree, and what is known of each: error or reason."""
    drawn = bench.inputs(options.problem, options.T)
    against, expected = _expected(options, drawn)
    arrays = [jnp.asarray(x, options.dtype) for x in drawn.values()]
    fns: dict[str, Callable[[], Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    limit = bench.AGREE[options.dtype]
    for name in options.contestants:
        try:
            program = compiled(name, options, arrays)
            results = [np.asarray(x, np.float32) for x in program(*arrays)]
        except _refusals(name) as error:
            known[name] = {"reason": _reason(error)}
            continue
        error = bench.relative_error(results, expected)
        known[name] = {"error": error}
        if error <= limit:
            fns[name] = functools.partial(program, *arrays)
        else:
            known[name]["reason"] = (
                f"it disagrees with {against} in float32: relative error {error:.1e}, at most {limit:.0e} for "
                f"{options.dtype}; it was not timed"
            )
    return against, fns, known


# ---- the measurement


def minimal_bytes(options: bench.AttentionOptions, T: int, what: str) -> int:
    """The least that crosses device memory: each argument read once, each result written once, per pass."""
    item = jnp.dtype(options.dtype).itemsize
    q, kv = (options.B * T * heads * options.D * item for heads in (options.H, options.heads))
    forward = 2 * q + 2 * kv  # q, out; k, v
    backward = 4 * q + 4 * kv  # q, out, do, dq; k, v, dk, dv
    return forward + (backward if what == "forward_backward" else 0)


def _static_seconds(name: str, options: CompareOptions, device: hardware.Device) -> tuple[float | None, str]:
    """Seconds of the compiler's own schedule at the chip's clock, for one call; or None and why."""
    case = CONTESTANTS[name].case
    if case is None or device.chip is None or device.chip.name not in hardware.TENSOR_CORES:
        return None, ""
    if options.dtype != "bfloat16":
        return None, f"static cycles are known for bfloat16, dtype is {options.dtype}"
    wanted = [case, f"{case}_backward"] if options.what == "forward_backward" else [case]
    seconds = 0.0
    for one in wanted:
        try:
            row = tpu.profile(one, device.chip.name, _blocks(options.problem))
        except (ValueError, NotImplementedError) as error:
            return None, str(error)
        if "reason" in row:
            return None, row["reason"]
        seconds += options.B * row["cycles"] / hardware.tpu_clock(device.chip.name)
    return seconds, ""


def _align(scope: trace.Scope) -> str:
    """A scope without the names of attention and its back end, so that the parts of two back ends meet."""
    path = scope.path
    if path[:1] == ("attention",):
        path = path[1:]
        if path[:1] and path[0] in BACK_ENDS:
            path = path[1:]
        return "/".join(path) or "attention"
    return str(scope)


def _record(fns: Mapping[str, Callable[[], Any]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Runs them in turns under one trace; gives the host's seconds. Each has one warming call in the trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls are no business of this and slow it down
    with jax.profiler.trace(str(folder), profiler_options=options):
        return bench.interleave(fns, rounds)


def _row(
    name: str, options: CompareOptions, executions: Sequence[trace.Execution], device: hardware.Device
) -> dict[str, Any]:
    """What the trace says about one contestant."""
    samples = [e.seconds for e in executions]
    seconds = trace.Spread.of(samples)
    flops = bench.flops(options.problem, options.T, options.what)
    moved = minimal_bytes(options.problem, options.T, options.what)
    chip = device.chip
    bandwidth = chip.hbm_bandwidth / chip.devices if chip else None
    by_compute = flops / device.peak_flops if device.peak_flops else None
    by_memory = moved / bandwidth if bandwidth else None
    static_seconds, why = _static_seconds(name, options, device)
    return {
        "samples": samples,
        "device_seconds": asdict(seconds),
        "idle": float(np.median([1 - e.busy / e.seconds for e in executions])),
        "flops": flops,
        "flops_per_second": flops / seconds.median,
        "share_of_peak_flops": None if by_compute is None else by_compute / seconds.median,
        "bytes": moved,
        "bytes_per_second": moved / seconds.median,
        "share_of_bandwidth": None if by_memory is None else by_memory / seconds.median,
        "roofline": None if by_compute is None else max(by_compute, by_memory or 0.0) / seconds.median,
        "bound": "memory" if (by_memory or 0.0) > (by_compute or 0.0) else "compute",
        "static_seconds": static_seconds,
        "static_ratio": None if static_seconds is None else seconds.median / static_seconds,
        "static_note": why,
        "kernels": [asdict(p) for p in trace.kernels(executions)],
        "scopes": [asdict(p) for p in trace.scopes(executions, _align)],
    }


def differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By how much each scope of each contestant differs from the first that ran, largest first."""
    ran = [row for row in rows if "scopes" in row]
    result = []
    parts = lambda row: {(p["name"], p["phase"]): p["seconds"] for p in row["scopes"]}
    for row in ran[1:]:
        mine, first = parts(row), parts(ran[0])
        for key in dict.fromkeys([*mine, *first]):
            a, b = mine.get(key, 0.0), first.get(key, 0.0)
            result.append(
                {"contestant": row["contestant"], "scope": key[0], "phase": key[1], "seconds": a, "first_seconds": b,
                 "difference": a - b}
            )  # fmt: skip
    return sorted(result, key=lambda d: -abs(d["difference"]))


def run(options: CompareOptions, console: Console | None = None) -> dict[str, Any]:
    """`measure`, then the tables (or the JSON document) on stdout; gives the document."""
    document = measure(options)
    if options.json:
        print(json.dumps(document))
    else:
        _print(console or Console(width=max(WIDTH, Console().width)), document)
    return document


def measure(options: CompareOptions) -> dict[str, Any]:
    """The comparison; writes plot and JSONL, and keeps the trace.

    Raises:
      ValueError: for inputs beyond this machine's memory.
    """
    progress = Console(stderr=True)
    options = replace(options, dtype=options.problem.dtype)
    elements = options.B * options.T * 2 * (options.H + options.problem.heads) * options.D
    needs, free = 3 * 4 * elements, available_memory()  # drawn in float32, rounded, and once more in the results
    if free is not None and needs > free:
        raise ValueError(
            f"T={options.T} is too long for this machine: inputs and results take {needs / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; choose a shorter one"
        )
    folder = Path(options.out)
    device = hardware.detect()
    with progress.status("compiling, and comparing results with the reference"):
        against, fns, known = _admit(options)
    rows = [{"contestant": name, "about": CONTESTANTS[name].about, **known[name]} for name in options.contestants]
    document: dict[str, Any] = {
        "version": VERSION,
        "kind": "compare",
        "options": {**asdict(options), "mask": str(options.mask)},
        "environment": environment(),
        "load": os.getloadavg()[0],  # what else the machine was doing
        "checked_against": f"{against}, float32",
        "peak": {
            "flops": device.peak_flops,
            "measured": device.measured,
            "hbm_bandwidth": device.chip.hbm_bandwidth / device.chip.devices if device.chip else None,
        },
        "trace": None,
        "rows": rows,
    }
    if fns:
        folder.mkdir(parents=True, exist_ok=True)
        with progress.status(f"{options.rounds} rounds of {', '.join(fns)}"):
            host = _record(fns, options.rounds, folder)
        path = trace.find(folder)
        document["trace"] = str(path.parent)
        recorded = trace.read(path.read_bytes())
        base: list[float] = []
        for row in rows:
            if (name := row["contestant"]) not in fns:
                continue
            executions = recorded.of(f"jit_compare_{name}")
            if len(executions) != options.rounds + 1:
                row["reason"] = f"the trace shows {len(executions)} executions of {options.rounds + 1} calls"
                if recorded.unknown_seconds:
                    row["reason"] += (
                        f"; {seconds_text(recorded.unknown_seconds)} of kernels name no program, as in CUDA graphs: "
                        "launch them one by one with XLA_FLAGS=--xla_gpu_enable_command_buffer="
                    )
                continue
            row |= _row(name, options, executions[1:], device) | {"host_seconds": host[name]}
            base = base or row["samples"]
            row["ratio"] = asdict(bench.ratio(row["samples"], base))
    document["differences"] = differences(rows)
    _write(document, folder)
    return document


def _write(document: dict[str, Any], folder: Path) -> None:
    """A line per contestant in FILE, and the plot; nothing where nothing ran."""
    document["plot"] = None
    if document["trace"] is None:
        return
    shared = {k: v for k, v in document.items() if k not in ("rows", "differences", "plot")}
    with open(folder / FILE, "a") as file:
        file.write("".join(json.dumps({**shared, **row}) + "\n" for row in document["rows"]))
    if not any("samples" in row for row in document["rows"]):
        return
    path = Path(document["trace"]) / "compare.png"
    plot(document).savefig(path, dpi=150)
    document["plot"] = str(path)


def plot(document: Mapping[str, Any], scopes: int = 7) -> Any:
    """A matplotlib figure: each contestant's device time, every call a point, and where its ops' time goes.

    The `scopes` with the largest share of any contestant's time have a colour each.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in document["rows"] if "samples" in row]
    figure = Figure(figsize=(12, 1.7 + 0.5 * len(rows)), layout="constrained")  # no window, and not pyplot's business
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
    at = np.arange(len(rows))
    for y, row in zip(at, rows):
        s = row["device_seconds"]
        left.plot(np.asarray(row["samples"]) * 1e3, np.full(len(row["samples"]), y), "o", color="C0", alpha=0.25, ms=4)
        spread = [[(s["median"] - s["low"]) * 1e3], [(s["high"] - s["median"]) * 1e3]]
        left.errorbar(s["median"] * 1e3, y, xerr=spread, fmt="D", color="black", capsize=4, ms=4)
    left.set_yticks(at, [row["contestant"] for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.set_xlabel("ms")
    left.set_title("device time: calls, median, quartiles", fontsize=10)

    seconds: list[dict[tuple[str, bool], float]] = []  # by scope and whether it is of the backward pass
    share: dict[str, float] = {}
    for row in rows:
        seconds.append({})
        for part in row["scopes"]:
            key = part["name"], part["phase"] != "forward"
            seconds[-1][key] = seconds[-1].get(key, 0.0) + part["seconds"]
        total = sum(seconds[-1].values())
        for name in {name for name, _ in seconds[-1]}:
            mine = sum(s for (n, _), s in seconds[-1].items() if n == name)
            share[name] = max(share.get(name, 0.0), mine / total if total else 0.0)
    shown = sorted(share, key=lambda name: -share[name])[:scopes]
    start = np.zeros(len(rows))
    for backward in (False, True):
        for i, name in enumerate([*shown, "other scopes"]):
            chosen = lambda n, name=name: n == name or (name == "other scopes" and n not in shown)
            width = np.array([sum(s for (n, b), s in row.items() if b == backward and chosen(n)) for row in seconds])
            color = f"C{i}" if name in shown else "0.75"
            hatch = "////" if backward else None
            right.barh(at, width * 1e3, left=start * 1e3, height=0.6, color=color, hatch=hatch, edgecolor="white")
            start += width
    colours = [Patch(color=f"C{i}", label=name) for i, name in enumerate(shown)]
    if len(share) > len(shown):
        colours.append(Patch(color="0.75", label="other scopes"))
    if any(backward for row in seconds for _, backward in row):
        colours.append(Patch(facecolor="0.4", edgecolor="white", hatch="////", label="backward"))
    right.legend(handles=colours, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    right.set_xlim(0, start.max() * 1.04e3)
    right.set_xlabel("ms")
    right.set_title("time of its ops by named scope, summed over threads or streams", fontsize=10)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    options, where = document["options"], document["environment"]
    device = where["host"]["cpu"] if where["device"]["platform"] == "cpu" else where["device"]["kind"]
    figure.suptitle(
        f"{options['case']} {options['mask']}  B{options['B']} T{options['T']} H{options['H']} D{options['D']} "
        f"{options['dtype']}, {device}",
        fontsize=11,
    )
    return figure


# ---- for people


def _print(console: Console, document: Mapping[str, Any]) -> None:
    options, rows = document["options"], document["rows"]
    K = "" if options["K"] is None else f" K{options['K']}"
    title = (
        f"{options['case']} {options['mask']}: B{options['B']} T{options['T']} H{options['H']}{K} D{options['D']} "
        f"{options['dtype']}"
    )
    table = plain_table(title)
    headings = (
        "contestant", "device time", "quartiles", "ratio", "idle", "GFLOP/s", "of peak", "GB/s", "of HBM", "vs static",
        "error",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contestant" else "right", no_wrap=True)
    notes, ran = [], [row for row in rows if "samples" in row]
    for row in rows:
        error = f"{row['error']:.0e}" if "error" in row else ""
        if "samples" not in row:
            table.add_row(row["contestant"], *["-"] * 9, error)
            notes.append(f"{row['contestant']}: {row['reason']}.")
            continue
        s = row["device_seconds"]
        table.add_row(
            row["contestant"],
            seconds_text(s["median"]),
            f"{seconds_text(s['low'])} .. {seconds_text(s['high'])}",
            str(bench.Interval(**row["ratio"])),
            f"{row['idle']:.0%}",
            f"{row['flops_per_second'] / 1e9:.3g}",
            _percent(row["share_of_peak_flops"]),
            f"{row['bytes_per_second'] / 1e9:.3g}",
            _percent(row["share_of_bandwidth"]),
            "-" if row["static_ratio"] is None else f"{row['static_ratio']:.2f}",
            error,
        )
        if row["static_note"]:
            notes.append(f"{row['contestant']}: no static cycles: {row['static_note']}")
    console.print(table)
    for row in ran:
        total = sum(kernel["seconds"] for kernel in row["kernels"])
        console.print(parts_table(f"{row['contestant']}: top kernels", row["kernels"][:TOP], total))
    if document["differences"]:
        table = plain_table(f"Largest differences to {ran[0]['contestant']} by named scope")
        for heading in ("contestant", "scope", "pass", "its time", ran[0]["contestant"], "difference"):
            left = heading in ("contestant", "scope", "pass")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for d in document["differences"][: 2 * TOP]:
            sign = "+" if d["difference"] > 0 else "-"
            table.add_row(
                d["contestant"], d["scope"], d["phase"], seconds_text(d["seconds"]), seconds_text(d["first_seconds"]),
                sign + seconds_text(abs(d["difference"])),
            )  # fmt: skip
        console.print(table)
    environment = document["environment"]
    where = environment["host"]["cpu"] if environment["device"]["platform"] == "cpu" else environment["device"]["kind"]
    peak = document["peak"]
    if peak["flops"]:
        how = "a float32 matrix product measured here" if peak["measured"] else "published, bfloat16"
        notes.append(f"Peak {peak['flops'] / 1e9:,.0f} GFLOP/s ({how}); GB/s count each argument and result once.")
    if ran:
        notes += [
            "The ratio is of median device times to the first's, its 95% interval in brackets; idle: no op ran, within "
            "a call.",
            f"Before timing, results agreed with {document['checked_against']}; the error is the largest relative one.",
        ]
    notes.append(
        f"{where}, load {document['load']:.1f} before; {options['rounds']} rounds in turns; jax "
        f"{environment['versions']['jax']}; commit {(environment['commit'] or 'unknown')[:12]}."
    )
    console.print("\n".join(notes), highlight=False, soft_wrap=True)
    if document["trace"]:
        console.print(opening(document["trace"]), highlight=False, soft_wrap=True)
        console.print(f"Plot: {document['plot']}", highlight=False, soft_wrap=True)
    else:
        console.print("Nothing could be timed here.", highlight=False)


def opening(recorded: str) -> str:
    """Where a trace is and how to look at it."""
    folder = Path(recorded).parents[2]  # FOLDER/plugins/profile/TIME
    return f"Trace: {recorded}; to open it: pip install xprof, then xprof --port 8791 {folder}"


def plain_table(title: str) -> Table:
    """An empty table in the style of all."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def parts_table(title: str, parts: Sequence[Mapping[str, Any]], total: float) -> Table:
    """Kernels, with their share of `total` seconds."""
    table = plain_table(title)
    for heading in ("kernel", "scope", "pass", "calls", "time", "share"):
        left = heading in ("kernel", "scope", "pass")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for p in parts:
        share = f"{p['seconds'] / total:.0%}" if total else "-"
        table.add_row(p["name"], p["scope"], p["phase"], f"{p['calls']:g}", seconds_text(p["seconds"]), share)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def seconds_text(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0"
