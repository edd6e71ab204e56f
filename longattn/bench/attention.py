"""`longattn compare attention`: our attention against PyTorch's and JAX's, and a window against the full mask.

The candidates of a row take turns, each after a warm-up, so that a slow machine slows all of them alike. Those with
gigabytes of scratch come last, since they disturb what follows them. A ratio is one of medians, with a bootstrap
interval; there is none where a candidate ran at two speeds. Outputs (and gradients) must agree before anything is
timed. Times are wall-clock around `block_until_ready`: on an accelerator choose T large enough to hide the dispatch of
some 50 us.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from longattn.bench.timing import Interval, Seconds, cores, fit_exponent, interleave, ratio, temp_bytes, two_speeds
from longattn.config.checks import typed
from longattn.cost import hardware
from longattn.cost.flops import attention_flops
from longattn.cost.pairs import visible_pairs
from longattn.display import device_text, plain_table, seconds_text
from longattn.environment import available_memory, environment
from longattn.files import json_text
from longattn.mask import Causal, Full, Mask, Window
from longattn.ops.attention.api import attention as ours

VERSION = 3
WORKER = Path(__file__).with_name("torch_worker.py")
TORCH_PYTHON = "LONGATTN_TORCH_PYTHON"
WIDTH = 96  # of the table: a narrower terminal wraps it and loses no digits

# ---- candidates


@dataclass(frozen=True)
class AttentionOptions:
    """Time attention by wall-clock against PyTorch and JAX, and a window against the full mask."""

    T: tuple[int, ...] = (2048, 8192, 16384)  # lengths
    B: int = 1  # sequences
    H: int = 8  # query heads
    K: int | None = None  # key/value heads; none: as many as H
    D: int = 64  # head size
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mask: Mask = Causal()  # an expression such as "Causal() & Window(512)"
    window: int = 1024  # also time `mask` within this window; 0: do not
    what: tuple[Literal["forward", "forward_backward"], ...] = ("forward", "forward_backward")
    against: tuple[Literal["torch", "jax", "reference"], ...] | None = None  # none: torch, if it is found, and jax
    implementation: str | None = None  # our back end; none: the best that accepts the call
    repeats: int = 7  # timed calls of each candidate
    threads: int = 2  # cores to use, if the device is the CPU
    json: bool = False  # print one JSON document instead of the table

    def __post_init__(self) -> None:
        typed(self)
        sizes = {**{f"T={T}": T for T in self.T}, **{f"{n}={getattr(self, n)}": getattr(self, n) for n in "BHD"}}
        sizes |= {
            f"K={self.K}": self.heads,
            f"repeats={self.repeats}": self.repeats,
            f"threads={self.threads}": self.threads,
        }
        for text, size in sizes.items():
            if size < 1:
                raise ValueError(f"{text} must be at least 1")
        if not self.T or not self.what:
            raise ValueError(f"{self.T=} and {self.what=} must each name at least one")
        if self.H % self.heads:
            raise ValueError(f"K={self.K} must divide H={self.H}")
        if self.window < 0:
            raise ValueError(f"window={self.window} must not be negative; 0 leaves it out")

    @property
    def heads(self) -> int:
        """Number of key/value heads."""
        return self.H if self.K is None else self.K


Attend = Callable[[Any, Any, Any], Any]
RESULTS = ("out", "dq", "dk", "dv")
# Largest relative L2 error between two implementations that agree. float32: about a thousand roundings of 6e-8 each,
# which add up like a random walk. The 16-bit types round each probability and output once, by 2**-9 and 2**-12.
AGREE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def _forward_backward(attend: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arrays: Any) -> Any:
        *inputs, do = arrays
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(do)

    return both


def candidate(attend: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Returns (q, k, v, do) -> (out,), or -> (out, dq, dk, dv) for "forward_backward". Other inputs follow v."""
    return _forward_backward(attend) if what == "forward_backward" else lambda *arrays: (attend(*arrays[:-1]),)


def _program(attend: Attend, what: str) -> Any:
    """Returns the jitted candidate."""
    return jax.jit(candidate(attend, what))


