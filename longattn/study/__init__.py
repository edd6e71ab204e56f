"""The study: measures what each way to attend costs and remembers, side by side, on this machine."""

from longattn.study.main import StudyOptions, compare, run

__all__ = ["StudyOptions", "compare", "run"]
