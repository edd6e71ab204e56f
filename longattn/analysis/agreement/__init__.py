"""Whether a back end computes what it should: results and all gradients, by a tolerance that is derived."""

from longattn.analysis.agreement.common import (
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
from longattn.analysis.agreement.linear import LinearProblem, StateProblem
from longattn.analysis.agreement.softmax import PartsProblem, Problem

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
