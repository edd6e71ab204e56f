"""Linear attention by Pallas kernels for TPUs: a back end as `longattn.ops.linear.contract` describes it."""

from longattn.ops.linear.pallas_tpu.back_end import attend, check, fold, pull
from longattn.ops.linear.pallas_tpu.tuning import Tuning

__all__ = ["Tuning", "attend", "check", "fold", "pull"]
