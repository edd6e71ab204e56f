"""Plans of programs that are really compiled: memory against a count by hand, what does not fit, refusals."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from longattn import cli, plan
from longattn.aot import train_step
from longattn.config import ByteLM, Config, Mesh, Model
from longattn.cost import flops
from longattn.plan import command, show
from tests.compilers import needs_cuda, needs_libtpu

TINY = Model(N=2, E=512, F=1024, H=4, K=2, D=64, W=512, remat="attention")
DATA = ByteLM(T=1024, B=4)
ROW = {
    "topology", "T", "B", "strategy", "layout", "devices", "mesh", "fits", "refused", "hbm_bytes", "hbm_limit",
    "by_kind", "buffers", "argument_bytes", "output_bytes", "aliased_bytes", "temporary_bytes", "code_bytes", "flops",
    "attention_flops_by_formula", "linear_attention_flops", "model_flops", "hbm_traffic", "seconds", "mfu_bound",
    "collectives", "not_counted", "collectives_missing", "compile_seconds", "cached", "host_bytes", "host_traffic",
    "instructions",
}  # fmt: skip


def planned(tmp_path_factory, where: str) -> tuple[dict, str]:
    """Plans a tiny model for `where`; returns the document and the page."""
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        options = plan.PlanOptions(topology=where, model=TINY, data=DATA, html=str(folder / "plan.html"))
        console = Console(width=200, file=io.StringIO())
        document = plan.run(options, "tiny", console)
        if where.startswith("v5e"):  # once: the cache is the same for all machines
            again = command._Compiler(options)(command.topology.parse(where))
            assert document["rows"][0] == again | {"cached": False} and again["cached"]
    show.tables(console, document)
    return document, (folder / "plan.html").read_text()


@pytest.fixture(scope="module")
def on_tpu(tmp_path_factory):
    return planned(tmp_path_factory, "v5e:2x2")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    return planned(tmp_path_factory, "h100:8")


def check(document: dict, devices: int) -> None:
    """Checks what holds for a plan of TINY on any machine."""
    json.dumps(document)
    assert {k: document[k] for k in ("version", "kind", "model")} == {"version": 1, "kind": "plan", "model": "tiny"}
    (row,) = document["rows"]
    assert set(row) == ROW and row["fits"]
    sizes = row["mesh"]
    assert sizes["fsdp"] * sizes["seq"] == devices and DATA.B % sizes["fsdp"] == 0

    # By hand: float32 parameters and two moments, sharded over all devices except the norms' gains; and the batch.
    p = flops.parameters(TINY)
    sliced = 4 * (p.total - p.norms) / devices
    state = 3 * (sliced + 4 * p.norms)
    batch = 4 * 4 * DATA.B * DATA.T / devices
    assert row["argument_bytes"] == pytest.approx(state + batch, rel=0.03)  # a TPU pads its smallest arrays
    assert row["by_kind"]["parameters"] == pytest.approx(state / 3, rel=0.05)
    assert row["by_kind"]["moments"] == pytest.approx(2 * state / 3, rel=0.05)
    # The buffers alive at the peak are named; in so small a model the gaps between them are large.
    assert 0.75 * row["hbm_bytes"] < sum(row["by_kind"].values()) <= row["hbm_bytes"]
    assert row["hbm_bytes"] == pytest.approx(row["argument_bytes"] + row["temporary_bytes"])

    # Products: three forward passes and the rematerialised one (without the MLP's last product, and without the head).
    tokens = DATA.B * DATA.T / devices
    forward = flops.forward_flops(TINY, DATA.T)
    layers, head = (forward.projections + forward.mlp) / DATA.T * tokens, forward.head / DATA.T * tokens
    last = forward.mlp / 3 / DATA.T * tokens
    outside = row["flops"] - row["attention_flops_by_formula"]
    assert outside == pytest.approx(4 * layers - last + 3 * head, rel=0.02)
    assert row["model_flops"] == pytest.approx(3 * forward.total * DATA.B / devices)
    assert row["not_counted"] == []  # formulas count attention, whose loops depend on data
    assert row["collectives_missing"] == []
    s = row["seconds"]
    assert s["bound"] == pytest.approx(s["compute"] + s["exposed"]) and s["products"] <= s["compute"]
    assert row["mfu_bound"] == pytest.approx(row["model_flops"] / row["flops"] * s["products"] / s["bound"])
    # Traffic: the update reads float32 parameters, moments and gradients, and writes the first two. Each matrix is read
    # twice as gathered bfloat16. Activations come on top, and no layer reads the whole stack of layers.
    least = 6 * 4 * p.total / devices + 2 * 2 * (p.mixers + p.mlp)
    assert least / 2 < row["hbm_traffic"] < 20 * least


@pytest.mark.slow
@needs_libtpu
def test_a_small_model_on_a_tpu(on_tpu):
    document, page = on_tpu
    check(document, 4)
    row = document["rows"][0]
    # Each device has one whole row, so messages carry only parameters and sums.
    gathered = sum(c["bytes"] for c in row["collectives"] if c["kind"] in ("all-gather", "collective-permute"))
    assert gathered > 2 * 3 / 4 * 2 * (flops.parameters(TINY).mixers + flops.parameters(TINY).mlp)  # bf16, both ways
    assert "Fits:" in page and "Largest buffers" in page and "<svg" not in page


@pytest.mark.slow
@needs_cuda
def test_a_small_model_on_gpus(on_gpu):
    document, page = on_gpu
    check(document, 8)
    row = document["rows"][0]
    assert row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "seq": 2}
    # The first device's keys and values go to the second in bfloat16, forward and backward; gradients home in float32.
    local = DATA.B / 4 * DATA.T / 2 * TINY.K * TINY.D
    sent = sum(c["bytes"] for c in row["collectives"] if c["kind"] == "collective-permute" and "/ring/" in c["scope"])
    assert sent == TINY.N * (2 * 2 * local * 2 + 2 * local * 4)
    assert "h100:8" in page


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_says_by_how_much(capsys):
    code = cli.main(["plan", "llama3_8b", "--topology", "v5e:2x2", "--T", "8192", "--B", "4", "--json"])
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert code == 0 and row["fits"] is False and "exceeds available HBM" in row["refused"]
    # 12 bytes for each of 8.03e9 parameters, a quarter of them here, are more than there is.
    assert row["hbm_bytes"] > 12 * 8.03e9 / 4 > row["hbm_limit"] and "seconds" not in row
    assert "GiB too little" in show.verdict(row)
    assert "Does not fit" in show.page(document)


@needs_libtpu
def test_strategies_that_refuse_say_why(monkeypatch):
    answers = {"all_gather": {"fits": True, "hbm_bytes": 10, "hbm_limit": 20, "by_kind": {}, "collectives": [],
                              "seconds": {"bound": 2.0, "exposed": 0.5}, "mfu_bound": 0.4}}  # fmt: skip
    monkeypatch.setattr(command, "STRATEGIES", {"all_gather": None, "ring": None})
    monkeypatch.setattr(
        train_step,
        "facts",
        lambda c, *rest: answers.get(c.mesh.strategy, {"reason": f"{c.mesh.strategy} is not there"}),
    )
    console = Console(width=200, file=io.StringIO())
    options = plan.PlanOptions(topology="v5e:2x2", model=TINY, data=DATA, strategies="all")
    document = plan.run(options, "tiny", console)
    assert [row.get("reason") for row in document["rows"]] == [None, "ring is not there"]
    assert document["recommended"].startswith("all_gather: it fits, and no other")
    assert "ring is not there" in console.file.getvalue()


@needs_libtpu
@pytest.mark.parametrize(
    ("kind", "found", "beyond"),
    [
        ("max-length", {"T": 30_720}, {"T": 32_768}),  # in steps of 16 * 128, and a sixteenth is less
        ("max-batch", {"B": 15}, {"B": 16}),
        ("min-devices", {"topology": "v5e:4x8"}, {"topology": "v5e:4x4"}),
    ],
)
def test_searches_compile_until_the_border_is_known(monkeypatch, kind, found, beyond):
    def facts(config, where, *rest):
        need = config.data.T * config.data.B // where.size
        return {"fits": need <= 31_000, "hbm_bytes": need, "hbm_limit": 31_000, "by_kind": {}, "buffers": []}

    monkeypatch.setattr(train_step, "facts", facts)
    monkeypatch.setattr(show, "_one", lambda *args: None)
    where, data = (
        ("v5e:8x16" if kind == "min-devices" else "v5e:4x4"),
        ByteLM(T=32_768, B=1 if kind == "max-batch" else 16),
    )
    mesh = Mesh(seq=16) if kind != "min-devices" else Mesh()
    options = plan.PlanOptions(topology=where, model=TINY, data=data, mesh=mesh, search=kind)
    console = Console(width=200, file=io.StringIO())
    document = plan.run(options, "tiny", console)
    assert found.items() <= document["found"].items() and document["found"]["fits"]
    assert beyond.items() <= document["beyond"].items() and not document["beyond"]["fits"]
    said = console.file.getvalue()
    assert show.found(document) in said
    # The two bounds of the answer, and no list of the programs between.
    assert f"{len(document['rows'])} programs were compiled" in said and len(document["rows"]) > 2
    cells = [line.split() for line in said.splitlines()]
    assert sum(c[0].startswith("v5e:") and c[1].isdigit() for c in cells if len(c) > 1) == 2


def test_a_search_by_formula_compiles_nothing():
    console = Console(width=200, file=io.StringIO())
    options = plan.PlanOptions(topology="v5e:1x1", model=TINY, data=DATA, search="max-batch", analytic=True)
    document = plan.run(options, "tiny", console)
    said = console.file.getvalue()
    assert "The largest that fits, and the next" in said and show.found(document) in said
    assert "ompiled" not in said.replace("compiled programs (scanned", "")
    assert "ring" not in said and "contiguous" not in said  # one device: nothing is spread


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({}, ""),
        ({"data": 1, "fsdp": 16, "tensor": 1, "seq": 1}, ""),
        ({"data": 1, "fsdp": 4, "tensor": 1, "seq": 4}, ", usp, zigzag"),
        ({"data": 1, "fsdp": 4, "tensor": 1, "ring": 4, "seq": 1}, ", usp, zigzag"),
    ],
)
def test_a_strategy_is_named_where_a_sequence_is_spread(mesh, said):
    assert show.spread({"mesh": mesh, "strategy": "usp", "layout": "zigzag"}) == said


def test_docs_quote_the_error_that_the_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    quoted = page.split("<!-- accuracy -->")[1]
    assert " ".join(quoted.split()) == show.formulas()


def test_bounds_lie_below_the_times_that_others_measured():
    """All but one: all_gather sums float32 gradients of keys, which the measured program does not."""
    found = Path(__file__).parents[2] / "experiments" / "plan_calibration" / "results.json"
    rows = json.loads(found.read_text(encoding="utf-8"))
    assert len(rows) == 9
    assert {name for name, r in rows.items() if r["seconds"]["bound"] > r["measured"]["seconds"]} <= {
        "all_gather, zigzag"
    }
    for row in rows.values():
        theirs = row["measured"]["seconds"] * row["measured"]["tflops_per_second"] * 1e12
        assert row["model_flops"] == pytest.approx(theirs, rel=0.01)
        assert row["collectives_missing"] == []


def test_what_a_bound_leaves_out_is_said():
    assert show._left_out({"collectives_missing": [], "not_counted": []}) == []
    row = {"collectives_missing": ["all-gather.7", "all-gather.8"], "not_counted": list("abcd")}
    said = "2 collectives (all-gather.7, all-gather.8), 4 loops of unknown length (a, b, c, ...)"
    assert show._left_out(row) == [("not in this bound", said)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a model first: llama3_1b"),
        (["llama3_9b"], "unknown model 'llama3_9b'; did you mean 'llama3_8b'"),
        (["llama3_8b", "--topology", "v5e:4"], "2 dimensions, such as v5e:2x2"),
        (["llama3_8b", "--topology", "v5e:4x4", "--mesh.seq", "3"], "the mesh has 3 devices, v5e:4x4 has 16"),
        (["llama3_8b", "--search", "max"], "--search"),
        (["llama3_8b", "--search", "max-length", "--strategies", "all"], "ask for one of them at a time"),
        (["llama3_8b", "--search", "min-devices", "--mesh.fsdp", "16", "--topology", "v5e:4x4"], "leave"),
        (["llama3_8b", "--timeout", "0"], "timeout=0 must be positive"),
        (["nowhere.py"], "config nowhere.py does not exist"),
    ],
)
def test_wrong_arguments_are_one_line_with_the_remedy(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_meshes_are_chosen_by_rows_and_then_positions():
    choose = lambda where, T, B: plan.PlanOptions(topology=where, model=TINY, data=ByteLM(T=T, B=B)).config(
        command.topology.parse(where)
    )
    assert choose("v5e:4x4", 4096, 4).mesh == Mesh(fsdp=4, seq=4)
    assert choose("v5e:4x4", 4096, 48).mesh == Mesh(fsdp=16)
    assert choose("h100:1", 4096, 3).mesh == Mesh()
    with pytest.raises(ValueError, match="16 devices cannot share 3 rows of T=4100"):
        choose("v5e:4x4", 4100, 3)


@needs_libtpu
@pytest.mark.slow
def test_what_is_offloaded_lies_on_the_host():
    """Each layer offloads its input, attention's output (bfloat16) and lse of each token, once there and once back."""
    model = dataclasses.replace(TINY, N=4, H=8, D=128, remat="offload")  # heads that need no padding on TPUs
    data = dataclasses.replace(DATA, T=512)  # tokens of each device, too
    mesh = Mesh(seq=4, strategy="all_gather")  # it has the fewest kernels to compile
    options = plan.PlanOptions(topology="v5e:2x2", model=model, data=data, mesh=mesh, cache=False)
    console = Console(width=200, file=io.StringIO())
    (row,) = plan.run(options, "tiny", console)["rows"]
    layers = model.N * data.B * data.T / 4 * (2 * (model.E + model.H * model.D) + 4 * model.H)
    assert row["host_traffic"] == 2 * layers
    assert layers <= row["host_bytes"] <= 2 * layers  # some layers' data are there twice
    assert row["seconds"]["host"] == pytest.approx(row["host_traffic"] / 16e9)
    assert row["seconds"]["bound"] >= row["seconds"]["host"]
    assert "offloaded" in console.file.getvalue()


