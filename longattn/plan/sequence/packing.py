"""How packed documents' true work lies on devices: along the sequence by layout, and over groups of rows.

A token sees its own document alone, so devices with equal numbers of tokens have unequal numbers of pairs: few tokens
of a long document cost more than many of short ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from longattn import config
from longattn.config.mesh import LayoutName
from longattn.mask import Causal, Mask
from longattn.parallel.layout import SequenceLayout
from longattn.tasks import bytelm
from longattn.train import data


@functools.lru_cache(maxsize=65_536)
def document_work(mask: Mask, n: int) -> np.ndarray:
    """int64 [n]: the keys that each token of a document of n tokens sees.

    Raises:
      ValueError: for a mask that is no rule of q - k.
    """
    if not mask.is_relative:
        raise ValueError(f"{mask=} must be a rule of q - k, such as Causal() & Window(1024), for packed documents")
    d = np.arange(1 - n, n)
    seen = np.concatenate([[0], np.cumsum(np.asarray(mask(d, np.zeros_like(d)), np.int64))])
    return seen[n:] - seen[:n]  # of distances q - n + 1 .. q


def row_work(documents: Sequence[int], T: int, mask: Mask = Causal()) -> np.ndarray:
    """int64 [T]: the keys that each token of a row sees; padding sees none that count."""
    work = np.zeros(T, np.int64)
    at = 0
    for n in documents:
        work[at : at + n] = document_work(mask, n)
        at += n
    return work


def imbalance(work: np.ndarray, layout: SequenceLayout, P: int) -> np.ndarray:
    """float64 [R]: of rows [R T] of work, that of the device that has most over the mean of P devices."""
    shares = layout.permute(work, P).reshape(len(work), P, -1).sum(2)
    return shares.max(1) / shares.mean(1)


def over_groups(work: np.ndarray, groups: int) -> np.ndarray:
    """float64 [steps]: of the rows' work [steps B], that of the group of neighbours that has most over the mean."""
    shares = work.reshape(len(work), groups, -1).sum(2)
    return shares.max(1) / shares.mean(1)


def table(
    lengths: Sequence[int], devices: Sequence[int], rows: int = 256, glob: str = "", mask: Mask = Causal()
) -> list[dict[str, Any]]:
    """Rows of JSON values: the imbalance along the sequence for every T, P and layout, mean and worst of some rows.

    Args:
      lengths: of the rows.
      devices: numbers of devices along the sequence.
      rows: of each length that are looked at, in the order of training.
      glob: files, as `config.ByteLM.glob`.
      mask: of q - k.
    """
    found = []
    for T in lengths:
        packed = data.source(config.ByteLM(glob=glob, T=T, B=1), seed=0, split="train")
        assert isinstance(packed, data.Packed)
        ptr, lengths_of = packed.rows.ptr, packed.pieces.length[packed.rows.pieces]
        chosen = [int(packed.order(step)[0]) for step in range(min(rows, packed.num_batches))]
        documents = [lengths_of[ptr[row] : ptr[row + 1]].tolist() for row in chosen]
        work = np.stack([row_work(d, T, mask) for d in documents])
        tokens = np.stack([np.arange(T) < sum(d) for d in documents]).astype(np.int64)
        for P in devices:
            for name in get_args(LayoutName):
                layout = SequenceLayout(name)
                by_work, by_tokens = imbalance(work, layout, P), imbalance(tokens, layout, P)
                found.append(
                    {"T": T, "P": P, "layout": name, "rows": len(work),
                     "documents_per_row": float(np.mean([len(d) for d in documents])),
                     "mean": float(by_work.mean()), "worst": float(by_work.max()),
                     "by_tokens": float(by_tokens.mean())}
                )  # fmt: skip
    return found


def groups_table(
    lengths: Sequence[int], groups: Sequence[int], rows_each: Sequence[int], glob: str = "", steps: int = 64
) -> list[dict[str, Any]]:
    """Rows of JSON values: the imbalance between groups of a step's rows, in the data's order and assigned by work.

    Args:
      lengths: of the rows.
      groups: numbers of groups, such as data * fsdp of a mesh.
      rows_each: rows of a group.
      glob: files, as `config.ByteLM.glob`.
      steps: that are looked at, or an epoch's.
    """
    found = []
    for T in lengths:
        for n in groups:
            for each in rows_each:
                packed = data.source(config.ByteLM(glob=glob, T=T, B=n * each), seed=0, split="train")
                assert isinstance(packed, data.Packed)
                whole = range(min(steps, len(packed.work) // (n * each)))
                if not whole:
                    continue
                rows = np.stack([packed.order(step) for step in whole])
                before = packed.work[rows]
                after = np.stack([work[bytelm.share(work, n)] for work in before])
                found.append(
                    {"T": T, "groups": n, "rows_each": each, "steps": len(whole),
                     "before": float(over_groups(before, n).mean()), "after": float(over_groups(after, n).mean())}
                )  # fmt: skip
    return found
