"""The kernels' copies never meet: their own source over walks of every shape, on a machine whose copies take long."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.mask import EMPTY, FULL, PARTIAL, Full
from longattn.ops.attention.pallas_tpu import backward, blocks, fetch, forward, row
from longattn.ops.attention.pallas_tpu.call import Call
from tests.ops.attention.pallas_tpu.numpy_kernels import Hazard, Machine, calls

QUERIES, KEYS = 2, 16  # of a block
D, V, SCALE = 2, 3, 0.5
NO_MASK = jax.tree.structure(Full())


def call(rows_q: int, rows_k: int, heads: int, group: int, short: int) -> Call:
    """A call whose last block fetched is `short` tokens short."""
    T, S = rows_q * QUERIES, rows_k * KEYS
    return Call(
        heads * group, heads, T - short, S, D, V, QUERIES, KEYS, QUERIES, KEYS // 2, SCALE, None, (), None, NO_MASK,
        None, False, 1.0, 0,
    )  # fmt: skip


def halved(kinds: np.ndarray) -> np.ndarray:
    """The kinds of blocks' two halves of keys, where blocks [N keys queries] have these kinds: [N 2*keys queries]."""
    N, keys, queries = kinds.shape
    cut = [(PARTIAL, EMPTY), (EMPTY, PARTIAL), (PARTIAL, PARTIAL), (PARTIAL, FULL), (FULL, PARTIAL), (EMPTY, FULL)]
    some = np.random.default_rng(N).choice(np.array(cut), kinds.shape)
    return np.where(kinds[..., None] == PARTIAL, some, kinds[..., None]).swapaxes(2, 3).reshape(N, 2 * keys, queries)


def every(rows: int, columns: int) -> np.ndarray:
    """All kinds [N rows columns] that the blocks can have."""
    return np.array(list(itertools.product((EMPTY, PARTIAL, FULL), repeat=rows * columns))).reshape(-1, rows, columns)


def sample(rows: int, columns: int) -> np.ndarray:
    """Some kinds [N rows columns], sparse ones and full ones among them."""
    rng = np.random.default_rng(10 * rows + columns)
    shown = rng.random((24, rows, columns)) < rng.choice([0.2, 0.5, 0.8, 1.0], (24, 1, 1))
    return np.where(shown, rng.choice([PARTIAL, FULL], shown.shape), EMPTY)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # a lost or doubled block is far off


