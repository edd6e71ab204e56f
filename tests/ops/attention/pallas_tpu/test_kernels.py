"""The kernels over several blocks, and logits of every size, by the interpreter that knows TPUs' memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import longattn
from longattn import mask as m
from longattn.ops.attention.contract import Options, Visibility
from longattn.ops.attention.pallas_tpu import Blocks, Tuning, back_end
from longattn.ops.attention.pallas_tpu.back_end import BOUND
from tests.ops import oracle
from tests.ops.interpreter import as_on_tpu
from tests.slow import but_few

SEVERAL = Tuning(Blocks(256, 512, 128, 256), Blocks(256, 256, 128, 128))
LOG2E = np.log2(np.e)


@pytest.fixture(autouse=True)
def _interpreted():
    with as_on_tpu():
        yield


@dataclass(frozen=True)
class Case:
    mask: m.Mask = m.Causal()
    lengths: tuple[int, int] = (640, 640)
    heads: tuple[int, int] = (2, 2)
    sizes: tuple[int, int] = (32, 32)
    dtype: str = "bfloat16"
    ids: str = "none"
    softcap: float | None = None

    def __str__(self) -> str:
        return "-".join(str(getattr(self, x.name)) for x in fields(self)).replace(" ", "")


def check(q, k, v, visible=True, tuning=SEVERAL, dtype="float32", scale=None, saved=False, **options: Any) -> Any:
    """out, lse and all gradients against the truth, by the error of `oracle.attention`; returns them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rng = np.random.default_rng(1)
    q, k, v = (np.asarray(x, jnp.dtype(dtype)) for x in (q, k, v))
    do = rng.standard_normal((*q.shape[:3], v.shape[3])).astype(dtype)
    dlse = rng.standard_normal(q.shape[:3]).astype(np.float32)
    visible = np.broadcast_to(visible, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))

    @jax.jit
    def f(q, k, v):
        attend = lambda *x: longattn.attention_with_lse(
            *x, scale=scale, implementation="pallas_tpu", tuning=tuning, **options
        )
        (out, lse), pull = jax.vjp(attend, q, k, v)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *pull((jnp.asarray(do), jnp.asarray(dlse))))))

    got = jax.tree.map(np.asarray, f(q, k, v))
    truth, plain = (
        oracle.attention(
            q,
            k,
            v,
            visible,
            scale=scale,
            softcap=options.get("softcap"),
            do=do,
            dlse=dlse,
            dtype=precision,
            saved=saved and precision != np.float64,
        )
        for precision in (np.float64, jnp.dtype(dtype))
    )
    oracle.assert_accurate(got, truth, plain, np.float32)
    return got


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def several(case: Case) -> None:
    (T, S), (H, K), (D, V) = case.lengths, case.heads, case.sizes
    B, rng, options = 2, np.random.default_rng(2), {}
    q_pos, k_pos = (np.tile(np.arange(n, dtype=np.int32), (B, 1)) for n in (T, S))
    visible = np.ones((B, 1, T, S), bool)
    if case.ids == "positions":
        q_pos, k_pos = (rng.permuted(x, axis=1) for x in (q_pos, k_pos))
        options["positions"] = q_pos, k_pos
    if case.ids in ("packed", "unsorted"):
        segments = [rng.integers(0, 4, (B, n)).astype(np.int32) for n in (T, S)]
        q_ids, k_ids = [np.sort(x, 1) for x in segments] if case.ids == "packed" else segments
        options["segment_ids"] = q_ids, k_ids
        visible &= q_ids[:, None, :, None] == k_ids[:, None, None, :]
    visible &= np.asarray(case.mask(q_pos[:, None, :, None], k_pos[:, None, None, :]))
    q, k, v = normal(3, B, T, H, D), normal(4, B, S, K, D), normal(5, B, S, K, V)
    check(q, k, v, visible, mask=case.mask, dtype=case.dtype, softcap=case.softcap, **options)


