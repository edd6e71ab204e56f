"""Schedules and rates that were read before: a sweep that was stopped goes on where it was."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from longattn import cache
from longattn.aot.kernels.cases import CASES


def folder() -> Path:
    """Where answers lie: in the user's cache folder."""
    return cache.folder("static")


def remembered(key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`cache.remembered` in this folder."""
    return cache.remembered(folder(), key, make)[0]


def versions(case: str) -> dict[str, str]:
    """Whatever an answer about `case` depends on beside its shape: versions of packages, and this project's sources."""
    versions = {"jax": jax.__version__, "sources": _sources(not CASES[case].module)}
    if module := CASES[case].module:
        versions[module] = importlib.metadata.version(module.replace("_", "-"))
    return versions


@functools.cache
def _sources(ours: bool) -> str:
    """A hash of the sources that say what is compiled and how it is counted; for `ours` those of the kernels too."""
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    counting = [here / f"{name}.py" for name in ("bundles", "tpu", "rates")]
    facts = [root / "mask.py", *(root / "cost" / f"{name}.py" for name in ("flops", "pairs", "hardware"))]
    kernels = [*(here / "cases").rglob("*.py"), *((root / "ops").rglob("*.py") if ours else ())]
    kernels = [path for path in kernels if path.name != "tuned.py"]  # cases name their sizes
    return cache.sources([*counting, *facts, *kernels])
