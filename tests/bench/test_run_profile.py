"""Steps of a training run: a trace to count by hand, and the one of a run that trains here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from longattn.bench import run_profile
from longattn.bench.trace import Scope
from longattn.config import ByteLM, Config, Model, Optimiser, Run, to_json
from longattn.train import train
from tests.bench.trace.written import CPU_STATS, cpu, instruction, module, plane, programs, space

SOURCES = str(Path(__file__).parents[2] / "longattn" / "train" / "*.py")
STEP = module(
    main=[
        instruction(1, "dot.1", "dot", "jit(f)/jvp(Transformer.hidden)/while/body/layers/layer_0/mlp/dot_general"),
        instruction(2, "dot.2", "dot", "jit(f)/transpose(jvp(Transformer.hidden))/layers/layer_1/mlp/dot_general"),
        instruction(3, "mul.3", "multiply", "jit(f)/optimiser/mul"),
    ]
)


def folder(tmp_path: Path, data: bytes | None, **run) -> Path:
    """A run's folder with that trace."""
    (tmp_path / "config.json").write_text(to_json(Config(run=Run(**run))))
    if data is not None:
        recorded = tmp_path / "profile" / "plugins" / "profile" / "now"
        recorded.mkdir(parents=True)
        (recorded / "host.xplane.pb").write_bytes(data)
    return tmp_path


def three_steps() -> bytes:
    """Steps that begin at 0, 100 and 250 us and are busy for 60 of them, and one execution of another program."""
    lines = {
        "a": [
            event
            for run, start in enumerate((0, 100, 250), 1)
            for event in (
                cpu("dot.1", start, start + 30, run),
                cpu("dot.2", start + 35, start + 55, run),
                cpu("mul.3", start + 60, start + 70, run),
            )
        ]
        + ["other 400 410 hlo_op=other hlo_module=jit_g program_id=8 run_id=9 device_ordinal=0"]
    }
    return space(programs(STEP), plane("/host:CPU", lines, CPU_STATS))


def test_steps_by_hand(tmp_path) -> None:
    document = run_profile.read(run_profile.RunProfileOptions(str(folder(tmp_path, three_steps(), profile=(5, 3)))))
    assert (document["program"], document["devices"]) == ("jit_f", 1)
    assert [s["step"] for s in document["steps"]] == [5, 6, 7]
    assert [s["wall_seconds"] for s in document["steps"]] == pytest.approx([100e-6, 150e-6, 70e-6])
    assert [s["device_seconds"] for s in document["steps"]] == pytest.approx([70e-6] * 3)
    assert [s["idle"] for s in document["steps"]] == pytest.approx([0.4, 0.6, 1 / 7])
    # What came after the last step is not known.
    assert document["idle"] == pytest.approx(0.5)
    assert document["wall_seconds"]["median"] == pytest.approx(125e-6)
    parts = {(p["name"], p["phase"]): p["seconds"] for p in document["parts"]}
    assert parts == pytest.approx(
        {("layer/mlp", "forward"): 30e-6, ("layer/mlp", "backward"): 20e-6, ("optimiser", "forward"): 10e-6}
    )
    assert [k["name"] for k in document["kernels"]] == ["dot.1", "dot.2", "mul.3"]
    assert document["other_programs"] == [{"program": "jit_g", "executions": 1, "busy_seconds": pytest.approx(10e-6)}]


def test_time_of_other_programs_is_not_idle(tmp_path) -> None:
    other = lambda start, end: f"o {start} {end} hlo_op=o hlo_module=jit_g program_id=8 run_id=9 device_ordinal=0"
    lines = {"a": [cpu("dot.1", 0, 30, 1), other(30, 70), cpu("dot.1", 100, 130, 2)]}
    data = space(programs(STEP), plane("/host:CPU", lines, CPU_STATS))
    document = run_profile.read(
        run_profile.RunProfileOptions(str(folder(tmp_path, data, profile=(1, 2))), program="jit_f")
    )
    assert [s["busy_seconds"] for s in document["steps"]] == pytest.approx([70e-6, 30e-6])
    assert document["idle"] == pytest.approx(0.3)


