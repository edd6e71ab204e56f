"""What clocks say: timings, traces and comparisons, measured on this machine."""
