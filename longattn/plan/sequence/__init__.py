"""The cost of sequence parallelism by formula: load, traffic and time line of each strategy."""

from longattn.plan.sequence.command import SequenceOptions, run

__all__ = ["SequenceOptions", "run"]
