"""Multi-query associative recall (Zoology, arXiv:2312.04927, section 4 and appendix E).

A row has `pairs` key-value pairs, then each key once more at a gap drawn from a power law, with filler 0 in between:

    k1 v1 k2 v2 ... 0 0 k2 v2 0 0 0 0 k1 v1 0 0        loss only on the second v1, v2

Keys are distinct within a row, and so are values. As in the paper's Figure 2 the filler is 0, not random tokens.
One deviation: in Zoology the answer is the label at the query's position and never an input. Here it is the next token,
as in any language model. Each key is asked once, so earlier answers only reveal which values are left: see `guess`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from longattn.config import MQAR

SPLITS = {"train": 0, "valid": 1}


def row(cfg: MQAR, seed: int, split: str, index: int) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Returns tokens and weights of row `index`; the splits are disjoint random streams."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS[split], index)))
    half, n = cfg.vocabulary // 2, cfg.pairs
    keys = 1 + rng.permutation(half - 1)[:n]
    values = half + rng.permutation(cfg.vocabulary - half)[:n]
    tokens, weights = np.zeros(cfg.T, np.int32), np.zeros(cfg.T, np.float32)
    tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
    query = 2 * n + 2 * _gaps(rng, (cfg.T - 2 * n) // 2, n, cfg.alpha)
    tokens[query], tokens[query + 1] = keys, values
    weights[query + 1] = 1
    return tokens, weights


def _gaps(rng: np.random.Generator, space: int, n: int, alpha: float) -> Int32[np.ndarray, " n"]:
    """Draws n distinct slots of `space`, one after the other, with p(g) ~ (g + 1) ** (alpha - 1).

    Takes the n largest of log p + Gumbel noise in falling order (arXiv:1903.06059).
    """
    score = (alpha - 1) * np.log(np.arange(1, space + 1)) + rng.gumbel(size=space)
    return np.argsort(-score)[:n].astype(np.int32)


def chance(cfg: MQAR) -> float:
    """Returns the accuracy of guessing among all values."""
    return 1 / (cfg.vocabulary - cfg.vocabulary // 2)


def guess(cfg: MQAR) -> float:
    """Returns the accuracy of a model that knows the row's values, and excludes answered ones, but not their keys."""
    return float(np.mean(1 / np.arange(1, cfg.pairs + 1)))
