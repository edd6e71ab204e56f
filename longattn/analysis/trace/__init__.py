"""A recorded trace, read back: what each op of each compiled program cost on the device, by the scope it came from."""

from longattn.analysis.trace.file import find, read
from longattn.analysis.trace.program import Op, program_ops
from longattn.analysis.trace.scope import Scope, scope_of
from longattn.analysis.trace.sums import Part, Spread, kernels, scopes
from longattn.analysis.trace.tables import opening, parts_table
from longattn.analysis.trace.timeline import Execution, Kernel, Trace, busy

__all__ = [
    "Execution", "Kernel", "Op", "Part", "Scope", "Spread", "Trace", "busy", "find", "kernels", "opening",
    "parts_table", "program_ops", "read", "scope_of", "scopes",
]  # fmt: skip
