"""Every strategy over every layout against NumPy in float64: all gradients, with everything else that attention has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longattn import parallel
from longattn.parallel import SequenceLayout
from tests.ops import oracle
from tests.parallel import contract
from tests.parallel.contract import Case


def call(case: Case, implementation: str | None = None):
    """(arrays, cotangents) -> out, lse and the gradients as a dict, all in order."""
    mesh, axis, ring = contract.mesh_of(case)
    _, options, _, _ = contract.inputs(case)
    strategy, layout = case.row[0], SequenceLayout(case.row[1])
    on_tokens = ("q", "k", "v", "out", "lse", "dq", "dk", "dv")

    def arrange(tree: Any, way: Any) -> Any:
        def one(name: str, x: Any) -> Any:
            if name in on_tokens:
                return way(x, ring)
            for axis in (2, 3) if name.endswith("bias") else ():
                x = jnp.moveaxis(way(jnp.moveaxis(x, axis, 1), ring), 1, axis)
            return x

        return {name: one(name, x) for name, x in tree.items()}

    ids = {name: tuple(layout.permute(x, ring) for x in options.pop(name)) for name in ("segment_ids", "positions")
           if name in options}  # fmt: skip

    def attend(arrays):
        return parallel.attention_with_lse(
            **arrays, **options, **ids, mesh=mesh, axis=axis, strategy=strategy, layout=layout,
            implementation=implementation,
        )  # fmt: skip

    def f(arrays, cotangents):
        (out, lse), pull = jax.vjp(attend, arrange(arrays, layout.permute))
        (gradients,) = pull(tuple(x.astype(y.dtype) for x, y in zip(cotangents, (out, lse))))
        return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}

    def back(results):
        return arrange(results, layout.restore)

    def g(arrays, cotangents):
        return f(arrays, tuple(layout.permute(cotangents[name], ring) for name in ("out", "lse")))

    return g, back


def check(case: Case, implementation: str | None = None) -> None:
    arrays, options, cotangents, visible = contract.inputs(case)
    mesh, axis, _ = contract.mesh_of(case)
    with jax.enable_x64(case.dtype == "float64"):
        f, back = call(case, implementation)
        results = jax.jit(f)(arrays, cotangents)
        names = axis if isinstance(axis, tuple) else (axis,)
        assert results["out"].sharding.is_equivalent_to(NamedSharding(mesh, P("data", names, "tensor")), 4)
        results = {name: np.asarray(x) for name, x in back(results).items()}
    assert results["out"].dtype == case.dtype
    truth, plain = (
        oracle.attention(
            **arrays, visible=visible, scale=options.get("scale", contract.D**-0.5), softcap=options.get("softcap"),
            do=cotangents["out"], dlse=cotangents["lse"], dtype=dtype,
        )
        for dtype in (np.float64, jnp.dtype(case.dtype))
    )  # fmt: skip
    oracle.assert_accurate(results, truth, plain, np.float64 if case.dtype == "float64" else np.float32)


SAMPLE = contract.sample()


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in contract.COMPARED if case not in SAMPLE], ids=str)
def test_forward_and_gradients_of_the_rest(case):
    """By the reference, which compiles in less than half the time: what the devices send is the same."""
    check(case, "reference")


@pytest.mark.slow
def test_every_cell_that_says_yes_is_served():
    for case in contract.CASES:
        if case.refusal or case in contract.COMPARED:
            continue
        arrays, _, cotangents, _ = contract.inputs(case)
        with jax.enable_x64(case.dtype == "float64"):
            results = jax.eval_shape(call(case, "reference")[0], arrays, cotangents)
        assert {name: results[f"d{name}"].shape for name in arrays} == {name: x.shape for name, x in arrays.items()}


def test_refusals():
    for case in contract.REFUSED:
        arrays, _, cotangents, _ = contract.inputs(case)
        with jax.enable_x64(case.dtype == "float64"), pytest.raises(NotImplementedError, match=case.refusal):
            jax.eval_shape(call(case)[0], arrays, cotangents)


def test_every_cell_of_the_table_is_a_case():
    for row in contract.ROWS:
        for feature in contract.FEATURES.values():
            refused = {bool(c.refusal) for c in contract.CASES if c.row == row and contract.has(c, feature)}
            assert bool(Case(row, **feature).refusal) in refused, (row, feature)


def test_status_page_holds_the_table():
    text = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    _, block, *_ = text.split("<!-- sequence support -->")
    assert block.strip() == contract.table(), "paste the output of `python -m tests.parallel.contract` there"
