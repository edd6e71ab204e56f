"""The search finds the border from any start."""

import pytest

from longattn.plan.search import largest, smallest


@pytest.mark.parametrize("start", [1, 96, 128, 1000, 100_000])
@pytest.mark.parametrize("border", [0, 127, 128, 640, 12_345, 10**6])
def test_largest_is_within_a_sixteenth_of_the_border(start, border):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= border

    found, beyond = largest(fits, start, 128, 2**19)
    assert all(n % 128 == 0 for n in tried) and len(tried) == len(set(tried)) <= 30
    if border < 128:
        assert (found, beyond) == (None, 128)
    elif border >= 2**19:
        assert (found, beyond) == (2**19, None)
    else:
        assert found <= border < beyond and beyond - found <= max(128, found / 16)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_smallest_is_the_first_that_fits(n):
    for border in range(n):
        assert smallest(lambda i, border=border: i >= border, n) == border
    assert smallest(lambda i: False, n) is None
