"""Figures that compilers gave earlier, kept as JSON, and their one loader."""

from longattn.recorded.loader import load, path

__all__ = ["load", "path"]
