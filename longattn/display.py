"""The common look of numbers, tables and pages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from markupsafe import Markup


def plain_table(title: str) -> Table:
    """Returns an empty table in the common style."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def digits(number: float) -> str:
    """Returns a number with three digits, or with all digits before the point."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"


def seconds_text(seconds: float) -> str:
    """Returns a time with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds * 1e9)} ns" if seconds else "0"


def bytes_text(n: float) -> str:
    """Returns a size with three digits and a unit."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{digits(n / size)} {unit}"
    return f"{n:.0f} B"


def device_text(environment: Mapping[str, Any]) -> str:
    """Returns the name of the device in an `environment()`: a CPU's model, else the device's kind."""
    device = environment["device"]
    return environment["host"]["cpu"] if device["platform"] == "cpu" else device["kind"]


def style() -> Markup:
    """Returns the CSS of every page of this project."""
    from markupsafe import Markup  # here: only pages need it, and it comes with the extra `study`

    return Markup(resources.files("longattn").joinpath("style.css").read_text(encoding="utf-8"))
