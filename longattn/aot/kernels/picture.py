"""Draws how full a kernel's units are along its schedule: a panel per kernel, a row per unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

_ROWS = ("MXU", "XLU", "VALU", "EUP", "load", "store", "fill", "spill")
_INK, _FRAME = "#22262b", "#c9ced6"
_REGIONS = ("#dbe7f3", "#f6e3cf")  # alternating, so that neighbours differ
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "longattn",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _FRAME,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "savefig.dpi": 150,
}
_NARROWEST = 0.004  # share of the cycles below which a stretch is not marked


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the kernels of these rows into a .png, .svg or .pdf. Raises ValueError if no row has a schedule."""
    panels = [(row, kernel) for row in rows for kernel in row.get("kernels", ())]
    if not panels:
        raise ValueError(f"{path} would be empty: no case has a schedule; without a plot, the table says why")
    with matplotlib.rc_context(_STYLE):
        fig, axes = plt.subplots(
            2 * len(panels), 1, figsize=(11, 2.75 * len(panels) + 0.6), layout="constrained", squeeze=False,
            height_ratios=[0.22, 1] * len(panels),
        )  # fmt: skip
        try:
            for i, (row, kernel) in enumerate(panels):
                image = _panel(axes[2 * i, 0], axes[2 * i + 1, 0], row, kernel)
            axes[-1, 0].set_xlabel("M cycles in the order of the program: a bundle is as wide as the times it runs")
            bar = fig.colorbar(image, ax=axes[:, 0].tolist(), shrink=min(1.0, 2 / len(panels)), aspect=30, pad=0.055)
            bar.set_label("slots filled (compiled, not run)")
            bar.ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            bar.outline.set_visible(False)
            path.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        finally:
            plt.close(fig)


def _panel(strip: Any, heat: Any, row: Mapping[str, Any], kernel: Mapping[str, Any]) -> Any:
    along, cycles = kernel["along"], kernel["cycles"]
    blocks = " x ".join(str(row[name]) for name in ("bT", "bS"))
    strip.set_title(
        f"{row['case']} on {row['chip']}, {kernel['name']}: {cycles / 1e6:.3f} M cycles; T {row['T']}, H {row['H']}, "
        f"D {row['D']}, {row['mask']}, blocks {blocks}"
    )
    scale = cycles / along["spans"][-1]["to"] / 1e6
    _regions(strip, heat, along["spans"], scale)

    shares = np.array([along["slots"][name] for name in _ROWS])
    image = heat.imshow(
        shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0, cycles / 1e6, len(_ROWS) - 0.5, -0.5),
    )  # fmt: skip
    heat.set_yticks(range(len(_ROWS)), _ROWS)
    heat.tick_params(length=0, axis="y")
    heat.hlines(np.arange(len(_ROWS) - 1) + 0.5, 0, cycles / 1e6, color="white", linewidth=1.2)
    for i, share in enumerate(shares.mean(1)):
        heat.annotate(f"{share:.0%}", (1, i), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    for side in heat.spines.values():
        side.set_visible(False)
    return image


def _regions(strip: Any, heat: Any, spans: Sequence[Mapping[str, Any]], scale: float) -> None:
    """Marks, above the units, the part of the source that each stretch belongs to."""
    whole = spans[-1]["to"]
    strip.set_xlim(0, whole * scale)
    strip.set_ylim(0, 1)
    strip.axis("off")
    strip.sharex(heat)
    wide = [span for span in spans if span["to"] - span["from"] > _NARROWEST * whole]
    for i, span in enumerate(wide):
        start, width = span["from"] * scale, (span["to"] - span["from"]) * scale
        strip.broken_barh([(start, width)], (0, 1), facecolor=_REGIONS[i % 2], edgecolor="white", linewidth=1)
        if span["from"]:
            heat.axvline(start, color=_INK, linewidth=0.6, linestyle=(0, (2, 2)), zorder=3)
        share = width / scale / whole
        text = f"{span['what']}\n{span['bundles']:,} bundles x {span['runs']:,.0f}: {share:.0%}"
        if share < 0.16:
            text = f"{span['what']}\n{share:.0%}" if share > 0.07 else ""
        strip.text(start + width / 2, 0.46, text, ha="center", va="center", fontsize=7.5, clip_on=True)
