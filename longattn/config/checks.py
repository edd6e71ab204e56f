"""Checks of config fields; their errors name the class, the field, its value and the rule."""

from __future__ import annotations


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
    """Raises ValueError unless each named field of `owner` is positive."""
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{type(owner).__name__}.{name}={getattr(owner, name)} must be positive")


def increasing(owner: object, *names: str) -> None:
    """Raises ValueError unless each named field of `owner` is a pair 0 < low <= high."""
    for name in names:
        low, high = getattr(owner, name)
        if not 0 < low <= high:
            raise ValueError(f"{type(owner).__name__}.{name}={(low, high)} must be (low, high) with 0 < low <= high")
