"""Exact attention in plain XLA, on any device: a back end as `longattn.ops.attention.contract` describes it."""

from longattn.ops.attention.xla.back_end import attend, backward_bias, backward_partial, check
from longattn.ops.attention.xla.tiling import Tuning

__all__ = ["Tuning", "attend", "backward_bias", "backward_partial", "check"]
