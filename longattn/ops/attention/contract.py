"""The functions that an attention back end exports, and the arguments it is given after validation.

A back end is a module with

    Tuning            a frozen dataclass of block sizes (absent if there is nothing to tune)
    check             (q, k, v, bias, visibility, options) -> plan
    attend            (q, k, v, bias, visibility, options, plan) -> (out, lse)
    backward_partial  (q, k, v, bias, visibility, out, lse, do, dlse, options, plan) -> (dq, dk, dv)

`check` raises NotImplementedError(reason) where the back end cannot serve the call. It takes ShapeDtypeStructs too. Its
plan holds what can be decided from shapes and static arguments, such as block sizes. A plan is hashable, for it is
static under jit; it is None where there is nothing to plan.

`attend` returns out in options.out_dtype. It knows no sinks. Reverse mode goes through out and lse, into q, k, v and
bias. `backward_partial` returns gradients in the statistics' dtype: float32, or float64 for float64 inputs. lse is the
natural logarithm of the sum of exp(logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from longattn.mask import Mask, bound
from longattn.shapes import KeyIds, QueryIds

Bias = Float[Array, "#B #H #T #S"]  # of any float dtype; added to the logits after the soft cap


class Visibility(NamedTuple):
    """Which query sees which key: the mask must allow it and, where segments are given, their ids must be equal."""

    mask: Mask  # a pytree: its integers are static, its arrays are traced; call it with [B|1 1 T 1] and [B|1 1 1 S]
    q_positions: QueryIds  # arange [1 T] if the caller gave none
    k_positions: KeyIds  # arange [1 S] if the caller gave none
    q_segments: QueryIds | None = None  # [B T]; both are given, or neither
    k_segments: KeyIds | None = None  # [B S]
    read: tuple[Array, ...] = ()  # traced arrays of any shape that functions of the mask read from outside

    @property
    def rule(self) -> Mask:
        """The mask to ask for pairs. `mask` alone answers for blocks, of which a function knows nothing."""
        return bound(self.mask, self.read)


@dataclass(frozen=True)
class Options:
    """The static arguments of a call."""

    scale: float  # logits are scale * q k^T
    softcap: float | None  # then softcap * tanh(logits / softcap)
    out_dtype: str  # name of the dtype of `out`
    in_order: bool  # positions are arange(T) and arange(S): the caller gave none
    tuning: Any = None  # this back end's Tuning, or None for its own choice
