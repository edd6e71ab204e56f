"""Test parameters for cases of optional packages."""

import importlib.util

import pytest

from longattn.aot.kernels.cases import CASES


def peer(case: str, *values, slow: bool = False):
    """Test parameters that are left out where the case's package is not installed."""
    module = CASES[case].module
    missing = bool(module) and importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not there: .[peers]"), *[pytest.mark.slow] * slow]
    return pytest.param(case, *values, marks=marks)
