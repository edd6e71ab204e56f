"""Timings, traces and comparisons: everything that is measured on this machine's device."""
