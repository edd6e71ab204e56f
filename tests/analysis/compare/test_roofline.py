"""The least bytes, by hand."""

from __future__ import annotations

from longattn.analysis.compare import roofline
from tests.analysis.compare.tiny import problem


def test_minimal_bytes_by_hand() -> None:
    o = problem(B=3, H=4, K=2, dtype="bfloat16")
    q, kv = 2 * 3 * 256 * 4 * 128, 2 * 3 * 256 * 2 * 128
    assert roofline.minimal_bytes(o, 256, "forward") == 2 * q + 2 * kv
    assert roofline.minimal_bytes(o, 256, "forward_backward") == 6 * q + 6 * kv
