"""Formulas of work, bytes, collectives and bounds on time: no compiler and no clock."""
