"""Checks of config fields; their errors name the class, the field, its value and the rule."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import types
import typing
from typing import Any, Literal

LARGEST = 2**31 - 1  # of an integer: XLA counts positions and steps in int32


def typed(owner: Any, *, wide: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless each field of the dataclass `owner` has its annotated type.

    Numbers must be finite, and integers lie within +-LARGEST, except in the fields that `wide` names.
    """
    for name, hint in _hints(type(owner)).items():  # type: ignore[arg-type]
        value = getattr(owner, name)
        if rule := _broken(value, hint, 2**63 - 1 if name in wide else LARGEST):
            raise ValueError(f"{type(owner).__name__}.{name}={shown(value)} must be {rule}")


def shown(value: Any) -> str:
    """Returns a value for an error's one line: a long one is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text):,} characters)"


@functools.lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _broken(value: Any, hint: Any, largest: int = LARGEST) -> str | None:
    """Returns what `value` must be instead, or None if it is of the annotated type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        rules = [_broken(value, one, largest) for one in inner]
        return None if None in rules else " or ".join(rule for rule in rules if rule)
    if origin is Literal:
        return (
            None
            if any(type(value) is type(one) and value == one for one in inner)
            else f"one of {', '.join(map(repr, inner))}"
        )
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        each = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(each) != len(value):
            return f"a tuple of {len(each)}"
        rule = next((rule for x, one in zip(value, each) if (rule := _broken(x, one, largest))), None)
        return rule and f"a tuple whose elements are each {rule}"
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return "an integer"
        return None if -largest <= value <= largest else f"an integer of at most {largest:,} in size"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and abs(value) <= sys.float_info.max else "a finite number"
    if hint is type(None):
        return None if value is None else "None"
    if isinstance(hint, type) and not isinstance(value, hint):
        return f"a {hint.__name__}"
    return None


def positive(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is None or at least 1."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be at least 1")


def not_negative(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is None or at least 0."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 0:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must not be negative")


def folder_name(owner: object, name: str) -> None:
    """Raises ValueError unless the named field of `owner` can name a folder."""
    value = getattr(owner, name)
    if not value.strip(".") or set(value) & set("/\0\n") or len(os.fsencode(value)) > 200:
        raise ValueError(
            f"{type(owner).__name__}.{name}={shown(value)} must name a folder: 1 to 200 bytes, without a slash or a "
            "line break, not only full stops"
        )


def usable_path(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is None or may be a path: its parts have 1 to 255 bytes."""
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if "\0" in str(value) or any(len(part) > 255 for part in os.fsencode(value).split(b"/")):
            raise ValueError(
                f"{type(owner).__name__}.{name}={shown(value)} must be a path, whose parts have at most 255 bytes"
            )


def fraction(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` lies in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must lie in [0, 1]")


def above_zero(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is None or positive."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be positive")


def increasing(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is a pair 0 < low <= high."""
    for name in names:
        low, high = getattr(owner, name)
        if not 0 < low <= high:
            raise ValueError(f"{type(owner).__name__}.{name}={(low, high)} must be (low, high) with 0 < low <= high")
