"""Linear attention of a sequence in parts along a mesh axis, against NumPy in float64, and what the devices send."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import parallel
from longattn.ops.linear import xla
from longattn.ops.linear.api import validate
from longattn.parallel import linear_state
from tests.ops import oracle
from tests.ops.contract.test_linear import Case, equations, expected, inputs, with_gradients, work


@dataclass(frozen=True)
class Parts:
    mesh: tuple[int, int, int, int]  # data, fsdp, tensor, seq
    case: Case
    implementation: str | None = None

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.mesh))}-{self.case}"


def mesh_of(*sizes):
    return parallel.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


# Documents that cross several devices, begin with one, or within; decays that forget all, nothing, or some.
hard = functools.partial(Case, ids="segments", state="from a state", decays="from e^-30 to 1")
whole = functools.partial(Case, state="from a state")  # what the first tokens write reaches the last device
CASES = [
    Parts((1, 1, 1, 2), hard("scalar decay, delta", "fewer q and k", "T=24")),
    Parts((2, 1, 1, 3), hard("vector decay, delta", length="T=21")),
    Parts((1, 1, 1, 8), whole("scalar decay, delta", "one q and k", "T=24")),
    Parts((1, 2, 1, 4), hard("vector decay", length="T=36")),
    Parts((1, 1, 3, 2), hard("scalar decay", "one q and k", "T=24", dtype="bfloat16")),
    Parts((2, 1, 1, 4), whole("vector decay, delta", "fewer v", "T=36", dtype="bfloat16")),
    Parts((1, 1, 2, 4), hard("delta", "all equal", "T=24", dtype="float64")),
    Parts((1, 1, 3, 2), hard("plain", "fewer v", "T=24", state="from zero")),
    Parts((2, 1, 1, 4), whole("constant decay", "fewer q and k", "T=36")),
    Parts((1, 1, 1, 3), Case("constant decay, delta", length="T=24"), "reference"),
]


def check(parts: Parts) -> None:
    case, mesh = parts.case, mesh_of(*parts.mesh)
    arrays, options, cotangents = inputs(case)
    attend = functools.partial(
        parallel.linear_attention, mesh=mesh, scale=options["scale"], implementation=parts.implementation or "xla",
        tuning=None if parts.implementation else xla.Tuning(4),
    )  # fmt: skip

    @jax.jit
    def f(arrays, cotangents, ids):
        return with_gradients(functools.partial(attend, segment_ids=ids), arrays, cotangents)

    with jax.enable_x64(case.dtype == "float64"):
        results = f(arrays, cotangents, options.get("segment_ids"))
    assert results["out"].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "seq", "tensor")), 4)
    assert results["out"].dtype == case.dtype and results["final_state"].dtype == work(case)
    oracle.assert_accurate(jax.device_get(results), *expected(case), work(case))


@pytest.mark.parametrize("parts", CASES, ids=str)
def test_forward_and_gradients(parts):
    check(parts)
