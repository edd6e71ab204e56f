from __future__ import annotations

import numpy as np
import pytest

from longattn import config
from longattn.tasks import mqar

CONFIGS = [
    config.MQAR(),
    config.MQAR(T=64, pairs=16, vocabulary=8192),  # full: every slot is a query
    config.MQAR(T=35, pairs=3, vocabulary=8),
    config.MQAR(T=4, pairs=1, vocabulary=4),
    config.MQAR(T=257, pairs=5, vocabulary=13, alpha=1.0),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_every_key_is_asked_once_and_answered(cfg: config.MQAR) -> None:
    half = cfg.vocabulary // 2
    for index in range(20):
        tokens, weights = mqar.row(cfg, 3, "train", index)
        assert tokens.shape == weights.shape == (cfg.T,)
        keys, values = tokens[0 : 2 * cfg.pairs : 2], tokens[1 : 2 * cfg.pairs : 2]
        assert len(set(keys)) == len(set(values)) == cfg.pairs
        assert keys.min() >= 1
        assert keys.max() < half <= values.min()
        assert values.max() < cfg.vocabulary
        answers = np.flatnonzero(weights)
        assert answers.min() > 2 * cfg.pairs
        recalled = dict(zip(keys, values, strict=True))
        assert sorted(tokens[answers - 1]) == sorted(keys)
        assert all(recalled[tokens[t - 1]] == tokens[t] for t in answers)
        rest = np.ones(cfg.T, bool)
        rest[: 2 * cfg.pairs] = rest[answers] = rest[answers - 1] = False
        assert not tokens[rest].any()


def test_rows_depend_on_nothing_but_seed_split_and_index() -> None:
    cfg = config.MQAR()
    a, _ = mqar.row(cfg, 0, "train", 5)
    np.testing.assert_array_equal(a, mqar.row(cfg, 0, "train", 5)[0])
    others = [mqar.row(cfg, 1, "train", 5), mqar.row(cfg, 0, "train", 6), mqar.row(cfg, 0, "valid", 5)]
    assert all((a != other).any() for other, _ in others)


def test_splits_share_no_row() -> None:
    cfg = config.MQAR(T=32, pairs=4, vocabulary=64)
    train, valid = ({mqar.row(cfg, 0, s, i)[0].tobytes() for i in range(500)} for s in ("train", "valid"))
    assert len(train) == len(valid) == 500
    assert not train & valid


def test_gaps_follow_the_power_law() -> None:
    """With one pair the gap's distribution is the law itself; alpha = 1 is uniform."""
    n = 4000
    for alpha in (0.01, 0.5, 1.0):
        cfg = config.MQAR(T=34, pairs=1, vocabulary=64, alpha=alpha)
        gaps = [(int(np.flatnonzero(mqar.row(cfg, 0, "train", i)[1])[0]) - 3) // 2 for i in range(n)]
        p = np.arange(1, 17) ** (alpha - 1.0)
        p /= p.sum()
        error = np.bincount(gaps, minlength=16) / n - p
        assert np.all(np.abs(error) < 5 * np.sqrt(p * (1 - p) / n))


def test_chance() -> None:
    cfg = config.MQAR(vocabulary=256, pairs=2)
    assert mqar.chance(cfg) == 1 / 128
    assert mqar.guess(cfg) == (1 / 2 + 1) / 2
