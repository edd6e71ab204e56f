"""Solves problems once for all tests, and makes wrong back ends."""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import jax
import numpy as np
import pytest

from longattn import numerics
from longattn.mask import Causal, Window
from longattn.numerics import AnyProblem, Problem

PROBLEM = Problem(
    T=45, H=4, K=2, D=8, V=6, B=2, mask=Causal() & Window(20), documents=4, softcap=1.5, sinks=True, bias=(4, 1, 45)
)
_numbers = itertools.count()


@functools.cache
def solved(problem: AnyProblem) -> tuple:
    """Returns (drawn, truth, plain) of a problem."""
    drawn = numerics.draws(problem)
    with jax.enable_x64(True):
        truth = numerics.truth(problem, "reference", drawn, np.float64)
    return drawn, truth, numerics.plain(problem, drawn)


def tried(problem: AnyProblem, name: str) -> dict[str, Any]:
    return numerics.tried(problem, name, *solved(problem))


def back_end(monkeypatch: pytest.MonkeyPatch, problem: AnyProblem, **changes: Any) -> str:
    """Registers a back end of the problem's operation: xla's with `changes`, under a new name."""
    name = f"changed_{next(_numbers)}"  # jit caches by name
    table = problem.api.BACK_ENDS
    monkeypatch.setitem(table, name, types.SimpleNamespace(**{**vars(table["xla"]), **changes}))
    return name
