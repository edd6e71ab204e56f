"""Linear attention with the sequence sharded along a mesh axis, against NumPy in float64, and what the devices send."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import parallel
from longattn.aot import compilers
from longattn.models.transformer import REMAT
from longattn.ops.linear import pallas_tpu, xla
from longattn.ops.linear.api import validate
from longattn.parallel import linear_state
from tests.compilers import needs_libtpu
from tests.ops import linear_oracle, oracle
from tests.ops.contract.test_linear import HEADS, Case, equations, expected, inputs, with_gradients, work
from tests.ops.interpreter import as_on_tpu
from tests.slow import but_few


@dataclass(frozen=True)
class Parts:
    mesh: tuple[int, int, int, int]  # data, fsdp, tensor, seq
    case: Case
    implementation: str | None = None

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.mesh))}-{self.case}"


def mesh_of(*sizes):
    return parallel.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


# Documents that cross several devices, begin with one, or within; decays that forget all, nothing, or some.
hard = functools.partial(Case, ids="segments", state="from a state", decays="from e^-30 to 1")
whole = functools.partial(Case, state="from a state")  # what the first tokens write reaches the last device
CASES = [
    Parts((1, 1, 1, 2), hard("scalar decay, delta", "fewer q and k", "T=24")),
    Parts((2, 1, 1, 3), hard("vector decay, delta", length="T=21")),
    Parts((1, 1, 1, 8), whole("scalar decay, delta", "one q and k", "T=24")),
    Parts((1, 2, 1, 4), hard("vector decay", length="T=36")),
    Parts((1, 1, 3, 2), hard("scalar decay", "one q and k", "T=24", dtype="bfloat16")),
    Parts((2, 1, 1, 4), whole("vector decay, delta", "fewer v", "T=36", dtype="bfloat16")),
    Parts((1, 1, 2, 4), hard("delta", "all equal", "T=24", dtype="float64")),
    Parts((1, 1, 3, 2), hard("plain", "fewer v", "T=24", state="from zero")),
    Parts((2, 1, 1, 4), whole("constant decay", "fewer q and k", "T=36")),
    Parts((1, 1, 1, 3), Case("constant decay, delta", length="T=24"), "reference"),
]


def check(parts: Parts) -> None:
    case, mesh = parts.case, mesh_of(*parts.mesh)
    arrays, options, cotangents = inputs(case)
    attend = functools.partial(
        parallel.linear_attention, mesh=mesh, scale=options["scale"], implementation=parts.implementation or "xla",
        tuning={None: xla.Tuning(4), "pallas_tpu": pallas_tpu.Tuning(16, 3)}.get(parts.implementation),
    )  # fmt: skip

    @jax.jit
    def f(arrays, cotangents, ids):
        return with_gradients(functools.partial(attend, segment_ids=ids), arrays, cotangents)

    with jax.enable_x64(case.dtype == "float64"):
        results = f(arrays, cotangents, options.get("segment_ids"))
    assert results["out"].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "seq", "tensor")), 4)
    assert results["out"].dtype == case.dtype and results["final_state"].dtype == work(case)
    oracle.assert_accurate(jax.device_get(results), *expected(case), work(case))


@pytest.mark.parametrize("parts", CASES[:2], ids=str)
def test_forward_and_gradients(parts):
    check(parts)


DOMAINS = {
    "kind": ["plain", "vector decay", "scalar decay, delta", "vector decay, delta"],  # each has its own transitions
    "heads": list(HEADS),
    "ids": ["one segment", "segments"],
    "state": ["from zero", "from a state"],
    "decays": ["usual", "from e^-30 to 1", "beyond exp"],
    "dtype": ["float32", "bfloat16", "float64"],
    "mesh": [(1, 1, 1, 2), (2, 1, 1, 3), (1, 2, 1, 4), (1, 1, 1, 8)],
}
REST = [Parts(row.pop("mesh"), Case(**row, length="T=24")) for row in oracle.covering(oracle.pairwise(DOMAINS))] + [
    Parts((2, 1, 1, 4), whole("constant decay", "all equal", "T=36")), *CASES[2:],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parts", REST, ids=str)
def test_forward_and_gradients_of_the_rest(parts):
    check(parts)


def over(mesh, f, in_specs, out_specs):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("names", "sizes"), [("seq", (n,)) for n in (1, 2, 3, 5, 8)] + [(("a", "b"), (2, 3))])
def test_the_scan_is_the_maps_of_all_devices_before_in_their_order(names, sizes, reverse):
    devices, rng = int(np.prod(sizes)), np.random.default_rng(0)
    M, N = rng.standard_normal((devices, 2, 4, 4)), rng.standard_normal((devices, 2, 4, 3))
    mesh = jax.make_mesh(
        sizes, (names,) if isinstance(names, str) else names, axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:devices],
    )  # fmt: skip
    scan = lambda N, M: linear_state.scan(N, M, names, reverse=reverse)
    got = over(mesh, scan, P(names), P(names))(N.astype(np.float32), M.astype(np.float32))
    S, order = np.zeros((2, 4, 3)), range(devices)
    for i in reversed(order) if reverse else order:
        np.testing.assert_allclose(got[i], S, rtol=1e-4, atol=1e-4)
        S = M[i] @ S + N[i]


@pytest.mark.parametrize("kind", but_few(["scalar decay, delta", "vector decay"]))
def test_what_is_not_finite_reaches_what_it_reaches_on_one_device(kind):
    """A document of four devices' 24 tokens begins on one device, has a NaN on the next and ends on the third."""
    arrays, options, cotangents = inputs(Case(kind, length="T=24", state="from a state"))
    ids, mesh = np.repeat(np.array([[4, -3, 4]], np.int32), [9, 8, 7], 1).repeat(2, 0), mesh_of(1, 1, 1, 4)
    one, sharded = (
        jax.jit(
            functools.partial(with_gradients, functools.partial(f, segment_ids=ids, scale=options["scale"], **more))
        )
        for f, more in ((longattn.linear_attention, {}), (parallel.linear_attention, {"mesh": mesh}))
    )
    for name in ("q", "k", "do", "initial_state"):
        given = arrays | {"do": cotangents["out"]}
        changed = given[name].copy()
        changed[(0, 0) if name == "initial_state" else (0, 11, 0)] = np.nan
        spoilt = (
            arrays | ({} if name == "do" else {name: changed}),
            cotangents | ({"out": changed} if name == "do" else {}),
        )
        expected, got = one(*spoilt), sharded(*spoilt)
        for result, x in expected.items():
            assert 0 < np.isnan(x).mean() < 0.5 or result != "dq" or name == "q", (name, result)
            np.testing.assert_allclose(got[result], x, rtol=1e-4, atol=1e-4, err_msg=f"{name}: {result}")


