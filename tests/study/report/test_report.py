"""The page has the JSONL's numbers, ranks only what separates, and fetches nothing."""

from __future__ import annotations

import html.parser
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from longattn.study import compare, report
from longattn.study.store import FILE, Number, Store

ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": "longattn study --preset smoke --name a",
    "versions": {"jax": "0.12.0", "longattn": "0.1"},
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "host": {"cpu": "Some CPU", "cores": 2},
    "commit": "0123456789abcdef",
}
WAYS = {"exact": 0.98, "window_16": 0.3, "window_64": 0.7}


def make(folder: Path, *, width: float = 0.02, shift: float = 0.0) -> Path:
    """A study as the parts would write it, every interval `width` to both sides (as a share of the value)."""
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"preset": "smoke", "plan": {}}))
    store = Store(folder / FILE)
    here = store.environment(ENVIRONMENT)
    numbers: list[Number] = []

    def add(part, quantity, way, value, unit, badge="measured", spread=True, **at):
        low, high = (value * (1 - width), value * (1 + width)) if spread else (None, None)
        numbers.append(Number(part, quantity, way, value, unit, badge, at, low, high, seeds=(0, 1), environment=here))

    for i, T in enumerate((1024, 2048, 4096)):
        for way, time, scratch in (("exact", 4.0, 2.0), ("window_256", 2.0, 2.0), ("dense", 4.0, 4.0)):
            seconds = {"exact": 0.004, "window_256": 0.003, "dense": 0.009}[way] * time**i + shift
            add("cost", "seconds_forward", way, seconds / 3, "s", T=T)
            add("cost", "seconds_forward_backward", way, seconds, "s", T=T)
            add("cost", "scratch_forward_backward", way, 2.0**20 * scratch**i, "B", "compiled", False, T=T)
            add("cost", "flops_forward", way, 1e9 * time**i, "FLOP", "predicted", False, T=T)
            add("cost", "tokens_per_second", way, 4096 / seconds, "tokens/s", T=T, tokens=4096)
    for way in ("exact", "window_256", "dense"):
        for name in ("time", "time_training", "memory"):
            add("cost", f"exponent_{name}", way, 1.9, "")
            add("cost", f"theory_{name}", way, 2, "", "predicted", False)
    for way in ("exact", "window_4096"):
        for T in (1024, 65536):
            add("cost", "attention_share", way, 0.02 + 0.6 * (T > 2000), "share", "predicted", False, T=T)
    for chip, size in (("v5e", 16 * 2**30), ("h100", 80e9)):
        add("memory", "chip_bytes", "", size, "B", "predicted", False, chip=chip)
        for way in ("exact", "window_1024", "dense"):
            for remat in ("attention", "none"):
                add("memory", "longest_T", way, 65536, "tokens", "predicted", False, remat=remat, chip=chip)
                add("memory", "largest_batch", way, 7, "sequences", "predicted", False, remat=remat, chip=chip, T=8192)
    for way in ("exact", "window_1024", "dense"):
        for remat in ("attention", "none"):
            for T in (2048, 4096, 8192, 16384):
                add("memory", "step_bytes", way, 1e6 * T, "B", "compiled", False, remat=remat, T=T)
                add("memory", "chip_step_bytes", way, 1e6 * T, "B", "predicted", False, remat=remat, T=T, chip="v5e")
            for part in ("parameters", "optimiser", "gradients", "attention", "activations"):
                add("memory", f"held_{part}", way, 3e8, "B", "compiled", False, remat=remat, T=16384)
    for task, at in (("mqar", {"T": 128, "pairs": 8}), ("needle", {"T": 192, "digits": 4})):
        for i, (way, value) in enumerate(WAYS.items()):
            add("recall", "accuracy", way, value, "", task=task, **at)
            add("recall", "state_elements", way, 128 * (16, 2, 8)[i], "elements", "predicted", False, task=task, **at)
            add("recall", "bytes_read", way, 256 * (16, 2, 8)[i], "B", "predicted", False, task=task, **at)
            add("recall", "chance", way, 0.03, "", "predicted", False, task=task, **at)
    for way in ("exact", "window_64"):
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
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study's folder, and its page."""
    folder = make(tmp_path_factory.mktemp("study") / "a")
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
    assert "<script" not in text
    assert shown.badges >= len(shown.numbers)
    assert "cost/T=8192" in text  # what the budget left out is named


def test_document_and_summary(study: report.Study, tmp_path: Path) -> None:
    document = json.loads(json.dumps(report.document(study)))
    assert document["numbers"][0]["key"] in study.store.numbers
    assert len(document["sentences"]) <= 5
    out = io.StringIO()
    report.summary(study, Console(file=out, width=160), tmp_path / "index.html")
    assert "exact, blockwise" in out.getvalue()
    for sentence in document["sentences"]:
        assert sentence in out.getvalue().replace("\n", " ") or sentence in out.getvalue()


def _text(study: report.Study) -> str:
    return " ".join(report.document(study)["sentences"])


def test_ranks_only_what_separates(tmp_path: Path) -> None:
    narrow = report.load(make(tmp_path / "narrow", width=0.02))
    wide = report.load(make(tmp_path / "wide", width=0.9))
    assert "window 16 recalls less than window 64" in _text(narrow)
    assert "window 256 is faster than exact, blockwise" in _text(narrow)
    assert report.UNRESOLVED in _text(wide)
    for word in ("recalls less than", "is faster than"):
        assert word not in _text(wide)


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
    assert report.UNRESOLVED in report.ranking([whole, cut], "recalls less than")


def test_recorded_studies_stand_beside(tmp_path: Path) -> None:
    make(tmp_path / "experiments" / "full")
    study = report.load(make(tmp_path / "a", shift=0.001), recorded=str(tmp_path / "experiments"))
    text = report.page(study)
    assert "recorded, Some CPU, 2 cores" in text
    assert '<abbr class="b recorded"' in text
    assert '<abbr class="b measured"' in text


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
