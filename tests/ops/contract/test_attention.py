"""The contract of exact attention (rule 8 of the style): every back end passes all of it. A new one joins by one line.

Sizes differ pairwise and are odd where they can be, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import longattn
from longattn import mask as m
from longattn.ops import partial as partials
from longattn.ops.attention import pallas_tpu, xla
from tests.ops import oracle
from tests.ops.contract import back_ends
from tests.ops.interpreter import as_on_tpu
from tests.slow import but_few


@dataclass(frozen=True)
class BackEnd(back_ends.BackEnd):
    tuning: Any = None  # small blocks, so that small cases have many


_TILE, _PAIR = pallas_tpu.Blocks(128, 128, 128, 128), pallas_tpu.Blocks(128, 256, 128, 128)
BACK_ENDS = [
    BackEnd("xla", tuning=xla.Tuning(16, 8)),
    BackEnd("reference", names_residuals=False),
    BackEnd(
        "pallas_tpu", tuning=pallas_tpu.Tuning(_PAIR, _TILE), device=as_on_tpu,
        interpreted=True,
        refuses=(
            *back_ends.NO_TPU_DTYPE,
            ("blocks", "BlockSparse.block_size=8 is no multiple of 128", "prefix"),
        ),
    ),
]  # fmt: skip
every_back_end = pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
every_back_end_but_kernels_later = pytest.mark.parametrize("back_end", but_few(BACK_ENDS, 2), ids=str)
gradients_of_every_back_end = pytest.mark.parametrize("back_end", but_few(BACK_ENDS), ids=str)


@pytest.fixture(autouse=True)
def _on_its_device(request):
    with request.getfixturevalue("back_end").device():
        yield


def every_third(q, k):
    return (q + k) % 3 != 0


LENGTHS = {"T<S": (37, 53), "T=S": (43, 43), "T>S": (53, 37), "T=1": (1, 53), "even": (40, 53), "long": (301, 417)}
B, D, V = 2, 5, 7
_rng = np.random.default_rng(0)
PREFIX = _rng.integers(0, 30, B).astype(np.int32)
BLOCKS = _rng.random((B, 6, 8, 8)) < 0.4

MASKS = {  # a mask, and its definition on NumPy arrays of positions [B 1 T 1] and [B 1 1 S]
    "full": (m.Full(), lambda q, k: q == q),
    "causal": (m.Causal(), lambda q, k: k <= q),
    "window": (m.Window(9, 3), lambda q, k: (q - k <= 9) & (k - q <= 3)),
    "chunked": (m.Causal() & m.Chunked(16), lambda q, k: (k <= q) & (q // 16 == k // 16)),
    "prefix": (m.Causal() | m.Prefix(PREFIX), lambda q, k: (k <= q) | (k < PREFIX[:, None, None, None])),
    "global": (m.Window(7) | m.Global(3), lambda q, k: ((k <= q) & (q - k <= 7)) | (q < 3) | (k < 3)),
    "dilated": (m.Dilated(4, 3), lambda q, k: (q >= k) & (q - k <= 12) & ((q - k) % 3 == 0)),
    "blocks": (
        m.BlockSparse(8, BLOCKS),
        lambda q, k: BLOCKS[np.arange(B)[:, None, None, None], np.arange(6)[:, None, None], q // 8, k // 8],
    ),
    "function": (m.Fn(every_third) & m.Causal(), lambda q, k: ((q + k) % 3 != 0) & (k <= q)),
    "distant": (m.Causal() & ~m.Window(11), lambda q, k: q - k > 11),
}


@dataclass(frozen=True)
class Case:
    mask: str = "causal"
    lengths: str = "T<S"
    heads: tuple[int, int] = (6, 3)  # H, K
    ids: str = "none"  # of segments and positions
    logits: str = "plain"  # "sinks" comes with a soft cap, "all" is both of these and a broadcast bias
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(str(x) for x in dataclasses.astuple(self)).replace(" ", "")


DOMAINS = {
    "mask": list(MASKS),
    "lengths": ["T<S", "T=S", "T>S", "T=1"],
    "heads": [(6, 3), (6, 6), (6, 1)],
    "ids": ["none", "segments", "positions", "both"],
    "logits": ["plain", "sinks", "bias", "all"],
    "dtype": ["float32", "bfloat16", "float64", "float16"],
}
# Compiling is what takes the time. By default each of fewer values comes once; slow tests take each pair of these and
# each one of all values.
FEWER = {"lengths": ["T<S", "T>S", "T=1"], "ids": ["none", "segments", "both"], "logits": ["plain", "bias", "all"]}
VALUES = oracle.covering([Case(**row) for row in oracle.pairwise(DOMAINS)])
FEWER_PAIRS = [Case(**row) for row in oracle.pairwise(DOMAINS | FEWER | {"dtype": ["float32", "bfloat16", "float64"]})]


@functools.cache
def inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """(differentiable arrays, the other keyword arguments, cotangents, visible [B H T S]) of a case, in NumPy."""
    rng = np.random.default_rng(7)
    (T, S), (H, K) = LENGTHS[case.lengths], case.heads
    dtype = jnp.dtype(case.dtype)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    arrays = {"q": normal(B, T, H, D), "k": normal(B, S, K, D), "v": normal(B, S, K, V)}
    cotangents = {"out": normal(B, T, H, V), "lse": rng.standard_normal((B, T, H))}
    mask, rule = MASKS[case.mask]
    options: dict[str, Any] = {"mask": mask}
    if case.logits in ("sinks", "all"):
        options |= {"softcap": 1.5, "scale": 0.7}
    if case.logits in ("sinks", "all"):
        arrays["sinks"] = rng.standard_normal(H).astype(np.float32)
    if case.logits == "bias":
        arrays["bias"] = normal(B, H, T, S)
    if case.logits == "all":
        arrays["bias"] = rng.standard_normal((H, 1, S)).astype(np.float32)
    q_pos, k_pos = np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)
    visible = np.ones((B, H, T, S), bool)
    if case.ids in ("positions", "both"):
        q_pos, k_pos = rng.integers(0, 50, (B, T)), rng.permuted(np.arange(S)[None].repeat(B, 0), axis=1)
        options["positions"] = (q_pos.astype(np.int32), k_pos.astype(np.int32))
    if case.ids in ("segments", "both"):
        documents = rng.integers(0, 4, (B, T + S)) * 7 - 3  # unsorted, negative, none reserved
        q_ids, k_ids = documents[:, :T].astype(np.int32), documents[:, T:].astype(np.int32)
        k_ids = q_ids if T == S else k_ids
        options["segment_ids"] = q_ids if T == S else (q_ids, k_ids)
        visible &= q_ids[:, None, :, None] == k_ids[:, None, None, :]
    visible &= rule(q_pos[:, None, :, None], k_pos[:, None, None, :])
    return arrays, options, cotangents, visible


@functools.cache
def expected(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """(truth, plain implementation of the case's precision)."""
    arrays, options, cotangents, visible = inputs(case)
    results = []
    for dtype in (np.float64, jnp.dtype(case.dtype)):
        results.append(
            oracle.attention(
                **arrays,
                visible=visible,
                scale=options.get("scale", D**-0.5),
                softcap=options.get("softcap"),
                do=cotangents["out"],
                dlse=cotangents["lse"],
                dtype=dtype,
            )
        )
    return results[0], results[1]


def work(case: Case) -> Any:
    """The dtype of statistics and accumulators."""
    return np.float64 if case.dtype == "float64" else np.float32


def with_gradients(attend, arrays, cotangents):
    """out, lse and the gradients of every array, as a dict."""
    (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
    (gradients,) = pull((cotangents["out"].astype(out.dtype), cotangents["lse"].astype(lse.dtype)))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}


def function(back_end: BackEnd, case: Case, **static: Any) -> Any:
    """(arrays, cotangents, traced options) -> dict of results, and these arguments."""
    arrays, options, cotangents, _ = inputs(case)
    traced = {name: options[name] for name in ("positions", "segment_ids", "mask") if name in options}
    options = {name: x for name, x in options.items() if name not in traced} | static

    def f(arrays, cotangents, traced):
        attend = functools.partial(
            longattn.attention_with_lse, implementation=back_end.name, tuning=back_end.tuning, **options, **traced
        )
        return with_gradients(attend, arrays, cotangents)

    return f, (arrays, cotangents, traced)


def check(back_end: BackEnd, case: Case) -> None:
    f, arguments = function(back_end, case)
    with jax.enable_x64(case.dtype == "float64"):
        if reason := back_end.refusal(case):
            with pytest.raises(NotImplementedError, match=reason):
                jax.eval_shape(f, *arguments)
            return
        results = jax.jit(f)(*arguments)
    assert results["out"].dtype == case.dtype
    assert results["lse"].dtype == work(case)
    assert all(results[f"d{name}"].dtype == x.dtype for name, x in arguments[0].items())
    oracle.assert_accurate(results, *expected(case), work(case))


def sample(back_end: BackEnd) -> list[Case]:
    """Returns cases that hold each value, or a few of them: the reference is compared again wherever another fails."""
    cases = list(dict.fromkeys(map(back_end.nearest, FEWER_PAIRS)))
    if back_end.interpreted:
        return oracle.covering(cases)[:1] + [case for case in FEWER_PAIRS if back_end.refusal(case)]
    return oracle.covering([*cases, Case(dtype="float16")])[:: 3 if back_end.name == "reference" else 1]


def rest(back_end: BackEnd) -> list[Case]:
    """Returns cases that hold every value, and every pair of fewer values; a third of these pairs for the reference.

    The interpreter takes twenty seconds a case: it meets every value.
    """
    pairs = [] if back_end.interpreted else FEWER_PAIRS[:: 3 if back_end.name == "reference" else 1]
    values = oracle.covering(map(back_end.nearest, VALUES))
    return [case for case in dict.fromkeys(values + pairs) if case not in sample(back_end)]


@pytest.mark.parametrize(("back_end", "case"), [(b, c) for b in BACK_ENDS for c in sample(b)], ids=str)
def test_forward_and_gradients(back_end, case):
    check(back_end, case)


@pytest.mark.slow
@pytest.mark.parametrize(("back_end", "case"), [(b, c) for b in BACK_ENDS for c in rest(b)], ids=str)
def test_forward_and_gradients_of_the_rest(back_end, case):
    check(back_end, case)


@gradients_of_every_back_end
def test_own_tuning_at_longer_lengths(back_end):
    check(dataclasses.replace(back_end, tuning=None), Case(lengths="long", ids="segments"))


PACKED = Case(lengths="T=S", ids="segments", logits="all")


@gradients_of_every_back_end
def test_determinism(back_end):
    f, arguments = function(back_end, back_end.nearest(PACKED))
    f = jax.jit(f)
    for a, b in zip(jax.tree.leaves(f(*arguments)), jax.tree.leaves(f(*arguments))):
        np.testing.assert_array_equal(a, b)


@gradients_of_every_back_end
def test_large_logits(back_end):
    """Softmax weights close to 0 and 1, logits far beyond exp's range."""
    case = Case(mask="window")
    f, (arrays, cotangents, traced) = function(back_end, case, scale=300.0)
    results = [
        oracle.attention(
            **arrays, visible=inputs(case)[3], scale=300.0, do=cotangents["out"], dlse=cotangents["lse"], dtype=dtype
        )
        for dtype in (np.float64, np.float32)
    ]
    oracle.assert_accurate(jax.jit(f)(arrays, cotangents, traced), *results, np.float32)


@gradients_of_every_back_end
def test_empty_rows_send_no_gradient_whatever_their_cotangent(back_end):
    """The gradient of lse**2 at lse = -inf is infinite, and what follows may divide by a row of zeros."""
    case = Case(mask="distant")
    f, (arrays, cotangents, traced) = function(back_end, case)
    f = jax.jit(f)
    truth, plain = expected(case)
    empty = np.isneginf(truth["lse"])
    assert 0 < empty.mean() < 1
    for lost in (np.inf, -np.inf, np.nan):
        changed = {
            "out": np.where(empty[..., None], lost, cotangents["out"]).astype(cotangents["out"].dtype),
            "lse": np.where(empty, lost, cotangents["lse"]),
        }
        oracle.assert_accurate(f(arrays, changed, traced), truth, plain, np.float32)


@gradients_of_every_back_end
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_reaches_those_who_see_it_alone(back_end, bad):
    """Other documents, earlier tokens of a causal mask and other rows are as before, in every result and gradient."""
    case = back_end.nearest(Case(mask="prefix", lengths="T=S", ids="segments"))
    f, (arrays, cotangents, traced) = function(back_end, case)
    f, token = jax.jit(f), 20
    visible = inputs(case)[3][0, 0]  # all heads see the same
    before = f(arrays, cotangents, traced)
    for name in ("q", "k", "v"):
        changed = arrays[name].copy()
        changed[0, token, 0, 1] = bad
        after = f(arrays | {name: changed}, cotangents, traced)
        rows = visible[:, token] if name in "kv" else np.arange(len(visible)) == token
        keys = visible[rows].any(0)
        assert 0 < rows.sum() < rows.size and 0 < keys.sum() < keys.size
        reached = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}
        for result, spoilt in reached.items():
            was, now = (np.asarray(x[result], np.float32) for x in (before, after))
            np.testing.assert_allclose(now[1], was[1], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {result}")
            np.testing.assert_allclose(
                now[0][~spoilt], was[0][~spoilt], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {result}"
            )
            assert np.isnan(now[0][spoilt]).any(axis=tuple(range(1, now[0].ndim))).all(), (name, result)


@every_back_end
@pytest.mark.parametrize(("T", "S"), [(3, 0), (0, 3)])
def test_no_queries_or_no_keys(back_end, T, S):
    q, k, v = jnp.ones((2, T, 4, 3)), jnp.ones((2, S, 2, 3)), jnp.ones((2, S, 2, 5))

    def loss(q, k, v):
        out, lse = longattn.attention_with_lse(q, k, v, implementation=back_end.name)
        return jnp.sum(out), (out, lse)

    gradients, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_array_equal(out, jnp.zeros((2, T, 4, 5)))
    np.testing.assert_array_equal(lse, jnp.full((2, T, 4), -jnp.inf))
    for x, dx in zip((q, k, v), gradients):
        np.testing.assert_array_equal(dx, jnp.zeros_like(x))


@gradients_of_every_back_end
def test_bias_of_minus_infinity_hides(back_end):
    case = Case(mask="full", logits="bias")
    if back_end.refusal(case):
        check(back_end, case)
        return
    f, (arrays, cotangents, traced) = function(back_end, case)
    hidden = MASKS["distant"][1](np.arange(37)[:, None], np.arange(53)[None])  # leaves no key to the first rows' rest
    hidden[5] = True
    arrays = arrays | {"bias": np.where(hidden, -np.inf, arrays["bias"])}
    results = [
        oracle.attention(
            **arrays, visible=~hidden, scale=D**-0.5, do=cotangents["out"], dlse=cotangents["lse"], dtype=dtype
        )
        for dtype in (np.float64, np.float32)
    ]
    oracle.assert_accurate(jax.jit(f)(arrays, cotangents, traced), *results, np.float32)


@gradients_of_every_back_end
def test_vmap(back_end):
    """Over q, k, v and segment ids, with sinks and bias shared."""
    case = back_end.nearest(PACKED)
    f, (arrays, cotangents, traced) = function(back_end, case)
    mask = traced.pop("mask")
    flip = functools.partial(jax.tree.map, lambda x: np.stack([x, x[::-1]]))  # the second example reverses the batch
    arrays = {name: x if name in ("sinks", "bias") else flip(x) for name, x in arrays.items()}
    axes = {name: None if name in ("sinks", "bias") else 0 for name in arrays}
    batched = jax.jit(jax.vmap(lambda a, c, t: f(a, c, t | {"mask": mask}), in_axes=(axes, 0, 0)))
    results = batched(arrays, flip(cotangents), flip(traced))
    truth, plain = expected(case)
    for i, order in enumerate((slice(None), slice(None, None, -1))):
        per_batch = {"out", "lse", "dq", "dk", "dv"}
        got = {name: x[i][order] if name in per_batch else x[i] for name, x in results.items()}
        oracle.assert_accurate(got, truth, plain, np.float32)


@gradients_of_every_back_end
@pytest.mark.parametrize(
    ("case", "shape", "q_spec", "kv_spec"),
    [
        (Case(mask="blocks", ids="both", logits="bias"), (2, 3), ("data", None, "model"), ("data", None, "model")),
        (Case(mask="prefix", lengths="even", ids="positions", logits="all"), (2, 4), ("data", "model"), ("data",)),
    ],
    ids=["batch and heads", "batch and queries"],
)
def test_shard_map(back_end, case, shape, q_spec, kv_spec):
    """Inside shard_map(check_vma=True), where what is replicated gets its gradient summed."""
    case = back_end.nearest(case)
    f, (arrays, cotangents, traced) = function(back_end, case)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    P = PartitionSpec
    heads, queries = ("model", None) if len(q_spec) == 3 else (None, "model")
    array_specs = {"q": P(*q_spec), "k": P(*kv_spec), "v": P(*kv_spec), "sinks": P(heads)}
    array_specs["bias"] = P("data", heads, queries) if case.logits == "bias" else P(heads)
    array_specs = {name: array_specs[name] for name in arrays}
    ids_spec = (P("data", queries), P("data"))
    mask_spec = jax.tree.map(lambda x: P("data") if x.ndim == 1 else P("data", heads), traced["mask"])
    option_specs = {"positions": ids_spec, "segment_ids": ids_spec, "mask": mask_spec}
    sharded = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(array_specs, {"out": P(*q_spec), "lse": P(*q_spec)}, {name: option_specs[name] for name in traced}),
        out_specs={"out": P(*q_spec), "lse": P(*q_spec)} | {f"d{name}": spec for name, spec in array_specs.items()},
        check_vma=True,
    )
    oracle.assert_accurate(jax.jit(sharded)(arrays, cotangents, traced), *expected(case), np.float32)


