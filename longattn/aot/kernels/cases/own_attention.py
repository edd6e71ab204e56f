"""Our attention kernels for TPUs (`longattn.ops.attention.pallas_tpu`), which walk over lists of blocks.

How often each body runs is counted in the lists that the kernels would be given. The data decide which rows of blocks
are bounded, and which of the others are computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longattn.aot.kernels.cases.kernel import F32, Branch, Case, Kernel, flops, gradients, row, sizes
from longattn.aot.kernels.cases.shape import Shape
from longattn.mask import Full, Window
from longattn.ops.attention import attention
from longattn.ops.attention.contract import Visibility
from longattn.ops.attention.pallas_tpu import Blocks, Tuning, blocks

INT32 = 4  # bytes
_TILES = {"forward": (512, 256), "backward": (256, 256)}  # queries and keys of one product, if the shape names none
# The functions under the forward kernel's `pl.when`.
_BOUNDED, _UNBOUNDED, _ONLINE = "of_bounded", "of_unbounded", "of_others"


def _tuning(shape: Shape, kernel: str) -> tuple[Tuning, Blocks]:
    """Returns the shape's block sizes for one of the kernels, as `attention` takes them and alone."""
    queries, keys = _TILES[kernel]
    try:
        sizes = Blocks(shape.bT, shape.bS, shape.bR or min(queries, shape.bT), shape.bC or min(keys, shape.bS))
        return Tuning(**{kernel: sizes}), sizes
    except ValueError as error:
        raise NotImplementedError(str(error)) from error


def _ids(shape: Shape) -> jax.Array | None:
    return jnp.asarray(shape.segment_ids())[None] if shape.documents else None


def _attend(shape: Shape, kernel: str) -> Callable[..., Any]:
    tuning, _ = _tuning(shape, kernel)
    return lambda q, k, v: attention(
        q, k, v, mask=shape.mask, segment_ids=_ids(shape), implementation="pallas_tpu", tuning=tuning
    )


