"""The study: what attention costs and what it remembers, measured side by side on this machine."""

from longattn.study.main import StudyOptions, compare, run

__all__ = ["StudyOptions", "compare", "run"]
