"""`longattn profile sequence`, `longattn plan --strategies all --analytic`, and the study's part."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from longattn import cli, plan
from longattn.config import ByteLM, Mesh, Model, Softmax
from longattn.cost import topology
from longattn.cost.sequence.problem import Problem
from longattn.cost.sequence.strategies import compare, recommended
from longattn.cost.sequence.timeline import machine
from longattn.mask import Causal, Full, Window
from longattn.plan import sequence
from longattn.study import StudyOptions, report
from longattn.study import run as run_study
from longattn.study.store import FILE


def said(options: sequence.SequenceOptions) -> tuple[dict, str]:
    console = Console(width=160, file=io.StringIO())
    document = sequence.run(options, console)
    return json.loads(json.dumps(document)), console.file.getvalue()


def test_all_ways_side_by_side(capsys):
    assert cli.main(["profile", "sequence", "--topology", "h100:8", "--T", "8192", "--mask", "Full()", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["kind"], document["devices"]) == (1, "profile sequence", 8)
    rows = {(row["strategy"], row["layout"]): row for row in document["rows"]}
    assert {s for s, _ in rows} == {"ring", "balanced", "all_gather", "ulysses", "usp"} and len(rows) == 11
    assert "is for causal masks" in rows["balanced", "contiguous"]["reason"]
    assert rows["ring", "zigzag"]["idle"] == pytest.approx(0)
    document, text = said(sequence.SequenceOptions(topology="v5e:2x4"))
    assert document["recommended"].startswith("ring, zigzag: ") and document["recommended"] in text
    assert "46.7%" in text and "11.1%" in text


def test_one_strategy_its_schedule_and_what_its_program_sends():
    options = sequence.SequenceOptions(
        strategy="balanced", topology="h100:2", T=64, H=2, K=1, D=4, dtype="float16", measure=True
    )
    document, text = said(options)
    way = document["way"]
    assert way["pairs"] == [[32 * 33 / 2] * 2, [0, 32**2]] and "1<0 100%" in text
    assert way["messages"] and all(m["measured"] == m["most"] for m in way["messages"])
    assert way["units"]["forward"]["mean"] == pytest.approx(1 / 4)  # one pair of shards of half the tokens, K = H / 2
    document, text = said(sequence.SequenceOptions(strategy="balanced", topology="v5e:2x4"))
    assert "+7<0 100%" in text  # device 0 helps 7
    assert document["way"]["helps"][1] == [True] + [False] * 7


def test_packed_documents(monkeypatch):
    monkeypatch.setattr(sequence.command.packing, "table", lambda *a, **k: [
        {"T": 8, "P": 2, "layout": "striped", "documents_per_row": 1.0, "mean": 1.5, "worst": 2.0, "by_tokens": 1.0}
    ])  # fmt: skip
    monkeypatch.setattr(sequence.command.packing, "groups_table", lambda *a, **k: [
        {"T": 8, "groups": 2, "rows_each": 4, "steps": 3, "before": 1.5, "after": 1.25}
    ])  # fmt: skip
    text = " ".join(said(sequence.SequenceOptions(packed=True))[1].split())
    assert "8 2 striped 1.0 1.50 2.00 1.00" in text and "8 2 4 3 1.50 1.25" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rings"], "strategy='rings' must be a strategy, or all; did you mean 'ring'?"),
        (["ring", "--topology", "v5e:2x4", "--T", "1001"], "T=1001 must be a multiple of 8"),
        (["balanced", "--layout", "zigzag"], "balances the contiguous layout"),
        (["usp", "--topology", "h100:3"], "cannot be divided into a ring and an all-to-all"),
        (["--topology", "h100:1"], "has one device"),
        (["--efficiency", "0"], "must lie in (0, 1]"),
        (["--measure"], "name it, such as profile sequence ring"),
        (["ring", "--measure"], "needs --dtype float16 or float32"),
    ],
)
def test_wrong_arguments_are_one_line_with_the_remedy(arguments, message, capsys):
    assert cli.main(["profile", "sequence", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_plan_by_formula_compares_and_recommends(capsys, tmp_path):
    page = tmp_path / "plan.html"
    arguments = ["plan", "llama3_8b", "--topology", "v5e:4x4", "--T", "131072", "--B", "4", "--strategies", "all"]
    assert cli.main([*arguments, "--analytic", "--html", str(page), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 1 and len(document["sequence"]) == 11
    assert document["recommended"] == document["recommended_by_formula"]
    assert document["recommended"].startswith("ring, zigzag: ")
    text = page.read_text()
    assert "usp 2x2, striped" in text and document["recommended"] in text
    one_row_each = plan.PlanOptions(
        topology="h100:2", model=Model(N=2, E=512, mixers=(Softmax(),)), data=ByteLM(T=1024, B=2), strategies="all",
        analytic=True, mesh=Mesh(fsdp=2),
    )  # fmt: skip
    console = Console(width=200, file=io.StringIO())
    alone = plan.run(one_row_each, "tiny", console)
    assert alone["sequence"] == [] and "one device needs none" in console.file.getvalue()


def test_a_plan_compiles_every_strategy_on_a_mesh_that_it_takes(monkeypatch):
    """usp on two axes, balanced in the contiguous layout, the others as asked for."""
    meshes = []

    def facts(config, *rest):
        meshes.append(config.mesh)
        return {"fits": True, "hbm_bytes": 10, "hbm_limit": 20, "by_kind": {}, "collectives": [], "mfu_bound": 0.4,
                "seconds": {"bound": 1.0 + len(meshes), "exposed": 0.5}}  # fmt: skip

    monkeypatch.setattr(plan.command.compilers, "environment_of", lambda where: {})
    monkeypatch.setattr(plan.command, "_compilers", lambda where: {})
    monkeypatch.setattr(plan.command.train_step, "facts", facts)
    options = plan.PlanOptions(
        topology="h100:8", model=Model(N=2, E=512, H=8, K=4), data=ByteLM(T=1024, B=2), strategies="all",
        mesh=Mesh(fsdp=2, seq=4, layout="zigzag"),
    )  # fmt: skip
    document = plan.run(options, "tiny", Console(width=200, file=io.StringIO()))
    shared = {"fsdp": 2, "seq": 4, "layout": "zigzag"}
    assert meshes == [
        Mesh(**shared), Mesh(**(shared | {"layout": "contiguous"}), strategy="balanced"),
        Mesh(**shared, strategy="all_gather"), Mesh(**shared, strategy="ulysses"),
        Mesh(**(shared | {"seq": 2}), ring=2, strategy="usp"),
    ]  # fmt: skip
    assert [row["layout"] for row in document["rows"]] == ["zigzag", "contiguous", "zigzag", "zigzag", "zigzag"]
    assert document["recommended"].startswith("ring: ")
    three = dataclasses.replace(options, topology="h100:6", mesh=Mesh(fsdp=2, seq=3), model=Model(E=6 * 64),
                                data=ByteLM(T=1200, B=2))  # fmt: skip
    reasons = [row.get("reason") for row in plan.run(three, "tiny", Console(file=io.StringIO()))["rows"]]
    assert reasons[:4] == [None] * 4 and "3 devices along the sequence cannot be divided" in reasons[4]


def test_layers_of_several_masks_are_averaged_and_remat_runs_forward_twice():
    where = machine(topology.parse("h100:8"))
    wide, near = (Problem(T=8192, H=8, K=8, D=64, mask=mask) for mask in (Causal(), Causal() & Window(100)))
    totals = [{(r["strategy"], r["layout"]): r["seconds"]["total"] for r in compare(layers, 8, where)}
              for layers in ({wide: 1}, {near: 1}, {wide: 1, near: 3})]  # fmt: skip
    for way, mean in totals[2].items():
        assert mean == pytest.approx((totals[0][way] + 3 * totals[1][way]) / 4)
    once, twice = (compare({wide: 1}, 8, where, remat=remat)[0]["seconds"] for remat in ("none", "full"))
    assert twice["total"] == pytest.approx(once["total"] + once["forward"]["total"])
    refused = compare({Problem(T=1024, H=8, K=8, D=64, mask=Full()): 1, wide: 1}, 8, where)
    assert [row["strategy"] for row in refused if "reason" in row] == ["balanced"]
    nothing = compare({Problem(T=1023, H=8, K=8, D=64): 1}, 8, where)
    assert recommended(nothing).startswith("None: no way serves this attention; T=1023 must be")


def test_the_studys_part_and_its_picture(tmp_path):
    options = StudyOptions(preset="smoke", name="s", dir=str(tmp_path), parts=("sequence",), recorded="")
    text = run_study(options).read_text()
    store = report.load(tmp_path / "s").store
    idle = {(n.at["strategy"], n.at["layout"]): n for n in store.select("sequence", "idle")}
    assert len(idle) == 11 and all(n.badge == "predicted" for n in idle.values())
    ring, balanced = idle["ring", "contiguous"], idle["balanced", "contiguous"]
    assert len(ring.samples) == 64 and len(balanced.samples) == 40
    assert sum(ring.samples) == sum(balanced.samples) == 1024 * 1025 / 2
    assert "What each device computes at each step" in text and f"ring, contiguous: {ring.value:.1%} idle" in text
    assert (tmp_path / "s" / FILE).is_file() and "all on h100:8" in text
