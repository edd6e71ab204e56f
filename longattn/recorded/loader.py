"""Where recorded figures lie: one JSON file per set, remade by the module that its reader names."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any


def path(name: str) -> Path:
    """The file that keeps the set `name`, such as "calibration", whether it exists or not."""
    return Path(str(resources.files("longattn.recorded").joinpath(f"{name}.json")))


def load(name: str) -> dict[str, Any]:
    """The set `name`: figures by the name of their case."""
    return json.loads(path(name).read_text())
