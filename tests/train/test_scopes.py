"""Named scopes: every op of a compiled training step names its place in the source, at no cost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re

import jax
import pytest

from longattn.bench import trace
from longattn.config import ByteLM, Config, Mesh, Model, Optimiser, Run
from longattn.train.step import batch_shapes, context_of, state_shapes, train_step

CONFIG = Config(
    model=Model(N=2, E=16, F=24, H=4, K=2, D=8, W=257, dtype="float32", remat="attention"),
    data=ByteLM(T=64, B=8),
    optimiser=Optimiser(loss_chunk=32),
    run=Run(steps=10),
)
ON_MESH = dataclasses.replace(CONFIG, mesh=Mesh(data=2, tensor=2, seq=2, strategy="all_gather"))
LAYER = "Transformer.hidden/layers/layer_0"
SCOPES = {
    ("Transformer.hidden/embedding", "forward"),
    (f"{LAYER}/mixer_norm", "forward"),
    (f"{LAYER}/mixer/projections", "forward"),
    (f"{LAYER}/mixer/projections", "recompute"),
    (f"{LAYER}/mixer/projections", "backward"),
    (f"{LAYER}/mixer/rotary", "forward"),
    (f"{LAYER}/mixer/out", "backward"),
    (f"{LAYER}/mlp_norm", "backward"),
    (f"{LAYER}/mlp", "forward"),
    (f"{LAYER}/mlp", "recompute"),
    (f"{LAYER}/mlp", "backward"),
    ("Transformer.hidden/norm", "forward"),
    ("loss", "forward"),
    ("optimiser", "forward"),
}
PHASES = ("logits", "softmax", "values"), ("logits", "softmax", "dp", "ds", "dq", "dk", "dv")
KNOWN = {"embedding", "projections", "out", "attention", "mlp", "loss", "optimiser"}


@functools.cache
def compiled(config: Config):
    context = context_of(config)
    return train_step(config, context).lower(state_shapes(config, context), batch_shapes(config)).compile()


def ops(program) -> dict[str, trace.Op]:
    (module,) = program.runtime_executable().hlo_modules()
    return trace.program_ops(module.as_serialized_hlo_module_proto())


def flops(text: str) -> dict[str, int]:
    """Returns the FLOPs of every matrix product of a compiled program, each counted once."""
    shapes = {m[1]: [int(n) for n in m[2].split(",") if n] for m in re.finditer(r"%(\S+) = \w+\[([\d,]*)\]", text)}
    found = {}
    for m in re.finditer(r"%(\S+) = \w+\[[\d,]*\]\S* dot\(%([\w.-]+), .*?lhs_contracting_dims=\{([\d,]*)\}", text):
        summed = [shapes[m[2]][int(i)] for i in m[3].split(",")]
        found[m[1]] = 2 * math.prod(shapes[m[1]]) * math.prod(summed)
    return found


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        pytest.param(CONFIG, f"{LAYER}/mixer/attention/xla", id="one"),
        pytest.param(ON_MESH, f"{LAYER}/mixer/all_gather/attention/xla", id="mesh"),
    ],
)
@pytest.mark.slow
def test_a_compiled_step_bears_every_scope(config: Config, attention: str) -> None:
    program = compiled(config)
    known = ops(program)
    scopes = {(str(op.scope), op.scope.phase) for op in known.values()}
    wanted = SCOPES | {
        (f"{attention}/{part}", phase) for phase, parts in zip(("forward", "backward"), PHASES) for part in parts
    }
    assert wanted <= scopes, wanted - scopes
    products = flops(program.as_text())
    assert len(products) > 15
    under = sum(n for name, n in products.items() if KNOWN & set(known[name].scope.path))
    assert under >= 0.99 * sum(products.values())
    # By hand: a device holds the logits of loss_chunk tokens at once.
    head = [n for name, n in products.items() if known[name].scope.path == ("loss",)]
    assert 2 * config.optimiser.loss_chunk * config.model.E * config.model.W in head


@pytest.mark.slow
def test_exchange_over_the_mesh_bears_its_scopes() -> None:
    text = compiled(ON_MESH).as_text()
    collectives = re.findall(r"(all-gather|reduce-scatter|all-reduce)[\w-]*\(.*?op_name=\"([^\"]*)\"", text)
    gathers = [name for kind, name in collectives if kind == "all-gather" and "/all_gather/gather/" in name]
    scatters = [name for _, name in collectives if "/all_gather/scatter/" in name]
    assert any("transpose(" not in name for name in gathers)
    assert any("transpose(" in name for name in gathers)  # the backward pass gathers once more
    assert scatters
    assert all("transpose(" in name for name in scatters)


def test_backward_partial_is_backward() -> None:
    from longattn.ops.attention import backward_partial

    q, lse = jax.ShapeDtypeStruct((1, 64, 2, 8), "float32"), jax.ShapeDtypeStruct((1, 64, 2), "float32")
    for name in ("xla", "reference"):
        call = jax.jit(functools.partial(backward_partial, implementation=name))
        found = ops(call.lower(q, q, q, q, lse, q, lse).compile())
        products = {(op.scope.path[:2], op.scope.phase) for op in found.values() if op.opcode == "dot"}
        assert products == {(("attention", name), "backward")}


@pytest.mark.slow
def test_scopes_change_nothing_that_is_compiled(monkeypatch) -> None:
    """Without the scopes, the programs have the same text."""

    def text(config: Config) -> str:
        jax.clear_caches()
        train_step.cache_clear()
        context = context_of(config)
        step = train_step(config, context).lower(state_shapes(config, context), batch_shapes(config)).compile()
        whole = re.sub(r",? metadata=\{[^}]*\}|,? stack_frame_id=\d+", "", step.as_text())
        whole = whole[whole.index("\n%") :]  # the table of source lines is before
        return re.sub(r"(%[\w-]+)[.\d]*", r"\1", whole)  # numbers in names may count scopes

    small = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, N=1))
    with_scopes = text(small)
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    without = text(small)
    monkeypatch.undo()
    assert with_scopes == without
    train_step.cache_clear()
    jax.clear_caches()
