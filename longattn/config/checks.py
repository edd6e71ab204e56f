"""Checks of config fields; their errors name the class, the field, its value and the rule."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal


def typed(owner: Any) -> None:
    """Raises ValueError unless each field of the dataclass `owner` has its annotated type; numbers must be finite."""
    for name, hint in _hints(type(owner)).items():  # type: ignore[arg-type]
        value = getattr(owner, name)
        if rule := _broken(value, hint):
            raise ValueError(f"{type(owner).__name__}.{name}={value!r} must be {rule}")


@functools.lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _broken(value: Any, hint: Any) -> str | None:
    """Returns what `value` must be instead, or None if it is of the annotated type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        rules = [_broken(value, one) for one in inner]
        return None if None in rules else " or ".join(rule for rule in rules if rule)
    if origin is Literal:
        return None if value in inner else f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        each = [inner[0]] * len(value) if inner[1:] == (...,) else inner
        if len(each) != len(value):
            return f"a tuple of {len(each)}"
        rule = next((rule for x, one in zip(value, each) if (rule := _broken(x, one))), None)
        return rule and f"a tuple whose elements are each {rule}"
    if hint is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and math.isfinite(value) else "a finite number"
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
