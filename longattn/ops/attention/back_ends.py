"""The back ends of exact attention, best first."""

from longattn.ops.attention import pallas_tpu, reference, xla

BACK_ENDS = {"pallas_tpu": pallas_tpu, "xla": xla, "reference": reference}
Tuning = pallas_tpu.Tuning | xla.Tuning  # block sizes of one of them
DEFAULT = ("pallas_tpu", "xla")  # never the reference: nothing silently becomes O(T S) in memory