def halves(case: Case) -> Any:
    """The keyword arguments of each half of the keys, as functions of the differentiable arrays."""
    (T, S), cut = LENGTHS[case.lengths], 20
    options = inputs(case)[1]
    q_pos, k_pos = options.get("positions", (np.arange(T, dtype=np.int32)[None].repeat(B, 0), None))
    k_pos = np.arange(S, dtype=np.int32)[None].repeat(B, 0) if k_pos is None else k_pos
    for half in (slice(None, cut), slice(cut, None)):
        ids = options.get("segment_ids")
        q_ids, k_ids = ids if isinstance(ids, tuple) else (ids, ids)
        yield (
            half,
            options
            | {
                "positions": (q_pos, k_pos[:, half]),
                "segment_ids": None if ids is None else (q_ids, k_ids[:, half]),
            },
        )


SPLIT = but_few([Case(mask="prefix", ids="segments", logits="sinks"), Case(mask="distant", ids="positions")])


@gradients_of_every_back_end
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_halves_of_the_keys_merge_to_the_whole(back_end, case):
    arrays, _, cotangents, _ = inputs(case)

    def attend(q, k, v, sinks=None):
        a, b = (
            longattn.attend_partial(
                q, k[:, half], v[:, half], **options, implementation=back_end.name, tuning=back_end.tuning
            )
            for half, options in halves(case)
        )
        assert a.out.dtype == a.lse.dtype == jnp.float32
        return tuple(partials.finish(partials.merge(a, b), sinks, q.dtype))

    results = jax.jit(functools.partial(with_gradients, attend))(arrays, cotangents)
    oracle.assert_accurate(results, *expected(case), np.float32)


