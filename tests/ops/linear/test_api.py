"""Errors of linear_attention() and linear_step() for a caller's mistakes, before any compute; and how they compile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longattn
from longattn.ops.linear import api, linear_attention, linear_step, state_bytes, xla
from tests.slow import but_few

B, T, H, D, V = 2, 5, 4, 3, 9
Q, KEY, VALUE = jnp.ones((B, T, 2, D)), jnp.ones((B, T, 1, D)), jnp.ones((B, T, H, V))
DECAY, BETA, STATE = -jnp.ones((B, T, H)), jnp.ones((B, T, H)), jnp.ones((B, H, D, V))
IDS = jnp.zeros((B, T), jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.astype(jnp.bfloat16)}, "must be one dtype; cast them with .astype"),
        ({"q": Q.astype(jnp.int32)}, "q.dtype=int32 must be bfloat16 or float16 or float32"),
        ({"q": Q[0]}, r"q.shape=\(5, 2, 3\) must have rank 4: \[B T Hq D\]"),
        ({"v": [1.0]}, "must be an array; it is a list"),
        ({"k": KEY[:1]}, r"k.shape=\(1, 5, 1, 3\) must be \(2, 5, 1, 3\), that is \[B T Hk D\]"),
        ({"k": KEY[..., :2]}, r"k.shape=\(2, 5, 1, 2\) must be \(2, 5, 1, 3\)"),
        ({"v": VALUE[:, :4]}, r"v.shape=\(2, 4, 4, 9\) must be \(2, 5, 4, 9\), that is \[B T Hv V\]"),
        ({"q": jnp.ones((B, T, 3, D))}, "Hq=3, Hk=1 and Hv=4 heads .* must be positive and divide the largest, 4"),
        ({"k": jnp.ones((B, T, 0, D))}, "Hk=0 and Hv=4 heads .* must be positive"),
        ({"v": jnp.ones((B, T, H, 0))}, "D=3 of q and k and V=0 of v must be positive"),
        ({"log_decay": DECAY[0]}, r"log_decay.shape=\(5, 4\) must be \(4,\), that is \[H\] or \(2, 5, 4\), that is"),
        ({"log_decay": jnp.ones((B, T, 2))}, r"log_decay.shape=\(2, 5, 2\) must be"),
        ({"log_decay": DECAY.astype(jnp.bfloat16)}, "log_decay.dtype=bfloat16 must be float32 or float64"),
        ({"log_decay": -0.5}, "log_decay=-0.5 must be an array; it is a float"),
        ({"beta": BETA[..., None]}, r"beta.shape=\(2, 5, 4, 1\) must be \(2, 5, 4\), that is \[B T H\]"),
        ({"beta": BETA.astype(jnp.float16)}, "beta.dtype=float16 must be float32"),
        ({"initial_state": STATE[0]}, r"must be \(2, 4, 3, 9\), that is \[B H D V\]"),
        ({"initial_state": STATE.swapaxes(2, 3)}, r"\(2, 4, 9, 3\) .* \[B H D V\]: D are the key's .* V first"),
        ({"initial_state": STATE.astype(jnp.bfloat16)}, "initial_state.dtype=bfloat16 must be float32"),
        ({"segment_ids": IDS[:1]}, r"segment_ids.shape=\(1, 5\) must be \(2, 5\), that is \[B T\]"),
        ({"segment_ids": IDS.astype(jnp.int8)}, r"segment_ids.dtype=int8 must be int32; .*\.astype\(jnp.int32\)"),
        ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
        ({"scale": jnp.ones(())}, "scale=.* must be a Python float"),
        ({"scale": None}, "scale=None must be a Python float"),
        ({"implementation": "refrence"}, "did you mean 'reference'"),
        ({"implementation": ()}, "must be None, a name or a sequence"),
        ({"tuning": xla.Tuning(4), "implementation": None}, "must come with exactly one named implementation"),
        ({"tuning": xla.Tuning(4)}, "must be None or a Tuning of 'reference'"),
        ({"tuning": 4, "implementation": "xla"}, "tuning=4 must be None or a Tuning of 'xla'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(change, message):
    arguments = {"q": Q, "k": KEY, "v": VALUE, "implementation": "reference"} | change
    with pytest.raises(ValueError, match=message):
        linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q}, r"q.shape=\(2, 5, 2, 3\) must have rank 3: \[B Hq D\]"),
        ({"v": VALUE[:, 0].astype(jnp.bfloat16)}, "must be one dtype"),
        (
            {"state": None},
            r"state=None must be an array \[B H D V\]; start from jnp.zeros\(\(2, 4, 3, 9\), jnp.float32\)",
        ),
        ({"state": STATE[..., :1]}, r"state.shape=\(2, 4, 3, 1\) must be \(2, 4, 3, 9\)"),
        ({"state": STATE.swapaxes(2, 3)}, r"\(2, 4, 9, 3\) .*: D are the key's channels, V the value's; swap"),
        (
            {"log_decay": DECAY},
            r"log_decay.shape=\(2, 5, 4\) must be \(4,\), that is \[H\] or \(2, 4\), that is \[B H\]",
        ),
        ({"beta": BETA}, r"beta.shape=\(2, 5, 4\) must be \(2, 4\), that is \[B H\]"),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_of_a_step(change, message):
    arguments = {"q": Q[:, 0], "k": KEY[:, 0], "v": VALUE[:, 0], "state": STATE} | change
    with pytest.raises(ValueError, match=message):
        linear_step(**arguments)


@pytest.mark.parametrize("chunk", [0, -8, 48])
def test_a_chunk_is_a_power_of_two(chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk} must be a power of two"):
        xla.Tuning(chunk)


def test_the_default_is_never_the_reference():
    assert "reference" not in api.DEFAULT
    assert set(api.DEFAULT) < set(api.BACK_ENDS)
    assert list(api.DEFAULT) == [name for name in ("pallas_tpu", "xla") if name in api.BACK_ENDS]


def test_a_refusal_sees_a_decay_for_every_token(monkeypatch):
    """A back end checks the repeated decay, also where the caller gave one per head, before anything is computed."""

    def check(x, options):
        raise NotImplementedError(f"a decay of {x.log_decay.shape}")

    monkeypatch.setattr(api.BACK_ENDS["reference"], "check", check)
    with pytest.raises(NotImplementedError, match=r"reference: a decay of \(2, 5, 4\)"):
        linear_attention(Q, KEY, VALUE, log_decay=-jnp.ones(H), implementation="reference")


def test_compiles_once_per_static_choice():
    def compiled():
        return api._linear_attention._cache_size()

    def call(**options):
        return linear_attention(Q, KEY, VALUE, implementation="reference", **options)

    call(log_decay=DECAY)
    start = compiled()
    call(log_decay=2 * DECAY, scale=1)
    assert compiled() == start
    call(log_decay=DECAY, scale=0.5)
    assert compiled() == start + 1


def test_numpy_inputs():
    q = np.ones((1, 4, 2, 3), np.float32)
    out, S = linear_attention(q, q, q, log_decay=np.zeros(2), segment_ids=np.zeros((1, 4), np.int32))
    np.testing.assert_allclose(out[0, :, 0, 0], 3 * np.arange(1, 5), rtol=1e-6)
    assert S.dtype == jnp.float32


def test_float64_without_x64_is_float32():
    q = np.ones((1, 4, 2, 3), np.float64)
    assert [x.dtype for x in linear_attention(q, q, q, initial_state=np.ones((1, 2, 3, 3)))] == [jnp.float32] * 2


def test_grouped_heads_read_their_head():
    """Heads 0 and 1 read q's head 0, heads 2 and 3 its head 1; all read the single head of k."""
    q = jnp.broadcast_to(jnp.array([10.0, 20.0])[None, None, :, None], Q.shape)
    for call, index in ((linear_attention, (0, 0)), (_step, (0,))):
        out, _ = call(q, KEY, VALUE)
        np.testing.assert_allclose(out[*index, :, 0], 3 * np.array([10, 10, 20, 20]), rtol=1e-6)


