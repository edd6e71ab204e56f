"""Named Pallas kernels for `longattn profile`: the function, its shapes, and how often each of its branches runs.

The declaration of a kernel follows from its source and the mask's geometry, independently of the compiled program.
`aot/kernels` refuses a kernel whose compiled form disagrees, and tests count branches in interpret mode.
"""

from longattn.aot.kernels.cases.kernel import Branch, Case, Kernel
from longattn.aot.kernels.cases.registry import CASES
from longattn.aot.kernels.cases.shape import Shape

__all__ = ["CASES", "Branch", "Case", "Kernel", "Shape"]
