"""A passkey hidden in real text and asked for at the end (arXiv:2305.16300); only the answer's digits have loss."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from longattn.config import Needle
from longattn.tasks.bytelm import BOS
from longattn.tasks.mqar import SPLITS

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "


def room(cfg: Needle) -> int:
    """Returns the bytes of haystack in a row. Raises ValueError if T is too short for needle, question and answer."""
    used = 1 + len(NEEDLE.format(key="0" * cfg.digits)) + len(QUESTION) + cfg.digits
    if used > cfg.T:
        raise ValueError(f"Needle.T={cfg.T} must be at least {used} to hold needle, question and {cfg.digits} digits")
    return cfg.T - used


def row(
    cfg: Needle, haystack: UInt8[np.ndarray, " N"], seed: int, split: str, index: int
) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Returns tokens and weights of row `index`: BOS, needle in an excerpt of `haystack` (cyclic), question, key."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS[split], index)))
    key = "".join(map(str, rng.integers(0, 10, cfg.digits)))
    n = room(cfg)
    start = int(rng.integers(len(haystack)))
    depth = rng.random() if cfg.depth is None else cfg.depth
    hay = np.take(haystack, np.arange(start, start + n), mode="wrap").tobytes()
    at = round(depth * n)
    text = hay[:at] + NEEDLE.format(key=key).encode() + hay[at:] + (QUESTION + key).encode()
    tokens = np.empty(cfg.T, np.int32)
    tokens[0], tokens[1:] = BOS, np.frombuffer(text, np.uint8)
    weights = np.zeros(cfg.T, np.float32)
    weights[-cfg.digits :] = 1
    return tokens, weights


def chance(cfg: Needle) -> float:
    """Returns the accuracy of guessing a digit."""
    return 1 / 10
