"""Convolutions against sums written out in NumPy's float64, gradients with random cotangents included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from longattn.ops.conv import diagonal_kernel, diagonal_step, long_convolution, short_convolution
from tests.ops import oracle
from tests.slow import but_few

B, E = 2, 5
IDS = np.array([[3, 3, 3, 1, 1, 1, 1, 3, 3, 0, 2], [7] * 11], np.int32)  # id 3 comes back: another segment


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) for s in shapes]


def segments(ids, B, T):
    """Returns how many segments have begun, with the call's first counted as 0."""
    if ids is None:
        return np.zeros((B, T), int)
    return np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, 1)


def silu(y):
    return y / (1 + np.exp(-y))


def short(x, w, b, ids, tail, dy=None, dtail=None, activation=None, r=lambda x: x):
    """Returns y, the new tail and, by the transposed sums, every gradient; `r` rounds as a plain program would."""
    (_, T, _), C = x.shape, w.shape[1]
    whole, seg = np.concatenate([tail, x], 1), np.pad(segments(ids, *x.shape[:2]), ((0, 0), (C - 1, 0)))
    see = lambda t, c: (seg[:, t + C - 1 - c] == seg[:, t + C - 1])[:, None]
    s = np.zeros(x.shape) + b
    for t in range(T):
        for c in range(C):
            s[:, t] = r(s[:, t] + r(w[:, C - 1 - c] * np.where(see(t, c), whole[:, t + C - 1 - c], 0)))
    keep = (seg[:, T:] == seg[:, -1:])[..., None]
    results = {"y": r(silu(s) if activation else s), "tail": np.where(keep, whole[:, T:], 0)}
    if dy is None:
        return results
    if activation:
        sigmoid = 1 / (1 + np.exp(-s))
        dy = dy * sigmoid * (1 + s * (1 - sigmoid))
    dwhole, dw = np.zeros(whole.shape), np.zeros(w.shape)
    dwhole[:, T:] += np.where(keep, dtail, 0)
    for t in range(T):
        for c in range(C):
            seen = np.where(see(t, c), dy[:, t], 0)
            dwhole[:, t + C - 1 - c] = r(dwhole[:, t + C - 1 - c] + r(w[:, C - 1 - c] * seen))
            dw[:, C - 1 - c] += (seen * whole[:, t + C - 1 - c]).sum(0)
    return results | {"dx": dwhole[:, C - 1 :], "dtail": dwhole[:, : C - 1], "dw": r(dw), "db": r(dy.sum((0, 1)))}


def ours(x, w, b, ids, tail, dy, dtail, activation):
    call = lambda x, w, b, tail: short_convolution(x, w, b, segment_ids=ids, tail=tail, activation=activation)
    (y, new), pull = jax.vjp(call, x, w, b, tail)
    dx, dw, db, dold = pull((dy, dtail))
    return {"y": y, "tail": new, "dx": dx, "dw": dw, "db": db, "dtail": dold}


