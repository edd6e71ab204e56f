"""Formulas of the traffic, load and time line of each strategy of sequence parallelism."""
