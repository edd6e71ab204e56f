"""The suite's JAX: eight CPU devices, no silent rank promotion, and shape checking of every internal function."""

import os
import pathlib

# Before jax loads. The platform stays what the caller set: `JAX_PLATFORMS=cuda make test` tries a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # pytest-xdist's workers may each compile for a TPU
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import jaxtyping
import pytest

import tests.runtime_types  # noqa: F401  (the hook below finds it as an attribute of `tests`)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("longattn", "tests.runtime_types.checked")

# These folders hold numbers against an oracle within derived tolerances, and compiling is most of their time. XLA's
# passes over its own graph run as ever; LLVM optimises less, which takes a quarter off. What is timed, or compared
# nearly bitwise, is elsewhere and compiled as users compile it.
QUICKLY = ("ops/contract", "parallel")


@pytest.fixture(autouse=True)
def compile_quickly(request):
    if not request.path.relative_to(pathlib.Path(__file__).parent).as_posix().startswith(QUICKLY):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