def test_several_axes_are_one():
    """`linear_state.attend` inside a shard_map, along two axes of the mesh."""
    arrays, options, cotangents = inputs(case := whole("scalar decay, delta", "one q and k", "T=24", ids="segments"))
    mesh = jax.make_mesh((2, 3), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])

    def local(ids, arrays, cotangents):
        def attend(**arrays):
            x, given, names = validate(**arrays, **options | {"segment_ids": ids}, implementation=None, tuning=None)
            return linear_state.attend(x, ("a", "b"), given, names)

        return with_gradients(attend, arrays, cotangents)

    tokens = P(None, ("a", "b"))
    specs = {name: P() if name == "initial_state" else tokens for name in arrays}
    outs = {"out": tokens, "final_state": P()}
    f = over(mesh, local, (tokens, specs, outs), outs | {f"d{name}": spec for name, spec in specs.items()})
    oracle.assert_accurate(f(options["segment_ids"], arrays, cotangents), *expected(case), np.float32)


def test_packed_documents_are_separate_ones():
    """Documents begin with a shard, within one, and are longer than one."""
    lengths, mesh = (9, 9, 2, 13, 3), mesh_of(1, 1, 1, 4)
    arrays, _, _ = inputs(Case("vector decay, delta", length="T=36"))
    ids = np.tile(np.repeat(np.array([1, 0, 1, 0, 7], np.int32), lengths), (arrays["q"].shape[0], 1))
    out, S = parallel.linear_attention(**arrays, segment_ids=ids, mesh=mesh)
    for start, n in zip(np.cumsum((0, *lengths)), lengths):
        document = {name: x[:, start : start + n] for name, x in arrays.items()}
        alone = linear_oracle.linear_attention(**document, do=0 * document["v"], dS=np.zeros(S.shape))
        np.testing.assert_allclose(out[:, start : start + n], alone["out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(S, alone["final_state"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_tpu_kernels_in_parts():
    """The kernels run the same three passes, interpreted."""
    with as_on_tpu():
        parts = Parts((1, 1, 1, 3), hard("scalar decay, delta", "fewer q and k", "T=21"), "pallas_tpu")
        check(parts)


def gradient_over(mesh, kind, T, sizes=(2, 4, 16, 24)):
    """Traces outputs and all gradients of a packed call over a mesh, from shapes; sizes are B, H, D and V."""
    B, H, D, V = sizes
    spread = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data", "seq")))
    x, v, number = (spread(jnp.bfloat16, B, T, H, D), spread(jnp.bfloat16, B, T, H, V), spread(jnp.float32, B, T, H))
    given = {"q": x, "k": x, "v": v, "log_decay": spread(jnp.float32, B, T, H, D) if kind == "vector" else number}
    given |= {"beta": number} if "delta" in kind else {}

    def f(given, ids):
        results, pull = jax.vjp(lambda given: parallel.linear_attention(**given, segment_ids=ids, mesh=mesh), given)
        return results, pull(results)

    return jax.jit(f).trace(given, spread(jnp.int32, B, T))


def collectives(text):
    """Counts the collectives of each kind in a compiled program."""
    found = re.findall(
        r" = .*?\b(all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text
    )
    return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize(
    ("kind", "transition"), [("scalar, delta", (1, 4, 16, 16)), ("scalar", (1, 4, 1)), ("vector", (1, 4, 16))]
)
def test_what_the_devices_send(kind, transition):
    """4 devices take 2 rounds: the first sends a state and a transition, the second a state; forward and backward."""
    mesh, state = parallel.make_mesh(2, 1, 1, 4), (1, 4, 16, 24)
    sent = []
    for T in (64, 1024):
        traced = gradient_over(mesh, kind, T)
        found = [e for e in equations(traced.jaxpr.jaxpr) if "perm" in e.params or e.primitive.name.startswith("psum")]
        sent.append([(e.primitive.name, e.invars[0].aval.shape) for e in found])
    once = [("ppermute", transition), ("ppermute", state), ("ppermute", state)]
    assert sent[0] == [("ppermute", (1,)), *once, ("psum_invariant", state), *once]
    assert sent[1] == sent[0]
    if "delta" in kind:
        assert collectives(traced.lower().compile().as_text()) == {"collective-permute": 7, "all-reduce": 1}


def test_two_devices_send_no_transition_and_an_unused_final_state_is_not_summed():
    mesh = mesh_of(1, 1, 1, 2)
    x = jnp.ones((1, 16, 2, 8))
    loss = lambda x: jnp.sum(parallel.linear_attention(x, x, x, beta=x[..., 0], mesh=mesh)[0])
    traced = jax.jit(jax.grad(loss)).trace(x)
    sent = [e.invars[0].aval.shape for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "ppermute"]
    assert sent == [(1, 2, 8, 8)] * 2
    assert "all-reduce" not in traced.lower().compile().as_text()


@pytest.mark.parametrize("policy", ["none", "attention"])
def test_nothing_runs_twice_under_remat_by_name(policy):
    x, mesh = jnp.ones((1, 64, 2, 8)), mesh_of(1, 1, 1, 4)

    def loss(x):
        y, _ = parallel.linear_attention(
            jnp.sin(x), x, x, beta=x[..., 0], segment_ids=jnp.zeros((1, 64), int), mesh=mesh
        )
        return jnp.sum(checkpoint_name(y, "linear_state") ** 2)

    if policy == "attention":
        loss = jax.checkpoint(loss, policy=REMAT["attention"])
    found = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)]
    assert found.count("ppermute") == 7
    assert found.count("scan") == 9  # spans and chunks: fold, forward, pull; backward: spans, states again, gradients


def compile_for_tpu(request: dict[str, str]) -> dict[str, dict[str, int]]:
    """Counts kernels and collectives of a packed call and its gradients over four chips of v5p."""
    devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
    mesh = parallel.make_mesh(seq=4, devices=devices)
    T, H, D, V = 4 * 2048, 8, 128, 256 if request["kind"] == "scalar, delta" else 128
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = gradient_over(mesh, request["kind"], T, (1, H, D, V)).lower().compile().as_text()
    kernels = {name: len(re.findall(rf"%longattn_linear_{name}[.\d]* =", text)) for name in KERNELS}
    return {"kernels": kernels, "collectives": collectives(text)}


KERNELS = ("fold", "forward", "pull", "backward")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar, delta", "vector"])
def test_compiles_for_tpus(kind):
    """Gated DeltaNet and GLA: one kernel for each pass, and the collectives of a CPU program."""
    answer = compilers.call(f"{__name__}:compile_for_tpu", {"kind": kind}, compilers.tpu_environment(), 600)
    assert answer == {
        "kernels": dict.fromkeys(KERNELS, 1), "collectives": {"collective-permute": 7, "all-reduce": 1},
    }  # fmt: skip
