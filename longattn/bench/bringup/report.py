"""The report of a bring-up. It is on disk after every step, and it ends the process when the device hangs."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from longattn import cache
from longattn.bench.bringup import show
from longattn.environment import environment
from longattn.files import json_text, write_whole
from longattn.ops import dispatch
from longattn.train.kernel_check import KIND, VERSION, generation

GRACE = 30.0  # seconds after the last deadline until a call that has not returned counts as hung


class Report:
    """The document, and the files NAME.json and NAME.html that hold it as it was after the last step.

    Use it as a context manager: inside, a step that hangs ends the process, and the report names the step.
    """

    def __init__(self, options: dict[str, Any], parts: tuple[str, ...], folder: Path, seconds: float):
        target = dispatch.target()
        name = generation(target.kind)
        began = datetime.datetime.now(datetime.UTC)
        self.path = folder / f"{name}_{began:%Y-%m-%d_%H%M%S}.json"
        self.document: dict[str, Any] = {
            "version": VERSION,
            "kind": KIND,
            "generation": name,
            "verdict": "incomplete",
            "findings": [],
            "options": options,
            "environment": environment(),
            "platform_version": jax.devices()[0].client.platform_version,
            **{part: {"status": "not run", "rows": []} for part in parts},
        }
        self.deadline = time.monotonic() + seconds  # of the current part
        self._end = self.deadline
        self._parts, self._part, self._step, self._since = parts, "", "starting", time.monotonic()
        self._console = Console(stderr=True)
        self._writing = threading.Lock()
        self._returned = threading.Event()

    # ---- what parts use

    def part(self, name: str) -> dict[str, Any]:
        """Returns the part of the document that a part of the bring-up fills."""
        return self.document[name]

    @property
    def late(self) -> bool:
        """Whether the current part's time is over."""
        return time.monotonic() > self.deadline

    def at(self, step: str) -> None:
        """Records which step begins, in case it hangs."""
        self._step, self._since = step, time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line of progress."""
        self._console.print(f"{self._part}: {line}", highlight=False, markup=False, soft_wrap=True)

    # ---- the course of things

    def begin(self, name: str, share: float) -> None:
        """Begins a part, which may take this share of the remaining time."""
        left = max(0.0, self._end - time.monotonic())
        self.deadline = time.monotonic() + share * left
        self._part, self._began = name, time.monotonic()
        self.document[name]["status"] = "running"
        self.at(name)
        self.write()

    def end(self, error: Exception | None = None) -> None:
        """Ends the part as done, or as failed with `error`."""
        part = self.document[self._part]
        part |= {"status": "done" if error is None else "failed", "seconds": time.monotonic() - self._began}
        if error is not None:
            part["reason"] = f"{self._step}: {type(error).__name__}: {' '.join(str(error).split())[:1000]}"
            self.say(part["reason"])
        self.write()

    def write(self) -> None:
        """Writes both files anew."""
        with self._writing:
            self.document["verdict"], self.document["findings"] = verdict(self.document, self._parts)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json_text(self.document, indent=1) + "\n")
            write_whole(self.path.with_suffix(".html"), show.page(self.document))

    def finish(self) -> None:
        """Also keep a report that passed in the user's cache folder, where every training looks for it."""
        self.write()
        if self.document["verdict"] == "passed":
            kept = cache.folder("bringup")
            kept.mkdir(parents=True, exist_ok=True)
            write_whole(kept / self.path.name, self.path.read_text(encoding="utf-8"))

    def __enter__(self) -> Report:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._returned.set()

    def _watch(self) -> None:
        """Ends the process if a step hangs. Only os._exit can: the main thread waits for the device."""
        if self._returned.wait(self._end + GRACE - time.monotonic()):
            return
        reason = f"{self._step} has not returned after {time.monotonic() - self._since:.0f} s"
        self.document[self._part] |= {"status": "failed", "reason": reason}
        self.write()
        print(f"longattn: {self._part}: {reason}; the report is {self.path}", file=sys.stderr, flush=True)
        os._exit(1)


def verdict(document: dict[str, Any], parts: tuple[str, ...]) -> tuple[str, list[str]]:
    """Returns the verdict, and a sentence for each finding that speaks against "passed".

    The verdict is "failed" if something is wrong, else "passed" if every numerics case was tried, else "incomplete".
    """
    wrong, missing = [], []
    for name in parts:
        part = document[name]
        if part["status"] == "failed":
            wrong.append(f"{name}: {part['reason']}")
        for row in part["rows"]:
            if row.get("outcome") == "failed":
                what = ", ".join(row[key] for key in ("back_end", "contestant", "case", "what", "step") if key in row)
                wrong.append(f"{name}: {what}: {row['reason']}")
    numerics = document.get("numerics", {"status": "not run", "rows": []})
    tried = {row["case"] for row in numerics["rows"] if row["outcome"] != "not run"}
    if numerics["status"] != "done" or len(tried) < numerics.get("of", 1):
        missing.append(f"numerics: {len(tried)} of {numerics.get('of', 'all')} cases were tried")
    return ("failed" if wrong else "incomplete" if missing else "passed"), wrong + missing
