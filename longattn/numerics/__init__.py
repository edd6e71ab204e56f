"""Checks a back end: its results and all gradients, against a derived tolerance."""

from longattn.numerics.attention import PartsProblem, Problem
from longattn.numerics.compare import (
    AnyProblem,
    Deviation,
    Drawn,
    Results,
    check,
    computed,
    deviations,
    draw,
    draws,
    plain,
    tried,
    truth,
)
from longattn.numerics.linear import LinearProblem, StateProblem

__all__ = [
    "AnyProblem",
    "Deviation",
    "Drawn",
    "LinearProblem",
    "PartsProblem",
    "Problem",
    "Results",
    "StateProblem",
    "check",
    "computed",
    "deviations",
    "draw",
    "draws",
    "plain",
    "tried",
    "truth",
]
