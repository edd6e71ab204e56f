"""What attention() says to a caller's mistakes, before any compute; and how it dispatches and compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longattn
from longattn import mask as m
from longattn.ops import dispatch
from longattn.ops.attention import api

B, T, S, H, K, D, V = 2, 5, 7, 4, 2, 3, 9
Q, KEY, VALUE = jnp.ones((B, T, H, D)), jnp.ones((B, S, K, D)), jnp.ones((B, S, K, V))
IDS = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q.astype(jnp.bfloat16)}, "must be one dtype"),
        ({"v": VALUE.astype(jnp.float16)}, "must be one dtype"),
        ({"q": Q.astype(jnp.int32)}, "q.dtype=int32 must be bfloat16 or float16 or float32"),
        ({"k": KEY.astype(jnp.float8_e4m3fn)}, "k.dtype=float8_e4m3fn must be"),
        ({"q": Q[0]}, r"q.shape=\(5, 4, 3\) must have rank 4: \[B T H D\]"),
        ({"k": KEY[..., None]}, "k.shape=.* must have rank 4"),
        ({"q": [1.0]}, "must be an array; it is a list"),
        ({"k": KEY[:1]}, r"k.shape=\(1, 7, 2, 3\) must be \(2, 7, 2, 3\), that is \[B S K D\]"),
        ({"k": KEY[..., :2]}, r"must be \(2, 7, 2, 3\)"),
        ({"v": VALUE[:, :6]}, r"v.shape=\(2, 6, 2, 9\) must be \(2, 7, 2, 9\)"),
        ({"v": VALUE[:, :, :1]}, r"v.shape=\(2, 7, 1, 9\) must be"),
        ({"q": jnp.ones((B, T, 3, D))}, "H=3 query heads must be a multiple of K=2"),
        ({"v": jnp.ones((B, S, 2, 0))}, "D=.* and V=0 positive"),
        ({"mask": None}, r"mask=None must be a longattn.mask.Mask; Full\(\) attends to every key"),
        ({"mask": np.ones((T, S), bool)}, "must be a longattn.mask.Mask; BlockSparse takes a pattern"),
        ({"mask": "causal"}, "must be a longattn.mask.Mask"),
        ({"mask": m.Prefix(np.zeros(3, np.int32))}, r"its pattern.shape=\(3, 1, 5, 7\) must be broadcastable"),
        ({"mask": m.BlockSparse(4, np.ones((1, 3, 2, 2), bool))}, "its pattern.shape"),
        ({"segment_ids": IDS[0]}, "segment_ids must be a pair .* as T=5 differs from S=7"),
        ({"segment_ids": (IDS[0],)}, "not 1 of them"),
        ({"segment_ids": (IDS[1], IDS[0])}, r"segment_ids of the queries.shape=\(2, 7\) must be \(2, 5\)"),
        ({"segment_ids": (IDS[0], IDS[1].astype(jnp.int16))}, "segment_ids of the keys.dtype=int16 must be int32"),
        ({"positions": (IDS[0][0], IDS[1])}, "positions of the queries.shape"),
        ({"positions": (IDS[0] * 1.0, IDS[1])}, "positions of the queries.dtype=float32 must be int32"),
        ({"positions": (None, IDS[1])}, "positions of the queries=None must be an array"),
        ({"sinks": jnp.ones(K)}, r"sinks.shape=\(2,\) must be \(4,\), that is \[H\]"),
        ({"sinks": jnp.ones(H, jnp.int32)}, "sinks.dtype=int32"),
        ({"bias": jnp.ones((T, S + 1))}, r"bias.shape=\(5, 8\) must be broadcastable to \(2, 4, 5, 7\)"),
        ({"bias": jnp.ones((3, B, H, T, S))}, "bias.shape=.* must be broadcastable"),
        ({"bias": jnp.ones((T, S), bool)}, "bias.dtype=bool"),
        ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
        ({"scale": float("nan")}, "scale=nan must be positive and finite"),
        ({"scale": jnp.ones(())}, "scale=.* must be a Python float"),
        ({"softcap": -30.0}, "softcap=-30.0 must be positive"),
        ({"softcap": float("inf")}, "softcap=inf must be positive and finite"),
        ({"implementation": "refrence"}, "did you mean 'reference'"),
        ({"implementation": ("reference", "cuda")}, "implementation 'cuda' must be"),
        ({"implementation": ()}, "must be None, a name or a sequence"),
        ({"tuning": 3, "implementation": None}, "must come with exactly one named implementation"),
        ({"tuning": 3, "implementation": ("reference", "xla")}, "must come with exactly one named implementation"),
        ({"tuning": 3}, "must be None or a Tuning of 'reference'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("f", [longattn.attention, longattn.attention_with_lse])
def test_errors(f, change, message):
    arguments = {"q": Q, "k": KEY, "v": VALUE, "implementation": "reference"} | change
    with pytest.raises(ValueError, match=message):
        f(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_backward_partial_errors():
    out, lse = jnp.ones((B, T, H, V)), jnp.ones((B, T, H))
    for change, message in [
        ({"out": out[:, :1]}, "out.shape"),
        ({"lse": lse.transpose(0, 2, 1)}, r"lse.shape=\(2, 4, 5\) must be \(2, 5, 4\), that is \[B T H\]"),
        ({"dlse": out}, "dlse.shape"),
    ]:
        arguments = {"out": out, "lse": lse, "do": out, "dlse": lse} | change
        with pytest.raises(ValueError, match=message):
            longattn.backward_partial(Q, KEY, VALUE, **arguments, implementation="reference")


def test_the_default_is_never_the_reference():
    assert "reference" not in api.DEFAULT
    assert set(api.DEFAULT) < set(api.BACK_ENDS)


def test_compiles_once_per_static_choice():
    """Masks, scale and softcap are static by value; arrays, a mask's among them, are not."""

    def compiled():
        return api._attention._cache_size()

    def call(**options):
        return longattn.attention(Q, KEY, VALUE, implementation="reference", **options)

    call(mask=m.Window(3))
    start = compiled()
    call(mask=m.Window(3), scale=D**-0.5)
    assert compiled() == start
    call(mask=m.Window(4))
    assert compiled() == start + 1
    call(mask=m.Prefix(np.array([1, 2], np.int32)))
    call(mask=m.Prefix(np.array([3, 0], np.int32)))
    assert compiled() == start + 2


