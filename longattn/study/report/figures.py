"""Draws the figures of the study's page as SVG. Colours are CSS variables, so that they follow the page's dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from longattn.study.store import Number, Store, family

# Each of these colours becomes a CSS variable: text, grid, panel, and one per way.
INK, GRID, PANEL = "#010203", "#010204", "#010205"
SERIES = ("#020301", "#020302", "#020303", "#020304", "#020305", "#020306", "#020307", "#020308")
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PANEL: "var(--panel)"} | {
    c: f"var(--s{i})" for i, c in enumerate(SERIES)
}
MARKERS = "oDs^vP*X"
_IN_AXES: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, for search and screen readers
    "svg.hashsalt": "longattn",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}
ORDER = ("exact", "window", "dense")  # families with fixed colours; the others follow in the order they appear


def colour(way: str, ways: Sequence[str]) -> tuple[str, str]:
    """Returns the colour and marker of a way, the same in every figure of the study. Windows share a colour."""
    families = list(dict.fromkeys([*ORDER, *map(family, ways)]))
    i = families.index(family(way)) % len(SERIES)
    return SERIES[i], MARKERS[i]


def ways_of(numbers: Sequence[Number]) -> list[str]:
    return list(dict.fromkeys(n.way for n in numbers if n.way))


def figure(
    name: str, title: str, description: str, draw: Callable[..., None], columns: int, height: float = 3.3
) -> str:
    """Returns an SVG of `columns` panels, drawn by `draw(*axes)`, with title and description for screen readers."""
    with matplotlib.rc_context(_STYLE):
        fig, axes = plt.subplots(1, columns, figsize=(9.6, height), layout="constrained", squeeze=False)
        try:
            draw(*axes[0])
            text = io.StringIO()
            fig.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        finally:
            plt.close(fig)
    return _inline(text.getvalue(), name, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)  # ids are unique in the page
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = f'<title id="{name}-t">{html.escape(title)}</title><desc id="{name}-d">{html.escape(description)}</desc>'
    return re.sub(r"<svg([^>]*)>", rf'<svg\1 role="img" aria-labelledby="{name}-t {name}-d">{label}', svg, count=1)


def powers(axis: Any, values: Sequence[float], show: Callable[[float], str]) -> None:
    """Puts the ticks of a logarithmic axis exactly at `values`."""
    ticks = sorted(set(values))
    axis.set_major_locator(FixedLocator(ticks[:: max(1, -(-len(ticks) // 6))]))  # more labels would overlap
    axis.set_major_formatter(FuncFormatter(lambda v, _: show(float(v))))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))


def short(n: float) -> str:
    """Formats lengths and bytes in powers of two: 1024 as 1k, 1048576 as 1M."""
    for size, letter in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def _bars(n: Number) -> list[list[float]] | None:
    if n.low is None or n.high is None:
        return None
    return [[max(0.0, n.value - n.low)], [max(0.0, n.high - n.value)]]


Recorded = Sequence[tuple[str, Store]]  # recorded studies: their labels and numbers


def recall(store: Store, titles: dict[str, str], recorded: Recorded = ()) -> str | None:
    """Draws accuracy with its interval against bytes read per token: a point per way, a panel per task."""
    points = store.select("recall", "accuracy")
    tasks = list(dict.fromkeys(n.at["task"] for n in points))
    if not tasks:
        return None

    def draw(*axes: Any) -> None:
        for ax, task in zip(axes, tasks, strict=True):
            _recall_panel(ax, task, store, titles, recorded)

    facts = "; ".join(f"{titles.get(n.way, n.way)} on {n.at['task']} {n.value:.3f}" for n in points)
    return figure(
        "recall", "Recall against bytes read per token", f"Share of right answers: {facts}.", draw, len(tasks), 3.6
    )


def _recall_panel(ax: Any, task: str, store: Store, titles: dict[str, str], recorded: Recorded) -> None:
    xs, ways = [], ways_of(store.select("recall", "accuracy"))
    for label, source in [("", store), *recorded]:
        marks: dict[str, Any] = (
            {"markersize": 7, "markerfacecolor": "none", "alpha": 0.6} if label else {"markersize": 9}
        )
        for n in source.select("recall", "accuracy", task=task):
            read = source.one("recall", "bytes_read", n.way, **n.at)
            if read is None:
                continue
            xs.append(read.value)
            c, m = colour(n.way, ways)
            ax.errorbar(read.value, n.value, yerr=_bars(n), fmt=m, color=c, ecolor=c, capsize=4, zorder=3, **marks)
            text = titles.get(n.way, n.way) + (f" ({label})" if label else "") + " (cut short)" * n.cut_short
            shift = (0, -22 if n.value > 0.8 else 14)
            ax.annotate(text, (read.value, n.value), shift, textcoords="offset points", ha="center", fontsize=9)
    for quantity, text, line, width in (
        ("chance", "chance", ":", 1.2),
        ("guess", "knows the values, not their keys", (0, (1, 4)), 1),
    ):
        for value in {n.value for n in store.select("recall", quantity, task=task)}:
            ax.axhline(value, color=INK, linestyle=line, linewidth=width)
            ax.annotate(text, (1, value), (-2, 3), ha="right", **_IN_AXES)
    ax.set_xscale("log", base=2)
    powers(ax.xaxis, xs, short)
    ax.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
    ax.set_ylim(-0.03, 1.08)
    ax.set_xlabel("bytes of state read per token and layer")
    ax.set_ylabel("answers right")
    ax.set_title({"mqar": "Associative recall (MQAR)", "needle": "Passkey in text (needle)"}.get(task, task))


def _lines(
    ax: Any,
    store: Store,
    part: str,
    quantity: str,
    titles: dict[str, str],
    scale: float,
    x: str = "T",
    dashed: str = "",
    **at: Any,
) -> None:
    numbers = store.select(part, quantity, **at)
    for way in ways_of(numbers):
        mine = sorted((n for n in numbers if n.way == way), key=lambda n: n.at[x])
        c, m = colour(way, ways_of(numbers))
        label = titles.get(way, way) + (f" ({dashed})" if dashed else "")
        ax.plot(
            [n.at[x] for n in mine],
            [n.value * scale for n in mine],
            marker=m,
            color=c,
            label=label,
            linestyle="--" if dashed else "-",
            markerfacecolor="none" if dashed else c,
            alpha=0.6 if dashed else 1,
        )
        spread = [(n.at[x], n.low, n.high) for n in mine if n.low is not None and n.high is not None]
        ax.fill_between(
            [at for at, _, _ in spread],
            [low * scale for _, low, _ in spread],
            [high * scale for _, _, high in spread],
            color=c,
            alpha=0.18,
            linewidth=0,
        )


def _lengths(ax: Any, numbers: Sequence[Number], label: str, title: str) -> None:
    ax.set_xscale("log", base=2)
    powers(ax.xaxis, [n.at["T"] for n in numbers], short)
    ax.set_xlabel("T (tokens)")
    ax.set_ylabel(label)
    ax.set_title(title)


def cost(store: Store, titles: dict[str, str], recorded: Recorded = ()) -> str | None:
    """Draws time, scratch memory and throughput against T."""
    times = store.select("cost", "seconds_forward_backward")
    if not times:
        return None

    def draw(time: Any, memory: Any, rate: Any) -> None:
        panels = (
            (time, "seconds_forward_backward", 1e3, "ms", "Time, forward + backward"),
            (memory, "scratch_forward_backward", 2**-20, "MiB", "Scratch memory"),
            (rate, "tokens_per_second", 1e-3, "thousand tokens/s", "Throughput at a fixed batch"),
        )
        for ax, quantity, scale, unit, title in panels:
            shown = store.select("cost", quantity)
            _lines(ax, store, "cost", quantity, titles, scale)
            for label, source in recorded:
                _lines(ax, source, "cost", quantity, titles, scale, dashed=label)
                shown = shown + source.select("cost", quantity)
            ax.set_yscale("log")
            _lengths(ax, shown, unit, title if shown else f"{title}: not measured")
        time.legend(fontsize=9)

    facts = "; ".join(f"{titles.get(n.way, n.way)} at {n.at['T']}: {n.value * 1e3:.3g} ms" for n in times)
    return figure("cost", "Cost of attention against length", f"Forward and backward: {facts}.", draw, 3)


def share(store: Store, titles: dict[str, str]) -> str | None:
    """Draws attention's share of a model's FLOPs against T."""
    shares = store.select("cost", "attention_share")
    if not shares:
        return None

    def draw(ax: Any, flops: Any) -> None:
        _lines(ax, store, "cost", "attention_share", titles, 100)
        _lengths(ax, shares, "% of the model's FLOPs", "Attention's share of a 7-billion-parameter model")
        ax.set_ylim(0, 100)
        ax.legend(fontsize=9)
        _lines(flops, store, "cost", "flops_forward", titles, 1e-9)
        flops.set_yscale("log")
        _lengths(flops, store.select("cost", "flops_forward"), "GFLOP", "FLOPs of the timed attention, forward")

    facts = "; ".join(f"{titles.get(n.way, n.way)} at {n.at['T']}: {n.value:.1%}" for n in shares)
    return figure("share", "Attention's share of the FLOPs", facts + ".", draw, 2)


def memory(store: Store, titles: dict[str, str]) -> str | None:
    """Draws the bytes of a training step on a chip against T, by formula, and the chip's memory.

    There is a panel per remat policy.
    """
    numbers = store.select("memory", "chip_step_bytes")
    if not numbers:
        return None
    chip = numbers[0].at["chip"]
    remats = list(dict.fromkeys(n.at["remat"] for n in numbers))
    held = {n.at["chip"]: n.value / 2**30 for n in store.select("memory", "chip_bytes")}

    def draw(*axes: Any) -> None:
        for ax, remat in zip(axes, remats, strict=True):
            for way in ways_of(numbers):
                c, m = colour(way, ways_of(numbers))
                mine = [n for n in numbers if (n.way, n.at["remat"]) == (way, remat)]
                if mine:
                    label = titles.get(way, way)
                    ax.plot([n.at["T"] for n in mine], [n.value / 2**30 for n in mine], m + "-", color=c, label=label)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{float(v):g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            if chip in held:
                ax.axhline(held[chip], color=INK, linestyle=":", linewidth=1)
                ax.annotate(chip, (0, held[chip]), (3, 3), **_IN_AXES)
            _lengths(ax, [n for n in numbers if n.at["remat"] == remat], "GiB", f"remat: {remat}")
        axes[0].legend(fontsize=9)

    facts = "; ".join(
        f"{titles.get(n.way, n.way)}, remat {n.at['remat']}, T {n.at['T']}: {n.value / 2**30:.2f} GiB" for n in numbers
    )
    return figure("memory", f"Memory of a training step on a {chip} against length", facts + ".", draw, len(remats))


def context(store: Store, titles: dict[str, str]) -> str | None:
    """Draws the loss by position at each context length, and the cost of replacing distant context."""
    at = store.select("context", "bits_at")
    if not at:
        return None
    first = ways_of(at)[0]

    def draw(position: Any, control: Any) -> None:
        lengths = sorted({n.at["T"] for n in at if n.way == first})
        for i, T in enumerate(lengths):
            mine = store.select("context", "bits_at", first, T=T)
            position.plot(
                [n.at["to"] for n in mine],
                [n.value for n in mine],
                marker=MARKERS[i],
                color=SERIES[i + 3],
                label=f"T = {T}",
            )
        position.set_xscale("log", base=2)
        powers(
            position.xaxis,
            [n.at["to"] for n in at if n.way == first and n.at["to"] in (1, 4, 16, 64, 256, 1024, 4096)],
            short,
        )
        position.set_xlabel("tokens read")
        position.set_ylabel("bits per byte")
        position.set_title(f"Loss by position ({titles.get(first, first)})")
        position.legend(fontsize=9)
        excess = store.select("context", "tail_excess")
        for way in ways_of(excess):
            mine = [n for n in excess if n.way == way]
            c, m = colour(way, ways_of(at))
            xs = [max(n.at["k"], 2) for n in mine]  # k = 0 does not exist on a logarithmic axis
            below = [0.0 if n.low is None else n.value - n.low for n in mine]
            above = [0.0 if n.high is None else n.high - n.value for n in mine]
            control.errorbar(
                xs,
                [n.value for n in mine],
                yerr=[below, above],
                marker=m,
                color=c,
                capsize=3,
                label=titles.get(way, way),
            )
        control.axhline(0, color=INK, linestyle=":", linewidth=1)
        control.set_xscale("log", base=2)
        powers(control.xaxis, [max(n.at["k"], 2) for n in excess], lambda v: "0" if v == 2 else short(v))
        control.set_xlabel("k: bytes before the tail that stay its own document's")
        control.set_ylabel("extra bits per byte")
        control.set_title("Cost of replacing what is further back than k")
        control.legend(fontsize=9)

    facts = "; ".join(
        f"{titles.get(n.way, n.way)}, k {n.at['k']}: {n.value:.3f} bits" for n in store.select("context", "tail_excess")
    )
    return figure(
        "context", "Loss by position and use of context", f"Extra loss without distant context: {facts}.", draw, 2
    )


_SCHEDULES = (("ring", "contiguous"), ("ring", "zigzag"), ("balanced", "contiguous"))


def schedules(store: Store) -> str | None:
    """Draws what each device computes at each step: a square's area is its visible pairs, its colour marks helpers."""
    shown = [
        n
        for strategy, layout in _SCHEDULES
        for n in store.select("sequence", "idle", strategy=strategy, layout=layout)[:1]
    ]
    if not shown:
        return None

    most = max(max(n.samples) for n in shown)

    def panel(ax: Any, idle: Number) -> None:
        P = idle.at["P"]
        lent = store.one("sequence", "lent", "", **idle.at)
        helps = lent.samples if lent else (0.0,) * len(idle.samples)
        steps = len(idle.samples) // P
        for i, (pairs, helped) in enumerate(zip(idle.samples, helps, strict=True)):
            step, device = divmod(i, P)
            side = 0.86 * (pairs / most) ** 0.5
            colour = SERIES[1] if helped else SERIES[0]
            ax.add_patch(Rectangle((device - side / 2, step - side / 2), side, side, color=colour, linewidth=0))
            ax.add_patch(Rectangle((device - 0.43, step - 0.43), 0.86, 0.86, fill=False, edgecolor=GRID))
        ax.set_xlim(-0.6, P - 0.4)
        ax.set_ylim(P - 0.4, -0.6)  # steps run downwards, on the same scale in all panels
        ax.set_aspect("equal")
        ax.grid(False)
        ax.xaxis.set_major_locator(FixedLocator(list(range(0, P, max(1, P // 8)))))
        ax.yaxis.set_major_locator(FixedLocator(list(range(0, steps, max(1, P // 8)))))
        ax.set_xlabel("device")
        ax.set_ylabel("step")
        ax.set_title(f"{idle.at['strategy']}, {idle.at['layout']}: {idle.value:.1%} idle")

    def draw(*axes: Any) -> None:
        for ax, idle in zip(axes, shown, strict=True):
            panel(ax, idle)

    facts = "; ".join(f"{n.at['strategy']}, {n.at['layout']}: {n.value:.1%} idle" for n in shown)
    text = f"Steps by devices: a square's area is its visible pairs, the second colour marks helpers. {facts}."
    return figure("sequence", "What each device computes at each step", text, draw, len(shown), 3.7)
