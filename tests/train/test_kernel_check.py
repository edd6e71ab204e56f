"""The check before step 0, on a chip where the kernels have not run yet."""

from __future__ import annotations

import dataclasses
import io
import json
import types
from pathlib import Path

import jax
import pytest
from rich.console import Console

from longattn import cli, numerics
from longattn.config import (
    GLA,
    ByteLM,
    Config,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mesh,
    Model,
    Optimiser,
    RetNet,
    RoPE,
    Run,
    Softmax,
)
from longattn.mask import Causal, Window
from longattn.models.context import Context
from longattn.numerics import LinearProblem
from longattn.ops import dispatch
from longattn.ops.attention import api, xla
from longattn.ops.linear import api as linear_api
from longattn.ops.linear import xla as linear_xla
from longattn.train import data, kernel_check, train
from tests.slow import but_few

SOURCES = str(Path(__file__).parents[2] / "longattn" / "train" / "*.py")
MIXERS = (Softmax(), Softmax(mask=Causal() & Window(9), softcap=2.0, sinks=True, rope=RoPE(scaling="yarn", factor=4.0)))
MODEL = Model(N=2, E=16, F=24, H=2, K=1, D=8, dtype="float32", mixers=MIXERS)
PLAIN = {"N": 1, "mixers": (Softmax(),)}  # quick to compile
V5E = "TPU v5 lite"


def config(folder: Path, **model) -> Config:
    return Config(
        model=dataclasses.replace(MODEL, **model),
        data=ByteLM(glob=SOURCES, T=32, B=2, valid=0.3),
        optimiser=Optimiser(loss_chunk=32),
        run=Run(dir=str(folder), name="a", steps=2, log_every=1, eval_batches=1),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Runs of one model share their compiled programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path) -> Path:
    """Hides all reports except those that a test writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_check, "CHECKOUT", tmp_path / "checkout")
    return tmp_path / "checkout" / "experiments" / "bringup"


def on_a_chip(monkeypatch: pytest.MonkeyPatch, back_end: str, kind: str = V5E, **changes) -> None:
    """Training believes in this chip, and takes a back end first that is xla's but for `changes`."""
    monkeypatch.setitem(api.BACK_ENDS, back_end, types.SimpleNamespace(**{**vars(xla), **changes}))
    monkeypatch.setattr(api, "DEFAULT", (back_end, "xla"))
    seen = types.SimpleNamespace(**{**vars(dispatch), "target": lambda: dispatch.Target("tpu", kind)})
    monkeypatch.setattr(kernel_check, "dispatch", seen)


def wrong(*call):
    out, lse = xla.attend(*call)
    return (out * 1.01).astype(out.dtype), lse


def write_report(folder: Path, name: str = "v5e_2026-01-01.json", **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"op": "attention", "back_end": "kernel", "outcome": "passed"},
        {"op": "attention", "back_end": "choosy", "outcome": "refused"},
        {"op": "linear attention", "back_end": "kernel", "outcome": "refused"},
    ]
    document = {
        "kind": "bringup", "version": 2, "generation": "v5e", "verdict": "passed", "numerics": {"rows": rows},
    }  # fmt: skip
    (folder / name).write_text(json.dumps(document | changes))


# ---- reports


def test_only_reports_that_passed_on_this_generation_count(own_folders) -> None:
    assert kernel_check.report("v5e", "kernel") is None
    own_folders.mkdir(parents=True)
    (own_folders / "cut.json").write_text('{"kind": "brin')
    (own_folders / "list.json").write_text("[]")
    (own_folders / "other.json").write_text('{"kind": "study"}')
    write_report(own_folders, "1.json", verdict="failed")
    write_report(own_folders, "2.json", verdict="incomplete")
    write_report(own_folders, "3.json", generation="v6e")
    write_report(own_folders, "4.json", version=1)
    write_report(own_folders, "5.json", kind="compare")
    assert kernel_check.report("v5e", "kernel") is None
    assert kernel_check.report("v6e", "kernel") == own_folders / "3.json"
    write_report(own_folders)
    assert kernel_check.report("v5e", "kernel") == own_folders / "v5e_2026-01-01.json"
    assert kernel_check.report("v5e", "choosy") is None  # it refused everything
    assert kernel_check.report("v5e", "newer") is None
    assert kernel_check.report("v5e", "kernel", "linear attention") is None  # one operation's kernel is not another's
    rows = [{"op": "linear attention", "back_end": "kernel", "outcome": "passed"}]
    write_report(own_folders, "5.json", numerics={"rows": rows})
    assert kernel_check.report("v5e", "kernel", "linear attention") == own_folders / "5.json"


def test_reports_of_the_cache_count_too(own_folders) -> None:
    write_report(kernel_check.folders()[1])
    assert kernel_check.report("v5e", "kernel").parent != own_folders


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX 4090", "nvidia_rtx_4090"),
        ("cpu", "cpu"),
    ],
)
def test_generations(kind, name) -> None:
    assert kernel_check.generation(kind) == name


