"""The contract of linear attention: every back end passes all of it. A new one joins by one line.

Sizes differ pairwise and are odd where they can be, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import longattn
from longattn.ops.linear import api, pallas_tpu, xla
from tests.ops import linear_oracle, oracle
from tests.ops.contract import back_ends
from tests.ops.interpreter import as_on_tpu
from tests.slow import but_few


@dataclass(frozen=True)
class BackEnd(back_ends.BackEnd):
    tunings: tuple[Any, ...] = (None,)  # the first of small chunks, so that small cases have many
    chunk: int = 1  # tokens of the first tuning's chunks
    rounds: bool = False  # for half-precision inputs, the factors of every product to their dtype


BACK_ENDS = [
    BackEnd("xla", tunings=(xla.Tuning(8), xla.Tuning(1), xla.Tuning(4), xla.Tuning(16)), chunk=8),
    BackEnd("reference", names_residuals=False),
    BackEnd(
        "pallas_tpu", tunings=(pallas_tpu.Tuning(16, 3),), chunk=16, device=as_on_tpu, rounds=True, interpreted=True,
        refuses=back_ends.NO_TPU_DTYPE,
    ),
]  # fmt: skip
every_back_end = pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
gradients_of_every_back_end = pytest.mark.parametrize("back_end", but_few(BACK_ENDS), ids=str)


@pytest.fixture(autouse=True)
def _on_its_device(request):
    with request.getfixturevalue("back_end").device():
        yield


B, D, V, H = 2, 5, 7, 6
LENGTHS = {f"T={T}": T for T in (29, 1, 8, 601, 24, 21, 36)}  # the last three are multiples, for meshes
KINDS = {  # log_decay's axes, and whether with beta
    "plain": ("", False),
    "constant decay": ("H", False),
    "scalar decay": ("BTH", False),
    "vector decay": ("BTHD", False),
    "delta": ("", True),
    "constant decay, delta": ("H", True),
    "scalar decay, delta": ("BTH", True),
    "vector decay, delta": ("BTHD", True),
}
HEADS = {"all equal": (6, 6, 6), "one q and k": (1, 1, 6), "fewer q and k": (2, 3, 6), "fewer v": (6, 6, 3)}


@dataclass(frozen=True)
class Case:
    kind: str = "scalar decay, delta"
    heads: str = "all equal"
    length: str = "T=29"
    ids: str = "one segment"
    state: str = "from zero"
    decays: str = "usual"
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(dataclasses.astuple(self)).replace(",", "").replace(" ", "_")


DOMAINS = {
    "kind": list(KINDS),
    "heads": list(HEADS),
    "length": ["T=29", "T=1", "T=8"],
    "ids": ["one segment", "segments"],
    "state": ["from zero", "from a state"],
    "decays": ["usual", "from e^-30 to 1", "beyond exp"],
    "dtype": ["float32", "bfloat16", "float64", "float16"],
}
# Compiling is what takes the time. By default each value of each factor comes once; slow tests take every pair,
# of the interpreter every value, and of the reference, which the oracle resembles most, a third of the pairs.
PAIRS = [Case(**row) for row in oracle.pairwise(DOMAINS)]


@functools.cache
def inputs(case: Case, draw: int = 0) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the differentiable arrays, the other keyword arguments and the cotangents of a case, in NumPy."""
    rng = np.random.default_rng(7 + draw)
    T, (Hq, Hk, Hv), (decay, delta) = LENGTHS[case.length], HEADS[case.heads], KINDS[case.kind]
    dtype = jnp.dtype(case.dtype)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    k = normal(B, T, Hk, D)
    if delta:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": normal(B, T, Hq, D).astype(dtype), "k": k.astype(dtype), "v": normal(B, T, Hv, V).astype(dtype)}
    if decay:
        shape = [{"B": B, "T": T, "H": H, "D": D}[axis] for axis in decay]
        a = -0.1 * rng.exponential(size=shape)
        if case.decays != "usual":
            lowest = {"from e^-30 to 1": -30.0, "beyond exp": rng.choice([-1e30, -np.inf], shape)}[case.decays]
            kind = rng.choice(4, shape)
            a = np.where(kind == 0, 0.0, np.where(kind == 1, lowest, np.where(kind == 2, 30 * a, a)))
        arrays["log_decay"] = a.astype(np.float32)
    if delta:
        arrays["beta"] = rng.uniform(0, 1.5, (B, T, H)).astype(np.float32)
    if case.state == "from a state":
        arrays["initial_state"] = normal(B, H, D, V)
    options: dict[str, Any] = {"scale": 0.7}
    if case.ids == "segments":  # unsorted, negative, none reserved
        lengths = rng.random((B, T)) < 0.15
        options["segment_ids"] = (np.cumsum(lengths, 1) % 3 * 7 - 3).astype(np.int32)
    return arrays, options, {"out": normal(B, T, H, V).astype(dtype), "final_state": normal(B, H, D, V)}


