"""Exact softmax attention."""

from longattn.ops.attention.api import attend_partial, attention, attention_with_lse, backward_partial

__all__ = ["attend_partial", "attention", "attention_with_lse", "backward_partial"]
