"""Who is not timed, and why."""

from __future__ import annotations

import dataclasses

import pytest

from longattn.analysis import bench, compare
from longattn.analysis.compare import admission
from longattn.mask import Full
from tests.analysis.compare.tiny import TINY, quiet


def test_who_disagrees_is_not_timed(monkeypatch, tmp_path) -> None:
    wrong = compare.Contestant("wrong", lambda o: bench.jax_nn(Full()))
    monkeypatch.setitem(compare.CONTESTANTS, "wrong", wrong)
    options = compare.CompareOptions("attention_forward", contestants=("wrong", "xla"), out=str(tmp_path), **TINY)
    first, second = compare.run(options, quiet())["rows"]
    assert first["reason"].startswith("it disagrees with reference in float32: relative error")
    assert "samples" not in first
    assert second["ratio"]["value"] == 1  # the first that ran


def test_what_cannot_be_checked_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(admission, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"T=300 is too long to be checked.*it needs .* free; choose a shorter one"):
        admission.admit(compare.CompareOptions("attention_forward", dtype="float32", **TINY))


def test_a_rival_that_fails_is_a_row_and_ours_is_an_error(monkeypatch, tmp_path) -> None:
    def fails(_: bench.AttentionOptions) -> bench.Attend:
        raise TypeError("no such argument\nsecond line")

    monkeypatch.setitem(compare.CONTESTANTS, "rival", compare.Contestant("rival", fails))
    options = compare.CompareOptions("attention_forward", contestants=("rival", "xla"), out=str(tmp_path), **TINY)
    first, second = compare.run(options, quiet())["rows"]
    assert first["reason"] == "TypeError: no such argument second line"
    assert "samples" in second
    monkeypatch.setitem(compare.CONTESTANTS, "xla", compare.Contestant("ours", fails))
    with pytest.raises(TypeError, match="no such argument"):
        compare.run(dataclasses.replace(options, contestants=("xla",)), quiet())
