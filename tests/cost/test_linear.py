"""Plans of linear attention: its kernels' work and its messages in compiled programs, by hand and by formula."""

import dataclasses
import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from longattn import cli, plan
from longattn.aot import train_step
from longattn.config import (
    GLA,
    Based,
    ByteLM,
    Config,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mesh,
    Model,
    Performer,
    RetNet,
    Softmax,
    to_json,
)
from longattn.cost import flops, linear, step, topology
from longattn.models import MIXERS
from longattn.ops.linear.pallas_tpu.cost import chunk_cost
from longattn.ops.linear.pallas_tpu.statics import Statics
from longattn.plan import command, show
from tests.compilers import needs_cuda, needs_libtpu

TINY = Model(N=2, E=256, F=512, H=4, K=2, D=64, W=512, remat="attention", mixers=(GLA(),))
HYBRID = dataclasses.replace(TINY, mixers=(GatedDeltaNet(), Softmax()))
V5E = topology.parse("v5e:2x2")


def accounts(model: Model, mesh: Mesh, T: int = 1024) -> tuple[Config, dict]:
    config = Config(model, ByteLM(T=T, B=4), mesh)
    return config, train_step.accounts(config, V5E, 600.0)


def exchanged(row: dict) -> float:
    """Bytes of what linear attention and short convolutions hand from device to device."""
    found = [c for c in row["collectives"] if c["kind"] == "collective-permute" and "/exchange/" in c["scope"]]
    return sum(c["bytes"] for c in found)


@pytest.mark.slow
@needs_libtpu
def test_a_recurrent_model_on_a_tpu():
    config, row = accounts(TINY, Mesh(fsdp=2, seq=2))
    assert row["not_counted"] == [] and row["attention_flops_by_formula"] == 0

    # Two layers of 4 heads and 2 rows, each with 4 chunks of 128 tokens in one span: of each kernel one run.
    n = Statics(128, "vector", False, jnp.dtype("bfloat16"), 32**-0.5)
    of = lambda what: chunk_cost(n, 32, 64, what)[0]
    chunk = of("out") + of("state") + of("gradients") + of("pull")  # forward, fold, backward, pull
    assert row["linear_attention_flops"] == 2 * 4 * 2 * (4 * chunk + 3 * of("state"))
    assert row["linear_attention_flops"] == sum(step.linear_flops(config))
    assert row["flops"] == pytest.approx(step.flops(config), rel=0.01)

    # A state of float32 from one device to the other, and back its gradient; nothing else is handed on.
    assert exchanged(row) == 2 * 2 * (4 * 2 * 4 * 32 * 64) == sum(step._state_messages(config).values())
    assert any("linear_attention/pallas_tpu/exchange" in c["scope"] for c in row["collectives"])
    assert row["model_flops"] == flops.step_flops(config) / 4


@pytest.mark.slow
@needs_libtpu
def test_a_hybrid_on_a_tpu():
    """Linear attention is counted in the program, softmax attention by formula: neither in the other's place."""
    config, row = accounts(HYBRID, Mesh(seq=4), 2048)
    assert row["not_counted"] == []
    assert row["attention_flops_by_formula"] == pytest.approx(sum(step.attention_flops(config)))
    assert row["linear_attention_flops"] == sum(step.linear_flops(config))
    assert row["flops"] == pytest.approx(step.flops(config), rel=0.01)
    # Besides states, their transitions [D D] in the first of two rounds, and 3 tokens before each of 3 convolutions,
    # the segment ids beside them, of 4 rows.
    states, ids = sum(step._state_messages(config).values()), 4 * 4
    assert states <= exchanged(row) <= states + 4 * ids
    scopes = {c["scope"] for c in row["collectives"]}
    assert any("/ring/" in scope for scope in scopes)
    assert any("layer_0/mixer/linear_attention/pallas_tpu/exchange" in scope for scope in scopes)


@needs_libtpu
@pytest.mark.slow
def test_a_hybrid_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "facts", train_step.accounts)  # without compiling kernels
    data = ByteLM(T=256, B=4)
    options = plan.PlanOptions(topology="v5e:2x2", model=HYBRID, data=data, cache=False, html=str(tmp_path / "a.html"))
    console = Console(width=200, file=io.StringIO())
    (row,) = plan.run(options, "hybrid", console)["rows"]
    config = options.config(V5E)
    assert row["fits"] and row["linear_attention_flops"] == sum(step.linear_flops(config))
    share = row["linear_attention_flops"] / row["flops"]
    said = console.file.getvalue()
    assert f"attention, by formula, {share:.0%} linear attention)" in said
    assert f"{share:.0%} linear attention" in (tmp_path / "a.html").read_text()


@needs_cuda
@pytest.mark.slow
def test_a_recurrent_model_on_gpus():
    """By XLA's loops, which say how often they run; the kernels of TPUs are not there."""
    model = dataclasses.replace(TINY, N=1)
    options = plan.PlanOptions(topology="h100:1", model=model, data=ByteLM(T=256, B=1), cache=False)
    (row,) = plan.run(options, "tiny", Console(file=io.StringIO()))["rows"]
    assert row["not_counted"] == [] and row["attention_flops_by_formula"] == 0
    assert row["linear_attention_flops"] > flops.forward_flops(model, 256).attention  # forward alone


