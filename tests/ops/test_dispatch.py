"""Back ends are tried in order, refuse with reasons, and are chosen for the compile target."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from longattn.ops import dispatch


def refuses(reason):
    def check():
        raise NotImplementedError(reason)

    return SimpleNamespace(check=check)


TABLE = {"fast": refuses("needs a TPU"), "good": SimpleNamespace(check=lambda: "a plan"), "slow": refuses("too slow")}


def test_candidates():
    assert dispatch.candidates(None, list(TABLE), ["fast", "good"]) == ("fast", "good")
    assert dispatch.candidates("slow", list(TABLE), ["fast"]) == ("slow",)
    assert dispatch.candidates(["slow", "good"], list(TABLE), ["fast"]) == ("slow", "good")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("godo", "did you mean 'good'"),
        (("good", "fats"), "did you mean 'fast'"),
        ((), "a sequence of names; known: fast, good, slow"),
        (3, "implementation=3 must be None"),
        ((3,), "implementation 3 must be a back end"),
    ],
)
def test_candidates_errors(given, message):
    with pytest.raises(ValueError, match=message):
        dispatch.candidates(given, list(TABLE), ["fast"])


def test_choose():
    check = lambda back_end: back_end.check()
    assert dispatch.choose(("fast", "good", "slow"), TABLE, check) == ("good", "a plan")
    with pytest.raises(NotImplementedError, match="fast: needs a TPU; slow: too slow"):
        dispatch.choose(("fast", "slow"), TABLE, check)


def test_target():
    assert dispatch.target().platform == jax.default_backend()
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2,), ("seq",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.target() == dispatch.Target("tpu", "TPU v5 lite")
    # Also while tracing, where the mesh reaches the back ends' checks.
    seen = []
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda x: seen.append(dispatch.target().platform) or x, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert seen == ["tpu"]


def test_vary_together_outside_of_shard_map():
    x = {"a": jnp.ones(2), "b": None}
    assert dispatch.vary_together(x)["a"] is x["a"]
