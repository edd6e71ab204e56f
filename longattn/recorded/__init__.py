"""Figures recorded from compilers as JSON, and their loader."""

from longattn.recorded.loader import load, path

__all__ = ["load", "path"]
