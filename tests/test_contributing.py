"""The recipes of CONTRIBUTING.md work: their code runs, and the lines that their diffs replace are in the files."""

from __future__ import annotations

import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longattn
from longattn import config, models, parallel
from longattn.mask import Causal, Window
from longattn.ops.attention import api
from tests.ops.contract import test_attention
from tests.slow import but_few

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
DIFFS = re.findall(r"^```diff\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture
def module(monkeypatch):
    """Makes the module that a recipe puts at a path; it is imported by its name until the test ends."""

    def make(path: str) -> types.ModuleType:
        made = types.ModuleType(path.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, made.__name__, made)
        exec(compile(BLOCKS[path], path, "exec"), vars(made))
        return made

    return make


def arrays(T: int, H: int = 4, K: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, T, heads, 8)).astype(np.float32) for heads in (H, K, K)]


def value_and_gradients(attend):
    return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), (0, 1, 2)))


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize(("path", "diff"), DIFFS, ids=lambda x: x if x.endswith(".py") else "")
def test_the_diffs_apply(path, diff):
    lines = (ROOT / path).read_text().splitlines()
    removed = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
    assert removed and all(line in lines for line in removed)


def test_every_recipe_has_a_diff_and_code():
    assert len(DIFFS) >= 3 and len(BLOCKS) >= 3


def test_a_back_end(monkeypatch, module):
    monkeypatch.setitem(api.BACK_ENDS, "short", module("longattn/ops/attention/short.py"))
    back_end = test_attention.BackEnd("short", names_residuals=False)
    for case in test_attention.sample(test_attention.BackEnd("reference", names_residuals=False))[:3]:
        test_attention.check(back_end, case)
    q, k, v = arrays(1025)
    with pytest.raises(NotImplementedError, match=r"short serves T S up to 1,048,576, not 1,025 x 1,025"):
        longattn.attention(q, k, v, implementation="short")
    out = longattn.attention(q, k, v, implementation=("short", "xla"))
    assert_close(out, longattn.attention(q, k, v, implementation="xla"))


@pytest.mark.parametrize("layout", but_few(["contiguous", "zigzag", "striped"]))
def test_a_strategy(monkeypatch, module, layout):
    strategy = module("longattn/parallel/gathered.py").GATHERED
    monkeypatch.setitem(parallel.STRATEGIES, strategy.name, strategy)
    mesh, layout = parallel.make_mesh(seq=4, devices=jax.devices()[:4]), parallel.SequenceLayout(layout)
    options = {
        "mask": Causal() & Window(11),
        "segment_ids": np.repeat(np.arange(4, dtype=np.int32), 8)[None].repeat(2, 0),
    }

    def over_the_mesh(q, k, v):
        q, k, v = (layout.permute(x, 4) for x in (q, k, v))
        ids = {**options, "segment_ids": layout.permute(options["segment_ids"], 4)}
        out = parallel.attention(q, k, v, mesh=mesh, strategy="gathered", layout=layout, **ids)
        return layout.restore(out, 4)

    here = lambda q, k, v: longattn.attention(q, k, v, **options)
    assert_close(*(value_and_gradients(f)(*arrays(32)) for f in (over_the_mesh, here)))


@pytest.mark.slow
def test_a_mixer(monkeypatch, module):
    made = module("longattn/config/lightning.py").Lightning
    monkeypatch.setitem(models.MIXERS, "Lightning", module("longattn/models/lightning.py").Lightning)
    model = config.Model(N=2, E=16, F=32, H=2, K=2, D=8, W=7, dtype="float32", mixers=(made(), config.Softmax()))
    params = models.init_params(model, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 24)), jnp.int32)
    forward = lambda params: models.Transformer(model).apply({"params": params}, tokens)[0]
    value, gradients = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(forward(params))))(params)
    assert np.isfinite(value) and all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    changed = forward(params) - models.Transformer(model).apply({"params": params}, tokens.at[:, 12].add(1))[0]
    assert np.abs(changed[:, :12]).max() < 1e-5 < np.abs(changed[:, 12:]).max()
    assert models.state_elements(made(), model, 24) == 2 * 8**2
    assert models.bytes_read_per_token(made(), model, 24) == 4 * 2 * 8**2
