"""Tables of a trace, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longattn.display import plain_table, seconds_text


def opening(recorded: str) -> str:
    """Returns a line that says where a trace is and how to open it."""
    folder = Path(recorded).parents[2]  # FOLDER/plugins/profile/TIME
    return f"Trace: {recorded}; to open it: pip install xprof, then xprof --port 8791 {folder}"


def parts_table(title: str, parts: Sequence[Mapping[str, Any]], total: float) -> Table:
    """Returns a table of kernels with their share of `total` seconds."""
    table = plain_table(title)
    for heading in ("kernel", "scope", "pass", "calls", "time", "share"):
        left = heading in ("kernel", "scope", "pass")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for p in parts:
        share = f"{p['seconds'] / total:.0%}" if total else "-"
        table.add_row(p["name"], p["scope"], p["phase"], f"{p['calls']:g}", seconds_text(p["seconds"]), share)
    return table
