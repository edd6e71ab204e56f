"""Remakes the fixtures beside it: what layers of `transformers` and FLA return, with tiny random weights.

    "$LONGATTN_TORCH_PYTHON" tests/models/published/remake.py

Made with torch 2.13.0, transformers 5.24.0 and fla-core 0.6.0. A fixture holds the weights and inputs (float16, to be
small), the result `exact` in float64, and `error`, how far the same layer in float32 is from it: norm of the difference
over norm.
"""

import contextlib
import importlib.util
import json
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    KimiLinearConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

FOLDER = Path(__file__).parent
DECODER = {
    "vocab_size": 11, "hidden_size": 16, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rms_norm_eps": 0.01, "attn_implementation": "eager",
}  # fmt: skip

# The `rope_parameters` of published checkpoints, their head size, and corner cases.
ROPES = {
    "llama_3_1": (128, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "llama_3_2": (64, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "qwen3": (128, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}),
    "gpt_oss": (64, {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                     "truncate": False, "original_max_position_embeddings": 4096}),
    "deepseek_v2": (64, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}),
    "two_mscales": (64, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                         "original_max_position_embeddings": 4096}),
    "attention_factor": (64, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0,
                              "beta_slow": 2.0, "attention_factor": 0.75, "original_max_position_embeddings": 8192}),
    "all_slow": (8, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
    "all_fast": (8, {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0,
                     "original_max_position_embeddings": 3000}),
    "linear": (8, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
}  # fmt: skip


SINGLE = torch.float32


class NoSingle(TorchDispatchMode):
    """Fails where an operation returns float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        assert all(getattr(t, "dtype", None) != SINGLE for t in tree_leaves(results)), func
        return results


@contextlib.contextmanager
def float64():
    """Layers cast to float32 inside; here these casts go to float64."""
    dtypes = unittest.mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
    with dtypes, unittest.mock.patch.object(torch.Tensor, "float", torch.Tensor.double), NoSingle():
        torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def both(run, arrays):
    """Returns the arrays, with the results of `run` on them in float64 (`exact`) and the errors of float32."""

    def results():
        dtype = torch.get_default_dtype()
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        return run({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()})

    single = results()
    with float64():
        exact = results()
    errors = [torch.linalg.norm(a.double() - b) / torch.linalg.norm(b) for a, b in zip(single, exact)]
    arrays |= {"exact" if i == 0 else f"exact_{i}": t.numpy() for i, t in enumerate(exact)}
    return arrays | {"error": np.array([float(e) for e in errors])}


def module(make, x):
    """Returns the fixture of a module for the input x.

    Its weights are normal. Vectors have mean 1, and rates of decay are about exp(-3): states last for tens of tokens.
    """
    rng = np.random.default_rng(0)

    def drawn(name, p):
        normal = rng.standard_normal(p.shape)
        if name.endswith("A_log"):
            return -3 + normal / 2
        return 1 + normal / 2 if p.ndim == 1 else normal / (2 * p.shape[-1] ** 0.5)

    arrays = {name: drawn(name, p).astype(np.float16) for name, p in make().named_parameters()}

    def run(given):
        made = make().to(torch.get_default_dtype()).eval()
        made.load_state_dict({name: given[name] for name in arrays})
        result = made(given["x"])
        return (getattr(result, "logits", result),)

    return both(run, arrays | {"x": x})


def kda():
    """Returns the fixture of FLA's recurrence of KDA with its default scale, from a state and to one."""
    file = Path(importlib.util.find_spec("fla").origin).parent / "ops/kda/naive.py"  # the package needs triton
    spec = importlib.util.spec_from_file_location("naive", file)
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float16)
    length_one = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    arrays = {
        "q": normal(1, 20, 2, 3), "k": length_one(normal(1, 20, 2, 3)), "v": normal(1, 20, 4, 5),
        "g": -np.exp(normal(1, 20, 4, 3)), "beta": 1 / (1 + np.exp(normal(1, 20, 4))),
        "initial_state": normal(1, 4, 3, 5),
    }  # fmt: skip
    return both(lambda given: naive.naive_recurrent_kda(**given, output_final_state=True), arrays)


def rope(D, parameters):
    """Returns frequencies and the attention factor of one of ROPES."""
    with float64():
        longest = int(parameters["factor"] * parameters.get("original_max_position_embeddings", 2048))
        config = LlamaConfig(head_dim=D, max_position_embeddings=longest, rope_parameters=parameters)
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    return {"D": D, "rope_parameters": parameters, "frequencies": frequencies.tolist(), "attention_factor": factor}


def main():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 70, 8)).astype(np.float16)  # 70 tokens: more than a chunk
    tokens = rng.integers(0, 11, (1, 24))
    # An eps that is not small shows whether results have the published size before their norm. (With a small one, rows
    # near zero lose digits.)
    linear = {"hidden_size": 8, "rms_norm_eps": 0.01, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    fixtures = {
        "llama": module(lambda: LlamaForCausalLM(LlamaConfig(
            **DECODER, rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        )), tokens),
        "qwen3": module(lambda: Qwen3ForCausalLM(Qwen3Config(
            **DECODER, rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
            "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.25, "truncate": False},
        )), tokens),
        "gated_delta_net": module(lambda: Qwen3NextGatedDeltaNet(Qwen3NextConfig(
            **linear, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=4, linear_value_head_dim=6,
        ), 0), x),
        "kimi_delta_attention": module(lambda: KimiLinearDeltaAttention(KimiLinearConfig(
            **linear, linear_num_heads=2, linear_head_dim=4,
        ), 0), x),
        "mamba2": module(lambda: Mamba2Mixer(Mamba2Config(
            hidden_size=8, num_heads=4, head_dim=4, state_size=5, n_groups=2, chunk_size=16, layer_norm_epsilon=0.01,
            time_step_limit=(0.5, 2.0), num_hidden_layers=1, use_bias=False,
        ), 0), x),
        "kda": kda(),
    }  # fmt: skip
    for name, arrays in fixtures.items():
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        print(f"{name}: error of float32 {arrays['error']}, {(FOLDER / f'{name}.npz').stat().st_size} bytes")
    lines = (f"{json.dumps(name)}: {json.dumps(rope(*parameters))}" for name, parameters in ROPES.items())
    (FOLDER / "rope.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
