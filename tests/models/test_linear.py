"""The linear family of mixers: each against its paper's recurrence in NumPy, packed, causal, and in a transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn import config as c
from longattn.models import (
    MIXERS,
    Context,
    Transformer,
    bytes_read_per_token,
    head,
    init_params,
    linear,
    sequential_steps,
    state_elements,
)
from longattn.models.layers import rope_frequencies
from longattn.ops.linear.xla import Tuning
from longattn.study.learn import learn, score
from longattn.study.units import Clock
from longattn.train.loss import cross_entropy, labels_and_weights
from longattn.train.step import decays
from tests.slow import but_few

MODEL = c.Model(N=2, E=12, F=20, H=6, K=2, D=4, W=17, dtype="float32")
LAYERS = [
    c.LinearAttention(),
    c.Performer(features=10, seed=3, eps=1e-12),
    c.Based(features=3),
    c.RetNet(V=5, rope=c.RoPE(base=50.0)),
    c.GLA(D=3, rank=5),
    c.Mamba2(expand=2, state=5, groups=3),
    c.GatedDeltaNet(V=7, taps=3),
    c.KimiDeltaAttention(V=5, rank=3),
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
gradients_of_every_layer = pytest.mark.parametrize(
    "layer", but_few(sorted(LAYERS, key=lambda x: not isinstance(x, c.GatedDeltaNet))), ids=lambda x: type(x).__name__
)
LENGTHS = (6, 3, 6)
T = sum(LENGTHS)
X = jax.random.normal(jax.random.key(0), (2, T, MODEL.E))
IDS = jnp.asarray(np.tile(np.repeat([3, 1, 3], LENGTHS), (2, 1)), jnp.int32)
POSITIONS = jnp.asarray(np.tile(np.concatenate([np.arange(n) for n in LENGTHS]), (2, 1)), jnp.int32)


def test_every_mixer_is_tested():
    assert {type(layer).__name__ for layer in LAYERS} | {"Softmax"} == set(MIXERS)


@functools.cache
def parameters(layer):
    """Random numbers in the shapes of its parameters, so that none is zero or equal to another."""
    module = MIXERS[type(layer).__name__](layer, MODEL, None)
    shapes = jax.eval_shape(module.init, jax.random.key(1), X)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda p: jnp.asarray(0.5 * rng.standard_normal(p.shape) + (len(p.shape) == 1), p.dtype), shapes
    )


@functools.partial(jax.jit, static_argnames=("layer", "context"))
def mixed(params, x, positions=None, segment_ids=None, *, layer, context=None):
    return MIXERS[type(layer).__name__](layer, MODEL, context).apply({"params": params}, x, positions, segment_ids)[0]


# ---- the papers' recurrences, on one head [T D] at a time

silu = lambda x: x / (1 + np.exp(-x))
sigmoid = lambda x: 1 / (1 + np.exp(-x))
softplus = lambda x: np.log1p(np.exp(x))
rms = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + MODEL.norm_eps) * scale
length_one = lambda x: x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def recur(q, k, v, decay=None, beta=None):
    """o_t = S_t^T q_t, S_t = (I - beta k k^T) Diag(decay) S_{t-1} + beta k v^T; decay and beta are ones by default."""
    S, outputs = np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(v)):
        S = np.ones(k.shape[1])[:, None] * (1.0 if decay is None else np.reshape(decay[t], (-1, 1))) * S
        if beta is not None:
            S = S - beta[t] * np.outer(k[t], k[t] @ S)
        S = S + (1.0 if beta is None else beta[t]) * np.outer(k[t], v[t])
        outputs.append(q[t] @ S)
    return np.stack(outputs)


def quadratic(q, k, v, weight, eps=1e-6):
    """sum_s w(q_t, k_s) v_s / (eps + sum_s w(q_t, k_s)) over s <= t, from the weights themselves."""
    w = np.tril([[weight(a, b) for b in k] for a in q])
    return w @ v / (w.sum(1, keepdims=True) + eps)


def conv(x, w, b=0.0):
    """silu of the causal convolution of x [T D] with w [D C]."""
    padded = np.concatenate([np.zeros((w.shape[1] - 1, x.shape[1])), x])
    return silu(sum(padded[c : c + len(x)] * w[:, c] for c in range(w.shape[1])) + b)


def rotated(x, base):
    z = (x[:, :2] + 1j * x[:, 2:]) * np.exp(1j * np.outer(np.arange(len(x)), rope_frequencies(c.RoPE(base=base), 4)))
    return np.concatenate([z.real, z.imag], 1)


def linear_attention(layer, p, x, h):
    phi = lambda z: np.where(z > 0, z + 1, np.exp(np.minimum(z, 0)))
    q, k, v = x @ p["q"][:, h], x @ p["k"][:, h // 3], x @ p["v"][:, h // 3]
    return quadratic(q, k, v, lambda a, b: phi(a) @ phi(b))


def performer(layer, p, x, h):
    w = linear.orthogonal_features(10, 4, 3).astype(np.float64)
    phi = lambda z: np.exp(w @ z / 4**0.25 - z @ z / 4) / 10**0.5
    q, k, v = x @ p["q"][:, h], x @ p["k"][:, h // 3], x @ p["v"][:, h // 3]
    return quadratic(q, k, v, lambda a, b: phi(a) @ phi(b), eps=0)


def based(layer, p, x, h):
    q, k, v = x @ p["q"][:, h], x @ p["k"][:, h // 3], x @ p["v"][:, h // 3]
    return quadratic(q, k, v, lambda a, b: 1 + (s := a @ b / 3**0.5) + s**2 / 2)


def retnet(layer, p, x, h):
    forgets = np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), 6))[h]
    q, k = (rotated(x @ p[n][:, h], 50.0) for n in "qk")
    o = recur(q / 2, k, x @ p["v"][:, h], np.full(len(x), 1 - forgets))
    return rms(o, p["norm"]["scale"]) * silu(x @ p["gate"][:, h])


def gla(layer, p, x, h):
    alpha = sigmoid(x @ p["decay_down"] @ p["decay_up"][:, h] + p["decay_bias"][h]) ** (1 / 16)
    o = recur(x @ p["q"][:, h] / 3**0.5, x @ p["k"][:, h], x @ p["v"][:, h], alpha)
    return rms(o, p["norm"]["scale"]) * silu(x @ p["gate"][:, h])


def mamba2(layer, p, x, h):
    g = h // 4  # twelve heads, three groups
    step = softplus(x @ p["decay"][:, h] + p["decay_bias"][h])
    v = conv(x @ p["v"][:, h], p["v_conv"][h], p["v_conv_bias"][h])
    B, C = (conv(x @ p[n][:, g], p[f"{n}_conv"][g], p[f"{n}_conv_bias"][g]) for n in "bc")
    step = np.clip(step, *layer.step_limit)
    y = recur(C, B, step[:, None] * v, np.exp(-step * np.exp(p["decay_log"][h]))) + p["skip"][h] * v
    return y * silu(x @ p["gate"][:, h])  # the norm is over several heads


def gated_delta_net(layer, p, x, h):
    q, k = (length_one(conv(x @ p[n][:, h // 3], p[f"{n}_conv"][h // 3])) for n in "qk")
    alpha = np.exp(-np.exp(p["decay_log"][h]) * softplus(x @ p["decay"][:, h] + p["decay_bias"][h]))
    q = q * (layer.scale or 4**-0.5)
    o = recur(q, k, conv(x @ p["v"][:, h], p["v_conv"][h]), alpha, sigmoid(x @ p["beta"][:, h]))
    return rms(o, p["norm"]["scale"]) * silu(x @ p["gate"][:, h])


def kimi_delta_attention(layer, p, x, h):
    q, k = (length_one(conv(x @ p[n][:, h], p[f"{n}_conv"][h])) for n in "qk")
    step = softplus(x @ p["decay_down"] @ p["decay_up"][:, h] + p["decay_bias"][h])
    alpha = np.exp(-np.exp(p["decay_log"][h]) * step)
    q = q * (layer.scale or 4**-0.5)
    o = recur(q, k, conv(x @ p["v"][:, h], p["v_conv"][h]), alpha, sigmoid(x @ p["beta"][:, h]))
    return rms(o, p["norm"]["scale"]) * sigmoid(x @ p["gate_down"] @ p["gate_up"][:, h])


PAPERS = (linear_attention, performer, based, retnet, gla, mamba2, gated_delta_net, kimi_delta_attention)


CASES = [
    *zip(LAYERS, PAPERS),
    # what configs of version 3 say, and a limit that some of the steps exceed
    (c.GatedDeltaNet(V=7, taps=3, scale=1.0), gated_delta_net),
    (c.Mamba2(expand=2, state=5, groups=3, norm_groups=1, step_limit=(0.5, 2.0)), mamba2),
]


@pytest.mark.parametrize(("layer", "paper"), CASES, ids=[paper.__name__ for _, paper in CASES])
def test_is_its_paper(layer, paper):
    params = parameters(layer)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for x, got in zip(np.asarray(X, np.float64), mixed(params, X, layer=layer)):
        y = np.stack([paper(layer, p, x, h) for h in range(p["out"].shape[0])], 1)
        if isinstance(layer, c.Mamba2):
            groups = layer.norm_groups or layer.groups
            y = rms(y.reshape(T, groups, -1), p["norm"]["scale"].reshape(groups, -1)).reshape(y.shape)
        np.testing.assert_allclose(got, np.einsum("THV,HVE->TE", y, p["out"]), rtol=1e-4, atol=1e-5)


@gradients_of_every_layer
def test_packed_documents_are_as_if_alone(layer):
    """Also where an id comes back: the third document has the first one's."""
    params = parameters(layer)
    whole = mixed(params, X, POSITIONS, IDS, layer=layer)
    start = 0
    for n in LENGTHS:
        alone = mixed(params, X[:, start : start + n], layer=layer, context=Context("reference"))
        np.testing.assert_allclose(whole[:, start : start + n], alone, rtol=1e-4, atol=1e-5)
        start += n
    assert not np.allclose(whole, mixed(params, X, layer=layer), rtol=1e-3)


