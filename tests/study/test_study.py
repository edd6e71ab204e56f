"""The study's parts: resumable, within their budget, and the same for a mixer that joins later."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from longattn import config, plan, recorded
from longattn.aot import compilers, train_step
from longattn.bench import attention as bench
from longattn.cost import hardware, topology
from longattn.cost.sequence import problem as sequence_problem
from longattn.cost.sequence import strategies, timeline
from longattn.models import MIXERS
from longattn.study import StudyOptions, context, cost, main, memory, pod, presets, recall, report, run, sequence, ways
from longattn.study.presets import PRESETS, SMOKE
from longattn.study.report import tables
from longattn.study.store import FILE, Number, Store
from longattn.study.units import Clock, Unit, share_interval, t_interval, wilson


def fake(calls: list[str], fail: str = "") -> main.Part:
    """Makes a part of three units that note that they ran; the unit `fail` is interrupted."""

    def work(key: str, clock: Clock) -> list[Number]:
        if key == fail:
            raise KeyboardInterrupt
        calls.append(key)
        return [Number("", "value", "exact", float(len(calls)), "", "measured", {"key": key})]

    def units(plan: object, store: Store) -> list[Unit]:
        made = [Unit(k, lambda clock, k=k: work(k, clock)) for k in ("a", "b", "c")]
        return [*made, Unit("fit", lambda clock: work("fit", clock), always=True)]

    return main.Part("cost", "a part", units)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_interrupted_part_goes_on_and_done_part_rests(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        main.run_part(fake(calls, fail="b"), SMOKE, Store(tmp_path / FILE), "e0", quiet())
    with open(tmp_path / FILE, "a") as file:  # killed while it wrote: a number without its unit, and a torn line
        file.write(json.dumps({"kind": "number", "unit_of_work": "b", "key": "k"}) + "\n" + '{"kind": "num')
    store = Store(tmp_path / FILE)
    store.trim()
    assert list(store.units) == ["a"]
    main.run_part(fake(calls), SMOKE, store, "e1", quiet())
    assert calls == ["a", "b", "c", "fit"]
    again = Store(tmp_path / FILE)
    main.run_part(fake(calls), SMOKE, again, "e2", quiet())
    assert calls == ["a", "b", "c", "fit"]
    assert [n.environment for n in again.numbers.values()] == ["e0", "e1", "e1", "e1"]
    assert {n.part for n in again.numbers.values()} == {"cost"}
    assert again.numbers == store.numbers


def test_budget_skips_and_says_so(tmp_path: Path) -> None:
    calls: list[str] = []
    store = Store(tmp_path / FILE)
    preset = dataclasses.replace(SMOKE, cost=dataclasses.replace(SMOKE.cost, seconds=0))
    main.run_part(fake(calls), preset, store, "e0", quiet())
    assert calls == ["fit"]  # what sums up is always done
    assert store.parts["cost"]["skipped"] == ["a", "b", "c"]


def test_store_refuses_another_version(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"kind": "environment", "id": "e0", "version": 99}\n')
    with pytest.raises(ValueError, match="version 99"):
        Store(tmp_path / FILE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]\n{}\n", "line 1 is damaged: it holds a list"),
        ('{"kind": 3}\n{}\n', "line 1 is damaged: its 'kind' must be a JSON string"),
        ('{"kind": "unit"}\n', "is damaged: a line lacks what it must hold"),
    ],
)
def test_a_damaged_store_is_refused_by_name(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{FILE}.* {reason}.*; move the file away and start again"):
        Store(tmp_path / FILE)


def test_what_is_not_finite_is_stored_as_null_and_read_as_nan(tmp_path: Path) -> None:
    bad = Number("cost", "value", "exact", math.inf, "", "measured", samples=(1.0, math.nan))
    Store(tmp_path / FILE).unit("a", [bad], part="cost", seconds=1.0)
    assert "NaN" not in (tmp_path / FILE).read_text() and "Infinity" not in (tmp_path / FILE).read_text()
    (read,) = Store(tmp_path / FILE).numbers.values()
    np.testing.assert_array_equal((read.value, *read.samples), (math.nan, 1.0, math.nan))


@pytest.mark.parametrize("content", ["", "[]", '{"preset": "smoke", "plan": 3}', "\udcff"])
def test_a_damaged_study_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"study\.json is damaged: .*; choose another --name"):
        run(StudyOptions(preset="smoke", name="s", dir=str(tmp_path)))


@pytest.mark.parametrize("name", [".", "..", "a/b", "x" * 300])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"StudyOptions\.name=.* must name a folder"):
        StudyOptions(name=name)


def test_folder_of_another_preset_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "study.json").write_text('{"preset": "quick", "plan": {}}')
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="preset quick"):
        run(StudyOptions(preset="smoke", name="s", dir=str(tmp_path)))
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_new_mixer_joins_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Nothing(config.Softmax):
        pass

    monkeypatch.setitem(MIXERS, Nothing.__name__, MIXERS["Softmax"])
    store, quick, full = Store(tmp_path / FILE), PRESETS["quick"], PRESETS["full"]
    assert ways.ways((16,))[-1].name == "nothing"
    for units, name in ((memory.units, "memory"), (recall.units, "recall"), (context.units, "context")):
        few, many = (sum("nothing" in u.key for u in units(getattr(p, name), store)) for p in (quick, full))
        assert few == {"memory": 2, "recall": 1, "context": 0}[name]  # the quick study's text was trained earlier
        assert many > few
    assert sum("nothing" in [w.name for w in cost._at(quick.cost, T)] for T in quick.cost.lengths) == 1
    assert sum("nothing" in [w.name for w in cost._at(full.cost, T)] for T in full.cost.lengths) == len(
        full.cost.lengths
    )


def made(units: Any, plan: Any, only: str = "") -> list[Number]:
    """The numbers of a part's units whose keys contain `only`."""
    chosen = (u for u in units(plan, Store(Path("unused"))) if only in u.key)
    return [n for u in chosen for n in u.work(Clock(3600))]


