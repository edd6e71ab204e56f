"""longattn: how long a context can I afford, with which attention, and will the model still remember what it read?"""

from longattn import mask
from longattn.ops import partial
from longattn.ops.attention import attend_partial, attention, attention_with_lse, backward_partial
from longattn.ops.linear import linear_attention, linear_step

__all__ = [
    "attend_partial",
    "attention",
    "attention_with_lse",
    "backward_partial",
    "linear_attention",
    "linear_step",
    "mask",
    "partial",
]
