"""Byte-level language modelling: cuts documents into pieces and packs them into rows of T tokens.

The vocabulary is the 256 bytes and BOS. A document is BOS and its bytes. Longer documents are cut; each piece after the
first repeats the last `overlap` bytes of the piece before, without loss. So every byte of the corpus is predicted
exactly once per epoch, and the sum of the losses over the number of bytes is an honest figure of bits per byte.

A corpus is one uint8 array in which each document follows one `SEPARATOR` byte, which BOS replaces.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

BOS = 256
VOCABULARY = 257
SEPARATOR = ord("\n")  # puts a line break between documents where text runs across them, as in needle's haystack
WINDOW = 4096  # pieces packed together; larger windows pad less, smaller ones mix documents more


class Pieces(NamedTuple):
    """n pieces of documents, as ranges of the corpus array."""

    start: Int64[np.ndarray, " n"]  # index of the piece's first token in the corpus array
    length: Int64[np.ndarray, " n"]  # tokens, 2 .. T
    skip: Int64[np.ndarray, " n"]  # leading tokens without loss
    first: Int64[np.ndarray, " n"]  # 1 where the first token is BOS


class Rows(NamedTuple):
    """The pieces of R rows: row r holds pieces[ptr[r]:ptr[r + 1]]."""

    pieces: Int64[np.ndarray, " n"]
    ptr: Int64[np.ndarray, " R+1"]


def cut(sizes: Int64[np.ndarray, " n"], T: int, overlap: int) -> Pieces:
    """Cuts documents of `sizes` bytes (each >= 1) into pieces of at most T tokens."""
    if not 1 <= overlap < T:
        raise ValueError(f"{overlap=} must lie in 1 .. T - 1 with {T=}: a piece's first token is not predicted")
    if sizes.size and sizes.min() < 1:
        raise ValueError(f"{sizes.min()=} must be at least 1: leave out empty documents")
    tokens = sizes + 1
    stride = T - overlap
    counts = 1 + np.maximum(0, -(-(tokens - T) // stride))
    begins = np.cumsum(tokens) - tokens
    document = np.repeat(np.arange(len(sizes)), counts)
    k = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # index of the piece in its document
    length = np.minimum(T, tokens[document] - k * stride)
    return Pieces(begins[document] + k * stride, length, np.where(k == 0, 1, overlap), (k == 0).astype(np.int64))


def pack(length: Int64[np.ndarray, " n"], T: int, rng: np.random.Generator, window: int = WINDOW) -> Rows:
    """Packs pieces of 2 .. T tokens into rows by best-fit decreasing, window by window of a shuffled order."""
    if length.size and length.max() > T:
        raise ValueError(f"{length.max()=} must be at most {T=}: cut the documents first")
    order = rng.permutation(len(length))
    whole = length[order] > T - 2  # pieces have at least two tokens: nothing fits beside these
    rows = [[int(i)] for i in order[whole]]
    rest = order[~whole]
    for lo in range(0, len(rest), window):
        some = rest[lo : lo + window]
        some = some[np.argsort(-length[some], kind="stable")]
        free: list[tuple[int, int]] = []  # (tokens free, row), sorted for bisection
        for i, n in zip(some.tolist(), length[some].tolist(), strict=True):
            at = bisect.bisect_left(free, (n, -1))
            if at < len(free):
                room, row = free.pop(at)
                rows[row].append(i)
            else:
                room, row = T, len(rows)
                rows.append([i])
            bisect.insort(free, (room - n, row))
    for pieces in rows:
        if len(pieces) > 1:  # else pieces would be sorted by length within each row
            rng.shuffle(pieces)
    ptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=ptr[1:])
    return Rows(np.array([i for row in rows for i in row], np.int64), ptr)


def work(length: Int64[np.ndarray, " n"], rows: Rows) -> Int64[np.ndarray, " R"]:
    """Returns the visible pairs of causal attention within documents, for each row."""
    pairs = length[rows.pieces] * (length[rows.pieces] + 1) // 2
    return np.add.reduceat(pairs, rows.ptr[:-1]) if len(rows.ptr) > 1 else pairs


def share(work: Int64[np.ndarray, " B"], groups: int) -> Int64[np.ndarray, " B"]:
    """Reorders B rows so that `groups` equal groups of neighbours have about equal work.

    Greedy (Graham 1969): the largest row comes first, and each goes to the group with the least work that has room.
    Rows of equal work keep their order. Raises ValueError unless `groups` divides B.
    """
    if len(work) % groups:
        raise ValueError(f"{groups=} must divide {len(work)} rows")
    members: list[list[int]] = [[] for _ in range(groups)]
    sums = [0] * groups
    for i in np.argsort(-work, kind="stable").tolist():
        least = min((g for g in range(groups) if len(members[g]) < len(work) // groups), key=lambda g: sums[g])
        members[least].append(i)
        sums[least] += int(work[i])
    return np.array([i for group in members for i in group], np.int64)


def fill(
    corpus: UInt8[np.ndarray, " N"],
    pieces: Pieces,
    members: Int64[np.ndarray, " n"],
    T: int,
) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Returns the row of the pieces `members`: tokens, restarting positions, segment ids (0 is padding), weights."""
    tokens, positions, segments = (np.zeros(T, np.int32) for _ in range(3))
    weights = np.zeros(T, np.float32)
    at = 0
    for segment, i in enumerate(members.tolist(), start=1):
        start, n = int(pieces.start[i]), int(pieces.length[i])
        tokens[at : at + n] = corpus[start : start + n]
        if pieces.first[i]:
            tokens[at] = BOS
        positions[at : at + n] = np.arange(n)
        segments[at : at + n] = segment
        weights[at + int(pieces.skip[i]) : at + n] = 1
        at += n
    return tokens, positions, segments, weights
