"""Configs: hashable, checked when built, and the same after a round trip through JSON."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from longattn import config as c
from longattn import mask as m

CONFIGS = [
    c.Config(),
    c.Config(
        model=c.Model(
            N=3,
            mixers=(
                c.Softmax(mask=m.Causal() & m.Window(512), sinks=True, softcap=50.0),
                c.Softmax(rope=None, qk_norm=True),
            ),
            W=300,
            mlp_chunk=64,
        ),
        data=c.MQAR(T=128, pairs=8),
        mesh=c.Mesh(data=2, fsdp=2, tensor=2, seq=4, ring=2, strategy="usp", layout="zigzag"),
        optimiser=c.Optimiser(accumulate=4, clip=0.0),
        run=c.Run(profile=(10, 3)),
    ),
    c.Config(
        model=c.Model(mixers=(c.Softmax(mask=~m.Causal() | m.Prefix(8), rope=c.RoPE(scaling="yarn", factor=4.0)),)),
        data=c.Needle(depth=0.5),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config):
    again = c.from_json(c.to_json(config))
    assert again == config
    assert hash(again) == hash(config)
    assert c.to_json(again) == c.to_json(config)


def test_layers_repeat_the_pattern():
    local, full = c.Softmax(mask=m.Window(8)), c.Softmax()
    assert c.Model(N=5, mixers=(local, local, full)).layers == (local, local, full, local, local)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.Config().model.N = 3


def edited(edit):
    document = json.loads(c.to_json(c.Config()))
    edit(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(version=99), "version 99 must be 4 or 3"),
        (lambda d: d.pop("version"), "version None must be 4 or 3"),
        (lambda d: d["config"]["model"].update({"class": "Modell"}), "'Modell' in the JSON is no config"),
        (lambda d: d["config"]["model"].update(depth=3), r"unknown fields \['depth'\]"),
        (lambda d: d["config"]["model"].pop("N"), r"lacks \['N'\]"),
        (lambda d: d["config"].pop("mesh"), r"lacks \['mesh'\]: it was written by another version"),
        (lambda d: d["config"]["model"].update(N=0), "Model.N=0 must be at least 1"),
        (lambda d: d["config"]["model"]["mixers"][0]["mask"].update(expression="Cusal()"), "did you mean 'Causal'"),
        (lambda d: d.update(config=d["config"]["model"]), "holds a Model, not a Config"),
        (lambda d: d.update(config=3), "holds a int, not a Config"),
        (lambda d: d["config"]["data"].update(T="long"), r"ByteLM\.T='long' must be an integer"),
    ],
)
def test_json_errors(edit, message):
    with pytest.raises(ValueError, match=message):
        c.from_json(edited(edit))


def test_version_3_is_read_as_what_it_computed():
    """The file is as version 3 wrote it. What its YaRN computed, tests/models/test_layers.py has by hand."""
    text = (Path(__file__).parent / "config_version_3.json").read_text()
    m3 = c.from_json(text).model.mixers
    yarn = c.RoPE(
        base=5e5, scaling="llama3", factor=4.0, original_T=4096, low_freq_factor=1.0, high_freq_factor=32.0,
        attention_factor=0.1 * math.log(4) + 1,
    )  # fmt: skip
    assert m3 == (
        c.Softmax(mask=m.Causal() & m.Window(64), rope=yarn),
        c.GatedDeltaNet(V=32, scale=1.0),
        c.KimiDeltaAttention(scale=1.0),
        c.Mamba2(groups=2, norm_groups=1),
        c.RetNet(),
    )
    assert c.from_json(c.to_json(c.from_json(text))) == c.from_json(text)
    document = json.loads(text)
    del document["config"]["model"]["mixers"][1]["V"]
    with pytest.raises(ValueError, match=r"GatedDeltaNet in the JSON has unknown fields \[\] and lacks \['V'\]"):
        c.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "message"), [("{torn", "is no JSON"), ("[]", "version None must be 4 or 3"), ("[" * 100_000, "too deep")]
)
def test_what_is_no_config_at_all(text, message):
    with pytest.raises(ValueError, match=message):
        c.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: c.RoPE(base=1.0), "must exceed 1"),
        (lambda: c.RoPE(factor=0.5, scaling="linear"), "at least 1"),
        (lambda: c.RoPE(factor=2.0), "has no effect"),
        (lambda: c.Model(mixers=()), "at least one mixer"),
        (lambda: c.Model(H=4, K=3), "must divide"),
        (lambda: c.Model(D=63), "must be even"),
        (lambda: c.Model(E=0), "Model.E=0 must be at least 1"),
        (lambda: c.ByteLM(valid=1.5), r"must lie in \[0, 1\]"),
        (lambda: c.ByteLM(T=16, overlap=16), "must be less than T=16"),
        (lambda: c.MQAR(T=32, pairs=16), "must be at most T/4"),
        (lambda: c.MQAR(T=256, pairs=32, vocabulary=64), "MQAR.pairs=32 must be at most 31"),
        (lambda: c.Needle(depth=2.0), r"must lie in \[0, 1\]"),
        (lambda: c.Optimiser(lr=0.0), "must be positive"),
        (lambda: c.Optimiser(clip=-1.0), "must not be negative"),
        (lambda: c.Run(eval_every=-1), "must not be negative"),
        (lambda: c.Run(seed=-1), "must lie in"),
        (lambda: c.Run(profile=(3, 0)), "both at least 1"),
        (lambda: c.Softmax(mask=m.Fn(lambda q, k: q == k)), "cannot be written"),
        (lambda: c.Softmax(mask=m.Prefix(np.array([3], np.int32))), "cannot be written"),
        (
            lambda: c.Config(optimiser=c.Optimiser(accumulate=3)),
            r"accumulate=3 must divide data.B=\d+: set B to a multiple",
        ),
        *(
            (lambda name=name: c.Run(name=name), r"Run\.name=.* must name a folder")
            for name in ("", ".", "..", "a/b", "x" * 300)
        ),
        (lambda: c.RoPE(scaling="ntk"), r"RoPE\.scaling='ntk' must be one of 'none', 'linear', 'yarn', 'llama3'"),
        (lambda: c.RoPE(scaling="yarn", beta_fast=1.0), r"beta_slow=1\.0 and beta_fast=1\.0 must be 0 < beta_slow < b"),
        (lambda: c.RoPE(scaling="llama3", low_freq_factor=4.0), r"must be 0 < low_freq_factor < high_freq_factor"),
        (lambda: c.RoPE(scaling="llama3", truncate=False), r"truncate=False has no effect .*'llama3'; choose 'yarn'"),
        (lambda: c.RoPE(scaling="yarn", high_freq_factor=8.0), r"high_freq_factor=8\.0 has no .*; choose 'llama3'"),
        (lambda: c.RoPE(scaling="yarn", mscale=1.0), r"mscale=1\.0 and mscale_all_dim=None must be given together"),
        (lambda: c.RoPE(scaling="yarn", mscale=1.0, mscale_all_dim=1.0, attention_factor=2.0), r"leave out either"),
        (lambda: c.RoPE(attention_factor=0.0), r"RoPE\.attention_factor=0\.0 must be positive"),
        (lambda: c.Model(remat="ful"), r"Model\.remat='ful' must be one of 'none', 'full'"),
        (lambda: c.Model(dtype="bf16"), r"Model\.dtype='bf16' must be one of 'float32', 'bfloat16'"),
        (lambda: c.Model(mixers=[c.Softmax()]), r"Model\.mixers=\[.* must be a tuple"),
        (lambda: c.Model(mixers=(c.RoPE(),)), r"must be a tuple whose elements are each a Mixer"),
        (lambda: c.Model(N=2.0), r"Model\.N=2\.0 must be an integer"),
        (lambda: c.Model(tie=1), r"Model\.tie=1 must be a bool"),
        (lambda: c.Run(steps=2**31), r"Run\.steps=2147483648 must be an integer of at most 2,147,483,647 in size"),
        (lambda: c.Model(N=10**8), r"Model\.N=100000000 must be at most 10,000"),
        (lambda: c.Optimiser(lr=10**400), r"Optimiser\.lr=10+\.\.\. \(401 characters\) must be a finite number"),
        (lambda: c.Run(dir="x" * 256), r"Run\.dir=.* must be a path, whose parts have at most 255 bytes"),
        (lambda: c.Optimiser(lr=float("nan")), r"Optimiser\.lr=nan must be a finite number"),
        (lambda: c.Optimiser(weight_decay=float("inf")), r"weight_decay=inf must be a finite number"),
        (lambda: c.Softmax(softcap=float("nan")), r"Softmax\.softcap=nan must be a finite number or None"),
        (lambda: c.Run(profile=[1, 1]), r"Run\.profile=\[1, 1\] must be a tuple or None"),
        (lambda: c.Config(run=c.Run(steps=10, profile=(9, 3))), r"run\.profile=\(9, 3\) ends with step 11"),
        (lambda: c.Config(model=c.Model(W=256)), "must be at least 257"),
        (lambda: c.Mesh(seq=0), "Mesh.seq=0 must be at least 1"),
        (lambda: c.Config(mesh=c.Mesh(seq=3)), r"mesh\.seq=3 must divide data\.T=1024"),
        (lambda: c.Config(mesh=c.Mesh(seq=3)), "set T to a multiple of it, next 1026"),
        (
            lambda: c.Config(mesh=c.Mesh(seq=4, layout="zigzag"), data=c.ByteLM(T=1004)),
            r"=4 must divide data\.T=1004: set T to a multiple of 8 for mesh\.layout='zigzag', next 1008",
        ),
        (
            lambda: c.Config(mesh=c.Mesh(ring=4, seq=3, strategy="usp", layout="zigzag"), data=c.ByteLM(T=36)),
            r"mesh\.ring=4 \* mesh\.seq=3 must divide data\.T=36: .* of 24 .*, next 48",
        ),
        (lambda: c.Config(mesh=c.Mesh(data=16)), r"must divide 8, the rows of a micro-batch"),
        (lambda: c.Config(mesh=c.Mesh(tensor=8)), r"mesh\.tensor=8 must divide model\.K=4.*: at most 4 devices"),
        (
            lambda: c.Config(data=c.ByteLM(T=96, B=6), mesh=c.Mesh(fsdp=3, seq=2)),
            r"mesh\.fsdp=3 \* mesh\.seq=2 must divide model\.E=256.*at most 2 devices along them",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