@pytest.mark.parametrize(
    ("T", "C", "packed", "activation"),  # every pair of values
    [
        *((T, C, *rest) for T, C in ((11, 4), (1, 3)) for rest in ((False, None), (True, "silu"))),
        *((T, C, *rest) for T, C in ((2, 4), (11, 1)) for rest in ((False, "silu"), (True, None))),
        (11, 4, True, None),
    ],
)
def test_short_is_the_sum_of_its_taps(T, C, packed, activation):
    x, w, b, tail, dy, dtail = normal(0, (B, T, E), (E, C), (E,), (B, C - 1, E), (B, T, E), (B, C - 1, E))
    ids = IDS[:, :T] if packed else None
    truth = short(x, w, b, ids, tail, dy, dtail, activation)
    with jax.enable_x64(True):
        got = ours(x, w, b, ids, tail, dy, dtail, activation)
        assert all(v.dtype == np.float64 for v in got.values())
    for name, value in truth.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-13, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_short_rounds_once(dtype):
    """Sums are in float32: the error is at most that of a program which rounds every step, and the dtypes are kept."""
    T, C, dtype = 11, 4, jnp.dtype(dtype)
    given = [v.astype(dtype) for v in normal(1, (B, T, E), (E, C), (E,), (B, C - 1, E), (B, T, E), (B, C - 1, E))]
    x, w, b, tail, dy, dtail = (np.asarray(v, np.float64) for v in given)
    truth = short(x, w, b, IDS, tail, dy, dtail)
    plain = short(x, w, b, IDS, tail, dy, dtail, r=lambda v: np.asarray(v).astype(dtype).astype(np.float64))
    got = ours(*given[:3], IDS, *given[3:], None)
    assert all(v.dtype == dtype for v in got.values())
    oracle.assert_accurate(got, truth, plain, np.float32)


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 8), range(1, 11)])
def test_short_in_pieces_is_the_whole(cuts):
    """A carried tail continues the call's first segment only where the pieces' ids agree across the cut."""
    C, T = 4, 11
    x, w, tail = (v.astype(np.float32) for v in normal(2, (B, T, E), (E, C), (B, C - 1, E)))
    whole, last = short_convolution(x, w, segment_ids=IDS, tail=tail)
    edges, pieces = [0, *cuts, T], []
    for start, stop in zip(edges, edges[1:]):
        new = (IDS[:, start] != IDS[:, start - 1]) & (start > 0)  # the caller's to say: a call knows its own ids only
        tail = np.where(new[:, None, None], 0, tail)
        y, tail = short_convolution(x[:, start:stop], w, segment_ids=IDS[:, start:stop], tail=tail)
        pieces.append(y)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    np.testing.assert_array_equal(tail, last)


def test_short_of_nothing():
    x, w, tail = (v.astype(np.float32) for v in normal(3, (B, 0, E), (E, 4), (B, 3, E)))
    for ids in (None, np.zeros((B, 0), np.int32)):
        y, new = short_convolution(x, w, segment_ids=ids, tail=tail)
        assert y.shape == (B, 0, E)
        np.testing.assert_array_equal(new, tail)


