"""Exact attention by Pallas kernels for TPUs: a back end as `longattn.ops.attention.contract` describes it."""

from longattn.ops.attention.pallas_tpu.back_end import attend, backward_partial, check
from longattn.ops.attention.pallas_tpu.tuning import Blocks, Tuning

__all__ = ["Blocks", "Tuning", "attend", "backward_partial", "check"]
