"""A cache on disk for answers of compilers, keyed by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

# Reasons that may not hold the next time: such answers are not kept.
_OF_THE_MOMENT = (
    "the compiler took",
    "the compiler ended",
    "ImportError",
    "ModuleNotFoundError",
    "MemoryError",
    "OSError",
)


def folder(name: str) -> Path:
    """Returns this project's folder of that name in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longattn" / name


def sources(paths: Iterable[Path]) -> str:
    """Returns a hash of the contents of source files that an answer depends on."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def remembered(folder: Path, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Returns (the answer for an equal `key` from before, True), else (`make()`, False), which is kept.

    A compiler's refusal is kept too.
    """
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return json.loads(path.read_text())["answer"], True
    answer = make()
    if not answer.get("reason", "").startswith(_OF_THE_MOMENT):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as whole:
            json.dump({"key": key, "answer": answer}, whole)
        Path(whole.name).replace(path)
    return answer, False