def test_hosts_that_are_not_read_are_told(tmp_path, capsys) -> None:
    run = folder(tmp_path, three_steps(), profile=(5, 3))
    run_profile.run(run_profile.RunProfileOptions(str(run)))
    assert "one host" not in capsys.readouterr().out
    (recorded,) = run.rglob("*.xplane.pb")
    (recorded.parent / "second.xplane.pb").write_bytes(recorded.read_bytes())
    assert run_profile.run(run_profile.RunProfileOptions(str(run)))["hosts"] == 2
    assert "one host; those of 1 more" in capsys.readouterr().out


def test_another_program_may_be_read(tmp_path) -> None:
    run = str(folder(tmp_path, three_steps(), profile=(5, 3)))
    assert run_profile.read(run_profile.RunProfileOptions(run, program="jit_g"))["kernels"][0]["name"] == "other"
    with pytest.raises(ValueError, match="no program 'jit_h'; it has jit_f, jit_g"):
        run_profile.read(run_profile.RunProfileOptions(run, program="jit_h"))


def test_tables_and_json(tmp_path, capsys) -> None:
    run = str(folder(tmp_path, three_steps(), profile=(5, 3)))
    document = run_profile.run(run_profile.RunProfileOptions(run, json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert (document["version"], document["kind"]) == (2, "profile run")
    run_profile.run(run_profile.RunProfileOptions(run))
    text = capsys.readouterr().out
    for piece in ("layer/mlp", "30 us", "20 us", "83.3%", "jit_g (1, 10 us)", "xprof"):
        assert piece in text, piece


@pytest.mark.parametrize(
    ("path", "depth", "part"),
    [
        (("Transformer.hidden", "layers", "layer_0", "mixer", "attention", "xla"), 3, "layer/mixer/attention"),
        (("Transformer.hidden", "layer_11", "mlp"), 3, "layer/mlp"),
        (("loss",), 1, "loss"),
        (("Transformer.hidden",), 3, "model"),
        ((), 3, "(no scope)"),
    ],
)
def test_parts_join_layers(path, depth, part) -> None:
    assert run_profile.part_of(Scope(path, "forward"), depth) == part


def test_a_run_without_a_trace_names_the_remedy(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no trace.*--run.profile FIRST COUNT"):
        run_profile.read(run_profile.RunProfileOptions(str(folder(tmp_path, None))))
    with pytest.raises(ValueError, match="give a run, or a folder"):
        run_profile.read(run_profile.RunProfileOptions(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="depth=0"):
        run_profile.RunProfileOptions("run", depth=0)


@pytest.mark.slow
def test_a_run_that_trained_here(tmp_path) -> None:
    config = Config(
        model=Model(N=2, E=16, F=24, H=2, K=1, D=8, dtype="float32"),
        data=ByteLM(glob=SOURCES, T=32, B=2, valid=0.3),
        optimiser=Optimiser(lr=3e-3, warmup=3, loss_chunk=32),
        run=Run(dir=str(tmp_path), name="a", steps=5, eval_batches=1, profile=(3, 2)),
    )
    train(config, quiet=True)
    document = run_profile.read(run_profile.RunProfileOptions(str(tmp_path / "a"), depth=9))
    assert document["program"] == "jit__train_step"
    assert [s["step"] for s in document["steps"]] == [3, 4]
    assert all(0 <= s["idle"] < 1 for s in document["steps"])
    parts = {(p["name"], p["phase"]) for p in document["parts"]}
    attention = "layer/mixer/attention/xla"
    for part in ("layer/mlp", "layer/mixer/projections", f"{attention}/logits", f"{attention}/softmax"):
        assert {(part, "forward"), (part, "backward")} <= parts, part
    assert {("embedding", "forward"), ("loss", "forward"), ("optimiser", "forward")} <= parts
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=7, profile=(6, 1)))
    with pytest.raises(ValueError, match="steps=5, now 7"):  # another number of steps is another schedule
        train(again, quiet=True)
