"""The page has the JSONL's numbers, ranks only what separates, and fetches nothing."""

from __future__ import annotations

import html.parser
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from longattn.study import compare, report
from longattn.study.report import figures, numbers
from longattn.study.report.load import Table
from longattn.study.report.sentences import sentences
from longattn.study.store import FILE, Number, Store

ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": "longattn study --preset smoke --name a",
    "versions": {"jax": "0.12.0", "longattn": "0.1"},
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "host": {"cpu": "Some CPU", "cores": 2},
    "commit": "0123456789abcdef",
}
WAYS = {"exact": 0.98, "window_32": 0.3, "gateddeltanet": 0.7}


def make(folder: Path, *, width: float = 0.02, shift: float = 0.0, plan: dict | None = None) -> Path:
    """A study as the parts would write it, every interval `width` to both sides (as a share of the value)."""
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"preset": "smoke", "plan": plan or {}}))
    store = Store(folder / FILE)
    here = store.environment(ENVIRONMENT)
    numbers: list[Number] = []

    def add(part, quantity, way, value, unit, badge="measured", spread=True, **at):
        low, high = (value * (1 - width), value * (1 + width)) if spread else (None, None)
        numbers.append(Number(part, quantity, way, value, unit, badge, at, low, high, seeds=(0, 1), environment=here))

    for i, T in enumerate((1024, 2048, 4096)):
        for way, time, scratch in (("exact", 4.0, 2.0), ("window_32", 2.0, 2.0), ("dense", 4.0, 4.0)):
            seconds = {"exact": 0.004, "window_32": 0.003, "dense": 0.009}[way] * time**i + shift
            add("cost", "seconds_forward", way, seconds / 3, "s", T=T)
            add("cost", "seconds_forward_backward", way, seconds, "s", T=T)
            add("cost", "scratch_forward_backward", way, 2.0**20 * scratch**i, "B", "compiled", False, T=T)
            add("cost", "flops_forward", way, 1e9 * time**i, "FLOP", "predicted", False, T=T)
            add("cost", "tokens_per_second", way, 4096 / seconds, "tokens/s", T=T, tokens=4096)
    for way in ("exact", "window_32", "dense"):
        for name in ("time", "time_training", "memory"):
            add("cost", f"exponent_{name}", way, 1.9, "")
            add("cost", f"theory_{name}", way, 2, "", "predicted", False)
    for way in ("exact", "window_32"):
        for T in (1024, 65536):
            add("cost", "attention_share", way, 0.02 + 0.6 * (T > 2000), "share", "predicted", False, T=T)
    for chip, size in (("v5e", 16 * 2**30), ("h100", 80e9)):
        add("memory", "chip_bytes", "", size, "B", "predicted", False, chip=chip)
        for way in ("exact", "window_32"):
            for remat in ("attention", "none"):
                add("memory", "longest_T", way, 65536, "tokens", "predicted", False, remat=remat, chip=chip)
                add("memory", "largest_batch", way, 7, "sequences", "predicted", False, remat=remat, chip=chip, T=8192)
    add("memory", "parameters", "", 85e6, "parameters", "predicted", False)
    for way in ("exact", "window_32"):
        for remat in ("attention", "none"):
            for T in (2048, 4096, 8192, 16384):
                add("memory", "step_bytes", way, 1e6 * T, "B", "predicted", False, remat=remat, chip="v5e", T=T)
            for part in ("parameters", "moments", "gradients", "forward pass", "total"):
                add("memory", f"held_{part}", way, 3e8, "B", "predicted", False, remat=remat, chip="v5e", T=16384)
    for task, at in (("mqar", {"T": 128, "pairs": 8}), ("needle", {"T": 192, "digits": 4})):
        for i, (way, value) in enumerate(WAYS.items()):
            add("recall", "accuracy", way, value, "", task=task, **at)
            add("recall", "state_elements", way, 128 * (16, 2, 8)[i], "elements", "predicted", False, task=task, **at)
            add("recall", "bytes_read", way, 256 * (16, 2, 8)[i], "B", "predicted", False, task=task, **at)
            add("recall", "chance", way, 0.03, "", "predicted", False, task=task, **at)
            if task == "mqar":
                add("recall", "guess", way, 0.13, "", "predicted", False, task=task, **at)
    for way in ("exact", "window_32"):
        for T in (128, 512, 1024):
            add("context", "bits_per_byte", way, 2.5, "bits", spread=False, T=T)
            for n in (1, 2, 4, 8, 16, 32, 64, 128):
                add("context", "bits_at", way, 4 / n**0.2, "bits", spread=False, T=T, **{"from": n // 2 + 1, "to": n})
        for k in (0, 32, 512):
            numbers.append(
                Number(
                    "context",
                    "tail_excess",
                    way,
                    0.1 / (k + 1),
                    "bits",
                    "measured",
                    {"T": 1024, "k": k, "tail": 512},
                    0.1 / (k + 1) - 0.01,
                    0.1 / (k + 1) + 0.01,
                    environment=here,
                )
            )
    for part in ("cost", "memory", "recall", "context"):
        store.unit(f"{part}/all", [n for n in numbers if n.part == part], part=part, seconds=1.0)
        store.part(part, seconds=1.0, skipped=["cost/T=8192"] if part == "cost" else [])
    return folder


class Page(html.parser.HTMLParser):
    """The numbers of a page, its links, ids, and whether its tags match."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers: list[tuple[str, float]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.badges = 0
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == "data":
            self.numbers.append((a["data-key"], float(a["value"])))
            assert "remake:" in a["title"]
            assert "commit 0123456789ab" in a["title"]
        self.badges += tag == "abbr" and "b" in a.get("class", "").split()
        self.links += [a[k] for k in ("href", "src", "xlink:href") if k in a]
        self.ids += [a["id"]] if "id" in a else []
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def study(tmp_path: Path) -> report.Study:
    return report.load(make(tmp_path / "a"))


@pytest.fixture(scope="module")
def texts() -> dict[str, list[tuple[str, str]]]:
    """The overlapping texts of each figure of `page`, by its title."""
    return {}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, list[tuple[str, str]]]) -> tuple[Path, str]:
    """A study's folder, and its page."""
    folder, save = make(tmp_path_factory.mktemp("study") / "a"), Figure.savefig

    def checked(figure: Figure, *args: Any, **options: Any) -> None:
        texts[figure.axes[0].get_title(loc="left")] = overlaps(figure)
        save(figure, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", checked)
        return folder, report.page(report.load(folder))


def test_numbers_equal_the_jsonl(page: tuple[Path, str]) -> None:
    folder, text = page
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    stored = {line["key"]: line["value"] for line in lines if line["kind"] == "number"}
    shown = Page(text).numbers
    assert {key for key, _ in shown} == set(stored)  # every one stands in the list of all numbers
    assert all(stored[key] == value for key, value in shown)
    assert len(shown) > len(stored)


def test_page_is_whole_and_fetches_nothing(page: tuple[Path, str]) -> None:
    _, text = page
    shown = Page(text)
    assert shown.open == []
    assert len(shown.ids) == len(set(shown.ids))
    assert all(link.startswith("#") and link[1:] in shown.ids for link in shown.links)
    assert "url(http" not in text
    assert text.count("<script") == text.count("<script>") == 1  # sorts the tables
    assert not any(word in text[text.index("<script>") :] for word in ("http", "fetch", "import(", "XMLHttp"))
    assert shown.badges >= len(shown.numbers)
    assert "cost/T=8192" in text  # what the budget left out is named


@pytest.mark.parametrize("width", [80, 120])
def test_summary_is_a_table_that_does_not_wrap(study: report.Study, tmp_path: Path, width: int) -> None:
    out = io.StringIO()
    report.summary(study, Console(file=out, width=width), tmp_path / "index.html")
    lines = out.getvalue().splitlines()
    rows = {line[:17].strip(): line.split() for line in lines if line.startswith((" exact", " window", " Gated"))}
    assert list(rows) == ["exact, blockwise", "window 32", "exact, dense", "GatedDeltaNet"]
    assert max(map(len, lines[: lines.index(next(x for x in lines if "Gated" in x)) + 1])) <= 80
    assert "…" not in out.getvalue()
    assert "e+0" not in out.getvalue()
    assert rows["window 32"][2:5] == ["12", "1.90", "4"]


def test_sentences_are_one_short_fact_each(study: report.Study, tmp_path: Path) -> None:
    said = report.document(study)["sentences"]
    assert said
    for sentence, parts in zip(said, sentences(study.store), strict=True):
        text = "".join("number" if isinstance(p, Number) else p for p in parts)
        assert len(text.split()) <= 25, sentence
        assert sum(isinstance(p, Number) for p in parts) <= 2, sentence
        assert "not resolved" not in sentence
    out = io.StringIO()
    report.summary(study, Console(file=out, width=400), tmp_path / "index.html")
    assert all(sentence in out.getvalue() for sentence in said)


def _text(study: report.Study) -> str:
    return " ".join(report.document(study)["sentences"])


def test_says_only_what_separates(tmp_path: Path) -> None:
    narrow = report.load(make(tmp_path / "narrow", width=0.02))
    wide = report.load(make(tmp_path / "wide", width=0.9))
    assert "GatedDeltaNet 0.700 [0.686 .. 0.714] (M), more than window 32 0.300" in _text(narrow)
    assert "Fastest layer at T = 4,096, forward and backward: window 32, 12 ms" in _text(narrow)
    for word in ("more than", "Fastest"):
        assert word not in _text(wide)
    text = (tmp_path / "narrow" / FILE).read_text()
    (tmp_path / "narrow" / FILE).write_text(text.replace('"seeds": [0, 1]', '"seeds": [0]'))
    assert "GatedDeltaNet (one seed) 0.700" in _text(report.load(tmp_path / "narrow"))


def test_units_stand_once_in_a_table() -> None:
    time = lambda value: Number("cost", "seconds_forward", "exact", value, "s", "measured")
    table = Table("t", ("way", "time", "memory"), (("a", time(1.53), None), ("b", time(0.005), None)))
    title, head, units = numbers.columns(table)
    assert (title, head) == ("t", ("way", "time (ms)", "memory"))
    assert [numbers.show(row[1], units[1]) for row in table.rows] == ["1,530", "5"]
    assert numbers.show(time(1.53)) == "1.53 s"
    chips = Table("Longest T", ("way", "v5e", "h100"), (("a", *(replace(time(9e4), unit="tokens"),) * 2),))
    assert numbers.columns(chips)[:2] == ("Longest T (tokens)", chips.head)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Returns the pairs of texts whose drawn boxes overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden: set[Text] = set()  # labels of ticks beyond the limits exist and are not drawn
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = axis.get_major_ticks()
            shown = {t.label1 for t in ticks if min(low, high) <= t.get_loc() <= max(low, high)}
            hidden |= {x for t in (*axis.majorTicks, *axis.minorTicks) for x in (t.label1, t.label2)} - shown
    drawn = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in drawn]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)]