@functools.cache
def expected(case: Case, rounds: bool = False, draw: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the truth, and the results of a plain implementation in the case's precision.

    rounds: whether the plain one rounds the factors of products to that precision.
    """
    arrays, options, cotangents = inputs(case, draw)
    dtype = jnp.dtype(case.dtype)
    truth, plain = (
        linear_oracle.linear_attention(
            **arrays, **options, do=cotangents["out"], dS=cotangents["final_state"], dtype=work, factors=factors
        )
        for work, factors in ((np.float64, None), (dtype, dtype if rounds and dtype.itemsize == 2 else None))
    )
    return truth, plain


def work(case: Case) -> Any:
    """Returns the dtype of states and accumulators."""
    return np.float64 if case.dtype == "float64" else np.float32


def with_gradients(attend, arrays, cotangents):
    """Returns out, final_state and the gradients of every array, as a dict."""
    (out, S), pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
    (gradients,) = pull((cotangents["out"].astype(out.dtype), cotangents["final_state"].astype(S.dtype)))
    return {"out": out, "final_state": S, **{f"d{name}": x for name, x in gradients.items()}}


def function(back_end: BackEnd, case: Case, tuning: Any = None) -> Any:
    """Returns a function (arrays, cotangents, segment ids) -> dict of results, and these arguments."""
    _, options, _ = inputs(case)

    def f(arrays, cotangents, segment_ids):
        attend = functools.partial(
            longattn.linear_attention, implementation=back_end.name, tuning=tuning or back_end.tunings[0],
            segment_ids=segment_ids, scale=options["scale"],
        )  # fmt: skip
        return with_gradients(attend, arrays, cotangents)

    return f, arguments_of(case)


def arguments_of(case: Case, draw: int = 0) -> Any:
    arrays, options, cotangents = inputs(case, draw)
    return arrays, cotangents, options.get("segment_ids")


def check(back_end: BackEnd, case: Case, tuning: Any = None) -> None:
    """Compares a case with its oracle. Gradients of six numbers need more draws: two errors differ by chance alone."""
    f, arguments = function(back_end, case, tuning)
    with jax.enable_x64(case.dtype == "float64"):
        if reason := back_end.refusal(case):
            with pytest.raises(NotImplementedError, match=reason):
                jax.eval_shape(f, *arguments)
            return
        draws = range(-(-64 // H) if case.kind.startswith("constant") and case.dtype == "bfloat16" else 1)
        results = [jax.device_get(jax.jit(f)(*arguments_of(case, draw))) for draw in draws]
    half = ("out", "dq", "dk", "dv")
    for name, x in results[0].items():
        given = arguments[0].get(name[1:])
        assert x.dtype == (case.dtype if name in half else work(case) if given is None else given.dtype), name
    stack = lambda *draws: jax.tree.map(lambda *x: np.stack(x), *draws)
    truth_and_plain = [expected(case, back_end.rounds, draw) for draw in draws]
    oracle.assert_accurate(stack(*results), *stack(*truth_and_plain), work(case))


_hard = functools.partial(Case, ids="segments", state="from a state", decays="from e^-30 to 1")
FEW = [
    _hard("scalar decay", "all equal", dtype="bfloat16"), Case(dtype="float16"), Case(dtype="float64"),
]  # fmt: skip


def sample(back_end: BackEnd) -> list[Case]:
    """Returns cases that hold each value; of the reference, which the oracle resembles most, a third of them."""
    return FEW if back_end.interpreted else oracle.covering(PAIRS)[:: 3 if back_end.name == "reference" else 1]


def accepted(back_end: BackEnd) -> dict[str, list[str]]:
    """Returns the values of each factor that a back end takes: those of a case it refuses would hide other pairs."""
    return {name: [v for v in values if not back_end.refusal(Case(**{name: v}))] for name, values in DOMAINS.items()}


def rest(back_end: BackEnd) -> list[Case]:
    """Returns cases that hold every pair of values that the back end takes; interpreted, every value."""
    pairs = [Case(**row) for row in oracle.pairwise(accepted(back_end))]
    pairs = oracle.covering(pairs) if back_end.interpreted else pairs[:: 3 if back_end.name == "reference" else 1]
    return [case for case in dict.fromkeys(pairs) if case not in sample(back_end)]


@pytest.mark.parametrize(("back_end", "case"), [(b, c) for b in BACK_ENDS for c in sample(b)], ids=str)
def test_forward_and_gradients(back_end, case):
    check(back_end, case)


@pytest.mark.slow
@pytest.mark.parametrize(("back_end", "case"), [(b, c) for b in BACK_ENDS for c in rest(b)], ids=str)
def test_forward_and_gradients_of_the_rest(back_end, case):
    check(back_end, case)


PACKED = Case(ids="segments", state="from a state")


@gradients_of_every_back_end
def test_own_tuning_at_longer_lengths(back_end):
    check(dataclasses.replace(back_end, tunings=(None,)), dataclasses.replace(PACKED, length="T=601"))


@pytest.mark.parametrize(("back_end", "tuning"), [(b, t) for b in BACK_ENDS for t in b.tunings[1:]], ids=str)
def test_chunk_sizes_change_rounding_only(back_end, tuning):
    check(back_end, PACKED, tuning)


@gradients_of_every_back_end
def test_determinism(back_end):
    f, arguments = function(back_end, back_end.nearest(PACKED))
    f = jax.jit(f)
    for a, b in zip(jax.tree.leaves(f(*arguments)), jax.tree.leaves(f(*arguments))):
        np.testing.assert_array_equal(a, b)


@gradients_of_every_back_end
@pytest.mark.parametrize("kind", ["scalar decay, delta", "vector decay"])
def test_causality(back_end, kind):
    """A change at a token changes no bit before it."""
    arrays, options, _ = inputs(back_end.nearest(Case(kind=kind)))
    f = jax.jit(
        lambda arrays: longattn.linear_attention(
            **arrays, **options, implementation=back_end.name, tuning=back_end.tunings[0]
        )[0]
    )
    out = f(arrays)
    for t in (3, 8, 20):
        changed = {name: np.concatenate([x[:, :t], x[:, t:] * 0.5], 1) for name, x in arrays.items()}
        np.testing.assert_array_equal(f(changed)[:, :t], out[:, :t])
        assert (f(changed)[:, t] != out[:, t]).any()


@gradients_of_every_back_end
@pytest.mark.parametrize("kind", but_few(["scalar decay, delta", "vector decay"]))
def test_what_is_not_finite_reaches_those_who_see_it_alone(back_end, kind):
    """Other segments, rows, heads and earlier tokens are as before, in every result and gradient."""
    case = back_end.nearest(Case(kind=kind, ids="segments", state="from a state"))
    f, (arrays, cotangents, _) = function(back_end, case)
    segment, token = np.repeat([0, 1, 2], [6, 16, 7]), 13
    T, ids = len(segment), np.repeat(np.array([[4, -3, 4]], np.int32), [6, 16, 7], 1).repeat(B, 0)
    f = jax.jit(f)
    before = f(arrays, cotangents, ids)
    same = segment == segment[token]
    later, sooner, none = same & (np.arange(T) >= token), same & (np.arange(T) <= token), np.zeros(T, bool)

    for name, bad in zip((*arrays, "do"), itertools.cycle((np.nan, np.inf))):
        given = arrays | {"do": cotangents["out"]}
        changed = given[name].copy()
        changed[(0, 0) if name == "initial_state" else (0, token, 0)] = bad
        after = f(
            arrays | ({name: changed} if name in arrays else {}),
            cotangents | ({"out": changed} if name == "do" else {}), ids,
        )  # fmt: skip
        first, last = segment == segment[0], segment == segment[-1]
        sees = {"q": none, "do": none, "initial_state": first}.get(name, later)  # whose states it reaches
        own = np.arange(T) == token
        sends = sooner if name in ("q", "do") else none  # whose gradients it reaches by those of states
        through = sooner if name in ("log_decay", "beta") or (name == "k" and "delta" in kind) else none
        spoilt = {  # what is NaN at least, and what may be
            "out": (sees | (own & (name == "q")),) * 2,
            "dq": (sees | (own & (name == "do")),) * 2,
            "dk": (sends, sends | through | sees | own),
            "dv": (sends, sends | through | sees | own),
            "dlog_decay": (none, sends | through | sees | own),
            "dbeta": (none, sends | through | sees | own),
            "final_state": (sees[-1:] & last[-1:],) * 2,
            "dinitial_state": (none[:1], ((sends | through) & first).any(keepdims=True)),
        }
        for result, (at_least, at_most) in spoilt.items():
            if result in after:
                was, now = (np.asarray(x[result], np.float32) for x in (before, after))
                if "state" in result:
                    was, now = was[:, None], now[:, None]
                others = {"rtol": 1e-5, "atol": 1e-5, "err_msg": f"{name}: {result}"}
                np.testing.assert_allclose(now[1], was[1], **others)
                np.testing.assert_allclose(now[0, :, 1:], was[0, :, 1:], **others)
                np.testing.assert_allclose(now[0, ~at_most, 0], was[0, ~at_most, 0], **others)
                spoilt_here = ~np.isfinite(now[0, at_least, 0])
                assert spoilt_here.any(axis=tuple(range(1, spoilt_here.ndim))).all(), (name, result)


@gradients_of_every_back_end
def test_packed_documents_are_separate_ones(back_end):
    """Documents that begin with a chunk are bitwise equal; others are compared with the oracle above."""
    case = back_end.nearest(Case(kind="vector decay, delta"))
    C = 2 * max(back_end.chunk, 8)
    rng = np.random.default_rng(3)
    arrays = {name: rng.permuted(np.resize(x, (1, 2 * C, *x.shape[2:])), axis=1) for name, x in inputs(case)[0].items()}

    @jax.jit
    def f(arrays, ids):
        return longattn.linear_attention(
            **arrays, segment_ids=ids, implementation=back_end.name, tuning=back_end.tunings[0]
        )

    ids = np.repeat(np.array([[4, 2]], np.int32), C, axis=1)
    out, S = f(arrays, ids)
    for i, half in enumerate((slice(0, C), slice(C, 2 * C))):
        alone, state = f({name: x[:, half] for name, x in arrays.items()}, ids[:, half])
        np.testing.assert_array_equal(out[:, half], alone)
        if i:
            np.testing.assert_array_equal(S, state)


@gradients_of_every_back_end
@pytest.mark.parametrize("kind", ["scalar decay", pytest.param("vector decay, delta", marks=pytest.mark.slow)])
def test_the_state_carries_a_sequence_on(back_end, kind):
    """Two calls, the second from the first's final state, have the results and gradients of one."""
    case = back_end.nearest(Case(kind=kind, state="from a state", heads="fewer q and k"))
    arrays, options, cotangents = inputs(case)

    def attend(initial_state, **arrays):
        outs, S = [], initial_state
        for part in (slice(0, 13), slice(13, None)):
            out, S = longattn.linear_attention(
                **{name: x[:, part] for name, x in arrays.items()}, **options, initial_state=S,
                implementation=back_end.name, tuning=back_end.tunings[0],
            )  # fmt: skip
            outs.append(out)
        return jnp.concatenate(outs, 1), S

    results = jax.jit(functools.partial(with_gradients, attend))(arrays, cotangents)
    oracle.assert_accurate(results, *expected(case), np.float32)


@gradients_of_every_back_end
@pytest.mark.parametrize(
    ("kind", "heads", "dtype"),
    [("scalar decay, delta", "fewer q and k", "float32"), ("vector decay, delta", "fewer v", "bfloat16")],
)
def test_parts_of_a_pass(back_end, kind, heads, dtype):
    """`fold` gives the states alone, with zeros written into further columns; `pull` the initial state's gradient."""
    case = back_end.nearest(Case(kind, heads, state="from a state", ids="segments", dtype=dtype))
    arrays, options, cotangents = inputs(case)
    x, given, _ = api.validate(
        **{"log_decay": None, "beta": None, "segment_ids": None} | arrays | options,
        implementation=back_end.name, tuning=back_end.tunings[0],
    )  # fmt: skip
    module, further = api.BACK_ENDS[back_end.name], np.flip(x.initial_state, (0, 3))

    @jax.jit
    def f(x, do, dS):
        wide = x._replace(q=None, initial_state=jnp.concatenate([x.initial_state, further], 3))
        after = module.fold(wide, given, api.check_fold(module, x, 2 * V, given))
        return after, module.pull(x, do, dS, given, module.check(x, given))

    after, dS = f(x, *cotangents.values())
    got = {"final_state": after[..., :V], "dinitial_state": dS}
    oracle.assert_accurate(got, *expected(case, back_end.rounds), np.float32)
    beyond_v = arrays | options | {"v": np.zeros_like(arrays["v"]), "initial_state": further}
    do, dS = cotangents.values()
    beyond = (
        linear_oracle.linear_attention(**beyond_v, do=do, dS=dS, dtype=exact, factors=factors)
        for exact, factors in (
            (np.float64, None),
            (x.q.dtype, x.q.dtype if back_end.rounds and dtype == "bfloat16" else None),
        )
    )
    oracle.assert_accurate({"final_state": after[..., V:]}, *beyond, np.float32)


@pytest.mark.parametrize(
    ("back_end", "kind"),
    but_few(
        [(BACK_ENDS[1], kind) for kind in KINDS] + [(b, "vector decay, delta") for b in BACK_ENDS if b != BACK_ENDS[1]],
        len(KINDS) + 1,  # the kernels later
    ),
    ids=str,
)
def test_steps_go_on_where_it_ends(back_end, kind):
    """Decoding: the last tokens one by one, from the state that the first ones leave.

    A step never asks which back end left the state, and the tests above compare the states of each.
    """
    case = back_end.nearest(Case(kind=kind, heads="one q and k"))
    arrays, options, _ = inputs(case)
    fixed = {name: x for name, x in arrays.items() if x.ndim == 1}
    arrays = {name: x for name, x in arrays.items() if x.ndim > 1}
    call = functools.partial(
        longattn.linear_attention, **fixed, **options, implementation=back_end.name, tuning=back_end.tunings[0]
    )
    out, S = call(**{name: x[:, :20] for name, x in arrays.items()})
    outs = [out]
    for t in range(20, 29):
        out, S = longattn.linear_step(state=S, **{name: x[:, t] for name, x in arrays.items()}, **fixed, **options)
        outs.append(out[:, None])
    truth, plain = (
        {name: x for name, x in results.items() if name in ("out", "final_state")} for results in expected(case)
    )
    oracle.assert_accurate({"out": np.concatenate(outs, 1), "final_state": S}, truth, plain, np.float32)


@every_back_end
@pytest.mark.parametrize(("size", "length"), [(2, 0), (0, 5)])
def test_no_tokens(back_end, size, length):
    q, v, S = jnp.ones((size, length, 2, 3)), jnp.ones((size, length, 4, 5)), jnp.ones((size, 4, 3, 5))

    def loss(q, v, S, log_decay):
        out, after = longattn.linear_attention(
            q, q, v, log_decay=log_decay, initial_state=S, implementation=back_end.name
        )
        assert out.shape == v.shape
        return jnp.sum(out) + 2 * jnp.sum(after)

    gradients = jax.grad(loss, (0, 1, 2, 3))(q, v, S, -jnp.ones(4))
    for dx, x in zip(gradients, (0 * q, 0 * v, 2 * S, jnp.zeros(4))):
        np.testing.assert_array_equal(dx, x)
    _, zeros = longattn.linear_attention(q, q, v, implementation=back_end.name)
    np.testing.assert_array_equal(zeros, 0 * S)


@gradients_of_every_back_end
def test_vmap(back_end):
    """vmap maps everything but a constant decay, which is shared."""
    case = back_end.nearest(dataclasses.replace(PACKED, kind="constant decay, delta"))
    f, (arrays, cotangents, ids) = function(back_end, case)
    flip = functools.partial(jax.tree.map, lambda x: np.stack([x, x[::-1]]))  # the second example reverses the batch
    axes = {name: None if x.ndim == 1 else 0 for name, x in arrays.items()}
    arrays = {name: x if x.ndim == 1 else flip(x) for name, x in arrays.items()}
    results = jax.jit(jax.vmap(f, in_axes=(axes, 0, 0)))(arrays, flip(cotangents), flip(ids))
    truth, plain = expected(case)
    for i, order in enumerate((slice(None), slice(None, None, -1))):
        got = {name: x[i] if name == "dlog_decay" else x[i][order] for name, x in results.items()}
        oracle.assert_accurate(got, truth, plain, np.float32)


@gradients_of_every_back_end
@pytest.mark.parametrize(
    ("kind", "heads"), [("constant decay, delta", "all equal"), ("vector decay", "one q and k")], ids=["all", "one"]
)
def test_shard_map(back_end, kind, heads):
    """Batch and heads are sharded, inside shard_map(check_vma=True): gradients of replicated arrays are summed."""
    case = back_end.nearest(dataclasses.replace(PACKED, kind=kind, heads=heads))
    f, (arrays, cotangents, ids) = function(back_end, case)
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    P = PartitionSpec
    tokens, state = P("data", None, "model"), P("data", "model")
    specs = {name: P("model") if x.ndim == 1 else tokens for name, x in arrays.items()} | {"initial_state": state}
    specs |= dict.fromkeys(("q", "k"), P("data")) if heads == "one q and k" else {}
    outs = {"out": tokens, "final_state": state}
    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(specs, outs, P("data")),
        out_specs=outs | {f"d{name}": spec for name, spec in specs.items()}, check_vma=True,
    )  # fmt: skip
    oracle.assert_accurate(jax.jit(sharded)(arrays, cotangents, ids), *expected(case), np.float32)


