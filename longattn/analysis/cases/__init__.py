"""Named Pallas kernels for `longattn profile`: the function, its shapes, and how often each of its branches runs.

What is declared of a kernel follows from its source and the mask's geometry, and is not read off the compiled program;
`analysis/static` refuses a kernel whose compiled form disagrees, and tests count the branches of kernels that run in
interpret mode.
"""

from longattn.analysis.cases.kernel import Branch, Case, Kernel
from longattn.analysis.cases.shape import Shape
from longattn.analysis.cases.table import CASES

__all__ = ["CASES", "Branch", "Case", "Kernel", "Shape"]
