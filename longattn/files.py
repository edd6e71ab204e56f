"""Files that a process may be killed while writing, that others may damage, and that two processes may want at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one step: after a kill or a power cut the old or the new file is there, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def json_text(value: Any, indent: int | None = None) -> str:
    """Returns JSON text, in which null stands for numbers that are not finite: JSON has no NaN or Infinity."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_object(text: str, where: object, remedy: str, **fields: type) -> dict[str, Any]:
    """Returns the JSON object that a text of a file holds.

    Args:
      where: the file, and the line where there are several; the error begins with it.
      remedy: what the reader can do; the error ends with it.
      fields: types of the fields that the object must have.

    Raises:
      ValueError: the text is no JSON object with these fields.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is damaged: it is no JSON ({reason}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it holds a {type(value).__name__}, not an object; {remedy}")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind) or (kind is int and isinstance(value[name], bool)):
            raise ValueError(f"{where} is damaged: its {name!r} must be a JSON {_JSON[kind]}; {remedy}")
    return value


_JSON = {dict: "object", list: "array", str: "string", int: "integer", float: "number"}


def read_object(path: Path, remedy: str, **fields: type) -> dict[str, Any]:
    """Returns the JSON object in a file; see `json_object`. Raises ValueError, and FileNotFoundError."""
    return json_object(read_text(path, remedy), path, remedy, **fields)


def read_text(path: Path, remedy: str) -> str:
    """Returns a file's text. Raises ValueError if it is no UTF-8 text, and FileNotFoundError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is no UTF-8 text ({error.reason}); {remedy}") from None


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a folder, which the operating system releases however the process ends.

    The lock is the file `.lock`. What it holds stays, and a link is not followed.

    Raises:
      ValueError: another process holds the lock; the message is `busy`. Or the file cannot be opened.
    """
    path = folder / ".lock"
    try:
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}): delete it") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield
