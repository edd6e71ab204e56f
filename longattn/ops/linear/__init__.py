"""Linear attention and its relatives: a state of fixed size, with or without decay and the delta rule."""

from longattn.ops.linear.api import BACK_ENDS, linear_attention, linear_step, state_bytes

__all__ = ["BACK_ENDS", "linear_attention", "linear_step", "state_bytes"]
