"""Loads a study's numbers, and the recorded ones to show beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from longattn import terminal
from longattn.files import read_object
from longattn.models import MIXERS
from longattn.study.store import FILE, Number, Store

Cell = Number | str | None


@dataclass(frozen=True)
class Study:
    """One study's numbers, and the recorded ones to show beside it."""

    name: str
    preset: str
    store: Store
    recorded: tuple[Study, ...] = ()

    @property
    def titles(self) -> dict[str, str]:
        """The title of each way."""
        names = {n.way: "" for n in self.store.numbers.values() if n.way}
        return {name: way_title(name) for name in names}

    @property
    def main(self) -> list[str]:
        """The ways that were timed or trained in this study."""
        quantities = ("seconds_forward_backward", "accuracy")
        found = {n.way for n in self.store.numbers.values() if n.quantity in quantities}
        return [way for way in self.titles if way in found]

    @property
    def label(self) -> str:
        """The legend's text for a recorded study: its device."""
        return f"recorded, {device(self.store)}"


@dataclass(frozen=True)
class Table:
    """A table of words and numbers; a None is an empty cell."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def way_title(way: str) -> str:
    """Returns a way's title."""
    name, _, size = way.partition("_")
    known = {name.lower(): name for name in MIXERS}
    known |= {"exact": "exact, blockwise", "dense": "exact, dense", "window": f"window {size}".strip()}
    return known.get(name, way.replace("_", " "))


def device(store: Store) -> str:
    """Describes the device of the study's newest start."""
    if not store.environments:
        return "unknown device"
    e = list(store.environments.values())[-1]
    d = e["device"]
    return (
        f"{e['host']['cpu']}, {e['host']['cores']} cores" if d["platform"] == "cpu" else f"{d['count']} x {d['kind']}"
    )


def load(folder: Path, recorded: str = "") -> Study:
    """Loads a study's folder, and the studies under `recorded` whose parts followed the same plans.

    Raises ValueError if `folder` holds no study.
    """
    about = folder / "study.json"
    if not about.is_file() or not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} is no study: it has no study.json and {FILE}; give a folder that `longattn study` wrote"
        )
    saved, studies = read_object(about, "give another folder", preset=str, plan=dict), []
    for path in sorted(Path(recorded).glob(f"*/{FILE}")) if recorded else []:
        if path.parent.resolve() == folder.resolve():
            continue
        try:
            old = load(path.parent)
        except ValueError as error:  # a broken recorded study must not cost this one its page
            terminal.say(f"longattn: left out a recorded study: {error}")
            continue
        plan = read_object(path.parent / "study.json", "give another folder", plan=dict)["plan"]
        parts = {n.part for n in old.store.numbers.values()}
        same = {part for part in parts if plan.get(part) == saved["plan"].get(part)}
        if parts - same:
            names = ", ".join(sorted(parts - same))
            terminal.say(f"longattn: left out of the recorded study {path.parent}: {names}, measured by another plan")
        if same:
            studies.append(dataclasses.replace(old, store=_as_recorded(old.store, same)))
    return Study(folder.name, saved["preset"], Store(folder / FILE), tuple(studies))


def _as_recorded(store: Store, parts: set[str]) -> Store:
    """Returns a recorded study's numbers of some parts, those that were measured marked as recorded."""
    store.numbers = {
        key: dataclasses.replace(n, badge="recorded") if n.badge == "measured" else n
        for key, n in store.numbers.items()
        if n.part in parts
    }
    return store
