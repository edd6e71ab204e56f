"""What every linear-attention back end is given, after validation, and the functions it has to export.

A back end is a module with

    Tuning                    a frozen dataclass of block sizes (absent if there is nothing to tune)
    check(q, k, v, log_decay, beta, initial_state, segment_ids, options)
                              raises NotImplementedError(reason); ShapeDtypeStructs will do
    attend(... as check ...)  -> (out in options.out_dtype, final_state); reverse mode goes through both, once at least
    fold(k, v, log_decay, beta, initial_state, segment_ids, options)
                              -> final_state, without the work for outputs. `initial_state` is an array [B H D X] with
                              X >= V: into the columns after V zeros are written. It need not be differentiable
    pull(q, k, v, log_decay, beta, segment_ids, do, dfinal_state, options)
                              -> the gradient of the initial state alone. `attend` is affine in it, so that this is one
                              transposed pass, which depends on no state; it need not be differentiable

`B` and `T` are positive. H is the largest of Hq, Hk and Hv, each divides it, and head h reads q's head h // (H // Hq),
likewise k and v. Decay, beta and states are float32, float64 for float64 inputs. A token whose segment id differs from
the one before starts from a zero state; the first one starts from `initial_state`, None being zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int32

Query = Float[Array, "B T Hq D"]
Key = Float[Array, "B T Hk D"]
Value = Float[Array, "B T Hv V"]
Decay = Float[Array, "B T H"] | Float[Array, "B T H D"]  # its logarithm, <= 0: one per head, or one per channel of k
Beta = Float[Array, "B T H"]
State = Float[Array, "B H D V"]
WideState = Float[Array, "B H D X"]  # with columns beyond v's
Ids = Int32[Array, "B T"]
Out = Float[Array, "B T H V"]


@dataclass(frozen=True)
class Options:
    """The static side of a call."""

    scale: float  # o_t = scale * S_t^T q_t
    out_dtype: str  # name of the dtype of `out`
    tuning: Any = None  # this back end's Tuning, or None for its own choice
