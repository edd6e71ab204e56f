"""The table of kernels by name."""

from longattn.aot.kernels.cases import (
    flywheel,
    jax_flash,
    jax_splash,
    matmul,
    own_attention,
    own_linear,
    tokamax_splash,
)
from longattn.aot.kernels.cases.kernel import Case

CASES: dict[str, Case] = {
    "matmul": matmul.CASE,
    "longattn": own_attention.FORWARD,
    "jax_flash": jax_flash.FORWARD,
    "jax_splash": jax_splash.FORWARD,
    "tokamax_splash": tokamax_splash.FORWARD,
    "flywheel": flywheel.FORWARD,
    "longattn_backward": own_attention.BACKWARD,
    "jax_flash_backward": jax_flash.BACKWARD,
    "jax_splash_backward": jax_splash.FUSED,
    "jax_splash_backward_unfused": jax_splash.UNFUSED,
    "tokamax_splash_backward": tokamax_splash.BACKWARD,
    "longattn_linear": own_linear.FORWARD,
    "longattn_linear_backward": own_linear.BACKWARD,
}