@pytest.mark.parametrize(
    ("mixer", "H", "D", "V", "decay", "delta", "channels"),
    [  # of one of two devices that share heads: E 256, H 4, K 2, D 64
        (LinearAttention(), (2, 1, 1), 64, 65, "none", False, ()),
        (Performer(features=48), (2, 1, 1), 48, 65, "none", False, ()),
        (Based(features=8), (2, 1, 1), 45, 65, "none", False, ()),
        (RetNet(), (2, 2, 2), 64, 128, "scalar", False, ()),
        (GLA(), (2, 2, 2), 32, 64, "vector", False, ()),
        (Mamba2(state=32), (1, 1, 4), 32, 64, "scalar", False, (4 * 64, 32, 32)),
        (GatedDeltaNet(), (1, 1, 2), 64, 128, "scalar", True, (64, 64, 256)),
        (KimiDeltaAttention(), (2, 2, 2), 64, 64, "vector", True, (128, 128, 128)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, GLA | Mamba2) else None,
)
def test_what_a_mixer_asks_for(mixer, H, D, V, decay, delta, channels):
    r = linear.of(mixer, TINY, tensor=2)
    call = r.call
    assert (call.Hq, call.Hk, call.Hv) == H and (call.D, call.V, call.decay, call.delta) == (D, V, decay, delta)
    assert r.channels == channels
    assert r.taps == (4 if channels else 1)
    assert MIXERS[type(mixer).__name__].sizes(mixer, TINY)[0] == call.H * call.D * call.V * 2


def test_messages_of_states_by_hand():
    """Of 8 devices 3 rounds: a state each, and in the first two a transition. They do not grow with the sequence."""
    state = 4 * 3 * (4 * 64 * 128)
    sent = lambda mixer, remat="attention": linear.messages(
        mixer, dataclasses.replace(TINY, remat=remat), rows=3, devices=8, tensor=1
    )
    assert sent(RetNet()) == (3 * state + 2 * 4 * 3 * 4,) * 2  # a decay per head
    before = 2 * 3 * 3 * (2 * 2 * 64 + 4 * 128)  # bfloat16, rows, taps, channels of q, k and v
    scan = 3 * state + 2 * 4 * 3 * 4 * 64 * 64
    assert sent(GatedDeltaNet()) == (scan + before, scan + 2 * before)
    assert sent(GatedDeltaNet(), "full") == (scan + before, 2 * (scan + before))
    assert sent(GatedDeltaNet(), "none") == (scan + before, scan + before)
    assert linear.messages(RetNet(), TINY, rows=3, devices=1, tensor=1) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (HYBRID, "v5e:2x2", "layers of several mixers"),
        (dataclasses.replace(TINY, mixers=(GLA(), RetNet())), "v5e:2x2", "layers of several mixers"),
        (TINY, "h100:2", "those of TPU kernels"),
        (dataclasses.replace(TINY, remat="none"), "v5e:2x2", "no formula says what XLA keeps"),
    ],
)
def test_what_no_formula_knows_is_refused(model, where, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LONGATTN_AOT", str(tmp_path))
    config = Config(model, ByteLM(T=1024, B=4))
    (tmp_path / "model.py").write_text(
        f"from longattn.config import from_json\nconfig = from_json({to_json(config)!r})\n"
    )
    assert cli.main(["plan", str(tmp_path / "model.py"), "--topology", where, "--analytic"]) == 2
    said = capsys.readouterr().err
    assert message in said and "leave --analytic out" in said and said.count("\n") == 1


def test_an_estimate_needs_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGATTN_AOT", str(tmp_path))
    console = Console(width=200, file=io.StringIO())
    options = plan.PlanOptions(
        topology="v5e:4x4", model=TINY, data=ByteLM(T=65_536, B=4), mesh=Mesh(fsdp=4, seq=4), analytic=True
    )
    (row,) = plan.run(options, "tiny", console)["rows"]
    config = options.config(topology.parse("v5e:4x4"))
    assert row["messages"]["states, forward"] == step._state_messages(config)["states, forward"] > 0
    assert "attention, forward" not in row["messages"] and "states, backward" in console.file.getvalue()
    assert row["flops"] > row["model_flops"] > 0


def test_strategies_are_of_softmax_attention():
    with pytest.raises(ValueError, match=r"strategies=all for \['GLA'\].*leave --strategies out"):
        plan.PlanOptions(model=TINY, strategies="all")


@needs_libtpu
def test_strategies_of_a_hybrid_are_compared_and_a_search_needs_no_formula(monkeypatch):
    def facts(config, where, *rest):
        need = config.data.T * config.data.B // where.size
        return {"fits": need <= 4000, "hbm_bytes": need, "hbm_limit": 4000, "by_kind": {}, "buffers": [],
                "seconds": {"bound": 1.0, "exposed": 0.5}, "mfu_bound": 0.4, "collectives": []}  # fmt: skip

    monkeypatch.setattr(train_step, "facts", facts)
    monkeypatch.setattr(show, "_one", lambda *args: None)
    console, data = Console(width=200, file=io.StringIO()), ByteLM(T=1024, B=4)
    options = plan.PlanOptions(topology="v5e:2x2", model=HYBRID, data=data, mesh=Mesh(seq=4))
    document = plan.run(dataclasses.replace(options, strategies="all"), "hybrid", console)
    assert {row["strategy"] for row in document["rows"]} == set(command.STRATEGIES) and document["sequence"]
    document = plan.run(dataclasses.replace(options, search="max-length"), "hybrid", console)
    assert document["found"]["T"] == 3584 and document["beyond"]["T"] == 4096  # multiples of 4 * 128
