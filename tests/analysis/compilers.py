"""Which compilers of accelerators that are not there are installed."""

import pytest

from longattn.analysis import aot


def _has_libtpu() -> bool:
    try:
        aot.libtpu_folder()
    except ValueError:
        return False
    return True


needs_libtpu = pytest.mark.skipif(not _has_libtpu(), reason="libtpu is not there: make test installs it, or .[aot]")