def test_within_a_shard_map():
    """Rows over two devices: the gradient of the replicated taps is the sum over both."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, w, kernel, dy = (v.astype(np.float32) for v in normal(9, (B, 11, E), (E, 4), (E, 11), (B, 11, E)))

    def gradients(x, w, kernel, ids, dy):
        f = lambda x, w, kernel: long_convolution(short_convolution(x, w, segment_ids=ids)[0], kernel)
        return jax.vjp(f, x, w, kernel)[1](dy)

    rows, whole = P("data"), P()
    spread = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, whole, whole, rows, rows), out_specs=(rows, whole, whole), check_vma=True
    )
    for got, alone in zip(jax.jit(spread)(x, w, kernel, IDS, dy), gradients(x, w, kernel, IDS, dy)):
        np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-5)


def test_short_keeps_its_inputs_only():
    x, w = (jnp.asarray(v, jnp.bfloat16) for v in normal(4, (B, 11, E), (E, 4)))
    _, pull = jax.eval_shape(lambda: jax.vjp(lambda x, w: short_convolution(x, w, activation="silu")[0], x, w))
    kept = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(pull))
    assert kept <= 2 * (B * (11 + 3) * E + E * 4)  # x, the tail, the taps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((B, 11, E), np.int32)}, "x.dtype=int32"),
        ({"x": np.zeros((B, E), np.float32)}, "B T E"),
        ({"weight": np.zeros((E, 0), np.float32)}, "at least one tap"),
        ({"weight": np.zeros((4, E), np.float32)}, r"must be \(5, 5\), that is \[E C\]"),
        ({"bias": np.zeros(4, np.float32)}, "bias.shape"),
        ({"segment_ids": IDS.astype(np.int64)}, "segment_ids.dtype=int64"),
        ({"segment_ids": IDS[:, 1:]}, "segment_ids.shape"),
        ({"tail": np.zeros((B, 4, E), np.float32)}, "tail.shape"),
        ({"tail": np.zeros((B, 3, E), np.float16)}, "tail.dtype=float16"),
        ({"activation": "selu"}, "did you mean 'silu'"),
    ],
)
def test_short_errors(change, message):
    call = {"x": np.zeros((B, 11, E), np.float32), "weight": np.zeros((E, 4), np.float32)} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(**call)


def direct(u, kernel):
    """Returns the sum over the past, as a triangular matrix [E T T]."""
    T = u.shape[1]
    padded = np.pad(kernel[:, :T], ((0, 0), (0, max(0, T - kernel.shape[1]))))
    lag = np.subtract.outer(np.arange(T), np.arange(T))
    return np.where(lag >= 0, padded[:, np.abs(lag)], 0)


def fft_error(n, *factors):
    """Returns the largest error of a product of two transforms in each output.

    Each of three transforms of length n has log2 n stages, of at most 8 roundings each (Higham, Accuracy and Stability,
    section 24.1).
    """
    eps = np.finfo(np.float32 if factors[0].dtype == np.float32 else np.float64).eps
    return 3 * 8 * np.log2(n) * eps * np.prod([np.linalg.norm(f) for f in factors])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("T", "L"), [(23, 23), (23, 7), (7, 23), (1, 1), (16, 16)])
def test_long_is_the_direct_sum(T, L, dtype):
    u, kernel, dy = (v.astype(dtype) for v in normal(5, (B, T, E), (E, L), (B, T, E)))
    M = direct(u.astype(np.float64), kernel.astype(np.float64))
    with jax.enable_x64(True):
        y, pull = jax.vjp(long_convolution, u, kernel)
        du, dkernel = pull(dy)
    assert y.dtype == du.dtype == dkernel.dtype == dtype
    n = 2 * (T + L)
    np.testing.assert_allclose(y, np.einsum("ETS,BSE->BTE", M, u), rtol=0, atol=fft_error(n, u, kernel))
    np.testing.assert_allclose(du, np.einsum("ETS,BTE->BSE", M, dy), rtol=0, atol=fft_error(n, dy, kernel))
    truth = np.zeros((E, L))
    for lag in range(min(T, L)):
        truth[:, lag] = (dy[:, lag:].astype(np.float64) * u[:, : T - lag]).sum((0, 1))
    np.testing.assert_allclose(dkernel, truth, rtol=0, atol=fft_error(n, dy, u))


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_reaches_the_tokens_that_see_it(bad):
    """It reaches the taps of its document, or all later tokens, in its row and channel; its gradient earlier ones."""
    rng = np.random.default_rng(0)
    x, weight, kernel = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 3), (3, 4), (3, 5)))
    ids = np.repeat(np.array([[7, 1]], np.int32), [6, 3], 1).repeat(2, 0)
    t, do = np.arange(9), np.ones((2, 9, 3), np.float32)
    convolutions = {
        "short": (lambda x: short_convolution(x, weight, segment_ids=ids)[0], (t >= 4) & (t < 6), t <= 4),
        "long": (lambda x: long_convolution(x, kernel), t >= 4, t >= 0),
    }
    for name, (f, reached, sends) in convolutions.items():
        y, pull = jax.vjp(f, x)
        changed, spoilt = x.copy(), do.copy()
        changed[0, 4, 1] = spoilt[0, 4, 1] = bad
        for was, now, where in ((y, f(changed), reached), (pull(do)[0], pull(spoilt)[0], sends)):
            expected = np.asarray(was).copy()
            others = np.ones_like(expected, bool)
            others[0, where, 1] = False
            np.testing.assert_allclose(now[others], expected[others], rtol=1e-5, atol=1e-5, err_msg=name)
        assert not np.isfinite(f(changed)[0, reached, 1]).any() and not np.isfinite(pull(spoilt)[0][0, 4, 1])
    late = kernel.copy()
    late[1, 3] = bad
    y, now = long_convolution(x, kernel), long_convolution(x, late)
    np.testing.assert_allclose(now[:, :3], y[:, :3], rtol=1e-5, atol=1e-5)
    assert np.isnan(now[:, 3:, 1]).all() and np.isfinite(now[..., 0]).all()


def test_long_keeps_the_dtype_and_refuses():
    u, kernel = jnp.ones((B, 9, E), jnp.bfloat16), jnp.ones((E, 9), jnp.float32)
    y = long_convolution(u, kernel)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y[0, :, 0], np.float32), np.arange(1, 10))
    assert long_convolution(u[:, :0], kernel).shape == (B, 0, E)
    with pytest.raises(NotImplementedError, match="each document by itself"):
        long_convolution(u, kernel, segment_ids=jnp.zeros((B, 9), jnp.int32))
    for bad, message in ((kernel[:, :0], "at least one tap"), (kernel[:3], "kernel.shape"), (kernel[0], "rank 2")):
        with pytest.raises(ValueError, match=message):
            long_convolution(u, bad)


def state_space(seed, D=3):
    """Returns the parameters of S4D-Lin with random real parts."""
    rng = np.random.default_rng(seed)
    real, step = np.log(rng.uniform(0.3, 0.8, (E, D))), np.log(rng.uniform(0.01, 0.3, E))
    B, C = rng.standard_normal((2, 2, E, D))
    return real, np.pi * np.arange(D) + rng.uniform(0, 1, (E, D)), B, C, step


def built(real, imag, B, C, step):
    return jax.lax.complex(-jnp.exp(real), imag), jax.lax.complex(*B), jax.lax.complex(*C), jnp.exp(step)


@pytest.mark.parametrize("L", but_few([2, 1, 17]))
def test_kernel_is_the_recurrence_is_the_transform(L):
    """In float64, with the gradients of the real parameters, against the recurrence written out here."""
    parameters = state_space(6)
    u, dy = normal(7, (B, L, E), (B, L, E))

    def recurrence(p):
        A, B_, C, step = built(*p)
        bar = jnp.exp(step[:, None].astype(A.dtype) * A)
        x, out = jnp.zeros((B, *A.shape), A.dtype), []
        for t in range(L):
            x = bar[None] * x + ((bar - 1.0) / A * B_)[None] * u[:, t, :, None].astype(A.dtype)
            out.append(2 * jnp.sum((C[None] * x).real, -1))
        return jnp.stack(out, 1)

    def steps(p):
        space = built(*p)
        state, out = jnp.zeros((B, *space[0].shape), space[0].dtype), []
        for t in range(L):
            y, state = diagonal_step(u[:, t], state, *space)
            out.append(y)
        return jnp.stack(out, 1)

    def transform(p):
        return long_convolution(u, diagonal_kernel(*built(*p), L))

    with jax.enable_x64(True):
        results = []
        for f in (recurrence, steps, transform):
            y, pull = jax.vjp(jax.jit(f), parameters)
            results.append((y, *pull(jnp.asarray(dy))[0]))
        kernel = diagonal_kernel(*built(*parameters), L)
        direct_sum = np.einsum("ETS,BSE->BTE", direct(u, np.asarray(kernel)), u)
    np.testing.assert_allclose(direct_sum, results[0][0], rtol=1e-12, atol=1e-12)
    for got in results[1:]:
        for a, b in zip(got, results[0]):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_kernel_in_float32_and_its_errors():
    parameters = state_space(8)
    with jax.enable_x64(True):
        truth = diagonal_kernel(*built(*parameters), 40)
    narrow = jax.tree.map(lambda p: np.asarray(p, np.float32), parameters)
    A, B_, C, step = built(*narrow)
    got = diagonal_kernel(A, B_, C, step, 40)
    assert got.dtype == np.float32
    steps = float(40 * np.max(np.asarray(step)[:, None] * np.abs(A)))  # roundings of the angles, as the docstring says
    bound = 4 * (steps + 4) * np.finfo(np.float32).eps * float(np.max(np.sum(np.abs(C * B_), 1) * np.asarray(step)))
    np.testing.assert_allclose(got, truth, rtol=0, atol=bound)
    for call, message in (
        ((A, B_, C, step, 0), "L=0"),
        ((A, B_[:, :2], C, step, 4), "B.shape"),
        ((A.real, B_, C, step, 4), "A.dtype=float32"),
        ((A, B_, C, step[:2], 4), "step.shape"),
        ((A, B_, C, step.astype(np.float16), 4), "step.dtype=float16"),
    ):
        with pytest.raises(ValueError, match=message):
            diagonal_kernel(*call)
    with pytest.raises(ValueError, match="state.shape"):
        diagonal_step(jnp.zeros((B, E)), jnp.zeros((B, E, 2), A.dtype), A, B_, C, step)