def jax_nn(mask: Mask, implementation: Literal["xla", "cudnn"] = "xla") -> Attend:
    """Returns jax.nn's attention with a mask."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        dot_product_attention = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        if isinstance(mask, Causal | Full):
            return dot_product_attention(q, k, v, is_causal=isinstance(mask, Causal))
        T = jnp.arange(q.shape[1], dtype=jnp.int32)
        return dot_product_attention(q, k, v, mask=mask(T[:, None], T[None])[None, None])

    return attend


def _window(options: AttentionOptions) -> Mask:
    return options.mask & Window(options.window, options.window)


def _attends(options: AttentionOptions, peers: Sequence[str]) -> dict[str, Attend]:
    """Returns the candidates that run under JAX, by name. The others are compared with "longattn"."""
    attends: dict[str, Attend] = {
        "longattn": functools.partial(ours, mask=options.mask, implementation=options.implementation)
    }
    if "jax" in peers:
        attends["jax"] = jax_nn(options.mask)
    if "reference" in peers:
        attends["reference"] = functools.partial(ours, mask=options.mask, implementation="reference")
    if options.window:
        attends["window"] = functools.partial(ours, mask=_window(options), implementation=options.implementation)
    return attends


class Torch:
    """A worker process whose interpreter has PyTorch. It keeps its inputs between calls and times itself."""

    def __init__(self, python: str):
        try:
            self.process = subprocess.Popen(
                [python, "-u", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(f"{TORCH_PYTHON}={python!r} must be a Python interpreter with PyTorch: {error}") from None
        try:
            self.version = self._answer()["ready"]
        except ValueError as error:
            self.close()
            raise ValueError(f"{TORCH_PYTHON}={python!r} must be a Python interpreter with PyTorch: {error}") from None

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        answer = (
            json.loads(line) if line else {"error": f"the worker ended ({self.process.wait()}), perhaps out of memory"}
        )
        if "error" in answer:
            raise ValueError(f"PyTorch: {answer['error']}")
        return answer

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns the worker's answer. Raises ValueError with the worker's error."""
        with contextlib.suppress(BrokenPipeError):  # the worker has ended: reading its answer reports that
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the worker."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait()


@contextlib.contextmanager
def _torch(options: AttentionOptions) -> Iterator[tuple[Torch | None, str]]:
    """Yields (the worker, ""), or (None, the reason why there is none)."""
    wanted = options.against is None or "torch" in options.against
    python = os.environ.get(TORCH_PYTHON, "")
    reason = ""
    if not wanted:
        reason = "not asked for"
    elif jax.default_backend() != "cpu":
        reason = f"it is compared on the CPU only, and this is {jax.default_backend()}"
    elif not python:
        reason = f"{TORCH_PYTHON} is not set; make it the path of a Python interpreter that has PyTorch"
    if reason:
        if options.against and wanted:
            raise ValueError(f"against=torch: {reason}")
        yield None, reason
        return
    worker = Torch(python)
    try:
        yield worker, ""
    finally:
        worker.close()


# ---- the benchmark


