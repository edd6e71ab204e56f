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


def colour(way: str, ways: Sequence[str]) -> tuple[str, str]:
    """Returns the colour and marker of a way, the same in every figure of the study: `ways` are all of its ways."""
    kinds = (["exact"], [w for w in ways if family(w) == "window"], ["dense"], ways)
    i = list(dict.fromkeys(w for kind in kinds for w in kind)).index(way)
    return SERIES[i % len(SERIES)], MARKERS[(i + i // len(SERIES)) % len(MARKERS)]


def ways_of(numbers: Sequence[Number]) -> list[str]:
    return list(dict.fromkeys(n.way for n in numbers if n.way))


def figure(
    name: str, title: str, description: str, draw: Callable[..., None], columns: int, height: float = 3.6
) -> str:
    """Returns an SVG of `columns` panels, drawn by `draw(*axes)`, with title and description for screen readers.

    The legend stands below the axes, with one entry per label.
    """
    with matplotlib.rc_context(_STYLE):
        fig, axes = plt.subplots(1, columns, figsize=(9.6, height), layout="constrained", squeeze=False)
        try:
            draw(*axes[0])
            entries = {}
            for ax in axes[0]:
                entries |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            if entries:
                columns = 4 if max(map(len, entries)) < 24 else 3
                fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9)
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
    points = [n for n in store.select("recall", "accuracy") if not n.refused]
    tasks = list(dict.fromkeys(n.at["task"] for n in points))
    if not tasks:
        return None

    def draw(*axes: Any) -> None:
        for ax, task in zip(axes, tasks, strict=True):
            _recall_panel(ax, task, store, titles, recorded)

    facts = "; ".join(f"{titles.get(n.way, n.way)} on {n.at['task']} {n.value:.3f}" for n in points)
    return figure(
        "recall", "Recall against bytes read per token", f"Share of right answers: {facts}.", draw, len(tasks), 4
    )


def _recall_panel(ax: Any, task: str, store: Store, titles: dict[str, str], recorded: Recorded) -> None:
    """Draws a task's hardest setting, which is the first."""
    xs: list[float] = []
    hardest = next(n.at for n in store.select("recall", "accuracy", task=task))
    for label, source in [("", store), *recorded]:
        for n in source.select("recall", "accuracy", **hardest):
            read = source.one("recall", "bytes_read", n.way, **n.at)
            if read is None or n.refused:
                continue
            xs.append(read.value)
            c, m = colour(n.way, [*titles, n.way])
            text = titles.get(n.way, n.way) + (f" ({label})" if label else "")
            marks: dict[str, Any] = {"markerfacecolor": "none", "alpha": 0.6} if label else {}
            ax.errorbar(
                read.value, n.value, yerr=_bars(n), fmt=m, color=c, ecolor=c, capsize=4, zorder=3, markersize=9,
                label=text, **marks,
            )  # fmt: skip
    for quantity, text, line in (
        ("guess", "knows the values, not their keys", (0, (1, 4))),
        ("chance", "chance", ":"),
    ):
        for value in {n.value for n in store.select("recall", quantity, **hardest)}:
            ax.axhline(value, color=INK, linestyle=line, linewidth=1.2, label=text)
    ax.set_xscale("log", base=2)
    powers(ax.xaxis, [2.0**i for i in range(int(min(xs)).bit_length() - 1, int(max(xs)).bit_length() + 1)], short)
    ax.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
    ax.set_ylim(-0.03, 1.08)
    ax.set_xlabel("bytes of state read per token and layer")
    ax.set_ylabel("share of answers right")
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
    numbers = [n for n in store.select(part, quantity, **at) if not n.refused]
    for way in ways_of(numbers):
        mine = sorted((n for n in numbers if n.way == way), key=lambda n: n.at[x])
        c, m = colour(way, [*titles, way])
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
    """Draws time, scratch memory and, if it was measured, throughput against T."""
    times = store.select("cost", "seconds_forward_backward")
    if not times:
        return None
    panels = [
        ("seconds_forward_backward", 1e3, "ms", "Time, forward + backward"),
        ("scratch_forward_backward", 2**-20, "MiB", "Scratch memory"),
        ("tokens_per_second", 1e-3, "thousand tokens/s", "Throughput at a fixed batch"),
    ]
    panels = [panel for panel in panels if store.select("cost", panel[0])]

    def draw(*axes: Any) -> None:
        for ax, (quantity, scale, unit, title) in zip(axes, panels, strict=True):
            shown = store.select("cost", quantity)
            _lines(ax, store, "cost", quantity, titles, scale)
            for label, source in recorded:
                _lines(ax, source, "cost", quantity, titles, scale, dashed=label)
                shown = shown + source.select("cost", quantity)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{float(v):g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            _lengths(ax, shown, unit, title)

    facts = "; ".join(f"{titles.get(n.way, n.way)} at {n.at['T']}: {n.value * 1e3:.3g} ms" for n in times)
    return figure("cost", "Cost of attention against length", f"Forward and backward: {facts}.", draw, len(panels), 3.9)


def share(store: Store, titles: dict[str, str]) -> str | None:
    """Draws attention's share of a model's FLOPs against T."""
    shares = store.select("cost", "attention_share")
    if not shares:
        return None

    def draw(ax: Any, flops: Any) -> None:
        _lines(ax, store, "cost", "attention_share", titles, 100)
        _lengths(ax, shares, "% of the model's FLOPs", "Attention's share of a 7-billion-parameter model")
        ax.set_ylim(0, 100)
        _lines(flops, store, "cost", "flops_forward", titles, 1e-9)
        flops.set_yscale("log")
        _lengths(flops, store.select("cost", "flops_forward"), "GFLOP", "FLOPs of the timed attention, forward")

    facts = "; ".join(f"{titles.get(n.way, n.way)} at {n.at['T']}: {n.value:.1%}" for n in shares)
    return figure("share", "Attention's share of the FLOPs", facts + ".", draw, 2)


def memory(store: Store, titles: dict[str, str], ways: Sequence[str]) -> str | None:
    """Draws the bytes of a training step on a chip against T, by formula, and the chip's memory.

    There is a panel per remat policy, and a line for each of `ways`.
    """
    numbers = [n for n in store.select("memory", "step_bytes") if n.way in ways]
    if not numbers:
        return None
    chip = numbers[0].at["chip"]
    remats = list(dict.fromkeys(n.at["remat"] for n in numbers))
    held = {n.at["chip"]: n.value / 2**30 for n in store.select("memory", "chip_bytes")}

    def draw(*axes: Any) -> None:
        for ax, remat in zip(axes, remats, strict=True):
            for way in ways_of(numbers):
                c, m = colour(way, list(titles))
                mine = [n for n in numbers if (n.way, n.at["remat"]) == (way, remat)]
                if mine:
                    label = titles.get(way, way)
                    ax.plot([n.at["T"] for n in mine], [n.value / 2**30 for n in mine], m + "-", color=c, label=label)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{float(v):g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            if chip in held:
                ax.axhline(held[chip], color=INK, linestyle=":", linewidth=1, label=f"memory of a {chip}")
            _lengths(ax, [n for n in numbers if n.at["remat"] == remat], "GiB", f"remat: {remat}")

    facts = "; ".join(
        f"{titles.get(n.way, n.way)}, remat {n.at['remat']}, T {n.at['T']}: {n.value / 2**30:.2f} GiB" for n in numbers
    )
    return figure("memory", f"Memory of a training step on a {chip} against length", facts + ".", draw, len(remats))


def context(store: Store, titles: dict[str, str]) -> str | None:
    """Draws the loss by position at each context length, and the cost of replacing distant context if it is known."""
    at = [n for n in store.select("context", "bits_at") if not n.refused]
    if not at:
        return None
    first = ways_of(at)[0]
    excess = [n for n in store.select("context", "tail_excess") if not n.refused]

    def position(ax: Any) -> None:
        for i, T in enumerate(sorted({n.at["T"] for n in at if n.way == first})):
            mine = [n for n in at if n.way == first and n.at["T"] == T]
            label = f"T = {T:,}" + ", recorded" * (mine[0].badge == "recorded")
            xs, ys = [n.at["to"] for n in mine], [n.value for n in mine]
            ax.plot(xs, ys, marker=MARKERS[i], color=SERIES[i + 3], label=label)
        ax.set_xscale("log", base=2)
        powers(ax.xaxis, [n.at["to"] for n in at if n.way == first and n.at["to"] in (1, 4, 16, 64, 256, 1024, 4096)],
               short)  # fmt: skip
        ax.set_ylim(bottom=0)
        ax.set_xlabel("bytes of the row read so far")
        ax.set_ylabel("bits per byte")
        ax.set_title(f"Loss by position ({titles.get(first, first)})")

    def control(ax: Any) -> None:
        for way in ways_of(excess):
            mine = [n for n in excess if n.way == way]
            c, m = colour(way, list(titles))
            xs = [max(n.at["k"], 2) for n in mine]  # k = 0 does not exist on a logarithmic axis
            bars = [[0.0 if end is None else abs(end - n.value) for n, end in ends]
                    for ends in ([(n, n.low) for n in mine], [(n, n.high) for n in mine])]  # fmt: skip
            label = titles.get(way, way)
            ax.errorbar(xs, [n.value for n in mine], yerr=bars, marker=m, color=c, capsize=3, label=label)
        ax.axhline(0, color=INK, linestyle=":", linewidth=1)
        ax.set_xscale("log", base=2)
        powers(ax.xaxis, [max(n.at["k"], 2) for n in excess], lambda v: "0" if v == 2 else short(v))
        ax.set_xlabel("k: bytes before the tail that stay its own")
        ax.set_ylabel("extra bits per byte")
        ax.set_title("Cost of replacing what is further back than k")

    def draw(*axes: Any) -> None:
        for ax, panel in zip(axes, (position, control), strict=False):
            panel(ax)

    facts = "; ".join(f"bytes {n.at['from']} to {n.at['to']} at T {n.at['T']}: {n.value:.3f} bits" for n in at)
    return figure("context", "Loss by position, and use of context", f"{facts}.", draw, 2 if excess else 1)


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
