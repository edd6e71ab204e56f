"""What sequence parallelism costs, counted: who computes what when, what is sent, how long it takes by formula."""

from longattn.plan.sequence.command import SequenceOptions, run

__all__ = ["SequenceOptions", "run"]
