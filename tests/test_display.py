"""Formatting of numbers."""

from __future__ import annotations

import pytest

from longattn.display import device_text, digits, seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0"),
        (3.21e-8, "32.1 ns"),
        (1.5e-6, "1.5 us"),
        (0.0123456, "12.3 ms"),
        (2.0, "2 s"),
        (1234.5, "1,234 s"),
        (0.99971, "1,000 ms"),
    ],
)
def test_seconds_have_three_digits(seconds, text) -> None:
    assert seconds_text(seconds) == text


def test_digits_are_never_powers_of_ten() -> None:
    assert [digits(x) for x in (0.5, 12.34, 999.4, 999.6, 197e3)] == ["0.5", "12.3", "999", "1,000", "197,000"]


def test_a_cpu_is_called_by_its_model() -> None:
    of = lambda platform: device_text({"host": {"cpu": "EPYC"}, "device": {"platform": platform, "kind": "kind"}})
    assert (of("cpu"), of("tpu")) == ("EPYC", "kind")
