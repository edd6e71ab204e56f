"""What every attention back end is given, after validation, and the functions it has to export.

A back end is a module with

    Tuning                           a frozen dataclass of block sizes (absent if there is nothing to tune)
    check(q, k, v, visibility, options)     raises NotImplementedError(reason); ShapeDtypeStructs will do
    attend(q, k, v, visibility, options)    -> (out in options.out_dtype, lse); no sinks; reverse mode goes through both
    backward_partial(q, k, v, visibility, out, lse, do, dlse, options) -> (dq, dk, dv) in the statistics' dtype

Statistics are float32, float64 for float64 inputs. `lse` is the natural logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from longattn.mask import Mask
from longattn.shapes import KeyIds, QueryIds


class Visibility(NamedTuple):
    """The arrays beside q, k and v. A query sees a key if the mask and, where given, equal segment ids allow it."""

    mask: Mask  # a pytree: its integers are static, its arrays are traced; call it with [B|1 1 T 1] and [B|1 1 1 S]
    q_positions: QueryIds  # [1 T] = arange if the caller gave none
    k_positions: KeyIds
    q_segments: QueryIds | None = None  # [B T], both or neither
    k_segments: KeyIds | None = None
    bias: Float[Array, "#B #H #T #S"] | None = None  # of any float dtype; added after the soft cap


@dataclass(frozen=True)
class Options:
    """The static side of a call."""

    scale: float  # logits are scale * q k^T
    softcap: float | None  # then softcap * tanh(logits / softcap)
    out_dtype: str  # name of the dtype of `out`
    in_order: bool  # positions are arange(T) and arange(S), as no positions were given
    tuning: Any = None  # this back end's Tuning, or None for its own choice