@every_layer
def test_causal_to_the_bit(layer):
    params = parameters(layer)
    before = mixed(params, X, layer=layer)
    for t in (0, 7, T - 1):
        after = mixed(params, X.at[0, t].add(1), layer=layer)
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        np.testing.assert_array_equal(after[1], before[1])
        assert not np.allclose(after[0, t], before[0, t])


@gradients_of_every_layer
def test_gradients_reach_every_parameter(layer):
    params, dy = parameters(layer), jax.random.normal(jax.random.key(3), X.shape)
    dparams, dx = jax.jit(jax.grad(lambda p, x: jnp.sum(mixed(p, x, POSITIONS, IDS, layer=layer) * dy), (0, 1)))(
        params, X
    )
    for gradient in jax.tree.leaves((dparams, dx)):
        assert gradient.dtype == jnp.float32
        assert np.isfinite(gradient).all()
        assert np.max(np.abs(gradient)) > 0


@gradients_of_every_layer
def test_bfloat16_is_as_close_as_the_recurrence(layer):
    params = parameters(layer)
    exact = mixed(params, X, layer=layer)
    got, serial = (mixed(params, X.astype(jnp.bfloat16), layer=layer, context=x) for x in (None, Context("reference")))
    assert got.dtype == jnp.bfloat16
    error, plain = (np.linalg.norm(exact - y.astype(jnp.float32)) for y in (got, serial))
    assert error <= 2 * plain


