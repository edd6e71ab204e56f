"""`longattn study`: runs each part, resumable and within its budget, then writes the page."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from longattn import mask
from longattn.config.checks import folder_name, typed, usable_path
from longattn.environment import environment
from longattn.files import json_text, locked, read_object, write_whole
from longattn.study import context, cost, memory, pod, recall, report, sequence
from longattn.study.presets import PRESETS, Preset
from longattn.study.store import FILE, Number, Store
from longattn.study.units import Clock, Unit


@dataclass(frozen=True)
class StudyOptions:
    """Measures what each way to attend costs and remembers, side by side; writes DIR/NAME/index.html."""

    preset: Literal["quick", "full", "smoke"] = (
        "quick"  # quick: ten minutes on two cores; full: an accelerator, or a night
    )
    name: str = ""  # folder under `dir`; "": study_PRESET. An interrupted study continues there
    dir: str = "runs"  # parent of the study's folder
    parts: tuple[Literal["cost", "memory", "recall", "context", "sequence", "pod"], ...] = (
        "cost",
        "memory",
        "recall",
        "context",
        "sequence",
        "pod",
    )
    recorded: str = ""  # folder with earlier studies of the same plan to show beside this one; "": none
    compare: tuple[str, str] | None = None  # two study folders: compare them on one page, measure nothing
    json: bool = False  # print one JSON document instead of the summary

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "dir", "recorded")
        if self.name:
            folder_name(self, "name")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts={' '.join(self.parts)!r} must name at least one part, each once")

    @property
    def folder(self) -> Path:
        return Path(self.dir) / (self.name or f"study_{self.preset}")


@dataclass(frozen=True)
class Part:
    """A part of the study."""

    name: str
    title: str
    units: Callable[[Any, Store], list[Unit]]  # (plan, what is stored) -> units of work, most important first


PARTS = (
    Part("cost", "cost against length", cost.units),
    Part("memory", "memory of a training step", memory.units),
    Part("recall", "recall: MQAR and needle", recall.units),
    Part("context", "text: is context used", context.units),
    Part("sequence", "over devices along the sequence", sequence.units),
    Part("pod", "on a pod: what fits", pod.units),
)


def run(options: StudyOptions) -> Path:
    """Measures what is missing, writes the page and prints the summary; returns the page's path.

    Raises ValueError if the folder holds a study of another preset, or another process works in it.
    """
    if options.compare:
        return compare(*options.compare, dir=options.dir, as_json=options.json)
    console = Console(stderr=True)
    with _claim(options) as store:
        here = store.environment(_environment(options))
        for part in PARTS:
            if part.name in options.parts:
                run_part(part, PRESETS[options.preset], store, here, console)
    study = report.load(options.folder, recorded=options.recorded)
    page = options.folder / "index.html"
    write_whole(page, report.page(study))
    if options.json:
        print(json_text(report.document(study)))
    else:
        report.summary(study, Console(highlight=False), page)
    return page


def compare(run_a: str, run_b: str, dir: str = "runs", as_json: bool = False) -> Path:
    """Writes one page about two studies, DIR/compare_A_B/index.html, and returns its path.

    Prints a summary, or one JSON document.
    """
    a, b = report.load(Path(run_a)), report.load(Path(run_b))
    if a.name == b.name:  # same folder name under different parents
        a, b = (dataclasses.replace(s, name=f"{s.name}_{i}") for i, s in enumerate((a, b), start=1))
    page = Path(dir) / f"compare_{a.name}_{b.name}" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, report.compare_page(a, b))
    if as_json:
        print(json_text(report.compare_document(a, b)))
    else:
        report.compare_summary(a, b, Console(highlight=False), page)
    return page


def run_part(part: Part, preset: Preset, store: Store, here: str, console: Console) -> None:
    """Runs the units of a part that are not stored yet, until its budget is spent; stores which it skipped."""
    if part.name in store.parts:
        console.print(f"[dim]{part.title}: done before, {store.parts[part.name]['seconds']:.0f} s[/]")
        return
    plan = getattr(preset, part.name)
    spent = sum(u["seconds"] for u in store.units.values() if u["part"] == part.name)
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("[dim]{task.fields[now]}"), console=console) as progress:
        start, skipped = time.monotonic() - spent, []
        units = part.units(plan, store)
        bar = progress.add_task(part.title, total=sum(u.weight for u in units), now="")
        done = 0.0
        for i, unit in enumerate(units):
            progress.update(bar, completed=done, now=unit.key)
            left = plan.seconds - (time.monotonic() - start)
            if unit.key in store.units:
                pass
            elif left <= 0 and not unit.always:
                skipped.append(unit.key)
            else:
                share = unit.weight / sum(u.weight for u in units[i:])
                clock = Clock(
                    max(0.0, left) * min(1.0, 1.5 * share),
                    lambda f, w=unit.weight, d=done: progress.update(bar, completed=d + f * w),
                )
                began = time.monotonic()
                numbers = [_stamp(n, here, part.name) for n in unit.work(clock)]
                store.unit(unit.key, numbers, part=part.name, seconds=time.monotonic() - began)
            done += unit.weight
        progress.update(bar, completed=done, now=f"{len(skipped)} skipped: budget spent" if skipped else "")
        store.part(part.name, seconds=time.monotonic() - start, skipped=skipped)


def _stamp(number: Number, here: str, part: str) -> Number:
    return dataclasses.replace(number, environment=here, part=part)


@contextlib.contextmanager
def _claim(options: StudyOptions) -> Iterator[Store]:
    """Locks the study's folder for this process and yields its store. study.json records the plan it follows."""
    folder, plan = options.folder, _plain(PRESETS[options.preset])
    about = folder / "study.json"

    def insist_on_plan() -> None:
        saved = read_object(about, "choose another --name", preset=str, plan=dict) if about.exists() else None
        if saved and saved["plan"] != plan:
            raise ValueError(
                f"{folder} holds a study of preset {saved['preset']} or of another version; choose another --name"
            )

    insist_on_plan()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"another process works in {folder}; stop it or choose another --name"):
        insist_on_plan()  # another process may have begun a study here since, and ended
        if not about.exists():
            write_whole(about, json_text({"preset": options.preset, "plan": plan}, indent=1) + "\n")
        store = Store(folder / FILE)
        store.trim()
        yield store


def _plain(value: Any) -> Any:
    """Turns a plan into JSON values; a mask becomes its expression."""
    if dataclasses.is_dataclass(value) and not isinstance(value, mask.Mask):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, mask.Mask) else value


def _environment(options: StudyOptions) -> dict[str, Any]:
    command = f"longattn study --preset {options.preset} --name {options.folder.name}"
    return {**environment(), "command": command, "x64": jax.config.jax_enable_x64}
