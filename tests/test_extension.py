"""A mixer that no file of the package knows trains, resumes, is evaluated, studied, planned and checked."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from longattn import cli, plan
from longattn.aot import compilers, train_step
from longattn.config import (
    ByteLM,
    Config,
    GatedDeltaNet,
    Mesh,
    Mixer,
    Model,
    Optimiser,
    Run,
    Softmax,
    from_json,
    to_json,
)
from longattn.cost import flops, step, topology
from longattn.mask import Causal, Window
from longattn.models import MIXERS, MixerModule
from longattn.models.layers import fan_in, no_state
from longattn.models.sharding import shardings
from longattn.parallel import make_mesh
from longattn.study import cost, recall, ways
from longattn.study.presets import SMOKE
from longattn.study.store import FILE, Store
from longattn.study.units import Clock
from longattn.train import data, evaluate, kernel_check, train
from longattn.train.step import context_of, init_state
from tests.compilers import needs_libtpu


@dataclasses.dataclass(frozen=True)
class LeakySum(Mixer):
    """A gated sum over the past that forgets at a learned rate: it calls none of the package's ops."""

    width: int = 16  # channels of the sum


class LeakySumModule(MixerModule):
    """h_t = sigmoid(rate) h_{t-1} + x_t W_read, from zero at each document; y_t = (silu(x_t W_gate) h_t) W_out."""

    in_order = True

    @nn.compact
    def __call__(self, x: Any, positions: Any = None, segment_ids: Any = None, state: None = None) -> Any:
        no_state(state)
        E, width = self.model.E, self.config.width
        read, gate = (self.param(name, fan_in(0, 1), (E, width), jnp.float32) for name in ("read", "gate"))
        out = self.param("out", fan_in(0, 1, 1 / (2 * self.model.N)), (width, E), jnp.float32)
        rate = self.param("rate", nn.initializers.ones, (width,), jnp.float32)
        added = jnp.einsum("BTE,EF->BTF", x, read.astype(x.dtype)).astype(jnp.float32)
        keep = jnp.broadcast_to(nn.sigmoid(rate)[None, None], added.shape)
        if segment_ids is not None:
            starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
            keep = jnp.where(starts[..., None], 0.0, keep)
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        h = jax.lax.associative_scan(join, (keep, added), axis=1)[1].astype(x.dtype)
        h = h * nn.silu(jnp.einsum("BTE,EF->BTF", x, gate.astype(x.dtype)))
        return jnp.einsum("BTF,FE->BTE", h, out.astype(x.dtype)), None

    @staticmethod
    def state_elements(mixer: LeakySum, model: Model, T: int) -> int:
        return mixer.width

    @staticmethod
    def bytes_read_per_token(mixer: LeakySum, model: Model, T: int, itemsize: int = 2) -> int:
        return 4 * mixer.width

    @staticmethod
    def sequential_steps(mixer: LeakySum, model: Model, T: int) -> int:
        return T.bit_length()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, "LeakySum", LeakySumModule)


MODEL = Model(N=2, E=16, F=24, H=2, K=1, D=8, dtype="float32", mixers=(LeakySum(width=8),))
HYBRID = dataclasses.replace(MODEL, N=4, mixers=(Softmax(mask=Causal() & Window(7)), LeakySum(width=8)))
OTHERS = tuple(name for name in MIXERS if name not in ("LeakySum", "Softmax"))
models = pytest.mark.parametrize(
    "model", [pytest.param(MODEL, id="alone"), pytest.param(HYBRID, id="hybrid", marks=pytest.mark.slow)]
)


def config(model: Model, folder: Path, steps: int) -> Config:
    sources = str(Path(__file__).parents[1] / "longattn" / "train" / "*.py")
    return Config(
        model=model,
        data=ByteLM(glob=sources, T=32, B=2, valid=0.3),
        optimiser=Optimiser(lr=3e-3, warmup=2, loss_chunk=32),
        run=Run(name="a", dir=str(folder), steps=steps, log_every=2, eval_every=4, eval_batches=1, save_every=4),
    )