@every_layer
def test_state_elements_are_those_of_the_layer(layer):
    """Counted where they come from: final states and the tails of the convolutions."""
    states, tails = [], []

    @dataclasses.dataclass(frozen=True)
    class Recording(Context):
        def linear_attention(self, *args, **kwargs):
            result = super().linear_attention(*args, **kwargs)
            states.append(result[1].size // 2)  # of two sequences
            return result

        def short_convolution(self, *args, **kwargs):
            result = super().short_convolution(*args, **kwargs)
            tails.append(result[1].size // 2)
            return result

    params = parameters(layer)
    states.clear(), tails.clear()
    jax.eval_shape(lambda: MIXERS[type(layer).__name__](layer, MODEL, Recording()).apply({"params": params}, X))
    for length in (1, 100):
        assert state_elements(layer, MODEL, length) == sum(states) + sum(tails)
        assert bytes_read_per_token(layer, MODEL, length) == 4 * sum(states) + 2 * sum(tails)
    C = Tuning().chunk
    assert [sequential_steps(layer, MODEL, length) for length in (1, C, C + 1, 4 * C)] == [1, 1, 2, 4]


@every_layer
def test_round_trip(layer):
    again = c.from_json(c.to_json(c.Config(model=c.Model(mixers=(layer, c.Softmax())))))
    assert again.model.mixers == (layer, c.Softmax())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.LinearAttention(eps=0.0), "LinearAttention.eps=0.0 must be positive"),
        (lambda: c.Performer(features=0), "Performer.features=0"),
        (lambda: c.RetNet(fastest=1e-3, slowest=1e-2), "slowest <= fastest < 1"),
        (lambda: c.GLA(rank=0), "GLA.rank=0"),
        (lambda: c.Mamba2(steps=(0.1, 0.01)), r"Mamba2.steps=\(0.1, 0.01\) must be \(low, high\)"),
        (lambda: c.Mamba2(step_limit=(0.1, 0.1)), r"Mamba2.step_limit=\(0.1, 0.1\) must be \(low, high\)"),
        (lambda: c.Mamba2(norm_groups=0), "Mamba2.norm_groups=0 must be at least 1"),
        (lambda: c.GatedDeltaNet(taps=0), "GatedDeltaNet.taps=0"),
        (lambda: c.KimiDeltaAttention(scale=0.0), "KimiDeltaAttention.scale=0.0 must be positive"),
    ],
)
def test_config_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_norm_groups_divide_the_channels():
    with pytest.raises(ValueError, match=r"Mamba2\.norm_groups=5 must divide the 48 channels of 12 heads"):
        MIXERS["Mamba2"](c.Mamba2(norm_groups=5), MODEL).init(jax.random.key(0), X)


