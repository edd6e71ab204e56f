"""Turns files or generators into batches by random access: (step, rows) -> tokens.

The order is a function of (config, seed). A process reads only the rows it holds, and a resumed run starts at its step
without any saved state.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from longattn import config
from longattn.parallel import SequenceLayout
from longattn.tasks import bytelm, mqar, needle

Split = Literal["train", "valid"]

TRAIN_ROWS, VALID_ROWS = 100_000, 3_000  # rows of a generated task in an epoch and held out, as in Zoology's Figure 2
NEEDLE_VALID = 0.05  # share of the haystack's documents held out
AHEAD = 4  # batches to prefetch


class Batch(NamedTuple):
    """B rows of T tokens. Padding has segment id 0 and weight 0."""

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]  # restart at every segment
    segment_ids: Int32[np.ndarray, "B T"]  # 1, 2, ... within a row
    weights: Float32[np.ndarray, "B T"]  # weight of the loss of predicting token t


@runtime_checkable
class Source(Protocol):
    """Random access to the batches of one split."""

    @property
    def num_batches(self) -> int:
        """The number of batches per epoch; the last one may end in empty rows."""

    @property
    def info(self) -> dict[str, Any]:
        """A description of the data, for the run's record."""

    @property
    def lengths(self) -> dict[int, float]:
        """The mean number of documents of each length in a row."""

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step (any step >= 0: epochs follow one another), or only some of its rows."""
        ...


def _check_memory(what: str, needed: int, remedy: str) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * needed > memory:
        raise ValueError(
            f"{what} takes {needed / 2**30:.1f} GiB, which must be at most half of {memory / 2**30:.1f} GiB: {remedy}"
        )


# ---- files


class Document(NamedTuple):
    name: str  # path relative to the corpus's root, with "/"
    start: int  # index of its first byte in Corpus.data
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in the order of their names, each preceded by one separator byte (see tasks/bytelm.py)."""

    data: UInt8[np.ndarray, " N"]
    documents: tuple[Document, ...]
    hash: str  # sha256 over names, sizes and contents
    empty: int  # files that had no bytes

    def read(self, document: Document) -> bytes:
        return self.data[document.start : document.start + document.size].tobytes()


def read_corpus(pattern: str, max_bytes: int | None = None) -> Corpus:
    """Reads the files that match a glob ("" is the standard library's sources), at most `max_bytes` bytes in all.

    Raises ValueError if a file cannot be read or there are no bytes at all.
    """
    root, paths = _find(pattern)
    files = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(pattern, path, error.strerror) from error
        if stat.S_ISREG(status.st_mode):
            files.append((path, status.st_size, status.st_mtime_ns))
        elif not stat.S_ISDIR(status.st_mode):
            raise _unreadable(pattern, path, "not a regular file")
    _check_memory(
        f"glob={pattern!r}", min(sum(size for _, size, _ in files), max_bytes or sys.maxsize), "set max_bytes"
    )
    return _load(pattern, root, tuple(files), max_bytes)


