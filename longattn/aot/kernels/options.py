"""Checks of the options that both targets of `longattn profile kernel` share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check(options: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless options name known cases and at least one machine, and give the compiler some time."""
    machines = "chips" if options.target == "tpu" else "archs"
    names = ", ".join(known)
    if not options.cases:
        raise ValueError(f"profile kernel needs a case; for {options.target} the cases are {names}")
    if not getattr(options, machines):
        raise ValueError(f"{machines}=() must name at least one")
    for case in options.cases:
        if case not in known:
            raise ValueError(f"unknown case {case!r}; the cases are {names}")
    if options.timeout <= 0:
        raise ValueError(f"timeout={options.timeout:g} must be positive")