@needs_libtpu
@pytest.mark.slow
def test_accounts_are_those_of_the_compiled_program(on_tpu):
    """FLOPs and messages are equal; memory is close, because the compiler sees that it is short."""
    where = command.topology.parse("v5e:2x2")
    config = plan.PlanOptions(topology=where.name, model=TINY, data=DATA).config(where)
    row, found = on_tpu[0]["rows"][0], train_step.accounts(config, where, 600.0)
    assert found["fits"] and found["flops"] == row["flops"]
    sent = lambda row: sorted((c["kind"], c["scope"], c["runs"], c["bytes"]) for c in row["collectives"])
    assert sent(found) == sent(row)
    assert found["by_kind"]["parameters"] == row["by_kind"]["parameters"]
    assert all(b["name"] != "fill" for b in found["buffers"])  # the argument that fills the memory
    assert found["seconds"]["products"] == row["seconds"]["products"]
    assert found["hbm_bytes"] == pytest.approx(row["hbm_bytes"], rel=0.1)


def test_accounts_are_of_several_tpus():
    for name, mesh in (("h100:8", Mesh(fsdp=8)), ("v5e:1x1", Mesh())):
        with pytest.raises(ValueError, match="compile for"):
            train_step.accounts(Config(TINY, ByteLM(T=1024, B=8), mesh), command.topology.parse(name), 1.0)