def _find(pattern: str) -> tuple[str, list[str]]:
    """Returns the directory that names are relative to, and the matching paths, sorted."""
    if not pattern:
        root = sysconfig.get_path("stdlib")
        # pydoc_data is one generated text of 700 kB: it would dominate the loss of the split it falls into.
        skipped = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
        paths = [str(p) for p in Path(root).rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    else:
        pattern = os.path.expanduser(pattern)
        root = os.path.dirname(pattern)
        while glob.has_magic(root):
            root = os.path.dirname(root)
        paths = glob.glob(pattern, recursive=True)
    return root, sorted(set(paths))


def _unreadable(pattern: str, path: str, reason: str | None) -> ValueError:
    return ValueError(
        f"glob={pattern!r} matches {path}, which cannot be read ({reason}): make it readable or narrow the glob"
    )


@functools.lru_cache(maxsize=2)  # both splits, and every length a study compares, read the same files
def _load(pattern: str, root: str, files: tuple[tuple[str, int, int], ...], max_bytes: int | None) -> Corpus:
    """Reads the files. `files` carries sizes and modification times, so that the cache misses changed files."""
    parts: list[bytes] = []
    documents: list[Document] = []
    digest = hashlib.sha256()
    at = empty = 0
    left = sys.maxsize if max_bytes is None else max_bytes
    for path, *_ in files:
        if left == 0:
            break
        try:
            with open(path, "rb") as file:
                text = file.read(left if max_bytes is not None else -1)
        except OSError as error:
            raise _unreadable(pattern, path, error.strerror) from error
        if not text:
            empty += 1
            continue
        name = Path(os.path.relpath(path, root or ".")).as_posix()
        digest.update(f"{name}\0{len(text)}\0".encode(errors="surrogateescape"))
        digest.update(text)
        parts += [bytes([bytelm.SEPARATOR]), text]
        documents.append(Document(name, at + 1, len(text)))
        at += 1 + len(text)
        left -= len(text)
    if not documents:
        found = f"{len(files)} files, {empty} of them empty" if files else "no files"
        raise ValueError(
            f"glob={pattern!r} must match files with bytes, and matches {found}: correct it ('dir/**' reads a tree)"
        )
    return Corpus(np.frombuffer(b"".join(parts), np.uint8), tuple(documents), digest.hexdigest(), empty)


def split_corpus(corpus: Corpus, valid: float, split: Split) -> Corpus:
    """Returns the documents of one split, chosen by a hash of the name: adding files moves no document to the other.

    Raises ValueError if the split has no documents.
    """

    def held_out(document: Document) -> bool:
        digest = hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") < valid * 2.0**64

    chosen = [d for d in corpus.documents if held_out(d) == (split == "valid")]
    if not chosen:
        raise ValueError(
            f"{valid=} leaves the {split} split without any of the {len(corpus.documents)} documents: "
            f"{'raise' if split == 'valid' else 'lower'} it or give more files (a document is never divided)"
        )
    documents, parts, at = [], [], 0
    for d in chosen:
        parts.append(corpus.data[d.start - 1 : d.start + d.size])
        documents.append(Document(d.name, at + 1, d.size))
        at += 1 + d.size
    return Corpus(np.concatenate(parts), tuple(documents), corpus.hash, corpus.empty)


# ---- sources


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents packed into rows of length T; each epoch holds every row once, in an order of its own."""

    cfg: config.ByteLM
    corpus: Corpus  # documents of this split
    shuffle: bool  # the held-out set keeps one order
    seed: int
    pieces: bytelm.Pieces
    rows: bytelm.Rows
    num_batches: int
    info: dict[str, Any]
    groups: int = 1  # number of groups of a step's rows that are made to cost the same

    @functools.cached_property
    def work(self) -> Int64[np.ndarray, " R"]:
        """The visible pairs of each row."""
        return bytelm.work(self.pieces.length, self.rows)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents of this split; `corpus.read(document)` gives the bytes."""
        return self.corpus.documents

    @property
    def lengths(self) -> dict[int, float]:
        """The mean number of pieces of each length in a row."""
        found, counts = np.unique(self.pieces.length, return_counts=True)
        rows = len(self.rows.ptr) - 1
        return {int(n): count / rows for n, count in zip(found, counts, strict=True)}

    def order(self, step: int) -> Int64[np.ndarray, " B"]:
        """Returns the rows of a step; -1 stands for the empty rows at the end of an epoch's last batch."""
        epoch, at = divmod(step, self.num_batches)
        rows = _order(self.seed, epoch if self.shuffle else 0, len(self.rows.ptr) - 1)
        rows = rows[at * self.cfg.B : (at + 1) * self.cfg.B]
        rows = np.concatenate([rows, np.full(self.cfg.B - len(rows), -1)])
        return rows if self.groups == 1 else rows[bytelm.share(np.where(rows < 0, 0, self.work[rows]), self.groups)]

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        filled = []
        for row in self.order(step)[rows or slice(None)].tolist():
            start, stop = self.rows.ptr[row : row + 2] if row >= 0 else (0, 0)
            filled.append(bytelm.fill(self.corpus.data, self.pieces, self.rows.pieces[start:stop], self.cfg.T))
        return Batch(*(np.stack(column) for column in zip(*filled, strict=True)))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> Int64[np.ndarray, " rows"]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _packed(cfg: config.ByteLM, seed: int, split: Split, groups: int) -> Packed:
    whole = read_corpus(cfg.glob, cfg.max_bytes)
    corpus = split_corpus(whole, cfg.valid, split)
    seed = seed if split == "train" else 0  # every run is scored on the same rows
    pieces = bytelm.cut(np.array([d.size for d in corpus.documents]), cfg.T, cfg.overlap)
    rows = bytelm.pack(pieces.length, cfg.T, np.random.default_rng(seed))
    n = len(rows.ptr) - 1
    info = _corpus_info(whole, corpus, split) | {
        "task": "bytelm",
        "pieces": len(pieces.length),
        "rows": n,
        "padding": 1 - float(pieces.length.sum()) / (n * cfg.T),
    }
    groups = groups if cfg.balance else 1
    if cfg.B % groups:
        raise ValueError(f"{groups=} must divide {cfg.B=}")
    return Packed(cfg, corpus, split == "train", seed, pieces, rows, -(-n // cfg.B), info, groups)


def _corpus_info(whole: Corpus, part: Corpus, split: Split) -> dict[str, Any]:
    return {
        "split": split,
        "corpus_sha256": whole.hash,
        "corpus_bytes": sum(d.size for d in whole.documents),
        "corpus_documents": len(whole.documents),
        "empty_files_skipped": whole.empty,
        "bytes": sum(d.size for d in part.documents),
        "documents": len(part.documents),
    }


@dataclass(frozen=True, eq=False)
class Generated:
    """Rows made on demand from their index. The train split never repeats; the held-out set does."""

    T: int
    B: int
    row: Callable[[int], tuple[np.ndarray, np.ndarray]]  # index -> tokens [T], weights [T]
    repeat: bool
    num_batches: int
    info: dict[str, Any]

    @property
    def lengths(self) -> dict[int, float]:
        """One document of T tokens."""
        return {self.T: 1.0}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        step = step % self.num_batches if self.repeat else step
        made = [self.row(i) for i in range(step * self.B, (step + 1) * self.B)[rows or slice(None)]]
        tokens, weights = (np.stack(column) for column in zip(*made, strict=True))
        positions = np.broadcast_to(np.arange(self.T, dtype=np.int32), tokens.shape)
        return Batch(tokens, positions, np.ones_like(tokens), weights)


def _generated(cfg: config.MQAR | config.Needle, seed: int, split: Split) -> Generated:
    seed = seed if split == "train" else 0  # every run is scored on the same rows
    if isinstance(cfg, config.MQAR):
        row = functools.partial(mqar.row, cfg, seed, split)
        info = {"task": "mqar", "split": split, "chance": mqar.chance(cfg), "guess": mqar.guess(cfg)}
    else:
        needle.room(cfg)  # raises before any file is read
        whole = read_corpus(cfg.glob)
        corpus = split_corpus(whole, NEEDLE_VALID, split)
        row = functools.partial(needle.row, cfg, corpus.data, seed, split)
        info = _corpus_info(whole, corpus, split) | {"task": "needle", "chance": needle.chance(cfg)}
    num_batches = -(-(TRAIN_ROWS if split == "train" else VALID_ROWS) // cfg.B)
    return Generated(cfg.T, cfg.B, row, split == "valid", num_batches, info)


def source(cfg: config.Data, *, seed: int, split: Split, groups: int = 1) -> Source:
    """Returns random access to one split. The seed decides the order of the train split alone.

    Args:
      groups: number of groups of neighbouring rows in a step (devices x micro-batches). With `ByteLM.balance` a step's
        rows are reordered so that the groups cost about the same; which rows a step has does not change.

    Raises:
      ValueError: files cannot be read, a glob matches no bytes, a split has no documents, or T is too short for the
        task.
    """
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative")
    _check_memory(f"reading ahead with T={cfg.T}, B={cfg.B}", AHEAD * cfg.B * cfg.T * 16, "lower T or B")
    return _packed(cfg, seed, split, groups) if isinstance(cfg, config.ByteLM) else _generated(cfg, seed, split)


# ---- over a mesh


@dataclass(frozen=True, eq=False)
class Spread:
    """A source whose batches are sharded over a mesh: each process reads the rows of its devices, each row once.

    Rows are permuted into the layout's order as they are read, so that a device's shard is a slice. A device's shard
    depends on its place in the mesh alone, never on its process; processes that share a sequence slice the same rows.
    """

    source: Source
    shape: tuple[int, int]  # [B T]
    sharding: jax.sharding.Sharding  # of each array of a batch
    layout: SequenceLayout = SequenceLayout()  # order of a row's tokens over the devices
    shards: int = 1  # number of shards that `layout` permutes

    @property
    def num_batches(self) -> int:
        return self.source.num_batches

    @property
    def info(self) -> dict[str, Any]:
        return self.source.info

    @property
    def lengths(self) -> dict[int, float]:
        return self.source.lengths

    def batch(self, step: int, rows: slice | None = None) -> Any:
        """Returns the whole batch of a step as global arrays; `rows` must be None."""
        if rows is not None:
            raise ValueError(f"{rows=} must be None: which rows a process reads follows from the mesh")

        @functools.cache
        def read(start: int, stop: int) -> Batch:
            whole = self.source.batch(step, slice(start, stop))
            return Batch(*(self.layout.permute(x, self.shards) for x in whole))

        def column(i: int) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self.shape[0])
                return read(start, stop)[i][:, index[1]]

            return jax.make_array_from_callback(self.shape, self.sharding, part)

        return Batch(*map(column, range(len(Batch._fields))))


# ---- reading ahead


@dataclass(frozen=True, eq=False)
class _FromStep:
    """The batches from step `start` on, as grain's random-access data source."""

    source: Source
    start: int
    rows: slice | None

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, index: SupportsIndex) -> tuple[int, Batch]:
        step = self.start + int(index)
        return step, self.source.batch(step, self.rows)


def loader(source: Source, start: int = 0, rows: slice | None = None) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) endlessly from step `start`, prefetched by one thread; `rows` selects rows of each batch."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.source(_FromStep(source, start, rows)).to_iter_dataset(options))
