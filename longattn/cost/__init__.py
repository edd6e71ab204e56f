"""What formulas say: work, bytes, collectives and bounds on time, with no compiler and no clock."""
