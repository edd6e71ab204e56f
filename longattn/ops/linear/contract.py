"""The arguments of a linear-attention back end after validation, and what its module exports.

    Tuning                     a frozen dataclass of block sizes; absent where there is nothing to tune
    check(x, options)          returns the plan of a call: its static sizes, hashable, or None. Raises
                               NotImplementedError(reason) where it cannot serve the call. It reads shapes and dtypes
                               alone: arrays may be ShapeDtypeStructs. Without x.q the plan is one for `fold`
    attend(x, options, plan)   returns (out in options.out_dtype, final_state); reverse mode goes through both once
    fold(x, options, plan)     returns final_state alone, without the work for outputs: x.q is None. The initial state
                               is [B H D X] with X >= V; zeros are written into its columns after V. Not differentiable
    pull(x, do, dfinal_state, options, plan)
                               returns the gradient of the initial state alone, which x.initial_state is not needed
                               for: `attend` is affine in it. Not differentiable

`B` and `T` are positive. H is the largest of Hq, Hk and Hv, each divides it, and head h reads q's head h // (H // Hq),
likewise k and v. Decay, beta and states are float32, float64 for float64 inputs. A token whose segment id differs from
the one before starts from a zero state. The first token starts from `initial_state`; None is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int32

Query = Float[Array, "B T Hq D"]
Key = Float[Array, "B T Hk D"]
Value = Float[Array, "B T Hv V"]
Decay = Float[Array, "B T H"] | Float[Array, "B T H D"]  # its logarithm, <= 0: one per head, or one per channel of k
Beta = Float[Array, "B T H"]
State = Float[Array, "B H D V"]
Ids = Int32[Array, "B T"]
Out = Float[Array, "B T H V"]


class Arrays(NamedTuple):
    """The arrays of a call."""

    q: Query | None
    k: Key
    v: Value
    log_decay: Decay | None = None
    beta: Beta | None = None
    initial_state: State | None = None
    segment_ids: Ids | None = None

    @property
    def H(self) -> int:
        """The number of heads, which without q only the initial state has."""
        if self.q is None:
            assert self.initial_state is not None  # only `fold` has no q, and it is given a state
            return self.initial_state.shape[1]
        return max(x.shape[2] for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Options:
    """The static arguments of a call."""

    scale: float  # o_t = scale * S_t^T q_t
    out_dtype: str  # name of the dtype of `out`
    tuning: Any = None  # this back end's Tuning, or None for its own choice
