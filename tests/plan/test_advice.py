"""The sentence about what would help: it names options, and with them the step is as it says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from longattn.arguments import parse
from longattn.config import ByteLM, Config, Mesh, Model
from longattn.cost import step, topology
from longattn.plan import command
from longattn.plan.advice import advice
from tests.slow import but_few

MODEL = Model(N=8, E=1024, F=4096, H=8, K=4, D=128, W=32000, remat="attention")


def changed(config: Config, said: str) -> Config:
    """The config with the options of a sentence, as the command line reads them."""
    options = command.PlanOptions(topology="v5e:4x4", model=config.model, data=config.data, mesh=config.mesh)
    words = re.match(r"(?:--\S+ \S+ )+", said)[0].split()
    return parse(command.PlanOptions, words, "plan", default=options).config(topology.parse("v5e:4x4"))


@pytest.mark.parametrize(
    ("T", "mesh", "remat", "what"),
    but_few(
        [
            (2**17, Mesh(seq=16), "attention", "takes .* off the bound"),
            (2**19, Mesh(seq=16, strategy="all_gather"), "attention", "makes it fit"),
            (2**19, Mesh(seq=4, fsdp=4, layout="zigzag"), "none", "--remat .* makes it fit"),
        ]
    ),
)
def test_with_what_it_says_the_step_is_as_it_says(T, mesh, remat, what):
    where = topology.parse("v5e:4x4")
    config = Config(replace(MODEL, remat=remat), ByteLM(T=T, B=4), mesh)
    now = step.estimate(config, where)
    said = advice(config, where, now["fits"])
    assert re.search(what, said), said
    then = step.estimate(changed(config, said), where)
    assert then["fits"]
    if now["fits"]:
        less = 1 - then["seconds"]["bound"] / now["seconds"]["bound"]
        assert f"{less:.0%}" in said
    else:
        assert f"{then['hbm_bytes'] / 2**30:.2f} GiB" in said


@pytest.mark.slow
def test_where_nothing_helps_it_is_silent_or_says_what_does_fit():
    where = topology.parse("v5e:4x4")
    even = Config(MODEL, ByteLM(T=2**17, B=4), Mesh(seq=4, fsdp=4, layout="zigzag"))
    assert advice(even, where, True) is None
    long = replace(even, data=replace(even.data, T=2**25))
    T = int(re.fullmatch(r"No other .* makes it fit; --T (\d+) does, by formula.", advice(long, where, False))[1])
    fits = lambda T: step.estimate(replace(long, data=replace(long.data, T=T)), where)["fits"]
    assert fits(T) and not fits(T + 4 * 128)