def test_more_recomputation_never_fits_less() -> None:
    plan_ = dataclasses.replace(PRESETS["quick"].memory, remats=("none", "dots", "attention", "full"), lengths=())
    found: dict[str, list[float]] = {}
    for n in made(memory.units, plan_, "/exact/"):
        if n.quantity == "longest_T":
            found.setdefault(n.at["chip"], []).append(n.value)
    assert len(found) == len(hardware.TENSOR_CORES) + len(hardware.GPUS)
    for chip, longest in found.items():
        assert len(longest) == 4
        assert longest == sorted(longest)
        assert longest[0] > 0, chip


@pytest.mark.slow
def test_a_number_is_what_the_command_says_that_also_computes_it(tmp_path: Path) -> None:
    """One row per quantity: the study's number, and the same one from the other command's document."""
    quick, silent = PRESETS["quick"], Console(file=io.StringIO())
    fits = {n.key: n.value for n in made(memory.units, quick.memory, "memory/chips")}
    fits |= {n.key: n.value for n in made(memory.units, quick.memory, "/exact/attention")}
    model = dataclasses.replace(quick.memory.model, remat="attention")

    def planned(T: int, search: str | None = None) -> dict[str, Any]:
        data = config.ByteLM(T=T, B=1)
        options = plan.PlanOptions(topology="v5e:1x1", search=search, analytic=True, data=data, model=model)
        return plan.run(options, "quick", silent)

    T = quick.memory.lengths[-1]
    one, held = planned(T), planned(quick.memory.held_at)["rows"][0]
    table = [
        ("memory/longest_T/exact/remat=attention/chip=v5e", planned(1024, "max-length")["found"]["T"]),
        (f"memory/largest_batch/exact/remat=attention/chip=v5e/T={quick.memory.batch_at}",
         planned(quick.memory.batch_at, "max-batch")["found"]["B"]),
        (f"memory/step_bytes/exact/remat=attention/chip=v5e/T={T}", one["rows"][0]["hbm_bytes"]),
        *((f"memory/held_{kind}/exact/remat=attention/chip=v5e/T={quick.memory.held_at}", size)
          for kind, size in held["by_kind"].items() if size),
        ("memory/chip_bytes/-/chip=v5e", one["rows"][0]["hbm_limit"]),
        ("memory/parameters/-", one["parameters"]),
    ]  # fmt: skip
    for key, value in table:
        assert fits[key] == value, key

    # `longattn compare attention`: FLOPs of the same heads and mask; and `longattn profile sequence`.
    small = dataclasses.replace(quick.cost, lengths=(64,), dense_limit=0, repeats=1, without=presets._FAMILY)
    counted = {n.key: n.value for n in cost._length(small, 64)}
    for way, window in (("exact", False), ("window_32", True)):
        options = bench.AttentionOptions(T=(64,), H=small.H, D=small.D, window=small.windows[0] - 1)
        assert counted[f"cost/flops_forward/{way}/T=64"] == bench.flops(options, 64, "forward", window=window)
    shapes = sequence_problem.Problem(T=1024, H=2, K=1, D=8)
    told = strategies.compare({shapes: 1}, 8, timeline.machine(topology.parse("v5e:2x4")))
    shown = {n.key: n.value for n in made(sequence.units, PRESETS["smoke"].sequence)}
    for row in told:
        at = f"strategy={row['strategy']}/layout={row['layout']}/P=8"
        assert shown[f"sequence/idle/-/{at}"] == row["idle"]
        assert shown[f"sequence/total/-/{at}/machine=v5e:2x4"] == row["seconds"]["total"]


