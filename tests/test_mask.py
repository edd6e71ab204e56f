"""Masks: the rules against plain definitions, block kinds against dense patterns, hashing, pytrees, text."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import mask as m

T, S = 19, 23


def every_third(q, k):
    return (q + k) % 3 == 0


RULES = [  # each mask beside its definition in design.md
    (m.Full(), lambda q, k: True),
    (m.Causal(), lambda q, k: k <= q),
    (m.Window(4), lambda q, k: 0 <= q - k <= 4),
    (m.Window(3, 5), lambda q, k: -5 <= q - k <= 3),
    (m.Window(6, -2), lambda q, k: 2 <= q - k <= 6),
    (m.Chunked(5), lambda q, k: q // 5 == k // 5),
    (m.Prefix(7), lambda q, k: k < 7),
    (m.Global(3), lambda q, k: q < 3 or k < 3),
    (m.Dilated(3, 4), lambda q, k: 0 <= q - k <= 12 and (q - k) % 4 == 0),
    (m.Fn(every_third), every_third),
    (m.Causal() & m.Window(9, 2), lambda q, k: k <= q and -2 <= q - k <= 9),
    (m.Causal() | m.Prefix(6), lambda q, k: k <= q or k < 6),
    (~m.Chunked(4) & m.Causal(), lambda q, k: q // 4 != k // 4 and k <= q),
]


@pytest.mark.parametrize(("mask", "rule"), RULES, ids=lambda x: str(x) if isinstance(x, m.Mask) else "")
def test_rule(mask, rule):
    expected = np.array([[rule(q, k) for k in range(S)] for q in range(T)])
    dense = mask.dense(T, S)
    assert isinstance(dense, np.ndarray)
    assert dense.dtype == np.bool_
    np.testing.assert_array_equal(dense, expected)
    traced = jax.jit(lambda mask, q, k: mask(q, k))(mask, jnp.arange(T)[:, None], jnp.arange(S)[None])
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize(("mask", "rule"), RULES, ids=lambda x: str(x) if isinstance(x, m.Mask) else "")
def test_is_relative(mask, rule):
    """A mask that calls itself relative stays the same when queries and keys move together; the others here do not."""
    q, k = np.arange(T)[:, None], np.arange(S)[None]
    moves = [np.array_equal(mask(q + step, k + step), mask.dense(T, S)) for step in range(1, 8)]
    assert mask.is_relative == all(moves)


def test_is_relative_of_masks_with_arrays():
    prefix, blocks = m.Prefix(np.array([2], np.int32)), m.BlockSparse(4, np.ones((1, 1, 2, 2), bool))
    assert not any(mask.is_relative for mask in (prefix, blocks, m.Causal() & prefix, ~blocks | m.Full()))


def test_leaves_are_per_sequence_and_head():
    n = np.array([2, 9, 0], np.int32)
    prefix = m.Prefix(n).dense(T, S)
    assert prefix.shape == (3, 1, T, S)
    for b in range(3):
        np.testing.assert_array_equal(prefix[b, 0], m.Prefix(int(n[b])).dense(T, S))
    visible = np.random.default_rng(0).random((1, 2, 4, 5)) < 0.5
    blocks = m.BlockSparse(5, visible)
    expected = np.repeat(np.repeat(visible, 5, 2), 5, 3)[:, :, :T, :S]
    np.testing.assert_array_equal(blocks.dense(T, S), expected)
    combined = (blocks & m.Prefix(n) | m.Causal()).dense(T, S)
    np.testing.assert_array_equal(combined, expected & prefix | m.Causal().dense(T, S))
    assert not m.BlockSparse(5, visible)(np.array(-1), np.arange(40)).any()  # nothing is visible outside
    assert not m.BlockSparse(5, visible)(np.array(3), np.arange(25, 40)).any()


sizes = st.integers(1, 7)
atoms = st.one_of(
    st.just(m.Full()),
    st.just(m.Causal()),
    st.builds(m.Window, st.integers(0, 9), st.integers(0, 9)),
    st.builds(m.Chunked, sizes),
    st.builds(m.Prefix, st.integers(0, 30)),
    st.builds(m.Global, st.integers(0, 30)),
    st.builds(m.Dilated, st.integers(0, 5), sizes),
)
sparse = st.builds(
    lambda n, bits: m.BlockSparse(n, np.array(bits).reshape(1, 2, 4, 5)),
    sizes,
    st.lists(st.booleans(), min_size=40, max_size=40),
)
prefixes = st.lists(st.integers(0, 30), min_size=3, max_size=3).map(lambda n: m.Prefix(np.array(n, np.int32)))


def compositions(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.builds(m.And, inner, inner), st.builds(m.Or, inner, inner), st.builds(m.Not, inner)),
        max_leaves=5,
    )


ranges = st.tuples(st.integers(-5, 35), st.integers(0, 12)).map(lambda x: (x[0], x[0] + x[1]))


def block(mask, q, k):
    """Returns all visibilities in a block, [... Tq Tk]."""
    return np.asarray(mask(np.arange(q[0], q[1] + 1)[:, None], np.arange(k[0], k[1] + 1)[None, :]))


@settings(max_examples=400, deadline=None)
@given(compositions(st.one_of(atoms, sparse, prefixes, st.just(m.Fn(every_third)))), ranges, ranges)
def test_kind_is_never_wrong(mask, q, k):
    kind = mask.kind(*q, *k)
    assert kind.dtype == np.int8
    visible = block(mask, q, k)
    visible = visible.reshape(*visible.shape[:-2], -1)
    assert visible.shape[:-1] == kind.shape[: visible.ndim - 1]
    kind = np.broadcast_to(np.reshape(kind, visible.shape[:-1] if visible.ndim > 1 else ()), visible.shape[:-1])
    assert not visible[kind == m.EMPTY].any()
    assert visible[kind == m.FULL].all()


@settings(max_examples=400, deadline=None)
@given(st.one_of(atoms, sparse), ranges, ranges)
def test_kind_of_a_single_mask_is_exact(mask, q, k):
    visible = block(mask, q, k)
    visible = visible.reshape(*visible.shape[:-2], -1)
    expected = np.where(visible.all(-1), m.FULL, np.where(visible.any(-1), m.PARTIAL, m.EMPTY))
    np.testing.assert_array_equal(np.reshape(mask.kind(*q, *k), expected.shape), expected)


@settings(max_examples=400, deadline=None)
@given(compositions(st.one_of(atoms, sparse, prefixes, st.just(m.Fn(every_third)))), ranges, ranges, st.data())
def test_kind_of_a_part_follows(mask, q, k, data):
    """Whatever lies within an EMPTY or FULL block is that too: blocks are found by their tiles, and tiles by blocks."""

    def part(x):
        low = data.draw(st.integers(*x))
        return low, data.draw(st.integers(low, x[1]))

    whole, inner = mask.kind(*q, *k), mask.kind(*part(q), *part(k))
    np.testing.assert_array_equal(inner[whole != m.PARTIAL], whole[whole != m.PARTIAL])


def test_kind_of_combinations_is_sharp():
    q, k = (64, 127), (0, 63)
    assert (m.Causal() & m.Window(128)).kind(*q, *k) == m.FULL
    assert (m.Causal() & m.Window(200)).kind(400, 463, *k) == m.EMPTY
    assert (m.Causal() | m.Prefix(64)).kind(0, 63, *k) == m.FULL
    assert (~m.Causal()).kind(0, 63, 64, 127) == m.FULL


def test_kind_broadcasts_on_host_and_device():
    lo = np.arange(0, 64, 16, dtype=np.int32)
    bounds = lo[:, None], lo[:, None] + 15, lo[None], lo[None] + 15
    for mask, _ in RULES:
        host = mask.kind(*bounds)
        assert isinstance(host, np.ndarray), mask
        assert host.shape == (4, 4)
        device = jax.jit(lambda mask, *bounds: mask.kind(*bounds))(mask, *bounds)
        assert device.dtype == jnp.int8
        np.testing.assert_array_equal(host, device)
    assert isinstance(m.Causal().kind(0, 3, 1, 2), np.int8 | np.ndarray)
    per_head = m.BlockSparse(16, np.ones((2, 3, 4, 4), bool)).kind(*bounds)
    assert per_head.shape == (2, 3, 4, 4)
    assert m.Prefix(np.zeros(2, np.int32)).kind(*bounds).shape == (2, 1, 4, 4)


def test_schedules_of_masks_need_no_device():
    with jax.transfer_guard("disallow"):
        (m.Causal() & m.Window(4) | ~m.Chunked(8)).kind(*(np.arange(8),) * 4)


@given(compositions(atoms))
@settings(max_examples=200, deadline=None)
def test_text_round_trips(mask):
    assert m.parse(str(mask)) == mask
    assert hash(m.parse(str(mask))) == hash(mask)


def test_text_follows_python():
    assert str(m.Causal() & m.Window(512)) == "Causal() & Window(512, 0)"
    assert m.parse(" ~Causal() | Window(left=3, right=-1) & Full()") == m.Or(~m.Causal(), m.Window(3, -1) & m.Full())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Cusal()", "did you mean 'Causal'"),
        ("Causal", "must be called"),
        ("Window(1.5)", "must be an integer"),
        ("Window(True)", "must be an integer"),
        ("Window()", "wrong arguments"),
        ("Window(*[3])", "must be an integer"),
        ("Causal() + Full()", "must be a mask such as"),
        ("Causal() &", "must be an expression"),
        ("__import__('os').system('true')", "must be a mask"),
        ("BlockSparse(3, 4)", "is no mask to write down"),
        ("Chunked(0)", "at least 1"),
        ("", "must be an expression"),
    ],
)
def test_text_errors(text, message):
    with pytest.raises(ValueError, match=message):
        m.parse(text)


def test_hashable_without_arrays_only():
    assert hash(m.Causal() & m.Fn(every_third)) == hash(m.Causal() & m.Fn(every_third))
    assert m.Window(3) == m.Window(np.int64(3), 0) != m.Window(4)
    assert m.Causal() != m.Full()
    for mask in (m.Prefix(np.zeros(2, np.int32)), m.Causal() & m.Prefix(jnp.zeros(2, jnp.int32))):
        with pytest.raises(TypeError):
            hash(mask)


def test_pytrees():
    n = jnp.array([1, 2], jnp.int32)
    mask = m.Causal() & (m.Prefix(n) | m.Window(3)) & ~m.BlockSparse(4, jnp.ones((1, 1, 2, 2), bool))
    leaves, treedef = jax.tree.flatten(mask)
    assert len(leaves) == 2
    assert jax.tree.map(lambda x: x.shape, mask).a.b.a.n == (2,)
    assert str(jax.tree.unflatten(treedef, leaves)) == str(mask)
    assert jax.tree.leaves(m.Prefix(3)) == []
    calls = []

    @jax.jit
    def f(mask):
        calls.append(None)
        return mask.dense(4, 4)

    f(m.Window(2)), f(m.Window(2)), f(m.Window(3))
    assert len(calls) == 2  # integers are static
    f(m.Prefix(n)), f(m.Prefix(n + 1))
    assert len(calls) == 3  # arrays are not
    stacked = jax.tree.map(lambda *x: jnp.stack(x), m.Prefix(n[:1]), m.Prefix(n[1:]))
    batched = jax.vmap(lambda mask: mask.dense(3, 3))(stacked)
    assert batched.shape == (2, 1, 1, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.Window(-3), "left >= -right"),
        (lambda: m.Window(2.0), "must be an integer"),
        (lambda: m.Window(2**40), "below 2\\*\\*31"),
        (lambda: m.Chunked(True), "must be an integer"),
        (lambda: m.Chunked(0), "at least 1"),
        (lambda: m.Prefix(-1), "at least 0"),
        (lambda: m.Prefix(np.zeros(2, np.int64)), "int32 array"),
        (lambda: m.Prefix(np.zeros((2, 1), np.int32)), "int32 array"),
        (lambda: m.Global("3"), "must be an integer"),
        (lambda: m.Dilated(2**20, 2**20), "less than 2\\*\\*31"),
        (lambda: m.BlockSparse(4, np.ones((2, 2), bool)), "bool array"),
        (lambda: m.BlockSparse(4, np.ones((1, 1, 2, 2))), "bool array"),
        (lambda: m.BlockSparse(0, np.ones((1, 1, 2, 2), bool)), "at least 1"),
        (lambda: m.Fn(3), "function"),
        (lambda: m.Fn(lambda q, k: q - k).dense(2, 2), "must return bool"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masks_combine_with_masks_only():
    with pytest.raises(TypeError):
        m.Causal() & np.ones((2, 2), bool)


FAR = (-(2**31), -(2**31) + 1, -5, 0, 3, 2**31 - 2, 2**31 - 1)
DISTANT = (
    m.Window(2**31 - 1), m.Window(7, 2**31 - 1), m.Window(2**31 - 1, -4), m.Window(-3, 2**31 - 1), m.Window(-3, 5),
    m.Window(0), m.Window(8, -2), m.Dilated(2**30, 1), m.Dilated(3, 2), m.Dilated(715827882, 3),
)  # fmt: skip


@pytest.mark.parametrize("mask", DISTANT, ids=str)
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_positions_that_are_2_to_the_31_or_more_apart(mask, xp):
    """Differences of int32 positions that leave int32 wrapped around, and far keys counted as near ones."""
    seen = lambda q, k: bool(mask(q, k))  # of Python's integers, which have no end
    q, k = (xp.asarray(FAR, np.int32).reshape(shape) for shape in ((-1, 1), (1, -1)))
    np.testing.assert_array_equal(mask(q, k), [[seen(a, b) for b in FAR] for a in FAR])
    spans = [(a, b) for a in FAR for b in FAR if a <= b]
    lo, hi = (xp.asarray(ends, np.int32) for ends in zip(*spans))
    kinds = np.asarray(mask.kind(lo[:, None], hi[:, None], lo[None], hi[None]))
    np.testing.assert_array_equal(kinds, [[mask.kind(*a, *b) for b in spans] for a in spans])
    inside = lambda x, span: span[0] <= x <= span[1]
    for (i, a), (j, b) in itertools.product(enumerate(spans), enumerate(spans)):
        pairs = {seen(x, y) for x in FAR for y in FAR if inside(x, a) and inside(y, b)}
        assert kinds[i, j] != m.EMPTY or pairs == {False}
        assert kinds[i, j] != m.FULL or pairs == {True}


def test_a_mask_of_too_many_operators_is_refused():
    deep = m.Causal()
    for _ in range(100):
        deep = ~deep
    assert m.parse(str(deep)) == deep
    with pytest.raises(ValueError, match="more than 100 operators within each other"):
        m.Not(deep)
    for text in ("~" * 101 + "Causal()", "~" * 3000 + "Causal()", "(" * 1000 + "Causal()" + ")" * 1000):
        with pytest.raises(
            ValueError, match=r"more than 100 operators|is nested too deep: at most 100|too many nested paren"
        ) as found:
            m.parse(text)
        assert len(str(found.value)) < 400
