"""Reads a recorded trace: device time of each op of each compiled program, with the named scope it comes from."""

from longattn.bench.trace.file import find, read
from longattn.bench.trace.program import Op, program_ops
from longattn.bench.trace.scope import Scope, scope_of
from longattn.bench.trace.sums import Part, Spread, kernels, scopes
from longattn.bench.trace.tables import opening, parts_table
from longattn.bench.trace.timeline import Execution, Kernel, Trace, busy

__all__ = [
    "Execution", "Kernel", "Op", "Part", "Scope", "Spread", "Trace", "busy", "find", "kernels", "opening",
    "parts_table", "program_ops", "read", "scope_of", "scopes",
]  # fmt: skip