def test_numpy_inputs_and_ids_of_one_array():
    q = np.ones((1, 4, 2, 3), np.float32)
    out = longattn.attention(q, q, q, segment_ids=np.zeros((1, 4), np.int32), implementation="reference")
    np.testing.assert_allclose(out, q, rtol=1e-6)


def test_float64_without_x64_is_float32():
    q = np.ones((1, 4, 2, 3), np.float64)
    assert longattn.attention(q, q, q, implementation="reference").dtype == jnp.float32


def test_grouped_heads_read_their_key_head():
    """Query heads 0, 1 read key/value head 0, heads 2, 3 read head 1."""
    v = jnp.broadcast_to(jnp.array([10.0, 20.0])[None, None, :, None], (B, S, K, V))
    out = longattn.attention(Q, KEY, v, mask=m.Full(), implementation="reference")
    np.testing.assert_allclose(out[0, 0, :, 0], [10, 10, 20, 20], rtol=1e-6)


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        longattn.attention(Q, KEY, VALUE, m.Full())
    with pytest.raises(TypeError, match="is_causal"):
        longattn.attention(Q, KEY, VALUE, is_causal=True)


def test_names_in_the_package():
    assert longattn.attention is api.attention
    assert longattn.partial.Partial._fields == ("out", "lse")
    assert isinstance(longattn.mask.Causal(), longattn.mask.Mask)


def test_default_device_of_an_abstract_mesh_reaches_check(monkeypatch):
    seen = []
    back_end = api.BACK_ENDS["reference"]
    monkeypatch.setattr(back_end, "check", lambda *_: seen.append(dispatch.target().kind))
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda q: longattn.attention(q, KEY, VALUE, implementation="reference"), Q)
    assert seen == ["TPU v6 lite"]