# ---- the comparison


@pytest.mark.parametrize("dtype", but_few(["bfloat16", "float32"]))
def test_the_reference_agrees_with_xla(tmp_path, dtype) -> None:
    problems = kernel_check.problems(config(tmp_path, dtype=dtype))
    assert len(problems) == 2  # kinds of layers
    verdict = kernel_check.compare({layer: ("reference", p) for layer, p in problems.items()}, seconds=600)
    assert verdict["outcome"] == "passed"
    assert [row["outcome"] for row in verdict["rows"]] == ["passed", "passed"]
    assert set(verdict["rows"][1]["results"]) == {"out", "lse", "dq", "dk", "dv", "dsinks"}
    assert "reference at Causal(), T 32" in kernel_check.sentence(verdict["rows"][0])
    kernel_check.insist(verdict)
    kernel_check.insist(None)


def test_the_problems_are_the_models_own(tmp_path) -> None:
    first, second = kernel_check.problems(config(tmp_path, H=4, K=2)).values()
    assert (first.T, first.H, first.heads, first.D, first.dtype) == (32, 4, 2, 8, "float32")
    assert first.documents == 4
    assert second.mask == MIXERS[1].mask
    assert second.scale == pytest.approx(8**-0.5 * 1.2966, rel=1e-3)  # (0.1 ln 4 + 1) ** 2
    assert (second.softcap, second.sinks) == (2.0, True)


def test_long_sequences_are_compared_short(tmp_path) -> None:
    problem = dataclasses.replace(next(iter(kernel_check.problems(config(tmp_path)).values())), T=2**20, H=8)
    assert problem.shorter().T == 2048
    assert dataclasses.replace(problem, H=32).shorter().T == 1024
    assert dataclasses.replace(problem, T=1000).shorter().T == 1000
    linear = LinearProblem(T=2**20, H=8, D=128)
    assert linear.shorter().T == 256
    assert dataclasses.replace(linear, H=32).shorter().T == 128
    assert dataclasses.replace(linear, T=100).shorter().T == 100


def test_when_time_is_over_the_rest_is_left_and_said(tmp_path) -> None:
    problems = kernel_check.problems(config(tmp_path))
    verdict = kernel_check.compare({layer: ("reference", p) for layer, p in problems.items()}, seconds=0)
    assert [row["outcome"] for row in verdict["rows"]] == ["passed", "not run"]
    assert kernel_check.sentence(verdict["rows"][1]).endswith("not run: 0 s were over")
    kernel_check.insist(verdict)


# ---- mixers of the linear family

LINEAR = {  # what they ask of linear attention in the model below: heads of q, k, v; D, V, decay, delta
    LinearAttention(): ((2, 1, 1), 8, 9, "none", False),
    RetNet(): ((2, 2, 2), 8, 16, "scalar", False),
    GLA(): ((2, 2, 2), 4, 8, "vector", False),
    Mamba2(state=6): ((1, 1, 4), 6, 8, "scalar", False),
    GatedDeltaNet(V=12): ((1, 1, 2), 8, 12, "scalar", True),
    KimiDeltaAttention(): ((2, 2, 2), 8, 8, "vector", True),
}


def test_the_linear_problems_are_the_models_own(tmp_path) -> None:
    problems = kernel_check.problems(config(tmp_path, N=7, mixers=(Softmax(), *LINEAR), dtype="bfloat16"))
    attention, *linear = problems.values()
    assert isinstance(attention, numerics.Problem)
    assert [(p.heads, p.D, p.V, p.decay, p.delta) for p in linear] == list(LINEAR.values())
    assert {(p.T, p.H, p.documents, p.dtype) for p in linear} == {(32, 2, 4, "bfloat16"), (32, 4, 4, "bfloat16")}
    assert linear[1].scale == 8**-0.5 and linear[4].scale == 1
    assert list(problems)[4] == "Mamba2, heads 1/1/4, D 6, V 8, T 32"


