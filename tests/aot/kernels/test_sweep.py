"""The sweep of block sizes, on rows that no compiler gave, and the table that it writes."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from longattn.aot.kernels import sweep
from longattn.cost import hardware
from longattn.ops.attention.pallas_tpu import Blocks, Tuning, tuned, tuning

KEYS = [
    f"{chip} {which} {kind} D{D} {length}"
    for chip, D, length, which, kind in itertools.product(
        ("v5e", "v5p", "v6e", "tpu7x"),
        (64, 128, 256),
        ("8k", "32k"),
        tuning.PASSES,
        ("full", "cut", "narrow", "numbers"),
    )
]


def test_the_table_has_every_class():
    assert list(tuned.TUNED) == KEYS
    assert set(tuned.SWEPT) <= set(KEYS)


@pytest.mark.parametrize("text", KEYS)
def test_entries_fit_their_chip(text):
    key, chosen = sweep.Key.parse(text), tuned.TUNED[text]
    assert str(key) == text
    Tuning(**{key.which: Blocks(*chosen)})  # it checks the rule of the kernel
    assert sweep.memory(key, chosen) <= hardware.TENSOR_CORES[key.chip].vmem_bytes * 7 // 8


@pytest.mark.parametrize("text", KEYS)
def test_shapes_are_of_the_class_that_they_stand_for(text):
    key = sweep.Key.parse(text)
    shape = key.shape
    assert tuning._kind(shape.mask, ("segments",) * bool(shape.documents), shape.T, shape.T) == key.kind
    assert tuning._key(key.chip, key.which, key.kind, shape.D, shape.T) == text
    tried = key.candidates()
    assert tried and len(set(tried)) == len(tried)
    assert all(sweep.memory(key, sweep.sizes(s)) <= hardware.TENSOR_CORES[key.chip].vmem_bytes * 7 // 8 for s in tried)


def test_candidates_that_need_more_fast_memory_are_left_out(monkeypatch):
    key = sweep.Key.parse("v5e forward cut D128 8k")
    needs = {sweep.memory(key, sweep.sizes(s)) for s in key.candidates()}
    core = hardware.TENSOR_CORES["v5e"]
    small = hardware.TensorCore(core.mxu_flops, min(needs) * 8 // 7 + 8, core.hbm_usable, 1, core.topology)
    monkeypatch.setitem(hardware.TENSOR_CORES, "v5e", small)
    assert {sweep.memory(key, sweep.sizes(s)) for s in key.candidates()} == {min(needs)}


@pytest.mark.parametrize("text", ["v4 forward cut D128 8k", "v5e sideways cut D128 8k", "v5e forward cut D128 9k"])
def test_what_is_no_key_is_refused(text):
    with pytest.raises(ValueError, match="is no key of the table"):
        sweep.Key.parse(text)


def row(shape, cycles, bundles=100):
    kernels = [{"regions": [{"bundles": bundles - 40}, {"bundles": 40}]}]
    return {**shape.as_json(), "compare_cycles": cycles, "kernels": kernels}


def test_the_fewest_cycles_win_among_programs_that_are_not_too_long():
    first, second, third, fourth = sweep.Key.parse("v5e forward cut D128 8k").candidates()[:4]
    refused = {**fourth.as_json(), "reason": "no memory"}
    rows = [row(first, 30.4), row(second, 10, bundles=70_001), row(third, 20.6, bundles=70_000), refused]
    assert sweep.best(rows) == sweep.Found(sweep.sizes(third), 21, 2)
    assert sweep.best([rows[1], refused]) is None


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """A sweep of two keys, whose profile counts its calls; the last candidate is the fastest."""
    called = []

    def profile(case, chip, shape, timeout):
        called.append((case, chip, shape))
        assert timeout == 5
        if shape.D == 64:
            return {**shape.as_json(), "reason": "refused"}
        return row(shape, 1e6 - len(called))

    monkeypatch.setattr(sweep, "profile", profile)
    monkeypatch.setattr(sweep, "ThreadPoolExecutor", lambda n: InOrder())
    monkeypatch.setattr(sweep.compilers, "libtpu_version", lambda: "0")
    return called, tmp_path / "tuned.py"


class InOrder:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        answer = function(*args)
        return type("Future", (), {"result": lambda self: answer})()

    def shutdown(self, cancel_futures):
        pass


def test_a_sweep_writes_what_it_found_and_keeps_the_rest(faked, capsys):
    called, path = faked
    table = dict.fromkeys(("v5e backward cut D128 8k", "v5e backward cut D128 32k"), (512, 512, 256, 256))
    table |= {"v5e backward full D64 8k": (512, 1024, 256, 256), "v5e backward full D128 8k": (512, 512, 128, 128)}
    found = sweep.sweep("cut D128 8k|D64", 2, path, dict(table), {"v5e backward full D128 8k": (9, 9)}, 5)
    key = sweep.Key.parse("v5e backward cut D128 8k")
    assert called[:2] == [("longattn_backward", "v5e", shape) for shape in key.candidates()[:2]]
    chosen = sweep.sizes(key.candidates()[1])
    assert found == [(str(key), sweep.Found(chosen, 999_998, 2))]
    assert "none of 2 sizes gave a number" in capsys.readouterr().err
    written = {}
    exec(path.read_text(), written)
    # Another length has the same sizes; what no compiler took keeps its own; cycles of other compilers are dropped.
    assert written["TUNED"] == {**table, str(key): chosen, str(key.other_length): chosen}
    assert written["SWEPT"] == {str(key): (999_998, 2)}
    assert written["COMPILERS"].endswith("libtpu 0")


def test_what_was_swept_at_both_lengths_keeps_its_own():
    table = {"v6e forward cut D64 8k": (1, 2, 3, 4), "v6e forward cut D64 32k": (5, 6, 7, 8)}
    assert sweep.filled(table, dict.fromkeys(table, (1, 1))) == table
    assert sweep.filled(table, {"v6e forward cut D64 32k": (1, 1)})["v6e forward cut D64 8k"] == (5, 6, 7, 8)


@pytest.mark.parametrize("swept", [tuned.SWEPT, {}])
def test_the_module_is_written_as_ruff_formats_it(tmp_path, swept):
    path = tmp_path / "tuned.py"
    sweep.write(path, tuned.TUNED, swept, tuned.COMPILERS)
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "--check", str(path)]
    subprocess.run(command, check=True)
    if swept:
        assert path.read_text() == Path(tuned.__file__).read_text()