@models
def test_it_trains_resumes_and_is_evaluated(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c, loader = config(model, tmp_path, 8), data.loader

    def failing(source: Any, start: int) -> Any:
        for i, batch in loader(source, start):
            if i == 6:
                raise RuntimeError("the power went")
            yield i, batch

    with monkeypatch.context() as patch:
        patch.setattr(data, "loader", failing)
        with pytest.raises(RuntimeError, match="power"):
            train(c, quiet=True)
    summary = train(c, quiet=True)
    assert (summary.status, summary.steps) == ("finished", 8)
    assert [record["step"] for record in summary.history if "loss" in record] == [2, 4, 6, 8]
    assert evaluate(summary.run_dir, T=64, B=1, batches=1)["T"] == 64


def test_its_config_round_trips_and_is_set_on_the_command_line(tmp_path: Path) -> None:
    c = config(HYBRID, tmp_path, 4)
    assert from_json(to_json(c)) == c
    parsed = cli._parse(Config, ["--model.mixers.1.width", "4"], "train CONFIG", default=c)
    assert parsed.model.mixers == (HYBRID.mixers[0], LeakySum(width=4))


def test_its_parameters_are_counted_decayed_and_sharded() -> None:
    mesh = Mesh(data=2, fsdp=2, seq=2)
    c = Config(model=dataclasses.replace(MODEL, N=4), data=ByteLM(T=32, B=4), mesh=mesh)
    state = init_state(c, 0, context_of(c))
    (mixer,) = (layer["mixer"] for layer in state.params["layers"].values())
    assert {name: p.shape for name, p in mixer.items()} == {
        "read": (4, 16, 8), "gate": (4, 16, 8), "out": (4, 8, 16), "rate": (4, 8),
    }  # fmt: skip
    assert mixer["read"].sharding.shard_shape((4, 16, 8)) == (4, 4, 8)
    assert mixer["out"].sharding.shard_shape((4, 8, 16)) == (4, 8, 4)
    assert mixer["rate"].sharding.is_fully_replicated
    assert LeakySumModule.decay_free(MODEL.mixers[0], MODEL) == {"rate"}
    assert shardings(make_mesh(8), state.params, c.model)["embedding"].spec
    assert flops.parameters(MODEL).mixers == 2 * (3 * 16 * 8 + 8)
    assert flops.layer_flops(MODEL.mixers[0], MODEL, 10) == flops.Flops(0, 2 * 10 * 3 * 16 * 8, 6 * 10 * 16 * 24, 0)


@models
def test_it_has_no_kernel_to_check(model: Model, tmp_path: Path) -> None:
    found = kernel_check.problems(config(model, tmp_path, 4))
    assert list(found) == ([] if model is MODEL else ["Causal() & Window(7, 0), T 32"])


@pytest.mark.slow
def test_it_joins_the_study(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE)
    assert "leakysum" in [way.name for way in ways.ways((16,))]
    measured = dataclasses.replace(SMOKE.cost, windows=(), lengths=(32, 64), dense_limit=0, every=True, without=OTHERS)
    found = [
        number
        for unit in cost.units(measured, store)
        if unit.key in ("cost/share", "cost/state", "cost/T=32")
        for number in unit.work(Clock(60))
    ]
    numbers = {n.quantity: n.value for n in found if n.way == "leakysum"}
    assert numbers["state_elements"] == 16 and numbers["seconds_forward_backward"] > 0
    assert numbers["attention_share"] == 0  # all its products are projections
    learned = dataclasses.replace(SMOKE.recall, windows=(), without=OTHERS)
    (unit,) = (u for u in recall.units(learned, store) if u.key.startswith("recall/leakysum/mqar"))
    assert "accuracy" in {n.quantity for n in unit.work(Clock(60))}


def test_no_formula_knows_its_memory() -> None:
    options = {"topology": "v5e:2x2", "data": ByteLM(T=1024, B=4), "analytic": True}
    for mixers in (MODEL.mixers, HYBRID.mixers, (LeakySum(), GatedDeltaNet())):
        with pytest.raises(NotImplementedError, match=r"layers of LeakySum: no formula .* leave --analytic out"):
            plan.PlanOptions(model=dataclasses.replace(MODEL, mixers=mixers), **options)
    with pytest.raises(ValueError, match=r"strategies=all for \['LeakySum'\]"):
        plan.PlanOptions(model=MODEL, strategies="all")
    c = Config(model=HYBRID, data=ByteLM(T=1024, B=4), mesh=Mesh(seq=4))
    assert step.attention_flops(c)[0] > 0 and step.messages(c, topology.parse("v5e:2x2"))["attention, forward"] > 0


def compile_step(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles a training step in a process of its own, to which the fixture's table does not belong."""
    MIXERS["LeakySum"] = LeakySumModule
    return train_step.compile_step(request)


@pytest.mark.slow
@needs_libtpu
@models
def test_it_is_planned(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    call = compilers.call
    monkeypatch.setattr(compilers, "call", lambda _, *rest: call("tests.test_extension:compile_step", *rest))
    monkeypatch.setattr(train_step, "facts", train_step.accounts)  # without compiling kernels
    model = dataclasses.replace(model, E=128, F=256, D=64, dtype="bfloat16", remat="attention")
    options = plan.PlanOptions(topology="v5e:2x2", model=model, data=ByteLM(T=256, B=2), cache=False)
    (row,) = plan.run(options, "leaky", Console(file=io.StringIO()))["rows"]
    assert row["fits"] and row["mesh"]["seq"] == 2 and 0 < row["mfu_bound"] < 1
    assert (row["attention_flops_by_formula"] > 0) == (model.N == HYBRID.N)