def test_no_state():
    with pytest.raises((ValueError, TypeError), match="state"):
        MIXERS["RetNet"](c.RetNet(), MODEL, None).init(jax.random.key(0), X, None, None, {"cache": 1})


def test_initial_decays():
    """Steps log-uniform in [1e-3, 0.1] where the projections are zero, rates uniform in [1, 16]."""
    layer, model = c.KimiDeltaAttention(), dataclasses.replace(MODEL, H=128, K=128)
    init = MIXERS["KimiDeltaAttention"](layer, model, Context("reference")).init
    p = jax.jit(init)(jax.random.key(1), X[:1, :1])["params"]
    steps, rates = np.log(softplus(np.asarray(p["decay_bias"], np.float64))), np.exp(p["decay_log"])
    assert np.log(1e-3) - 1e-3 <= steps.min() < np.log(2e-3) and np.log(0.05) < steps.max() <= np.log(0.1) + 1e-3
    np.testing.assert_allclose(np.median(steps), np.log(1e-2), atol=0.5)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16


def test_orthogonal_features():
    w = linear.orthogonal_features(20, 8, 0)
    np.testing.assert_allclose(np.triu(w[:8] @ w[:8].T, 1), 0, atol=1e-5)
    np.testing.assert_array_equal(w, linear.orthogonal_features(20, 8, 0))
    assert np.abs(w - linear.orthogonal_features(20, 8, 1)).max() > 0.1
    many = linear.orthogonal_features(8000, 8, 0).astype(np.float64)
    q, k = np.random.default_rng(0).standard_normal((2, 8)) / 8**0.25 / 2
    estimate = np.mean(np.exp(many @ (q + k) - q @ q / 2 - k @ k / 2))
    np.testing.assert_allclose(estimate, np.exp(q @ k), rtol=0.05)  # unbiased: its deviation here is 0.01


