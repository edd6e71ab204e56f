"""Finds and loads recorded figures: one JSON file per set, remade by the module that reads it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any


def path(name: str) -> Path:
    """Returns the file of the set `name`, such as "calibration", whether it exists or not."""
    return Path(str(resources.files("longattn.recorded").joinpath(f"{name}.json")))


def load(name: str) -> dict[str, Any]:
    """Loads the set `name`: figures by case."""
    return json.loads(path(name).read_text())