def check_backward(machine: Machine, kinds: np.ndarray, walk: np.ndarray, n: Call) -> None:
    """The kernel's sums for the tiles [keys queries] that are not EMPTY, against all pairs at once."""
    group, length = n.H // n.K, n.rows_q * QUERIES
    q, do, k, v = normal(1, n.H, n.T, D), normal(1, n.H, n.T, V), normal(1, n.K, n.S, D), normal(1, n.K, n.S, V)
    stats = np.pad(normal(1, n.H, 2, n.T), (*((0, 0),) * 3, (0, length - n.T)))
    stats[:, :, 0, n.T :] = backward.NO_KEY
    dq, dk, dv = machine.backward(n, np.float32, walk[None, None], q, k, v, do, stats, None, None, None)

    seen = np.repeat(np.repeat(kinds != EMPTY, KEYS // 2, 0), QUERIES, 1)[:, : n.T].T
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    p = seen * np.exp(SCALE * (q @ k.swapaxes(2, 3) - stats[:, :, 0, : n.T, None]))
    ds = p * (do @ v.swapaxes(2, 3) - stats[:, :, 1, : n.T, None])
    over_group = lambda x: x.reshape(1, n.K, group, *x.shape[2:]).sum(2)
    visited = np.repeat((kinds != EMPTY).any(0), QUERIES)[: n.T]
    close(dq[..., : n.T][..., visited], (ds @ k).swapaxes(2, 3)[..., visited])
    close(dk, SCALE * over_group(ds.swapaxes(2, 3) @ q))
    close(dv, over_group(p.swapaxes(2, 3) @ do))


def check_forward(machine: Machine, kinds: np.ndarray, walk: np.ndarray, n: Call, size: float) -> None:
    """The kernel's result for the tiles [queries keys] that are not EMPTY, against all pairs at once.

    Args:
      size: of keys. Large ones send rows that are not bounded around a second time.
    """
    q, k, v = normal(1, n.H, n.T, D), size * normal(1, n.K, n.S, D), normal(1, n.K, n.S, V)
    with np.errstate(over="ignore", invalid="ignore"):
        out, lse = machine.forward(n, np.float32, walk[None, None], q, k, v, None, None, None)

    seen = np.repeat(np.repeat(kinds != EMPTY, QUERIES, 0), KEYS // 2, 1)
    k, v = np.repeat(k, n.H // n.K, 1), np.repeat(v, n.H // n.K, 1)
    logits = SCALE * q.astype(np.float64) @ k.swapaxes(2, 3)
    most = np.max(logits, -1, where=seen, initial=-1e9, keepdims=True)
    e = seen * np.exp(np.minimum(logits - most, 0))
    total = e.sum(-1)
    close(out, e @ v / np.where(total == 0, 1, total)[..., None], atol=1e-4 * size)
    with np.errstate(divide="ignore"):
        close(SCALE * lse, np.where(total == 0, 0, most[..., 0]) + np.log(total))


def backward_over(machine: Machine, kinds: np.ndarray, heads: int, group: int, short: int) -> None:
    _, rows, columns = kinds.shape
    n = call(columns, rows, heads, group, short)
    kinds = halved(kinds)
    walks = np.asarray(blocks.lists(jnp.asarray(kinds[:, None], jnp.int8), 2, 1, None, [], mark_first=True))
    for kind, walk in zip(kinds, walks[:, 0]):
        check_backward(machine, kind, walk, n)


def forward_over(machine: Machine, kinds: np.ndarray, group: int, size: float = 1.0) -> None:
    _, rows, columns = kinds.shape
    n = call(rows, columns, 1, group, 0)
    bounded = jnp.asarray(np.random.default_rng(1).random((len(kinds), 1, rows)) < (0.5 if size == 1.0 else 0.0))
    kinds = halved(kinds.swapaxes(1, 2)).swapaxes(1, 2)
    walks = np.asarray(blocks.lists(jnp.asarray(kinds[:, None], jnp.int8), 1, 2, None, [bounded]))
    for kind, walk in zip(kinds, walks[:, 0]):
        check_forward(machine, kind, walk, n, size)


SHAPES = [(3, 2), (2, 3), (5, 1), (1, 5), (4, 4)]  # rows of lists, blocks in them
by_shape = pytest.mark.parametrize(
    "shape", [*SHAPES[:2], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[2:])], ids=str
)
HEADS = [(1, 1, 0), (2, 2, 1), (1, 3, 0)]  # key heads, query heads of each, queries that the last block lacks


@pytest.mark.parametrize(("heads", "group", "short"), HEADS)
@by_shape
def test_backward(shape, heads, group, short):
    backward_over(Machine(), sample(*shape), heads, group, short)


@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("group", [1, 2])
@by_shape
def test_forward(shape, group, size):
    forward_over(Machine(), sample(*shape), group, size)


@pytest.mark.slow
def test_every_walk_of_three_rows_over_two_blocks():
    backward_over(Machine(), every(3, 2), 1, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "group", "short"), HEADS)
@pytest.mark.parametrize("shape", [(2, 3), (6, 1)], ids=str)
def test_every_walk(shape, heads, group, short):
    backward_over(Machine(), every(*shape), heads, group, short)
    forward_over(Machine(), every(*shape), group)


WAITS = [
    (module, name, i)
    for module, name in ((backward, "settle"), (backward, "wait"), (forward, "wait"), (row, "wait"), (fetch, "wait"))
    for i in range(calls(module, name))
]


def meet(without: tuple[ModuleType, str, int]) -> None:
    """Walks that need every wait."""
    for shape, group in itertools.product(SHAPES, (1, 2)):
        if without[0] in (forward, row):
            forward_over(Machine(without), sample(*shape), group)
            forward_over(Machine(without), sample(*shape), group, 200.0)
        else:
            backward_over(Machine(without), sample(*shape), 1, group, 0)


@pytest.mark.parametrize("without", WAITS, ids=lambda x: f"{x[0].__name__.rpartition('.')[2]}.{x[1]}{x[2]}")
def test_no_wait_can_be_left_out(without):
    with pytest.raises(Hazard):
        meet(without)


def test_all_waits_are_tried():
    assert {(module, name) for module, name, _ in WAITS} == {
        (backward, "settle"), (backward, "wait"), (forward, "wait"), (row, "wait"), (fetch, "wait")
    }  # fmt: skip