@every_back_end
def test_traces_from_shapes(back_end):
    x = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.bfloat16)
    out, S = jax.eval_shape(functools.partial(longattn.linear_attention, implementation=back_end.name), x, x, x)
    assert (out.shape, out.dtype, S.shape, S.dtype) == (x.shape, x.dtype, (1, 4, 8, 8), jnp.float32)


def equations(jaxpr):
    """Yields all equations, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@every_back_end
@pytest.mark.parametrize("kind", ["scalar decay, delta", "vector decay, delta"])
def test_float32_products_are_full_and_residuals_are_named(back_end, kind):
    f, arguments = function(back_end, back_end.nearest(dataclasses.replace(PACKED, kind=kind)))
    with jax.default_matmul_precision("bfloat16"):
        found = list(equations(jax.make_jaxpr(f)(*arguments).jaxpr))
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product
    names = {e.params["name"] for e in found if e.primitive.name == "name"}
    assert names >= ({"linear_state"} if back_end.names_residuals else set())


@every_back_end
def test_further_derivatives_work_or_name_the_reference(back_end):
    q = jnp.ones((1, 5, 2, 3))
    f = functools.partial(longattn.linear_attention, implementation=back_end.name)
    hessian = jax.hessian(lambda v: jnp.sum(f(q, q, v)[0] ** 2))
    if back_end.name == "reference":
        _, (tangent, _) = jax.jvp(lambda v: f(q, q, v), (q,), (q,))
        np.testing.assert_allclose(tangent[0, :, 0, 0], 3 * np.arange(1, 6), rtol=1e-6)
        assert hessian(q)[0, 4, 0, 0, 0, 4, 0, 0] == 18
    else:
        with pytest.raises(Exception, match=r"jvp|forward-mode"):
            jax.jvp(lambda v: f(q, q, v), (q,), (q,))
        with pytest.raises(NotImplementedError, match="implementation='reference' has derivatives of any order"):
            hessian(q)


@gradients_of_every_back_end
def test_what_is_remembered_of_keys_written_again(back_end):
    """16 keys of 64 numbers are written three times each; the last value counts, and a plain sum cannot tell which."""
    rng = np.random.default_rng(0)
    N, keys, size = 8, 16, 64
    key = rng.standard_normal((N, keys, size)).astype(np.float32)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    values = rng.standard_normal((N, 3 * keys, size)).astype(np.float32)
    order = np.stack([np.concatenate([rng.permutation(keys) for _ in range(3)]) for _ in range(N)])
    k = np.take_along_axis(key, order[..., None], 1)[:, :, None]
    last = np.stack([[np.flatnonzero(row == i)[-1] for i in range(keys)] for row in order])

    def recalled(**model):
        _, S = longattn.linear_attention(
            k, k, values[:, :, None], **model, implementation=back_end.name, tuning=back_end.tunings[0]
        )
        read = np.einsum("NKD,NDV->NKV", key, np.asarray(S)[:, 0])
        return (np.einsum("NKV,NTV->NKT", read, values).argmax(-1) == last).mean()

    ones = np.ones((N, 3 * keys, 1), np.float32)
    assert 0.2 < recalled() < 0.5
    decay = np.full(1, np.log(0.97), np.float32)
    assert 0.85 < recalled(log_decay=decay) < 0.97  # the one before it is as little as one token older
    assert recalled(beta=ones) > 0.99
    assert recalled(beta=ones, log_decay=decay) > 0.99