@gradients_of_every_back_end
@pytest.mark.parametrize("case", [dataclasses.replace(SPLIT[0], dtype="bfloat16"), SPLIT[1]], ids=str)
def test_backward_partials_sum_to_the_whole(back_end, case):
    arrays, _, cotangents, _ = inputs(case)
    truth, plain = expected(case)

    @jax.jit
    def f(q, k, v, out, lse, do, dlse):
        return [
            longattn.backward_partial(
                q,
                k[:, half],
                v[:, half],
                out,
                lse,
                do,
                dlse,
                **options,
                implementation=back_end.name,
                tuning=back_end.tuning,
            )
            for half, options in halves(case)
        ]

    out, lse = truth["out"].astype(case.dtype), truth["lse"].astype(np.float32)
    do, dlse = cotangents["out"], cotangents["lse"].astype(np.float32)
    a, b = f(arrays["q"], arrays["k"], arrays["v"], out, lse, do, dlse)
    assert all(x.dtype == jnp.float32 for x in (*a, *b))
    results = {"dq": a[0] + b[0], "dk": np.concatenate([a[1], b[1]], 1), "dv": np.concatenate([a[2], b[2]], 1)}
    oracle.assert_accurate(results, truth, plain, np.float32)


@every_back_end_but_kernels_later
def test_traces_from_shapes(back_end):
    x = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.bfloat16)
    f = functools.partial(longattn.attention_with_lse, implementation=back_end.name)
    out, lse = jax.eval_shape(f, x, x, x)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (x.shape, x.dtype, x.shape[:3], jnp.float32)


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@every_back_end_but_kernels_later
def test_float32_products_are_full_and_residuals_are_named(back_end):
    f, arguments = function(back_end, back_end.nearest(PACKED))
    with jax.default_matmul_precision("bfloat16"):
        found = list(equations(jax.make_jaxpr(f)(*arguments).jaxpr))
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product
    names = {e.params["name"] for e in found if e.primitive.name == "name"}
    assert names >= ({"attention_out", "attention_lse"} if back_end.names_residuals else set())


@every_back_end_but_kernels_later
def test_forward_mode_works_or_names_the_reference(back_end):
    q = jnp.ones((1, 5, 2, 3))
    f = functools.partial(longattn.attention, implementation=back_end.name)
    if back_end.name == "reference":
        _, tangent = jax.jvp(lambda v: f(q, q, v), (q,), (q,))
        np.testing.assert_allclose(tangent, q, rtol=1e-6)
    else:
        with pytest.raises(Exception, match=r"jvp|forward-mode"):
            jax.jvp(lambda v: f(q, q, v), (q,), (q,))
