"""Draws docs/images/cost.png from study.jsonl: time and scratch memory of one layer against its length.

    python experiments/2026-11-study_quick/picture.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NUMBERS = [n for n in map(json.loads, (HERE / "study.jsonl").read_text().splitlines()) if n["kind"] == "number"]
GREY, BLUE, ORANGE = "#59626f", "#1f5aa6", "#c84e1f"


def numbers(quantity: str, way: str, **at: str) -> list[dict]:
    found = [n for n in NUMBERS if n["quantity"] == quantity and n["way"] == way and at.items() <= n["at"].items()]
    return sorted(found, key=lambda n: n["at"].get("T", 0))


def lines(ax, quantity: str, scale: float, ways: dict[str, tuple[str, str, str]]) -> None:
    for way, (label, color, marker) in ways.items():
        found = numbers(quantity, way)
        T = [n["at"]["T"] for n in found]
        ax.plot(T, [n["value"] * scale for n in found], marker=marker, color=color, label=label)
        if found[0]["low"] is not None:
            low, high = ([n[edge] * scale for n in found] for edge in ("low", "high"))
            ax.fill_between(T, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([1024, 2048, 4096, 8192], ["1k", "2k", "4k", "8k"])
    ax.set_xlabel("tokens T")
    ax.grid(alpha=0.25)


plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
figure, (time, memory) = plt.subplots(1, 2, figsize=(9.5, 4), constrained_layout=True)

DENSE, BLOCKWISE = ("exact, dense", GREY, "s"), ("exact, blockwise", BLUE, "o")
lines(time, "seconds_forward_backward", 1e3, {
    "dense": DENSE, "exact": BLOCKWISE, "window_256": ("window of 256", ORANGE, "D"),
})  # fmt: skip
time.set_title("Time of one layer (measured)", loc="left")
time.set_ylabel("ms, forward and backward")

lines(memory, "scratch_forward_backward", 2**-20, {"dense": DENSE, "exact": BLOCKWISE})
memory.set_title("Scratch memory of one layer (compiled)", loc="left")
memory.set_ylabel("MiB, forward and backward")
memory.text(4000, 18, "a window of 256\ntakes as much", color=ORANGE)

figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
out = HERE.parents[1] / "docs" / "images" / "cost.png"
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=130)
