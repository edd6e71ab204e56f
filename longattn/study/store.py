"""Stores the numbers of a study: one JSON object per line, appended unit by unit, so that a study can be resumed.

There are four kinds of lines:

    {"kind": "environment", "id": ...}   device, versions, commit and command of one start; numbers refer to it
    {"kind": "number", "unit_of_work": ..., "part": ..., "quantity": ..., "way": ..., "at": {...}, "value": ..., ...}
    {"kind": "unit", "key": ...}         a unit of work is complete: its numbers are above
    {"kind": "part", "part": ...}        a part is done

The next start drops the numbers of a unit that was never completed (the process was killed while writing).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longattn.files import json_object, json_text, read_text, write_whole

VERSION = 1
FILE = "study.jsonl"
_REMEDY = "move the file away and start again"

STOPPED = "stopped by its budget"  # opens the note of a training that was cut short
UNSTEADY = "ran at two speeds"  # opens the note of a timing whose samples fall into two groups

Badge = Literal["measured", "compiled", "predicted", "recorded"]
BADGES: dict[str, str] = {
    "measured": "measured here: timed or trained on this device",
    "compiled": "read off a program compiled here, not run",
    "predicted": "computed from formulas or published figures",
    "recorded": "measured or compiled earlier, as its provenance says",
}


@dataclass(frozen=True)
class Number:
    """One number and its provenance. `low` and `high` bound its 95% interval, if it has one."""

    part: str
    quantity: str  # such as "seconds_forward"
    way: str  # name of the way to attend; "" if the number belongs to none
    value: float
    unit: str
    badge: Badge
    at: dict[str, Any] = field(default_factory=dict)  # labels: T, chip, remat, ...
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()  # the timings or seeds that `value` summarises
    seeds: tuple[int, ...] = ()
    note: str = ""
    environment: str = ""  # id of the start that made it
    command: str = ""  # command that remakes it

    @property
    def refused(self) -> str:
        """Why figures and sentences leave it out: "cut short" by the budget, or "two speeds"; "" if they do not."""
        return "cut short" if self.note.startswith(STOPPED) else "two speeds" if self.note.startswith(UNSTEADY) else ""

    @property
    def key(self) -> str:
        """The number's name, unique in its study."""
        return "/".join([self.part, self.quantity, self.way or "-", *(f"{k}={v}" for k, v in self.at.items())])


class Store:
    """Reads and appends the lines of one study. Only one process may write."""

    def __init__(self, path: Path):
        self.path = path
        self.numbers: dict[str, Number] = {}
        self.environments: dict[str, dict[str, Any]] = {}
        self.units: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        try:
            self._sort(list(_lines(self.path)))
        except (KeyError, TypeError) as error:  # a field is missing, unknown, or of another type
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path} is damaged: a line lacks what it must hold ({reason}); {_REMEDY}") from error

    def _sort(self, lines: list[dict[str, Any]]) -> None:
        whole = {line["key"] for line in lines if line["kind"] == "unit"}
        for line in lines:
            kind = line.pop("kind")
            if kind == "environment":
                if line["version"] != VERSION:
                    raise ValueError(
                        f"{self.path} has version {line['version']}, this is {VERSION}; choose another --name"
                    )
                self.environments[line["id"]] = line
            elif kind == "number" and line.pop("unit_of_work") in whole:
                line.pop("key")
                value, *samples = (math.nan if x is None else x for x in (line["value"], *line["samples"]))
                number = Number(**{**line, "value": value, "seeds": tuple(line["seeds"]), "samples": tuple(samples)})
                self.numbers[number.key] = number
            elif kind == "unit":
                self.units[line["key"]] = line
            elif kind == "part":
                self.parts[line["part"]] = line

    def trim(self) -> None:
        """Rewrites the file without a torn line and without the numbers of incomplete units."""
        if not self.path.exists():
            return
        lines = list(_lines(self.path))
        whole = {line["key"] for line in lines if line["kind"] == "unit"}
        kept = [line for line in lines if line["kind"] != "number" or line["unit_of_work"] in whole]
        write_whole(self.path, "".join(json_text(line) + "\n" for line in kept))

    def environment(self, environment: dict[str, Any]) -> str:
        """Notes a start of the study; returns the id for its numbers."""
        name = f"e{len(self.environments)}"
        self.environments[name] = {"id": name, "version": VERSION, **environment}
        self._append([{"kind": "environment", **self.environments[name]}])
        return name

    def unit(self, key: str, numbers: Iterable[Number], **facts: Any) -> None:
        """Appends a unit of work and its numbers; they are on disk when this returns."""
        numbers = list(numbers)
        rows = [{"kind": "number", "unit_of_work": key, **_plain(n)} for n in numbers]
        self._append([*rows, {"kind": "unit", "key": key, **facts}])
        self.units[key] = {"key": key, **facts}
        for n in numbers:
            if n.key in self.numbers:
                raise ValueError(f"{n.key} is already in {self.path}")
            self.numbers[n.key] = n

    def part(self, part: str, **facts: Any) -> None:
        """Notes that a part is done."""
        self._append([{"kind": "part", "part": part, **facts}])
        self.parts[part] = {"part": part, **facts}

    def select(self, part: str, quantity: str, way: str | None = None, **at: Any) -> list[Number]:
        """Returns the numbers of a part and quantity, optionally of one way and with these labels, oldest first."""
        return [
            n
            for n in self.numbers.values()
            if n.part == part
            and n.quantity == quantity
            and (way is None or n.way == way)
            and all(n.at.get(k) == v for k, v in at.items())
        ]

    def one(self, part: str, quantity: str, way: str, **at: Any) -> Number | None:
        """Returns the only number with these labels, or None if there is none or several."""
        found = self.select(part, quantity, way, **at)
        return found[0] if len(found) == 1 else None

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json_text(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def family(way: str) -> str:
    """Returns a way's name without its size: "window" for "window_64"."""
    return way.split("_")[0]


def _plain(number: Number) -> dict[str, Any]:
    return {"key": number.key, **vars(number)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file. Skips a torn last line; any other torn line is an error."""
    if not path.exists():
        return
    lines = read_text(path, _REMEDY).splitlines()
    for i, line in enumerate(lines):
        try:
            yield json_object(line, f"{path}, line {i + 1}", _REMEDY, kind=str)
        except ValueError:
            if i < len(lines) - 1:
                raise