def test_no_two_texts_of_a_figure_overlap(page: Any, texts: dict[str, list[tuple[str, str]]]) -> None:
    assert len(texts) >= 5
    assert not any(texts.values()), texts


def test_overlapping_texts_are_found() -> None:
    figure = plt.figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "two")
    assert overlaps(figure) == [("one", "two")]
    plt.close(figure)


def test_what_was_cut_short_is_in_no_figure_and_no_sentence(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    for line in lines:
        if line.get("way") == "gateddeltanet" and line["quantity"] == "accuracy":
            line["note"] = "stopped by its budget at step 5 of 9"
        if line.get("way") == "dense" and line["quantity"] == "seconds_forward_backward":
            line["note"] = "ran at two speeds, 1 s and 2 s"
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = report.load(folder)
    recall = figures.recall(study.store, study.titles)
    assert "exact, blockwise" in recall
    assert "GatedDeltaNet" not in recall
    said = " ".join(report.document(study)["sentences"])
    assert "GatedDeltaNet" not in said
    assert "Slowest" in said
    assert "Slowest layer at T = 4,096: exact, dense" not in said
    marked = study.store.select("recall", "accuracy", "gateddeltanet")
    assert all("cut short" in numbers.number_html(n, study) for n in marked)  # as in the tables


def number(value: float, low: float | None, high: float | None, note: str = "", way: str = "exact") -> Number:
    return Number("recall", "accuracy", way, value, "", "measured", {}, low, high, note=note)


def test_separate() -> None:
    a = number(0.5, 0.4, 0.6)
    assert report.separate(a, number(0.7, 0.61, 0.8))
    assert report.separate(number(0.7, 0.61, 0.8), a)
    assert not report.separate(a, number(0.7, 0.6, 0.8))  # they touch
    assert not report.separate(a, number(0.9, None, None))
    assert not report.separate(a, number(0.9, -math.inf, math.inf))


def test_training_that_was_cut_short_is_not_ranked() -> None:
    whole, cut = number(0.9, 0.85, 0.95), number(0.2, 0.1, 0.3, "stopped by its budget at step 5 of 9", "window_16")
    assert not report.separate(whole, cut)
    assert report.separate(whole, replace(cut, note=""))


def test_recorded_studies_stand_beside(tmp_path: Path) -> None:
    make(tmp_path / "experiments" / "full")
    study = report.load(make(tmp_path / "a", shift=0.001), recorded=str(tmp_path / "experiments"))
    text = report.page(study)
    assert "recorded, Some CPU, 2 cores" in text
    assert '<abbr class="b recorded"' in text
    assert '<abbr class="b measured"' in text


def test_recorded_parts_of_another_plan_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "old" / "full", plan={"cost": {"repeats": 3}, "recall": {"steps": 5}})
    study = report.load(
        make(tmp_path / "a", plan={"cost": {"repeats": 6}, "recall": {"steps": 5}}), str(tmp_path / "old")
    )
    (old,) = study.recorded
    assert {n.part for n in old.store.numbers.values()} == {"recall", "memory", "context"}
    assert "left out of the recorded study" in (said := capsys.readouterr().err)
    assert "full: cost, measured by another plan" in " ".join(said.split())


@pytest.mark.slow
def test_compare_page(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", shift=0.1)
    path = compare(str(a), str(b), dir=str(tmp_path))
    page = Page(path.read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    values = {}
    for key, value in page.numbers:
        values.setdefault(key, set()).add(value)
    key = "cost/seconds_forward_backward/exact/T=4096"
    expected = {report.load(f).store.numbers[key].value for f in (a, b)}
    assert expected <= values[key]
    assert "apart" in path.read_text()


def test_not_a_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no study"):
        report.load(tmp_path)
