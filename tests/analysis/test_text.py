"""Numbers for people."""

from __future__ import annotations

import pytest

from longattn.analysis.text import seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0"), (3.21e-8, "32.1 ns"), (1.5e-6, "1.5 us"), (0.0123456, "12.3 ms"), (2.0, "2 s"), (1234.5, "1234 s")],
)
def test_seconds_have_three_digits(seconds, text) -> None:
    assert seconds_text(seconds) == text
