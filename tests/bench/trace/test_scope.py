"""Scopes of the names that jax and XLA give."""

from __future__ import annotations

import pytest

from longattn.bench.trace import scope_of


@pytest.mark.parametrize(
    ("op_name", "path", "phase"),
    [
        ("jit(f)/logits/dot_general", "logits", "forward"),
        ("jit(f)/jvp(Model)/while/body/eval_jaxpr/layer_0/mlp/BTE,EF->BTF/dot_general", "Model/layer_0/mlp", "forward"),
        ("jit(f)/transpose(jvp(Model))/while/body/layer_0/layer_0/checkpoint/mlp/mul", "Model/layer_0/mlp", "backward"),
        ("jit(f)/transpose(jvp(Model))/checkpoint/rematted_computation/mlp/exp", "Model/mlp", "recompute"),
        ("jit(f)/attention/xla/backward/dq/add", "attention/xla/dq", "backward"),
        ("jit(f)/vmap(jvp(a))/b/cond/branch_1_fun/jit(silu)/exp", "a/b", "forward"),
        ("jit(f)/shard_map/all_gather/gather/all_gather", "all_gather/gather", "forward"),
        ("jit(f)/loss/mul;jit(f)/optimiser/add", "loss", "forward"),
        ("jit(f)/jvp(vmap(BTNH,BSNH->BNTS))/dot_general:", "BTNH,BSNH->BNTS", "forward"),
        ("jit(f)/transpose(jvp(Model))/(embedding/add:jvp(Model)/mlp/dot)", "Model", "backward"),
        ("jit(f)/(transpose(jvp(loss))/psum:jvp(loss)/add)", "loss", "backward"),
        ("jit(f)/jvp()/mul", "", "forward"),
        ("", "", "forward"),
    ],
)
def test_scopes_are_what_the_source_says(op_name: str, path: str, phase: str) -> None:
    scope = scope_of(op_name)
    assert ("/".join(scope.path), scope.phase) == (path, phase)
    assert str(scope) == (path or "(no scope)")