def test_heads_are_those_of_one_device(tmp_path) -> None:
    """Every device has the head that all others read."""
    c = dataclasses.replace(config(tmp_path, N=2, K=2, mixers=(GLA(), Mamba2())), mesh=Mesh(tensor=2))
    assert [p.heads for p in kernel_check.problems(c).values()] == [(1, 1, 1), (1, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixers", "compared"), [((GatedDeltaNet(),), True), ((Softmax(),), False)], ids=["linear", "not"]
)
def test_linear_kernels_are_compared_where_the_model_has_their_mixers(monkeypatch, tmp_path, mixers, compared) -> None:
    def scaled(*arguments):
        out, state = linear_xla.attend(*arguments)
        return (out * 1.01).astype(out.dtype), state

    seen = types.SimpleNamespace(**{**vars(dispatch), "target": lambda: dispatch.Target("tpu", V5E)})
    monkeypatch.setattr(kernel_check, "dispatch", seen)
    for name, changes in (("right_linear", {}), ("wrong_linear", {"attend": scaled})):
        module = types.SimpleNamespace(**{**vars(linear_xla), **changes})
        monkeypatch.setitem(linear_api.BACK_ENDS, name, module)
        monkeypatch.setattr(linear_api, "DEFAULT", (name, "xla"))
        verdict = kernel_check.check(config(tmp_path, N=1, mixers=mixers), None, Console(quiet=True))
        if not compared:
            assert verdict is None
            continue
        (row,) = verdict["rows"]
        assert row["back_end"] == name and row["layer"].startswith("GatedDeltaNet")
        assert row["outcome"] == ("passed" if name == "right_linear" else "failed"), row
        assert set(row["results"]) == {"out", "final_state", "dq", "dk", "dv", "dlog_decay", "dbeta"}
    if compared:
        with pytest.raises(
            kernel_check.Disagreement, match="wrong_linear does not agree with xla on TPU v5 lite, Gated"
        ):
            kernel_check.insist(verdict)


# ---- training


def test_a_cpu_and_programs_of_xla_need_no_comparison(monkeypatch, tmp_path) -> None:
    c, console = config(tmp_path), Console(quiet=True)
    assert kernel_check.check(c, None, console) is None
    on_a_chip(monkeypatch, "fresh")
    assert kernel_check.check(c, Context(implementation=("xla", "fresh")), console) is None
    assert kernel_check.check(c, None, console)["outcome"] == "passed"


def test_a_back_end_that_refuses_the_model_is_not_compared(monkeypatch, tmp_path) -> None:
    def refuse(*_):
        raise NotImplementedError("too small")

    on_a_chip(monkeypatch, "choosy", check=refuse)
    assert kernel_check.check(config(tmp_path), None, Console(quiet=True)) is None


def test_training_goes_on_after_agreement_and_keeps_the_verdict(monkeypatch, tmp_path) -> None:
    on_a_chip(monkeypatch, "right")
    said = io.StringIO()
    c = config(tmp_path, **PLAIN)
    assert train(c, console=Console(file=said, width=300)).status == "finished"
    text = said.getvalue()
    assert "no bring-up report of TPU v5 lite that right passed: comparing with xla first" in text
    assert text.count("agrees with xla: largest error") == 1
    (start,) = json.loads((tmp_path / "a" / "env.json").read_text())["starts"]
    assert (start["kernels"]["outcome"], start["kernels"]["device"]) == ("passed", V5E)
    assert [row["back_end"] for row in start["kernels"]["rows"]] == ["right"]


def test_training_stops_before_step_0_on_a_mismatch(monkeypatch, tmp_path, capsys) -> None:
    on_a_chip(monkeypatch, "wrong_in_training", attend=wrong)
    c = config(tmp_path, **PLAIN)
    with pytest.raises(
        kernel_check.Disagreement, match="wrong_in_training does not agree with xla on TPU v5 lite"
    ) as caught:
        train(c, quiet=True)
    assert "\n" not in str(caught.value) and "longattn bringup" in str(caught.value)
    folder = tmp_path / "a"
    (start,) = json.loads((folder / "env.json").read_text())["starts"]
    assert start["kernels"]["outcome"] == "failed"
    assert (folder / "metrics.jsonl").read_text() == ""
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]

    # The same from the command line, which goes on with this run: 1, and one line after the verdict.
    path = tmp_path / "c.json"
    path.write_text((folder / "config.json").read_text())
    monkeypatch.setattr(cli, "_compilation_cache", lambda **_: None)
    assert cli.main(["train", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("longattn: wrong_in_training does not agree with xla on TPU v5 lite, ")


def test_with_a_report_nothing_is_compared(monkeypatch, tmp_path, own_folders) -> None:
    on_a_chip(monkeypatch, "kernel", attend=wrong)
    write_report(own_folders)
    assert train(config(tmp_path, **PLAIN), quiet=True).status == "finished"
    (start,) = json.loads((tmp_path / "a" / "env.json").read_text())["starts"]
    assert "kernels" not in start


def test_a_run_goes_on_only_with_kernels_that_agree(monkeypatch, tmp_path) -> None:
    """The check also runs on resuming: a run begun on another chip is checked on this one."""
    c = config(tmp_path, **PLAIN)
    c = dataclasses.replace(c, run=dataclasses.replace(c.run, steps=4, save_every=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "loader", stop_after(2))
        with pytest.raises(EOFError):
            train(c, quiet=True)
    on_a_chip(monkeypatch, "wrong_on_resuming", attend=wrong)
    with pytest.raises(kernel_check.Disagreement):
        train(c, quiet=True)
    _, start = json.loads((tmp_path / "a" / "env.json").read_text())["starts"]
    assert (start["step"], start["kernels"]["outcome"]) == (2, "failed")


def stop_after(n: int):
    """A loader that gives n batches and then fails."""
    whole = data.loader

    def loader(source, start):
        batches = iter(whole(source, start))
        for _ in range(n):
            yield next(batches)
        raise EOFError

    return loader