def test_exponents_are_the_benchmarks(tmp_path: Path) -> None:
    store, times = Store(tmp_path / FILE), {1024: (1.0, 1.1, 1.2), 2048: (3.0, 3.1, 3.2), 4096: (9.0, 9.1, 9.9)}
    quantity = "seconds_forward_backward"
    numbers = [Number("cost", quantity, "exact", s[1], "s", "measured", {"T": T}, samples=s) for T, s in times.items()]
    store.unit("a", numbers, part="cost", seconds=1.0)
    rows = [
        {"what": "x", "T": T, "seconds": {"exact": s}, "temp_bytes": {}, "two_speeds": []} for T, s in times.items()
    ]
    shown = next(n for n in cost._fits(PRESETS["quick"].cost, store) if n.quantity == "exponent_time_training")
    assert {"value": shown.value, "low": shown.low, "high": shown.high} == bench._exponents(rows)["x"]["exact"]["time"]


def test_windows_are_the_same_in_every_part() -> None:
    for name, preset in PRESETS.items():
        parts = (preset.cost, preset.memory, preset.recall, *([] if preset.context.recorded else [preset.context]))
        assert len({p.windows for p in parts}) == 1, name


def test_quick_recall_compares_families() -> None:
    preset = PRESETS["quick"].recall
    steps = {u.key.split("/")[1]: u.weight for u in recall.units(preset, Store(Path("unused"))) if "/mqar/" in u.key}
    assert steps.keys() == {"exact", "window_32", "gateddeltanet"}
    rows = preset.mqar[0].B * preset.mqar[0].T
    assert steps["gateddeltanet"] == preset.recurrent_steps * rows
    assert steps["exact"] == preset.mqar_steps * rows * len(preset.seeds)


