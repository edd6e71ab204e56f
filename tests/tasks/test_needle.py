from __future__ import annotations

import re

import numpy as np
import pytest

from longattn import config
from longattn.tasks import needle
from longattn.tasks.bytelm import BOS

HAY = np.frombuffer(bytes(range(97, 123)) * 10, np.uint8)


def text_of(tokens: np.ndarray) -> str:
    assert tokens[0] == BOS
    return bytes(tokens[1:].astype(np.uint8)).decode()


@pytest.mark.parametrize("digits", [1, 4, 9])
@pytest.mark.parametrize("T", [180, 333])
def test_loss_only_on_the_answer(T: int, digits: int) -> None:
    cfg = config.Needle(T=T, digits=digits)
    for index in range(10):
        tokens, weights = needle.row(cfg, HAY, 1, "train", index)
        text = text_of(tokens)
        keys = re.findall(r"\d+", text)
        assert len(keys) == 3
        assert len(set(keys)) == 1
        assert len(keys[0]) == digits
        assert text.endswith("The pass key is " + keys[0])
        assert np.flatnonzero(weights).tolist() == list(range(T - digits, T))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 0.5), (1.0, 1)])
def test_depth(depth: float, place: float) -> None:
    cfg = config.Needle(T=500, depth=depth)
    text = text_of(needle.row(cfg, HAY, 0, "train", 0)[0])
    assert text.index("\nThe pass key") == round(place * needle.room(cfg))


def test_depth_is_uniform_by_default() -> None:
    cfg = config.Needle(T=500)
    at = [text_of(needle.row(cfg, HAY, 0, "train", i)[0]).index("\nThe pass key") for i in range(400)]
    quartiles = np.quantile(np.array(at) / needle.room(cfg), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.1)


def test_rows_depend_on_nothing_but_seed_split_and_index() -> None:
    cfg = config.Needle(T=200)
    a, _ = needle.row(cfg, HAY, 0, "train", 5)
    np.testing.assert_array_equal(a, needle.row(cfg, HAY, 0, "train", 5)[0])
    others = [(1, "train", 5), (0, "train", 6), (0, "valid", 5)]
    assert all((a != needle.row(cfg, HAY, *other)[0]).any() for other in others)


def test_T_must_hold_the_question() -> None:
    smallest = 200 - needle.room(config.Needle(T=200))
    tokens, _ = needle.row(config.Needle(T=smallest), HAY, 0, "train", 0)
    assert text_of(tokens).startswith("\nThe pass key is ")
    with pytest.raises(ValueError, match=f"must be at least {smallest}"):
        needle.row(config.Needle(T=smallest - 1), HAY, 0, "train", 0)