def attention(options: AttentionOptions, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table (or the JSON document) on stdout, and returns the document.

    Raises:
      ValueError: if PyTorch was asked for and is not found, or T needs more memory than there is.
      FloatingPointError: if two candidates disagree; nothing is timed then.
    """
    console = console or Console(width=max(WIDTH, Console().width))
    progress = Console(stderr=True)
    peers = ("torch", "jax") if options.against is None else options.against
    with contextlib.ExitStack() as stack:
        # Before JAX starts its CPU client, which starts one thread per core that it may use.
        n: int | None = stack.enter_context(cores(options.threads))
        if jax.default_backend() != "cpu":
            stack.close()
            n = None
        torch, why = stack.enter_context(_torch(options))
        skipped = {"torch": why} if why and options.against is None else {}
        document: dict[str, Any] = {
            "version": VERSION,
            "kind": "compare attention",
            "options": {**asdict(options), "mask": str(options.mask)},
            "environment": environment(),
            "torch": torch and torch.version,
            "cores": n,
            "load": os.getloadavg()[0],  # the machine's load from other work
            "peak_flops": hardware.detect().peak_flops,
            "skipped": skipped,
            "rows": [],
        }
        for T in options.T:
            for what in options.what:
                with progress.status(f"T={T} {what}"):
                    row = _row(options, T, what, peers, torch, n)
                document["rows"].append(row)
                times = ", ".join(f"{name} {seconds_text(median)}" for name, median in row["median"].items())
                progress.print(f"T={T} {what}: {times}", highlight=False, soft_wrap=True)
    document["exponents"] = _exponents(document["rows"])
    if options.json:
        print(json_text(document))
    else:
        _print(console, document)
    return document


def inputs(options: AttentionOptions, T: int) -> dict[str, np.ndarray]:
    """Returns q, k, v and the cotangent do, standard normal [B T H|K D]: float32, rounded to the dtype under test."""
    rng = np.random.default_rng(T)
    heads = {"q": options.H, "k": options.heads, "v": options.heads, "do": options.H}
    shape = lambda h: (options.B, T, h, options.D)
    rounded = np.dtype(jnp.dtype(options.dtype))
    return {n: rng.standard_normal(shape(h), np.float32).astype(rounded).astype(np.float32) for n, h in heads.items()}


def numbers(options: AttentionOptions, T: int) -> int:
    """Returns the number of elements of q, k, v and the cotangent."""
    return options.B * T * 2 * (options.H + options.heads) * options.D


def check_memory(numbers: int, T: int) -> None:
    """Raises ValueError if inputs of that many elements, and their results, exceed this machine's free memory."""
    needs, free = 3 * 4 * numbers, available_memory()  # in float32: drawn, rounded, and the results
    if free is not None and needs > free:
        raise ValueError(
            f"{T=} is too long for this machine: inputs and results take {needs / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; choose a shorter one"
        )


def _row(
    options: AttentionOptions, T: int, what: str, peers: Sequence[str], torch: Torch | None, threads: int | None
) -> dict[str, Any]:
    """Returns the document's row for one length and one direction."""
    check_memory(numbers(options, T), T)
    drawn = inputs(options, T)
    arrays = [jnp.asarray(x, options.dtype) for x in drawn.values()]
    fns: dict[str, Callable[[], Any]] = {}
    temp: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, attend in _attends(options, peers).items():
        try:
            compiled = _program(attend, what).lower(*arrays).compile()
        except (ValueError, NotImplementedError) as error:
            if name in ("longattn", "window"):
                raise
            skipped[name] = f"refuses: {str(error).splitlines()[0]}"
            continue
        memory = compiled.memory_analysis()
        temp[name] = int(memory.temp_size_in_bytes)
        needs, free = temp[name] + memory.output_size_in_bytes, available_memory()
        if free is not None and needs > 0.8 * free:
            skipped[name] = f"needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            if name == "longattn":
                raise ValueError(f"{T=} is too long for this machine: it {skipped[name]}; choose a shorter one")
        else:
            fns[name] = functools.partial(compiled, *arrays)
    errors = _agree(options, T, what, fns, drawn, torch, threads)
    if torch:
        fns["torch"] = lambda: Seconds(torch.ask("run", what=what)["seconds"])
    seconds = interleave(fns, options.repeats)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    unsteady = [name for name, samples in seconds.items() if two_speeds(samples)]
    steady = [] if "longattn" in unsteady else [n for n in seconds if n not in ("longattn", *unsteady)]
    against = lambda name: (seconds["longattn"], seconds[name])
    ratios = {name: ratio(*(against(name) if name == "window" else against(name)[::-1])) for name in steady}
    twice = [jax.ShapeDtypeStruct((a.shape[0], 2 * T, *a.shape[2:]), a.dtype) for a in arrays]
    return {
        "T": T,
        "what": what,
        "seconds": seconds,
        "median": medians,
        "ratio": {name: asdict(r) for name, r in ratios.items()},
        "two_speeds": unsteady,
        "error": errors,
        "skipped": skipped,
        "temp_bytes": temp,
        "temp_bytes_at_2T": temp_bytes(_program(_attends(options, ())["longattn"], what), *twice),
        "flops": {name: flops(options, T, what, window=name == "window") for name in seconds},
    }


def flops(options: AttentionOptions, T: int, what: str, *, window: bool = False) -> float:
    """Returns the FLOPs of the visible pairs without recomputation, which are the same for every candidate."""
    mask = _window(options) if window else options.mask
    parts = attention_flops(visible_pairs(mask, T), options.H * options.B, options.D)
    return parts.forward + (parts.backward if what == "forward_backward" else 0)


def _agree(
    options: AttentionOptions,
    T: int,
    what: str,
    fns: Mapping[str, Callable[[], Any]],
    inputs: Mapping[str, np.ndarray],
    torch: Torch | None,
    threads: int | None,
) -> dict[str, float]:
    """Returns our largest relative L2 error against each peer. Raises FloatingPointError for one beyond AGREE."""
    mine = [np.asarray(x, np.float32) for x in fns["longattn"]()]
    errors = {}
    for name in [n for n in fns if n not in ("longattn", "window")]:
        errors[name] = relative_error(mine, [np.asarray(x, np.float32) for x in fns[name]()])
    if torch:
        with tempfile.TemporaryDirectory() as folder:
            for name, x in inputs.items():
                np.save(Path(folder, name), x)
            dense = not isinstance(options.mask, Causal | Full)
            if dense:
                np.save(Path(folder, "mask"), options.mask.dense(T, T))
            causal = isinstance(options.mask, Causal)
            torch.ask("load", folder=folder, dtype=options.dtype, threads=threads or 1, causal=causal, mask=dense)
            torch.ask("save", what=what)
            errors["torch"] = relative_error(mine, [np.load(Path(folder, f"{n}.npy")) for n in RESULTS[: len(mine)]])
    for name, error in errors.items():
        if not error <= AGREE[options.dtype]:
            raise FloatingPointError(
                f"longattn and {name} disagree at {T=} ({what}): relative error {error:.1e}, must be at most "
                f"{AGREE[options.dtype]:.0e} for {options.dtype}; nothing was timed"
            )
    return errors


def relative_error(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Returns the largest relative L2 error of an array of `a` against the same one of `b`."""
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True))


def _exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns by direction and candidate how time and scratch memory grow with T: the exponents, given two lengths."""
    result: dict[str, Any] = {}
    for what in dict.fromkeys(row["what"] for row in rows):
        same = [row for row in rows if row["what"] == what]
        for name in dict.fromkeys(n for row in same for n in row["seconds"]):
            timed = [row for row in same if name in row["seconds"] and name not in row["two_speeds"]]
            if len({row["T"] for row in timed}) > 1:
                sizes = [row["T"] for row in timed]
                entry = {"time": asdict(fit_exponent(sizes, [row["seconds"][name] for row in timed]))}
                scratch = [row["temp_bytes"].get(name, 0) for row in timed]
                if min(scratch) > 0:
                    entry["temp_bytes"] = asdict(fit_exponent(sizes, scratch))
                result.setdefault(what, {})[name] = entry
    return result


def _print(console: Console, document: Mapping[str, Any]) -> None:
    """Prints the document as a table with a line per length, direction and candidate."""
    options, environment, rows = document["options"], document["environment"], document["rows"]
    title = f"attention {options['mask']}: B{options['B']} H{options['H']} D{options['D']} {options['dtype']}"
    table = plain_table(title)
    for heading in ("T", "", "", "time", "GFLOP/s", "scratch", "at 2T", "ratio"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    reasons: dict[str, str] = dict(document["skipped"])
    for row in rows:
        first = [f"{row['T']:,}", {"forward": "fwd", "forward_backward": "fwd+bwd"}[row["what"]]]
        for name in dict.fromkeys([*row["temp_bytes"], *row["median"], *row["skipped"]]):
            label = f"window {options['window']}" if name == "window" else name
            scratch = _mebibytes(row["temp_bytes"].get(name))
            if name in row["skipped"]:
                table.add_row(*first, label, "-", "-", scratch)
                reasons[f"{name} at T={row['T']:,} ({row['what']})"] = row["skipped"][name]
            else:
                growth = f"x{row['temp_bytes_at_2T'] / row['temp_bytes'][name]:.2f}" if name == "longattn" else ""
                faster = str(Interval(**row["ratio"][name])) if name in row["ratio"] else ""
                rate = f"{row['flops'][name] / row['median'][name] / 1e9:.0f}"
                table.add_row(*first, label, seconds_text(row["median"][name]), rate, scratch, growth, faster)
            first = ["", ""]
    console.print(table)
    notes = [
        "The ratio is of medians, its 95% interval in brackets; window's: how much faster than the whole mask it is."
    ]
    errors = {n: max(row["error"][n] for row in rows if n in row["error"]) for row in rows for n in row["error"]}
    if errors:
        text = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        notes.append(f"Before timing the results agreed; largest relative error against {text}.")
    for row in rows:
        for name in row["two_speeds"]:
            low, high = (seconds_text(f(row["seconds"][name])) for f in (min, max))
            notes.append(
                f"{name} at T={row['T']:,} ({row['what']}) ran at two speeds, {low} to {high}: no ratio. "
                "Repeat it when the machine is quiet."
            )
    versions = environment["versions"]
    notes.append(
        f"{device_text(environment)}, {document['cores'] or '-'} cores, load {document['load']:.1f} before; "
        f"{options['repeats']} rounds in turns; jax {versions['jax']}, torch {document['torch'] or '-'}; commit "
        f"{(environment['commit'] or 'unknown')[:12]}."
    )
    notes += [f"{name}: {why}." for name, why in reasons.items()]
    console.print("\n".join(notes), highlight=False)


def _mebibytes(n: int | None) -> str:
    return "" if n is None else f"{n / 2**20:.1f} MiB"
