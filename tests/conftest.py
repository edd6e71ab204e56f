"""The suite's JAX: eight CPU devices, no silent rank promotion, and shape checking of every internal function."""

import os
import signal

# Before jax loads. The platform stays what the caller set: `JAX_PLATFORMS=cuda make test` tries a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # pytest-xdist's workers may each compile for a TPU
os.environ.setdefault("MPLBACKEND", "agg")
# Compiling is most of the suite's time. XLA's passes over its own graph run as ever; LLVM optimises less, which halves
# it. The processes that tests start inherit this, and compilations for other devices do not.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import jaxtyping
import pytest

import tests.runtime_types  # noqa: F401  (the hook below finds it as an attribute of `tests`)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("longattn", "tests.runtime_types.checked")


@pytest.fixture
def optimised():
    """LLVM optimises as for users: for results that are compared to the last place."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


LONGEST = ("study/test_study.py", "test_notebooks.py", "plan/test_plan.py", "cost/test_linear.py", "train/test_run.py",
           "train/test_processes.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files of which one test takes minutes come first: at the end, one worker would wait for the other."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