def test_quick_text_is_the_recorded_run() -> None:
    numbers = made(context.units, PRESETS["quick"].context)
    assert {n.badge for n in numbers} == {"recorded"}
    folder = Path("experiments/2026-11-bytelm_small")
    assert recorded.load("text") == context.record(folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert numbers[0].value == evaluation["bits_per_byte"]
    bits = [n.value for n in numbers if n.quantity == "bits_at"]
    assert bits == [row["nll"] / math.log(2) for row in evaluation["by_position"]]
    assert bits[0] > bits[-1]


def test_a_timing_at_two_speeds_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {"a": [1.0, 1.01, 1.02, 2.0, 2.01, 2.02], "b": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
    asked: list[list[str]] = []

    def timed(fns: dict[str, object], repeats: int) -> dict[str, list[float]]:
        asked.append(list(fns))
        return {name: samples[name] for name in fns}

    monkeypatch.setattr(cost, "interleave", timed)
    found = cost._timed({"a": print, "b": print}, 6)
    assert asked == [["a", "b"], ["a"]]  # once more, by itself
    assert (found["a"]["low"], found["a"]["high"]) == (None, None)
    number = Number("cost", "seconds_forward", "exact", unit="s", badge="measured", **found["a"])
    assert number.refused == "two speeds"
    assert (found["b"]["low"], found["b"]["high"]) == (1.0, 1.5)


def test_intervals() -> None:
    assert t_interval([1.0]) == (-math.inf, math.inf)
    low, high = t_interval([0.8, 0.9, 1.0])
    assert (low, high) == pytest.approx((0.9 - 4.303 * 0.1 / 3**0.5, 0.9 + 4.303 * 0.1 / 3**0.5))
    assert wilson(0, 100)[0] == 0 < wilson(0, 100)[1] < 0.05
    assert share_interval([100, 100], 100)[1] == 1
    assert share_interval([50, 90], 100) == (0, 1)  # two seeds that far apart say nothing
    assert cost.median_interval([3, 1, 2]) == (1, 3)
    assert cost.median_interval(range(12)) == (2, 9)  # P(fewer than 3 of 12 below the median) = 1.9%


def test_control_replaces_only_what_is_further_back() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert (context.replace_before(rows, 0) == rows).all()
    assert (context.replace_before(rows, 3) == [[4, 5, 6, 3], [8, 9, 10, 7], [0, 1, 2, 11]]).all()
    found = context.documents(config.ByteLM(T=64, max_bytes=2_000_000), 3)
    assert found.shape == (3, 64)
    assert (found[:, 0] == 256).all()
    assert len({bytes(r[1:].astype(np.uint8)) for r in found}) == 3


@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part and the page, as the command runs them; a second start only rewrites the page."""
    time = 3600  # seconds, more than a loaded machine takes; pods are recorded ones, which take none
    preset = dataclasses.replace(
        SMOKE,
        cost=dataclasses.replace(SMOKE.cost, seconds=time, windows=(), tokens=32),
        memory=dataclasses.replace(SMOKE.memory, seconds=time),
        recall=dataclasses.replace(SMOKE.recall, seconds=time, windows=(), needle_seeds=(0,)),
        context=dataclasses.replace(SMOKE.context, seconds=time, windows=(), lengths=SMOKE.context.lengths[-1:]),
        sequence=dataclasses.replace(SMOKE.sequence, seconds=time),
    )
    monkeypatch.setitem(PRESETS, "smoke", preset)
    options = StudyOptions(preset="smoke", name="s", dir=str(tmp_path), recorded="")
    page = run(options)
    lines = (tmp_path / "s" / FILE).read_text().splitlines()
    store = report.load(tmp_path / "s").store
    assert set(store.parts) == {"cost", "memory", "recall", "context", "sequence", "pod"}
    assert not any(p["skipped"] for p in store.parts.values())
    assert store.select("memory", "longest_T", "exact", chip="v5e")[0].value > 0
    for task, seeds in (("mqar", (0, 1)), ("needle", (0,))):
        found = store.select("recall", "accuracy", task=task)
        assert {n.way for n in found} == {"exact"}
        for n in found:
            assert 0 <= n.low <= n.value <= n.high <= 1
            assert n.seeds == seeds
            assert len(n.samples) == len(seeds)
    for n in store.select("context", "tail_excess"):
        assert n.low <= n.value <= n.high
    assert store.select("context", "tail_excess", "exact", k=64 - 16)[0].value == 0
    page.unlink()
    assert run(options).is_file()
    assert (tmp_path / "s" / FILE).read_text().splitlines()[: len(lines)] == lines
    assert len(Store(tmp_path / "s" / FILE).numbers) == len(store.numbers)


def test_quick_counts_all_mixers_and_times_some(tmp_path: Path) -> None:
    plan, store = PRESETS["quick"].cost, Store(tmp_path / FILE)
    store.unit("cost/state", list(cost._state(plan)), part="cost", seconds=0.0)
    by_name = {w.name: w for w in ways.trained(plan.windows)}
    assert {n.way for n in store.select("cost", "state_elements")} == set(by_name)
    timed = {w.name for T in plan.lengths for w in cost._at(plan, T)}
    assert {"retnet", "gateddeltanet"} < timed < set(by_name) | {"dense"}
    for name, way in by_name.items():
        elements = [store.one("cost", "state_elements", name, T=T).value for T in plan.lengths]
        steps = [store.one("cost", "sequential_steps", name, T=T).value for T in plan.lengths]
        if isinstance(way.mixer, config.Softmax):
            assert steps == [1] * len(steps)
        else:
            assert len(set(elements)) == 1
            assert steps[-1] == 8 * steps[0] > 8
    study = report.Study("a", "quick", store)
    (shown,) = (t for t in tables.tables(study)["cost"] if t.title.startswith("State and reads of one layer"))
    assert [row[0] for row in shown.rows][:2] == ["exact, blockwise", "window 32"]
    assert {"GatedDeltaNet", "Based"} < {row[0] for row in shown.rows}


@pytest.mark.parametrize("there", [False, True])
def test_pods_are_compiled_anew_where_the_compilers_are(tmp_path: Path, monkeypatch, there: bool) -> None:
    """Without the compilers, figures compiled earlier are shown as such."""
    monkeypatch.setattr(compilers, "environment_of", lambda where: {} if there else _missing())
    monkeypatch.setattr(
        train_step, "facts", lambda c, where, *rest: {"fits": False, "hbm_bytes": 2 * where.hbm_bytes, "hbm_limit": 1}
    )
    store = Store(tmp_path / FILE)
    part = next(p for p in main.PARTS if p.name == "pod")
    preset = dataclasses.replace(SMOKE, pod=dataclasses.replace(SMOKE.pod, seconds=60))
    main.run_part(part, preset, store, "e0", quiet())
    needs = store.select("pod", "needs")
    assert len(needs) == SMOKE.pod.cases == 2
    for case, n in zip(pod.CASES, needs, strict=False):
        earlier = pod.recorded()[case.name]
        assert n.badge == ("compiled" if there else "recorded")
        assert there or (n.value == earlier["hbm_bytes"] and "not installed" in n.note)
        bounds = store.select("pod", "step_bound", **n.at)
        assert len(bounds) == (0 if there else int(earlier["fits"]))


def _missing() -> dict[str, str]:
    raise ValueError("no compiler")


def test_every_case_of_the_pods_is_recorded() -> None:
    assert set(pod.recorded()) == {case.name for case in pod.CASES}