def _step(q, k, v):
    return linear_step(q[:, 0], k[:, 0], v[:, 0], jnp.zeros_like(STATE))


@pytest.mark.parametrize("shape", [(H,), (B, H), (B, H, D)], ids=str)
@pytest.mark.parametrize("dtype", but_few(["float32", "bfloat16"]))
def test_a_step_is_one_token_with_its_gradients(shape, dtype, optimised):
    """A step equals one token of the reference, whose sums have the same order."""
    rng = np.random.default_rng(0)
    q, k, v, S, beta = (jnp.asarray(rng.random(x.shape, np.float32)) for x in (Q, KEY, VALUE, STATE, BETA))
    q, k, v = (x[:, 0].astype(dtype) for x in (q, k, v))
    log_decay = -jnp.asarray(rng.random(shape, np.float32))

    def step(q, k, v, S, log_decay, beta):
        return linear_step(q, k, v, S, log_decay=log_decay, beta=beta, scale=0.7)

    def one_token(q, k, v, S, log_decay, beta):
        q, k, v, beta = (x[:, None] for x in (q, k, v, beta))
        log_decay = log_decay if log_decay.ndim == 1 else log_decay[:, None]
        out, S = linear_attention(
            q, k, v, log_decay=log_decay, beta=beta, initial_state=S, scale=0.7, implementation="reference"
        )
        return out[:, 0], S

    results = []
    for f in (step, one_token):
        primals, pull = jax.vjp(f, q, k, v, S, log_decay, beta[:, 0])
        results.append((*primals, *pull(jax.tree.map(jnp.cos, primals))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        last_place = float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), rtol=max(last_place, 1e-6))


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        linear_attention(Q, KEY, VALUE, DECAY)
    with pytest.raises(TypeError, match="gate"):
        linear_attention(Q, KEY, VALUE, gate=DECAY)


def test_names_in_the_package():
    assert longattn.linear_attention is linear_attention
    assert longattn.linear_step is linear_step


def test_bytes_of_a_state():
    _, S = jax.eval_shape(linear_attention, Q, KEY, VALUE)
    assert state_bytes(B, H, D, V) == S.size * S.dtype.itemsize
