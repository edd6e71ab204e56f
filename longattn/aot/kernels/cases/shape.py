"""The shape that a case is built for: lengths, heads, mask, packed documents, block sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from longattn.cost.pairs import visible_pairs
from longattn.mask import EMPTY, Causal, Full, Mask, Window, parse

KINDS = tuple(f"{decay}{delta}" for decay in ("none", "scalar", "vector") for delta in ("", "_delta"))


@dataclass(frozen=True)
class Shape:
    """The shape of a case. Everything is bfloat16; queries and keys have equal lengths."""

    T: int = 8192  # queries and keys; `matmul`: the edge of its square matrices
    H: int = 8  # query heads (`matmul` ignores this and all but the block sizes below)
    K: int | None = None  # key/value heads; None: H
    D: int = 128  # head size of queries and keys
    V: int | None = None  # head size of values; None: D
    mask: Mask = Causal()  # an expression such as "Window(4095)"
    documents: int = 0  # packed into the sequence, of random lengths; 0: no segment ids
    bT: int = 1024  # block of queries; `matmul`: of rows and of columns
    bS: int = 1024  # block of keys; `matmul`: of the summed dimension
    bC: int | None = None  # keys of one product within a block; None: bS
    bR: int | None = None  # queries of one product within a block, for kernels that split queries; None: bT
    kind: str = "scalar"  # of linear attention: its decay, with "_delta" for the delta rule, such as "vector_delta"

    def __post_init__(self) -> None:
        for name in ("T", "H", "K", "D", "V", "bT", "bS", "bC", "bR"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("bT", "bS"):
            if self.T % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide T={self.T}")
        for part, whole in (("bC", "bS"), ("bR", "bT")):
            if getattr(self, part) is not None and getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part}={getattr(self, part)} must divide {whole}={getattr(self, whole)}")
        if self.H % self.key_heads:
            raise ValueError(f"K={self.K} must divide H={self.H}")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if not 0 <= self.documents <= self.T:
            raise ValueError(f"documents={self.documents} must be at least 0 and at most T={self.T}")

    def as_json(self) -> dict[str, Any]:
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "mask": str(self.mask)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Shape:
        """Inverts `as_json`."""
        return cls(**{**values, "mask": parse(values["mask"])})

    @property
    def key_heads(self) -> int:
        return self.H if self.K is None else self.K

    @property
    def values(self) -> int:
        """The head size of values."""
        return self.D if self.V is None else self.V

    @property
    def compute(self) -> int:
        """The number of keys of one product."""
        return self.bS if self.bC is None else self.bC

    @property
    def blocks(self) -> tuple[int, int]:
        """The numbers of blocks of queries and of keys, (Jq, Jk)."""
        return self.T // self.bT, self.T // self.bS

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each document, from uniformly random cuts; () without segment ids."""
        if not self.documents:
            return ()
        cuts = np.random.default_rng(0).choice(self.T - 1, self.documents - 1, replace=False) + 1
        return tuple(np.diff([0, *np.sort(cuts), self.T]).tolist())

    def segment_ids(self) -> np.ndarray:
        """Returns each token's document, int32 [T]."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    def kinds(self) -> np.ndarray:
        """Returns EMPTY, PARTIAL or FULL of each block by the mask, ignoring documents, int8 [Jq Jk]."""
        (Jq, Jk), T, S = self.blocks, self.bT, self.bS
        q, k = np.arange(Jq, dtype=np.int32)[:, None] * T, np.arange(Jk, dtype=np.int32)[None] * S
        return np.asarray(self.mask.kind(q, q + T - 1, k, k + S - 1))

    def visible(self) -> np.ndarray:
        """Returns the blocks with a visible pair by the mask, ignoring documents, bool [Jq Jk]."""
        return self.kinds() != EMPTY

    def share_a_document(self) -> np.ndarray:
        """Returns the blocks with a query and a key of one document, bool [Jq Jk]; all blocks without segment ids."""
        if not self.documents:
            return np.ones(self.blocks, bool)
        ids = self.segment_ids()  # they rise along the sequence
        q, k = ids.reshape(self.blocks[0], -1), ids.reshape(self.blocks[1], -1)
        return (q[:, :1] <= k[:, -1]) & (k[:, 0] <= q[:, -1:])

    def pairs(self) -> float:
        """Returns the visible pairs of one head."""
        if self.documents and not isinstance(self.mask, Causal | Full | Window):
            raise NotImplementedError(f"documents are counted under masks of q - k only, mask is {self.mask}")
        return float(visible_pairs(self.mask, self.T, documents=self.lengths or None))
