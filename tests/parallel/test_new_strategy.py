"""A strategy that is new to the package needs its own file and one line in the table, and nothing else."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longattn
from longattn import cli, parallel
from longattn.config import ByteLM, Config, Mesh, Model
from longattn.cost.sequence.problem import Problem, with_strategy
from longattn.cost.sequence.strategies import compare, recommended
from longattn.cost.sequence.timeline import machine
from longattn.cost.topology import parse
from longattn.mask import Causal, Window
from longattn.parallel import all_gather
from longattn.parallel.strategy import Strategy
from longattn.train.step import context_of
from tests.slow import but_few

P = 4


def forward(q, k, v, bias, visibility, call):
    """all_gather, told apart by its own named scope."""
    with jax.named_scope("new"):
        return all_gather.forward(q, k, v, bias, visibility, call)


def check(mask, T, S, call):
    if mask != Causal():
        raise NotImplementedError("strategy='new' knows causal attention alone")


NEW = Strategy("new", "gathers everything", forward, all_gather.backward, layouts=("contiguous", "zigzag"), check=check)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(parallel.STRATEGIES, NEW.name, NEW)


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 32, heads, 5)).astype(np.float32) for heads in (4, 2, 2)]


def value_and_gradients(attend):
    return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), (0, 1, 2)))(*arrays())


@pytest.mark.parametrize("layout", but_few(parallel.SequenceLayout(name) for name in NEW.layouts), ids=lambda x: x.name)
def test_it_attends(layout):
    mesh = parallel.make_mesh(seq=P, devices=jax.devices()[:P])

    def over_the_mesh(q, k, v):
        q, k, v = (layout.permute(x, P) for x in (q, k, v))
        return layout.restore(parallel.attention(q, k, v, mesh=mesh, strategy="new", layout=layout), P)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        value_and_gradients(over_the_mesh),
        value_and_gradients(longattn.attention),
    )


def test_it_refuses_what_it_does_not_serve():
    mesh = parallel.make_mesh(seq=P, devices=jax.devices()[:P])
    attend = lambda **options: parallel.attention(*arrays(), mesh=mesh, strategy="new", **options)
    with pytest.raises(NotImplementedError, match="knows causal attention alone"):
        attend(mask=Window(4))
    with pytest.raises(NotImplementedError, match="serves the layout contiguous or zigzag, not striped"):
        attend(layout=parallel.SequenceLayout("striped"))
    with pytest.raises(NotImplementedError, match="strategy='new' takes no bias"):
        attend(bias=np.zeros((1, 1, 1, 32), np.float32))


def test_a_config_names_it():
    config = Config(Model(N=1), ByteLM(T=64, B=P), Mesh(seq=P, data=2, strategy="new", layout="zigzag"))
    assert context_of(config).strategy == "new"
    striped = Mesh(seq=P, data=2, layout="striped")
    assert with_strategy(striped, "new", 4) == dataclasses.replace(striped, strategy="new", layout="contiguous")
    with pytest.raises(ValueError, match=r"Mesh\.layout='striped' with strategy='new'.*set layout='contiguous'"):
        context_of(dataclasses.replace(config, mesh=dataclasses.replace(striped, strategy="new")))


def test_its_cost_is_said_to_be_unknown():
    problem, where = Problem(T=64, H=8, K=8, D=8), machine(parse("v5e:2x2"))
    rows = {(row["strategy"], row["layout"]): row for row in compare({problem: 1}, P, where)}
    for layout in NEW.layouts:
        assert rows["new", layout]["reason"].startswith("no formula is known for the load of strategy='new'")
    assert ("new", "striped") not in rows and "reason" not in rows["ring", "zigzag"]
    assert "new" not in recommended(list(rows.values()))


def test_the_command_line_lists_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    said = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert "{ring,balanced,all_gather,ulysses,usp,new}" in said  # of --mesh.strategy
    assert cli.main(["profile", "sequence", "new", "--topology", "v5e:2x2", "--T", "64"]) == 2
    assert "no formula is known for the load of strategy='new'" in capsys.readouterr().err
    assert cli.main(["profile", "sequence", "--topology", "v5e:2x2", "--T", "64", "--json"]) == 0
    reasons = {row["strategy"]: row.get("reason") for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "strategy='new'" in reasons["new"] and reasons["ring"] is None


def test_it_runs_under_its_own_scope():
    mesh = parallel.make_mesh(seq=P, devices=jax.devices()[:P])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    lowered = jax.jit(lambda q, k, v: parallel.attention(q, k, v, mesh=mesh, strategy="new")).lower(*shapes)
    assert "new/new/gather" in lowered.as_text(debug_info=True)
