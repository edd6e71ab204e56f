"""Skips tests whose compiler for an accelerator is not installed."""

from collections.abc import Callable

import pytest

from longattn.aot import compilers


def _found(compiler: Callable[[], object]) -> bool:
    try:
        compiler()
    except ValueError:
        return False
    return True


def _skip_without(compiler: Callable[[], object], name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not _found(compiler), reason=f"{name} is not there: make test installs it, or .[aot]")


needs_libtpu = _skip_without(compilers.libtpu_folder, "libtpu")
needs_cuda = _skip_without(compilers.cuda_versions, "the compiler for GPUs")


def cost_here(request: dict) -> dict:
    """Returns XLA's cost of a case on a TPU: FLOPs, and bytes between HBM and the core."""
    from longattn.aot.kernels import tpu
    from longattn.aot.kernels.cases import Shape

    compiled = tpu.program(request["case"], request["chip"], Shape.from_json(request["shape"])).compile()
    return {name: compiled.cost_analysis()[name] for name in ("flops", "bytes accessed")}
