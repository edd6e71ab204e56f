"""Layers equal published ones: results of `transformers` and FLA, which published/remake.py recorded.

The tolerance is twice the error of the published layer in float32, both against its result in float64.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn import config as c
from longattn import linear_attention
from longattn.models import MIXERS, Transformer
from longattn.models.layers import rope_frequencies, rope_temperature

FOLDER = Path(__file__).parent / "published"
ROPES = json.loads((FOLDER / "rope.json").read_text())


def fixture(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in arrays.items()}


def heads(w, H):
    """A Linear's weight [out in] as [in H D]."""
    return w.T.reshape(w.shape[1], H, -1)


def distance(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def rope(parameters):
    """A published `rope_parameters` as a config: the scaling's own fields have the published names."""
    names = {"rope_theta": "base", "rope_type": "scaling", "original_max_position_embeddings": "original_T"}
    return c.RoPE(**{names.get(name, name): value for name, value in parameters.items()})


@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies(name):
    published = ROPES[name]
    mine = rope(published["rope_parameters"])
    np.testing.assert_allclose(rope_frequencies(mine, published["D"]), published["frequencies"], rtol=1e-13)
    np.testing.assert_allclose(rope_temperature(mine), published["attention_factor"] ** 2, rtol=1e-13)


# ---- whole models

LLAMA = c.RoPE(base=100.0, scaling="llama3", factor=4.0, original_T=16)
QWEN3 = c.RoPE(
    base=100.0, scaling="yarn", factor=4.0, original_T=16, beta_fast=2.0, beta_slow=0.25, truncate=False
)  # fmt: skip


def decoder(w, m):
    """Parameters of a published decoder; the embedding's rows enter this model times sqrt(E)."""
    params = {
        "embedding": w["model.embed_tokens.weight"] / m.E**0.5,
        "head": w["lm_head.weight"],
        "norm": {"scale": w["model.norm.weight"]},
    }
    for i in range(m.N):
        layer = {
            name.removeprefix(f"model.layers.{i}."): x for name, x in w.items() if name.startswith(f"model.layers.{i}.")
        }
        mixer = {n: heads(layer[f"self_attn.{n}_proj.weight"], h) for n, h in (("q", m.H), ("k", m.K), ("v", m.K))}
        mixer["out"] = layer["self_attn.o_proj.weight"].T.reshape(m.H, m.D, m.E)
        if m.mixers[0].qk_norm:
            mixer |= {f"{n}_norm": {"scale": layer[f"self_attn.{n}_norm.weight"]} for n in "qk"}
        params[f"layer_{i}"] = {
            "mixer_norm": {"scale": layer["input_layernorm.weight"]},
            "mixer": mixer,
            "mlp_norm": {"scale": layer["post_attention_layernorm.weight"]},
            "mlp": {n: layer[f"mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")},
        }
    return params


@pytest.mark.parametrize(
    ("name", "mixer"),
    [("llama", c.Softmax(rope=LLAMA)), ("qwen3", c.Softmax(rope=QWEN3, qk_norm=True))],
    ids=["llama", "qwen3"],
)
def test_decoders(name, mixer):
    model = c.Model(
        N=2, E=16, F=7, H=4, K=2, D=4, W=11, mixers=(mixer,), tie=False, dtype="float32", norm_eps=0.01, scan=False
    )
    f = fixture(name)
    got, _ = jax.jit(Transformer(model).apply)({"params": decoder(f, model)}, jnp.asarray(f["x"], jnp.int32))
    assert distance(got, f["exact"]) <= 2 * f["error"][0]


# ---- layers


def gated_delta_net(w, m, mixer):
    """Qwen3-Next: one matrix for q, k, v and the gate of each key head and its value heads, one for beta and decay."""
    G, V = m.H // m.K, mixer.V
    q, k, v, gate = np.split(heads(w["in_proj_qkvz.weight"], m.K), np.cumsum([m.D, m.D, G * V]), -1)
    beta, decay = np.split(heads(w["in_proj_ba.weight"], m.K), 2, -1)
    q_conv, k_conv, v_conv = np.split(w["conv1d.weight"][:, 0], np.cumsum([m.K * m.D] * 2))
    return {
        "q": q, "k": k, "v": v.reshape(m.E, m.H, V), "gate": gate.reshape(m.E, m.H, V),
        "beta": beta.reshape(m.E, m.H), "decay": decay.reshape(m.E, m.H),
        "q_conv": q_conv.reshape(m.K, m.D, -1), "k_conv": k_conv.reshape(m.K, m.D, -1),
        "v_conv": v_conv.reshape(m.H, V, -1), "decay_log": w["A_log"], "decay_bias": w["dt_bias"],
        "norm": {"scale": w["norm.weight"]}, "out": w["out_proj.weight"].T.reshape(m.H, V, m.E),
    }  # fmt: skip


def kimi_delta_attention(w, m, mixer):
    """Kimi Linear: one convolution for q, k and v."""
    convs = np.split(w["conv1d.weight"][:, 0], 3)
    return {
        **{n: heads(w[f"{n}_proj.weight"], m.H) for n in "qkv"},
        **{f"{n}_conv": x.reshape(m.H, m.D, -1) for n, x in zip("qkv", convs)},
        "decay_down": w["forget_gate.f_a_proj.weight"].T, "decay_up": heads(w["forget_gate.f_b_proj.weight"], m.H),
        "decay_log": w["forget_gate.A_log"].reshape(m.H), "decay_bias": w["forget_gate.dt_bias"].reshape(m.H, m.D),
        "gate_down": w["g_a_proj.weight"].T, "gate_up": heads(w["g_b_proj.weight"], m.H), "beta": w["b_proj.weight"].T,
        "norm": {"scale": w["o_norm.weight"]}, "out": w["o_proj.weight"].T.reshape(m.H, m.D, m.E),
    }  # fmt: skip


def mamba2(w, m, mixer):
    """Mamba-2: one matrix for the gate, x, B, C and the step, one convolution for x, B and C."""
    H, C, S = mixer.expand * m.H, mixer.expand * m.H * m.D, mixer.groups * mixer.state
    gate, v, b, c_, decay = np.split(w["in_proj.weight"], np.cumsum([C, C, S, S]))
    shapes = {"v": (H, m.D), "b": (mixer.groups, mixer.state), "c": (mixer.groups, mixer.state)}
    weights = np.split(w["conv1d.weight"][:, 0], [C, C + S])
    biases = np.split(w["conv1d.bias"], [C, C + S])
    return {
        "gate": heads(gate, H), "v": heads(v, H), "b": heads(b, mixer.groups), "c": heads(c_, mixer.groups),
        "decay": decay.T, "decay_log": w["A_log"], "decay_bias": w["dt_bias"], "skip": w["D"],
        **{f"{n}_conv": x.reshape(*shapes[n], -1) for n, x in zip("vbc", weights)},
        **{f"{n}_conv_bias": x.reshape(shapes[n]) for n, x in zip("vbc", biases)},
        "norm": {"scale": w["norm.weight"]}, "out": w["out_proj.weight"].T.reshape(H, m.D, m.E),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "mixer", "H"),
    [
        (gated_delta_net, c.GatedDeltaNet(V=6), 4),
        (kimi_delta_attention, c.KimiDeltaAttention(), 2),
        (mamba2, c.Mamba2(expand=2, state=5, groups=2, step_limit=(0.5, 2.0)), 2),
    ],
    ids=["gated_delta_net", "kimi_delta_attention", "mamba2"],
)
def test_linear_layers(parameters, mixer, H):
    model = c.Model(E=8, H=H, K=2, D=4, dtype="float32", norm_eps=0.01)
    f = fixture(parameters.__name__)
    layer = MIXERS[type(mixer).__name__](mixer, model)
    got, _ = jax.jit(layer.apply)({"params": parameters(f, model, mixer)}, f["x"])
    assert distance(got, f["exact"]) <= 2 * f["error"][0]


def test_kimi_delta_attention_of_fla():
    """FLA scales by D**-0.5 unless it is told otherwise, we by 1; the layout of states is the same."""
    f = fixture("kda")
    out, state = linear_attention(
        f["q"], f["k"], f["v"], log_decay=f["g"], beta=f["beta"], initial_state=f["initial_state"], scale=3**-0.5
    )
    assert distance(out, f["exact"]) <= 2 * f["error"][0]
    assert distance(state, f["exact_1"]) <= 2 * f["error"][1]
