"""Tests of longattn.models.mixers: state sizes, and how Softmax reads its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.config import GatedDeltaNet, Model, Softmax, mixer_classes
from longattn.mask import Causal, Chunked, Dilated, Full, Global, Prefix, Window
from longattn.models import MIXERS, Context, bytes_read_per_token, module_of, sequential_steps, state_elements
from longattn.models.mixer import specs
from longattn.ops.calls import AttentionCall, ConvolutionCall, LinearCall

MODEL = Model(E=12, H=6, K=2, D=4)  # keys and values of a token: 2 * 2 * 4 = 16 elements


@pytest.mark.parametrize(
    ("mask", "kept", "read"),
    [
        (Causal(), 100, 100),
        (Causal() & Window(9), 10, 10),
        (Causal() & Window(500), 100, 100),
        (Causal() & Chunked(64), 36, 36),  # tokens 64 .. 99
        (Causal() & Prefix(7), 7, 7),
        (Causal() & (Window(9) | Prefix(4)), 14, 14),
        (Dilated(5, 3), 16, 6),  # 0, 3, .. 15 back are read; all within 15 back are read by some later query
        (Causal() & (Window(9) | Global(4)), 14, 14),
        (Full(), 100, 100),
    ],
)
def test_state_and_traffic(mask, kept, read):
    mixer = Softmax(mask=mask)
    assert state_elements(mixer, MODEL, 100) == 16 * kept
    assert bytes_read_per_token(mixer, MODEL, 100) == 2 * 16 * read
    assert bytes_read_per_token(mixer, MODEL, 100, itemsize=4) == 4 * 16 * read
    assert sequential_steps(mixer, MODEL, 100) == 1


def test_grouped_heads_and_shapes():
    """Query head h reads key/value head h // G: equal to full heads whose parameters are repeated."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    grouped = MIXERS["Softmax"](Softmax(), MODEL, Context("reference"))
    params = grouped.init(jax.random.key(1), x)["params"]
    shapes = {name: p.shape for name, p in params.items()}
    assert shapes == {"q": (12, 6, 4), "k": (12, 2, 4), "v": (12, 2, 4), "out": (6, 4, 12)}
    full = MIXERS["Softmax"](Softmax(), Model(E=12, H=6, K=6, D=4), Context("reference"))
    repeated = params | {n: jnp.repeat(params[n], 3, 1) for n in ("k", "v")}
    y, state = grouped.apply({"params": params}, x)
    assert state is None
    np.testing.assert_allclose(y, full.apply({"params": repeated}, x)[0], rtol=1e-5, atol=1e-6)


def test_qk_norm_sinks_and_softcap_take_effect():
    x = jax.random.normal(jax.random.key(0), (1, 9, 12))
    plain = MIXERS["Softmax"](Softmax(), MODEL, Context("reference"))
    params = plain.init(jax.random.key(1), x)["params"]
    y = plain.apply({"params": params}, x)[0]
    for change in ({"qk_norm": True}, {"sinks": True}, {"softcap": 0.1}, {"rope": None}):
        mixer = MIXERS["Softmax"](Softmax(**change), MODEL, Context("reference"))
        changed = mixer.init(jax.random.key(1), x)["params"]
        assert set(changed) - set(params) == {"qk_norm": {"q_norm", "k_norm"}, "sinks": {"sinks"}}.get(
            next(iter(change)), set()
        )
        assert float(jnp.max(jnp.abs(mixer.apply({"params": changed | params}, x)[0] - y))) > 1e-3


def test_no_state():
    x = jnp.zeros((1, 2, 12))
    with pytest.raises((ValueError, TypeError), match="state"):
        MIXERS["Softmax"](Softmax(), MODEL, None).init(jax.random.key(0), x, None, None, {"cache": 1})


def test_what_softmax_calls():
    mask = Causal() & Window(9)
    (call,) = module_of(Softmax()).calls(Softmax(mask=mask, sinks=True, softcap=3.0), MODEL, 40)
    assert call == AttentionCall(T=40, H=6, K=2, D=4, dtype="bfloat16", mask=mask, scale=0.5, softcap=3.0, sinks=True)
    assert (call.shared(2).H, call.shared(2).heads, call.keys, call.values) == (3, 1, 40, 4)


def test_what_a_gated_delta_net_calls():
    *convolutions, call = module_of(GatedDeltaNet()).calls(GatedDeltaNet(V=5), MODEL, 40)
    assert call == LinearCall(T=40, Hq=2, Hk=2, Hv=6, D=4, V=5, decay="scalar", delta=True, dtype="bfloat16")
    assert convolutions == [
        ConvolutionCall(T=40, H=H, D=D, taps=4, dtype="bfloat16") for H, D in ((2, 4), (2, 4), (6, 5))
    ]
    assert (call.shared(2).Hq, call.shared(3).Hq, call.shared(3).Hv) == (1, 2, 2)  # 3 devices do not divide 2 heads


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_has_a_sharding(name):
    mixer = mixer_classes()[name]()
    module = module_of(mixer)
    assert specs(module, mixer, MODEL).keys() == module.parameters(mixer, MODEL).keys()
    assert module.decay_free(mixer, MODEL) <= module.parameters(mixer, MODEL).keys()


def test_a_config_without_a_module_is_refused():
    class Unknown(Softmax):
        pass

    with pytest.raises(ValueError, match=r"mixer 'Unknown' must be in longattn.models.MIXERS; known: Softmax"):
        module_of(Unknown())
