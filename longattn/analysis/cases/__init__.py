"""Named Pallas kernels for `longattn profile`: the function, its shapes, and how often each of its branches runs.

What is declared of a kernel follows from its source and the mask's geometry, and is not read off the compiled program;
`analysis/static` refuses a kernel whose compiled form disagrees, and tests count the branches of kernels that run in
interpret mode.
"""

from longattn.analysis.cases import flywheel, jax_flash, jax_splash, matmul, tokamax_splash
from longattn.analysis.cases.kernel import Branch, Case, Kernel
from longattn.analysis.cases.shape import Shape

CASES: dict[str, Case] = {
    "matmul": matmul.CASE,
    "jax_flash": jax_flash.FORWARD,
    "jax_splash": jax_splash.FORWARD,
    "tokamax_splash": tokamax_splash.FORWARD,
    "flywheel": flywheel.FORWARD,
    "jax_flash_backward": jax_flash.BACKWARD,
    "jax_splash_backward": jax_splash.FUSED,
    "jax_splash_backward_unfused": jax_splash.UNFUSED,
    "tokamax_splash_backward": tokamax_splash.BACKWARD,
}

__all__ = ["CASES", "Branch", "Case", "Kernel", "Shape"]