PREFIX = m.Causal() | m.Prefix(np.array([100, 600], np.int32))
SEVERAL_BLOCKS = [
    Case(lengths=(641, 641), heads=(2, 1)),
    Case(m.Window(200, 40), (601, 1030), (2, 1), (5, 7), "float32", "packed"),
    Case(PREFIX, (640, 640), ids="positions", softcap=2.0),
    *(Case(mask, (641, 641), (2, 1)) for mask in (m.Full(), m.Causal() & m.Chunked(300), m.Dilated(50, 7))),
    Case(m.Window(150) | m.Global(8), (641, 641), (4, 2), ids="unsorted"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SEVERAL_BLOCKS, ids=str)
def test_several_blocks(case):
    several(case)


@pytest.mark.parametrize(
    ("heads", "scale"),
    [pytest.param(1, None, marks=pytest.mark.slow), pytest.param(4, 30.0, marks=pytest.mark.slow)],
    ids=["shared-bounded", "per head-online"],
)
def test_block_sparse(heads, scale):
    """Alone it needs no mask within a tile; with others, each tile is told what it shows. Some rows are empty."""
    B, T, H, K, D = 2, 700, 4, 2, 32
    visible = np.random.default_rng(15).random((B, heads, 6, 6)) < 0.3
    shown = np.repeat(np.repeat(visible, 128, 2), 128, 3)[:, :, :T, :T]
    q, k, v = normal(16, B, T, H, D), normal(17, B, T, K, D), normal(18, B, T, K, D)
    near = np.asarray(m.Window(40).dense(T, T))
    for mask, seen in (
        (m.BlockSparse(128, visible), shown),
        (m.Window(40) | m.Causal() & m.BlockSparse(128, visible), near | np.tri(T, dtype=bool) & shown),
    ):
        check(q, k, v, seen, scale=scale, saved=scale is not None, mask=mask, dtype="float32")


def test_what_of_block_sparse_is_refused():
    x = jnp.ones((1, 256, 1, 8))
    attend = lambda mask, **more: longattn.attention(x, x, x, mask=mask, implementation="pallas_tpu", **more)
    one = lambda size: m.BlockSparse(size, jnp.ones((1, 1, 256 // size, 256 // size), bool))
    for mask, more, reason in (
        (one(64), {}, "BlockSparse.block_size=64 is no multiple of 128"),
        (one(128), {"positions": jnp.arange(256, dtype=jnp.int32)[None]}, "not at given ones"),
        (one(128) & one(256), {}, "more than one BlockSparse"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            attend(mask, **more)


# ---- logits of every size, in rows of blocks that are bounded and in those that are not

T = 512  # two rows of two blocks
D = 16
SMALL = Tuning(Blocks(256, 256, 256, 128), Blocks(256, 256, 128, 128))


def all_equal() -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, T, 1, D)), np.ones((1, T, 1, D))


def huge() -> tuple[np.ndarray, np.ndarray]:
    """Logits up to +-1e4."""
    q, k = normal(6, 1, T, 1, D), normal(7, 1, T, 1, D)
    return q * (1e4 / np.abs(np.einsum("bthd,bshd->bhts", q, k)).max()), k


def late() -> tuple[np.ndarray, np.ndarray]:
    """One key, in the last block, takes nearly all of the weight."""
    q, k = np.abs(normal(8, 1, T, 1, D)) + 1, normal(9, 1, T, 1, D)
    k[:, T - 3] = 6
    return q, k


def very_negative() -> tuple[np.ndarray, np.ndarray]:
    """All logits near -1e4: weights of one size, exp of each far below the least number."""
    return np.full((1, T, 1, D), 25.0), normal(10, 1, T, 1, D) * 0.01 - 25.0


def at_the_bound(logits: float) -> tuple[np.ndarray, np.ndarray]:
    """|q| |k| just so large in base 2 for the first row of blocks, and its negative reached; small for the second."""
    q, k = np.zeros((1, T, 1, D)), np.zeros((1, T, 1, D))
    q[..., 0], k[..., 0] = 1.0, np.linspace(-1, 1, T)[None, :, None] * (logits / LOG2E)
    q[:, T // 2 :] *= 0.1
    return q, k


LOGITS = {
    "equal": all_equal, "huge": huge, "late": late, "very negative": very_negative,
    "within the bound": lambda: at_the_bound(BOUND * 0.999), "beyond the bound": lambda: at_the_bound(BOUND * 1.001),
}  # fmt: skip


@pytest.mark.parametrize("name", but_few(LOGITS))
def test_logits(name):
    q, k = LOGITS[name]()
    got = check(q, k, normal(11, 1, T, 1, D), tuning=SMALL, scale=1.0, mask=m.Full(), saved=True)
    assert np.isfinite(got["lse"]).all()


@pytest.mark.parametrize(
    ("name", "rows"),
    but_few(
        [
            ("beyond the bound", [False, True]),
            ("within the bound", [True, True]),
            ("huge", [False, False]),
            ("equal", [True, True]),
        ]
    ),
)
def test_which_rows_are_bounded(name, rows, monkeypatch):
    """The cases above are on either side of the bound."""
    seen = []
    bounded = back_end._bounded
    monkeypatch.setattr(back_end, "_bounded", lambda *x: seen.append(bounded(*x)) or seen[-1])
    q, k = (jnp.asarray(x, jnp.float32) for x in LOGITS[name]())
    visibility = Visibility(m.Full(), *(jnp.arange(T, dtype=jnp.int32)[None],) * 2)
    options = Options(scale=1.0, softcap=None, out_dtype="float32", in_order=True, tuning=SMALL)
    plan = back_end.check(q, k, k, None, visibility, options)
    back_end._forward(q, k, k, None, visibility, options, plan.forward)
    np.testing.assert_array_equal(seen[0], [[rows]])


@pytest.mark.parametrize("value", but_few([np.inf, np.nan]), ids=str)
def test_what_is_not_finite_spreads_no_further_than_it_does_elsewhere(value):
    """From a key, to the queries that see it; from a query, to itself."""
    q, k, v = normal(12, 1, T, 1, D), normal(13, 1, T, 1, D), normal(14, 1, T, 1, D)
    k[0, 300, 0, 3], q[0, 7, 0, 2] = value, value
    attend = lambda **more: np.asarray(longattn.attention(*map(jnp.asarray, (q, k, v)), **more))
    other = attend(implementation="xla")
    mine = attend(implementation="pallas_tpu", tuning=SMALL)
    clean = np.isfinite(other)
    assert 0 < clean.mean() < 1
    np.testing.assert_allclose(mine[clean], other[clean], rtol=1e-5, atol=1e-5)


def test_a_race_is_an_error():
    """What these tests stand on: a copy's target that is read too early is found."""

    def kernel(x_ref, o_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, o_ref, semaphore)
        copy.start()
        o_ref[...] = jnp.ones_like(o_ref)
        copy.wait()

    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(
            pl.pallas_call(
                kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
                scratch_shapes=[pltpu.SemaphoreType.DMA],
            )(jnp.zeros((8, 128)))
        )  # fmt: skip