# ---- in a transformer

HYBRID = dataclasses.replace(
    MODEL, N=4, E=16, F=24, H=2, K=2, mixers=(c.GatedDeltaNet(V=5), c.Softmax(rope=None)), tie=False
)
TOKENS = jax.random.randint(jax.random.key(7), (2, T), 0, 17, jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "context"))
def loss(params, model, context=None):
    labels, weights = labels_and_weights(TOKENS, POSITIONS, IDS, jnp.ones(TOKENS.shape))
    x, _ = Transformer(model, context).apply({"params": params}, TOKENS, POSITIONS, IDS, method="hidden")
    return cross_entropy(x, head(params, model), labels, weights, chunk=16)[0] / jnp.sum(weights)


@pytest.mark.slow
def test_hybrid_scans_and_starts_from_the_loss_of_chance():
    params = init_params(HYBRID, jax.random.key(0))
    assert set(params["layers"]) == {"layer_0", "layer_1"}
    assert params["layers"]["layer_0"]["mixer"]["decay_log"].shape == (2, 2)
    assert abs(float(loss(params, HYBRID)) - np.log(17) - 0.5) < 0.4


@pytest.mark.slow
def test_remat_runs_no_scan_again():
    """Counted as loops of the compiled gradient, as for attention; and it is the same gradient."""
    plain = dataclasses.replace(MODEL, N=1, mixers=(c.RetNet(),))
    shapes = jax.eval_shape(lambda: init_params(plain, jax.random.key(0)))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes)
    tokens = jnp.zeros((1, 600), jnp.int32)  # several spans, so that there are loops

    def loops(remat, transform):
        model = dataclasses.replace(plain, remat=remat)
        f = lambda p: jnp.sum(Transformer(model).apply({"params": p}, tokens, method="hidden")[0] ** 2)
        compiled = jax.jit(transform(f)).lower(params).compile()
        return compiled.as_text().count(" while("), compiled(params)

    forward, _ = loops("none", lambda f: f)
    once, expected = loops("none", jax.grad)
    for remat, more in (("attention", 0), ("full", forward)):
        again, grads = loops(remat, jax.grad)
        assert again == once + more
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected)
    assert forward > 0


@every_layer
def test_weight_decay_is_of_matrices_alone(layer):
    """Stacked, vectors have the rank of matrices."""
    model = dataclasses.replace(MODEL, N=4, mixers=(layer,))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shrinks = decays(jax.tree.map(lambda p: jnp.zeros(p.shape), shapes), model)["layers"]["layer_0"]["mixer"]
    vectors = {"norm", "skip", "decay_log", "decay_bias", "v_conv_bias", "b_conv_bias", "c_conv_bias"}
    assert {n for n, d in shrinks.items() if d is not True} == vectors & set(shrinks)


@pytest.mark.slow
def test_gated_delta_net_learns_to_recall(optimised):
    """One layer and nothing else: with four pairs, who knows the row's values but not their keys gets a quarter."""
    model = c.Model(N=1, E=32, F=64, H=2, K=2, D=16, W=32, mixers=(c.GatedDeltaNet(V=16),), tie=False, dtype="float32")
    config = c.Config(
        model=model,
        data=c.MQAR(T=32, B=32, pairs=4, vocabulary=32),
        optimiser=c.Optimiser(lr=1e-2, warmup=60),
        run=c.Run(steps=300),
    )
    sums = score(learn(config, (0,), Clock(600)), 8)
    assert sums["correct_sum"] / sums["weight_sum"] > 0.9