def _arrays(shape: Shape, *heads: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes [1 T heads size], as callers hold arrays: XLA's transposition is not counted."""
    return [jax.ShapeDtypeStruct((1, shape.T, n, size), jnp.bfloat16) for n, size in heads]


def _inputs(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    return _arrays(shape, (shape.H, shape.D), (shape.key_heads, shape.D), (shape.key_heads, shape.values))


# ---- the lists


@dataclass(frozen=True)
class _Lists:
    """The lists of one head."""

    visits: np.ndarray  # blocks of each class in each row, int [rows classes]; the last class needs no mask
    block: np.ndarray  # block of each visit in the order of the walk, int [visits]
    first: np.ndarray  # no earlier row visited this block, bool [visits]
    tiles: np.ndarray | None  # numbers of cut and of whole tiles of each visit to a block with listed tiles, [n 2]
    words: int  # length of a row's list

    @property
    def rows(self) -> int:
        return len(self.visits)

    @property
    def blocks(self) -> int:
        """The number of visits of all rows."""
        return int(self.visits.sum())

    def events(self, group: int) -> dict[str, list[int]]:
        """Counts, for each class, the visits that do something more; `group` heads walk over each row in turn.

        "sent" visits fetch their own block, which was not prefetched. "first" ones begin a block's sum. "ahead" ones
        prefetch the next visit's sum, and "read" ones fetch their own, which was not prefetched.
        """
        rows, classes = self.visits.shape
        row = np.repeat(np.arange(rows), self.visits.sum(1))
        kind = np.concatenate([np.repeat(np.arange(classes), counts) for counts in self.visits])
        order = np.concatenate([np.tile(np.flatnonzero(row == i), group) for i in range(rows)])
        head = np.concatenate([np.repeat(np.arange(group), counts.sum()) for counts in self.visits])
        row, kind, block, first = row[order], kind[order], self.block[order], self.first[order]
        follows = np.diff(row, prepend=-2) <= 1  # its block was prefetched: the row before has visits
        same = (np.diff(block, prepend=-1) == 0) & (np.diff(head, prepend=0) == 0)
        ready = follows & ~first & ~same  # its sum was prefetched
        found = {"sent": ~follows, "first": first, "ahead": np.append(ready[1:], False), "read": ~first & ~ready}
        return {name: np.bincount(kind[held], minlength=classes).tolist() for name, held in found.items()}


def _lists(shape: Shape, tuning: Blocks, by_key: bool) -> _Lists:
    """Returns the lists of one head, whose rows are blocks of queries or, `by_key`, of keys."""
    own = 0 if by_key else 1  # whether the row's logits are bounded
    with jax.default_device(jax.devices("cpu")[0]):
        positions, ids = jnp.arange(shape.T, dtype=jnp.int32)[None], _ids(shape)
        patterns = None
        if not shape.documents:
            patterns = blocks.patterns(
                shape.mask, tuning.block_q, tuning.block_k, tuning.tile_q, tuning.tile_k, shape.T, shape.T
            )
        walk, _ = blocks.walk(
            Visibility(shape.mask, positions, positions, ids, ids), patterns, (tuning.block_q, tuning.block_k),
            (tuning.tile_q, tuning.tile_k), shape.T, shape.T, True, [0] * own, by_key,
        )  # fmt: skip
    table = np.asarray(walk)[0, 0]
    across = tuning.block_q if by_key else tuning.block_k
    listed = blocks.Row(
        lambda i: table[:, i], 2 if patterns is None else len(patterns) + 1, own, shape.T // across, tuning.tiles
    )
    steps = np.arange(int(listed.seen.max()))
    order = listed.block(steps)[steps < listed.seen[:, None]]
    visits = np.diff(np.stack(listed.ends, 1), axis=1, prepend=0)
    tiles = None
    if patterns is None:
        tiles = np.stack([count[steps < listed.ends[0][:, None]] for count, _ in listed.groups(steps)], 1)
    return _Lists(visits, order & blocks.INDEX, order > blocks.INDEX, tiles, table.shape[1])


# ---- declarations


def _groups(counts: np.ndarray, tiles: int, heads: int) -> list[tuple[str, int]]:
    """Returns the bodies of a block's listed tiles in source order, and how often each runs."""
    bodies = []
    for kind, count in zip(("cut", "whole"), counts.T):
        runs = {n: (count % blocks.GROUP == n).sum() for n in range(1, min(blocks.GROUP, tiles + 1))}
        if tiles >= blocks.GROUP:
            runs = {blocks.GROUP: (count // blocks.GROUP).sum(), **runs}
        bodies += [(f"{n} {kind} tiles", heads * int(x)) for n, x in runs.items()]
    return bodies


def _forward(shape: Shape) -> tuple[Kernel, ...]:
    _, tuning = _tuning(shape, "forward")
    found = _lists(shape, tuning, by_key=False)
    *cut, whole = (shape.H * found.visits.sum(0)).tolist()
    *cut_sent, whole_sent = [shape.H * sent for sent in found.events(1)["sent"]]
    rows_of_whole = shape.H * int((found.visits[:, -1] > 0).sum())

    def body(data: str, what: str, runs: int, sent: int) -> Branch:
        which = _BOUNDED if data == _BOUNDED else _UNBOUNDED
        return Branch(f"{what}, {data[3:]}", runs, data, ((sent, runs), (sent, runs, runs)), which)

    def of_cut(data: str) -> list[Branch]:
        if found.tiles is None:
            return [body(data, f"cut block {i}", *counts) for i, counts in enumerate(zip(cut, cut_sent))]
        tiles = [body(data, what, runs, 0) for what, runs in _groups(found.tiles, tuning.tiles, shape.H)]
        tiles = [replace(branch, loop=sum(cut)) for branch in tiles]
        last = body(data, "last cut tile's product", shape.H * int((found.visits[:, 0] > 0).sum()), 0)
        return tiles if data == _ONLINE else [*tiles, last]

    bodies = [
        *of_cut(_BOUNDED),
        body(_BOUNDED, "first whole block of a row", rows_of_whole, whole_sent),
        body(_BOUNDED, "whole block", whole - rows_of_whole, 0),
        body(_UNBOUNDED, "first maximum", shape.H * found.rows, 0),
        *of_cut(_UNBOUNDED),
        body(_UNBOUNDED, "whole block", whole, whole_sent),
        *of_cut(_ONLINE),
        body(_ONLINE, "whole block", whole, whole_sent),
    ]
    number = INT32 * bool(shape.documents)
    query = row(shape.D) + row(shape.values) + F32 + number  # q, out, lse, segment id
    key = row(shape.D) + row(shape.values) + number
    per_head = found.rows * (shape.bT * query + found.words * INT32) + found.blocks * shape.bS * key
    steps = shape.H * found.rows
    moved = float(shape.H * per_head)
    return (Kernel("longattn_attention_forward", steps, tuple(bodies), flops(shape, "DV"), moved, lists=True),)


def _backward(shape: Shape) -> tuple[Kernel, ...]:
    _, tuning = _tuning(shape, "backward")
    found = _lists(shape, tuning, by_key=True)
    events = found.events(shape.H // shape.key_heads)
    bodies = []
    for runs, *counts in zip((shape.H * found.visits.sum(0)).tolist(), *events.values()):
        sent, first, ahead, read = (shape.key_heads * count for count in counts)
        copies = (sent, runs, ahead, first, runs - first, read), (sent, runs, first)
        bodies.append(Branch(f"cut block {len(bodies)}", runs, asides=copies))
    *cut, whole = *bodies[:-1], replace(bodies[-1], what="whole block")
    if found.tiles is not None:
        cut = [Branch(what, n, loop=cut[0].runs) for what, n in _groups(found.tiles, tuning.tiles, shape.H)]
    number = INT32 * bool(shape.documents)
    query = row(shape.D) + row(shape.values) + 2 * F32 + number  # q, do, lse, delta, segment id
    key = 2 * (row(shape.D) + row(shape.values)) + number  # k, v, dk, dv
    dq = shape.D * F32  # transposed, so that nothing is padded
    visits = found.blocks * (query + dq) + (~found.first).sum() * dq
    per_group = found.rows * (shape.bS * key + found.words * INT32)
    return (
        Kernel(
            "longattn_attention_backward", shape.key_heads * found.rows,
            (*cut, whole),
            flops(shape, "DVVDD"), float(shape.H * shape.bT * visits + shape.key_heads * per_group),
            after_bytes=float(shape.H * shape.T * dq), lists=True,  # XLA scales and transposes dq: its reads count
        ),
    )  # fmt: skip


# ---- block sizes worth trying


def _forward_blocks(shape: Shape) -> list[Shape]:
    """Returns the most promising sizes first: programs of this length take a minute to compile."""
    wide = [((2048, 1024), (512, 256)), ((2048, 1024), (256, 256)), ((2048, 1024), (128, 128))]
    if shape.documents:
        found = [((2048, 1024), (512, 512)), ((2048, 1024), (512, 256)), ((2048, 1024), (256, 256))]
        found += [((2048, 2048), (512, 256)), ((1024, 1024), (512, 256))]
    elif isinstance(shape.mask, Window):
        found = [((1024, 1024), (512, 256)), ((1024, 1024), (256, 256)), ((1024, 1024), (128, 128))]
    elif isinstance(shape.mask, Full):
        found = [((2048, 2048), (512, 256)), ((2048, 2048), (256, 256)), *wide[:2]]
    else:
        found = [*wide, ((1024, 1024), (128, 128)), ((1024, 2048), (512, 256))]
    found += [((1024, 512), (256, 128)), ((512, 512), (512, 256)), ((512, 512), (128, 128))]
    sized = [s for block, tile in found for s in _sized(shape, block, tile) if s.bS // (s.bC or s.bS) % 2 == 0]
    return list(dict.fromkeys(sized))


def _backward_blocks(shape: Shape) -> list[Shape]:
    """Returns the most promising sizes first."""
    first = [(1024, 1024), (512, 1024)] if shape.documents or isinstance(shape.mask, Window) else [(2048, 1024)]
    pairs = dict.fromkeys([*first, (1024, 1024), (2048, 1024), (1024, 2048), (512, 512)])
    return [s for pair in pairs for s in _sized(shape, pair, (256, 256))]


def _sized(shape: Shape, block: tuple[int, int], tile: tuple[int, int]) -> list[Shape]:
    """Returns `shape` with these (queries, keys) of a block and of a product, if they divide it."""
    (bT, bS), (bR, bC) = block, tile
    return sizes(shape, (bT,), (bS,), (bC,), bR)


FORWARD = Case("longattn, forward", lambda s: (_attend(s, "forward"), _inputs(s)), _forward, _forward_blocks)
BACKWARD = Case(
    "longattn, dq, dk, dv in one kernel",
    lambda s: (gradients(_attend(s, "backward")), [*_inputs(s), *_arrays(s, (s.H, s.values))]),
    _backward,
    _backward_blocks,
)
