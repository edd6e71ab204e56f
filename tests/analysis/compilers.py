"""Which compilers of accelerators that are not there are installed."""

from collections.abc import Callable

import pytest

from longattn.analysis import aot


def _found(compiler: Callable[[], object]) -> bool:
    try:
        compiler()
    except ValueError:
        return False
    return True


def _skip_without(compiler: Callable[[], object], name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not _found(compiler), reason=f"{name} is not there: make test installs it, or .[aot]")


needs_libtpu = _skip_without(aot.libtpu_folder, "libtpu")
needs_cuda = _skip_without(aot.cuda_versions, "the compiler for GPUs")
