"""Which values of a parametrised test run by default, where each takes seconds: the others are left to test-all."""

from collections.abc import Iterable
from typing import Any

import pytest


def but_few(values: Iterable[Any], few: int = 1) -> list[Any]:
    """Returns the values, each one or a tuple of several parameters, all but the first few of them slow."""
    values = list(values)
    rest = [value if isinstance(value, tuple) else (value,) for value in values[few:]]
    return values[:few] + [pytest.param(*value, marks=pytest.mark.slow) for value in rest]
