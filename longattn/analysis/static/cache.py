"""What was compiled or interpreted before, remembered on disk: a sweep that was stopped goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from longattn.analysis.cases import CASES

# Refusals that say more of the moment than of what was asked: each may succeed another time.
_OF_THE_MOMENT = (
    "the compiler took",
    "the compiler ended",
    "ImportError",
    "ModuleNotFoundError",
    "MemoryError",
    "OSError",
)


def folder() -> Path:
    """Where answers lie: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longattn" / "static"


def remembered(key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON that `make` gave for an equal `key` before, else what it gives now.

    A compiler's refusal is an answer too.
    """
    path = folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return json.loads(path.read_text())["answer"]
    answer = make()
    if not answer.get("reason", "").startswith(_OF_THE_MOMENT):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as whole:
            json.dump({"key": key, "answer": answer}, whole)
        Path(whole.name).replace(path)
    return answer


def versions(case: str) -> dict[str, str]:
    """Whatever an answer about `case` depends on beside its shape: versions of packages, and this project's sources."""
    versions = {"jax": jax.__version__, "sources": _sources(not CASES[case].module)}
    if module := CASES[case].module:
        versions[module] = importlib.metadata.version(module.replace("_", "-"))
    return versions


@functools.cache
def _sources(ours: bool) -> str:
    """A hash of the sources that say what is compiled and how it is counted; for `ours` those of the kernels too."""
    root = Path(__file__).parents[2]
    counting = [root / "analysis" / "static" / f"{name}.py" for name in ("schedule", "tpu", "rates")]
    facts = [root / "mask.py", *(root / "analysis" / f"{name}.py" for name in ("cost", "hardware"))]
    kernels = [*(root / "analysis" / "cases").rglob("*.py"), *((root / "ops").rglob("*.py") if ours else ())]
    digest = hashlib.sha256()
    for path in sorted([*counting, *facts, *kernels]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
