"""The numbers of a study: one JSON object per line, appended unit by unit, so that an interrupted study goes on where
it stopped.

Lines of four kinds:

    {"kind": "environment", "id": ...}   device, versions, commit and command of one start; numbers refer to it
    {"kind": "number", "unit_of_work": ..., "part": ..., "quantity": ..., "way": ..., "at": {...}, "value": ..., ...}
    {"kind": "unit", "key": ...}         a unit of work is whole: its numbers stand above
    {"kind": "part", "part": ...}        a part is done

Numbers of a unit that never became whole (the process was killed while it wrote) are dropped on the next start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

VERSION = 1
FILE = "study.jsonl"

Badge = Literal["measured", "compiled", "predicted", "recorded"]
BADGES: dict[str, str] = {
    "measured": "measured here: timed or trained on this device",
    "compiled": "read off a program compiled here, not run",
    "predicted": "computed from formulas, fits or published figures",
    "recorded": "measured earlier, on the device named; kept in experiments/",
}


@dataclass(frozen=True)
class Number:
    """One number and where it comes from. `low` and `high` bound its 95% interval where it has one."""

    part: str
    quantity: str  # what it is, such as "seconds_forward"
    way: str  # the way to attend, "" where the number belongs to none
    value: float
    unit: str
    badge: Badge
    at: dict[str, Any] = field(default_factory=dict)  # what tells it from its siblings: T, chip, remat, ...
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()  # what the value summarises: single timings, single seeds
    seeds: tuple[int, ...] = ()
    note: str = ""
    environment: str = ""  # id of the start that made it
    command: str = ""  # remakes it

    @property
    def cut_short(self) -> bool:
        """Whether its training was stopped by the budget."""
        return self.note.startswith("stopped")

    @property
    def key(self) -> str:
        """The number's name, unique in its study."""
        return "/".join([self.part, self.quantity, self.way or "-", *(f"{k}={v}" for k, v in self.at.items())])


class Store:
    """Reads and appends the lines of one study. Use one at a time for writing."""

    def __init__(self, path: Path):
        self.path = path
        self.numbers: dict[str, Number] = {}
        self.environments: dict[str, dict[str, Any]] = {}
        self.units: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        lines = list(_lines(self.path))
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
                number = Number(**{**line, "seeds": tuple(line["seeds"]), "samples": tuple(line["samples"])})
                self.numbers[number.key] = number
            elif kind == "unit":
                self.units[line["key"]] = line
            elif kind == "part":
                self.parts[line["part"]] = line

    def trim(self) -> None:
        """Rewrite the file without a torn line or the numbers of units that are not whole."""
        if not self.path.exists():
            return
        lines = list(_lines(self.path))
        whole = {line["key"] for line in lines if line["kind"] == "unit"}
        kept = [line for line in lines if line["kind"] != "number" or line["unit_of_work"] in whole]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, self.path)

    def environment(self, environment: dict[str, Any]) -> str:
        """Note a start of the study; gives the id that its numbers carry."""
        name = f"e{len(self.environments)}"
        self.environments[name] = {"id": name, "version": VERSION, **environment}
        self._append([{"kind": "environment", **self.environments[name]}])
        return name

    def unit(self, key: str, numbers: Iterable[Number], **facts: Any) -> None:
        """Append a unit of work and its numbers; they are on disk when this returns."""
        numbers = list(numbers)
        rows = [{"kind": "number", "unit_of_work": key, **_plain(n)} for n in numbers]
        self._append([*rows, {"kind": "unit", "key": key, **facts}])
        self.units[key] = {"key": key, **facts}
        for n in numbers:
            if n.key in self.numbers:
                raise ValueError(f"{n.key} is already in {self.path}")
            self.numbers[n.key] = n

    def part(self, part: str, **facts: Any) -> None:
        """Note that a part is done."""
        self._append([{"kind": "part", "part": part, **facts}])
        self.parts[part] = {"part": part, **facts}

    def select(self, part: str, quantity: str, way: str | None = None, **at: Any) -> list[Number]:
        """The numbers of a part and quantity, optionally of one way and with these labels, in the order they were
        made.
        """
        return [
            n
            for n in self.numbers.values()
            if n.part == part
            and n.quantity == quantity
            and (way is None or n.way == way)
            and all(n.at.get(k) == v for k, v in at.items())
        ]

    def one(self, part: str, quantity: str, way: str, **at: Any) -> Number | None:
        """The only number of that description, or None."""
        found = self.select(part, quantity, way, **at)
        return found[0] if len(found) == 1 else None

    def _append(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def family(way: str) -> str:
    """What a way is called whatever its size: "window" for "window_64"."""
    return way.split("_")[0]


def _plain(number: Number) -> dict[str, Any]:
    return {"key": number.key, **vars(number)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a torn last line is left out, any other is an error."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if i == len(lines) - 1:
                return
            raise ValueError(f"{path}, line {i + 1} is no JSON; move the file away and start again") from error
