from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.tasks import bytelm


def corpus_of(sizes: list[int], rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    documents = [rng.integers(0, 256, n).astype(np.uint8) for n in sizes]
    separator = np.array([bytelm.SEPARATOR], np.uint8)
    return np.concatenate([part for d in documents for part in (separator, d)]), documents


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=30),
    T=st.integers(2, 40),
    overlap=st.integers(1, 39),
    window=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_every_byte_is_predicted_once(sizes: list[int], T: int, overlap: int, window: int, seed: int) -> None:
    """Packed rows hold each byte of each document once with loss, after the bytes that precede it in its document."""
    overlap = min(overlap, T - 1)
    rng = np.random.default_rng(seed)
    corpus, documents = corpus_of(sizes, rng)
    pieces = bytelm.cut(np.array(sizes), T, overlap)
    rows = bytelm.pack(pieces.length, T, rng, window)
    assert sorted(rows.pieces.tolist()) == list(range(len(pieces.length)))

    begins = np.cumsum([n + 1 for n in sizes]) - [n + 1 for n in sizes]  # of each document's separator
    predicted = [np.zeros(n, int) for n in sizes]
    for r in range(len(rows.ptr) - 1):
        members = rows.pieces[rows.ptr[r] : rows.ptr[r + 1]]
        assert len(members)
        tokens, positions, segments, weights = bytelm.fill(corpus, pieces, members, T)
        assert not weights[segments == 0].any()
        assert not weights[positions == 0].any()
        for s in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == s)
            np.testing.assert_array_equal(at, np.arange(at[0], at[0] + len(at)))
            np.testing.assert_array_equal(positions[at], np.arange(len(at)))
            start = pieces.start[members[s - 1]]
            d = int(np.searchsorted(begins, start, side="right")) - 1
            whole = np.concatenate([[bytelm.BOS], documents[d].astype(np.int32)])
            offset = start - begins[d]
            np.testing.assert_array_equal(tokens[at], whole[offset : offset + len(at)])
            predicted[d][offset + np.flatnonzero(weights[at]) - 1] += 1
    for count in predicted:
        np.testing.assert_array_equal(count, 1)


def test_overlap_is_context_without_loss() -> None:
    pieces = bytelm.cut(np.array([25]), 10, 4)
    assert pieces.start.tolist() == [0, 6, 12, 18]
    assert pieces.length.tolist() == [10, 10, 10, 8]
    assert pieces.skip.tolist() == [1, 4, 4, 4]
    assert pieces.first.tolist() == [1, 0, 0, 0]


def test_a_document_of_exactly_a_row_is_one_piece() -> None:
    assert bytelm.cut(np.array([7, 8]), 8, 1).length.tolist() == [8, 8, 2]


@pytest.mark.parametrize("T", [256, 1024, 4096])
def test_padding_is_small(T: int) -> None:
    """Sizes spread like those of source files: under one percent is padding, at a hundred thousand pieces a second."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(8.5, 1.5, 1500)).astype(np.int64) + 1
    pieces = bytelm.cut(sizes, T, 1)
    rows = bytelm.pack(pieces.length, T, rng)
    assert 1 - pieces.length.sum() / (T * (len(rows.ptr) - 1)) < 0.01


def test_no_row_is_longer_than_T() -> None:
    rng = np.random.default_rng(0)
    length = rng.integers(2, 101, 3000)
    rows = bytelm.pack(length, 100, rng, 500)
    used = np.add.reduceat(length[rows.pieces], rows.ptr[:-1])
    assert used.max() <= 100


@pytest.mark.parametrize("overlap", [0, 8, 9])
def test_bad_overlap(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        bytelm.cut(np.array([5]), 8, overlap)


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match="leave out empty documents"):
        bytelm.cut(np.array([5, 0]), 8, 1)
    with pytest.raises(ValueError, match="cut the documents first"):
        bytelm.pack(np.array([9]), 8, np.random.default_rng(0))
