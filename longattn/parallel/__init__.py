"""The functions of `longattn.ops` over a device mesh: they take and return global arrays."""

from longattn.parallel.attention import STRATEGIES, attention, attention_with_lse
from longattn.parallel.conv import short_convolution
from longattn.parallel.layout import SequenceLayout
from longattn.parallel.linear import linear_attention
from longattn.parallel.mesh import make_mesh

__all__ = [
    "STRATEGIES",
    "SequenceLayout",
    "attention",
    "attention_with_lse",
    "linear_attention",
    "make_mesh",
    "short_convolution",
]
