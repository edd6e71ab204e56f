from __future__ import annotations

import dataclasses
import itertools
import json
import lzma
import os
import sysconfig
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from longattn import config
from longattn.parallel import SequenceLayout, make_mesh
from longattn.tasks.bytelm import BOS
from longattn.train import data


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty files, nested, of any bytes (also invalid UTF-8), two of them empty."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / f"d{i % 3}" / f"f{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            b"" if i in (3, 17) else rng.integers(0, 256, int(rng.integers(1, 400))).astype(np.uint8).tobytes()
        )
    return tmp_path


def bytelm(corpus: Path, **changes) -> config.ByteLM:
    return config.ByteLM(**{"glob": f"{corpus}/**/*.txt", "T": 64, "B": 4, "valid": 0.3, **changes})


def configs(corpus: Path) -> list[config.Data]:
    return [bytelm(corpus), config.MQAR(T=32, B=4, pairs=4), config.Needle(glob=f"{corpus}/**/*.txt", T=200, B=4)]


def assert_equal(a: data.Batch, b: data.Batch) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("task", range(3))
def test_rows_of_any_process_are_slices_of_the_batch(corpus: Path, task: int, split: data.Split) -> None:
    cfg = configs(corpus)[task]
    whole = data.source(cfg, seed=1, split=split)
    again = data.source(cfg, seed=1, split=split)  # as another process builds it
    for step in (0, 1, whole.num_batches - 1, whole.num_batches, 3 * whole.num_batches + 1):
        batch = whole.batch(step)
        for x, dtype in zip(batch, (np.int32, np.int32, np.int32, np.float32), strict=True):
            assert x.shape == (cfg.B, cfg.T)
            assert x.dtype == dtype
        for rows in (slice(0, 2), slice(2, 4), slice(1, 2), slice(None)):
            assert_equal(again.batch(step, rows), data.Batch(*(x[rows] for x in batch)))


@pytest.mark.parametrize("task", range(3))
def test_loader_reads_the_same_from_any_step(corpus: Path, task: int) -> None:
    source = data.source(configs(corpus)[task], seed=0, split="train")
    whole = list(itertools.islice(data.loader(source), 9))
    assert [step for step, _ in whole] == list(range(9))
    for step, batch in whole:
        assert_equal(batch, source.batch(step))
    for (a, x), (b, y) in zip(whole[5:], data.loader(source, 5), strict=False):
        assert a == b
        assert_equal(x, y)
    step, batch = next(data.loader(source, 3, slice(1, 3)))
    assert_equal(batch, source.batch(step, slice(1, 3)))


def test_loader_hands_on_errors() -> None:
    class Broken:
        num_batches, info, lengths = 1, {}, {4: 1.0}

        def batch(self, step: int, rows: slice | None = None) -> data.Batch:
            raise ValueError("this step must be readable")

    with pytest.raises(ValueError, match="must be readable"):
        next(data.loader(Broken()))


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("B", [1, 4, 7])
def test_an_epoch_predicts_every_byte_once(corpus: Path, split: data.Split, B: int) -> None:
    source = data.source(bytelm(corpus, B=B), seed=0, split=split)
    for epoch in range(2):
        batches = [source.batch(epoch * source.num_batches + i) for i in range(source.num_batches)]
        counts = np.zeros(257, int)
        for b in batches:
            counts += np.bincount(b.tokens[b.weights > 0], minlength=257)
            assert not b.weights[b.segment_ids == 0].any()
        expected = np.zeros(257, int)
        for d in source.documents:
            expected += np.bincount(np.frombuffer(source.corpus.read(d), np.uint8), minlength=257)
        np.testing.assert_array_equal(counts, expected)
        assert counts[BOS] == 0
        assert counts.sum() == source.info["bytes"] == sum(d.size for d in source.documents)


def test_lengths_are_those_of_the_documents_in_the_rows(corpus: Path) -> None:
    for cfg in configs(corpus):
        source = data.source(cfg, seed=0, split="valid")
        batches = [source.batch(i) for i in range(source.num_batches)]
        tokens = sum(np.count_nonzero(b.segment_ids) for b in batches)
        rows = sum((b.segment_ids != 0).any(1).sum() for b in batches)
        starts = sum(np.count_nonzero((b.positions == 0) & (b.segment_ids != 0)) for b in batches)
        assert sum(n * count for n, count in source.lengths.items()) == pytest.approx(tokens / rows)
        assert sum(source.lengths.values()) == pytest.approx(starts / rows)


def test_order_changes_with_seed_and_epoch_and_not_for_the_held_out_set(corpus: Path) -> None:
    cfg = bytelm(corpus)
    first = [data.source(cfg, seed=seed, split="train").batch(0).tokens for seed in (0, 1)]
    assert (first[0] != first[1]).any()
    train = data.source(cfg, seed=0, split="train")
    assert (train.batch(0).tokens != train.batch(train.num_batches).tokens).any()
    valid = [data.source(cfg, seed=seed, split="valid") for seed in (0, 1)]
    assert_equal(valid[0].batch(0), valid[1].batch(0))
    assert_equal(valid[0].batch(0), valid[0].batch(valid[0].num_batches))


def test_balanced_groups_have_the_same_rows_as_without(corpus: Path) -> None:
    """A step keeps its rows, the last one its empty ones too, and slices of it are those of the whole."""
    plain = data.source(bytelm(corpus, B=8), seed=0, split="train", groups=4)
    source = data.source(bytelm(corpus, B=8, balance=True), seed=0, split="train", groups=4)
    changed = False
    for step in (0, 1, source.num_batches - 1, source.num_batches):
        a, b = plain.batch(step), source.batch(step)
        rows = lambda batch: sorted(map(bytes, batch.tokens))
        assert rows(a) == rows(b)
        changed |= (a.tokens != b.tokens).any()
        work = ((b.positions + 1) * (b.segment_ids > 0)).sum(1)
        shares = [w.reshape(4, 2).sum(1) for w in (work, ((a.positions + 1) * (a.segment_ids > 0)).sum(1))]
        assert shares[0].max() <= shares[1].max()
        np.testing.assert_array_equal(work, np.where(source.order(step) < 0, 0, source.work[source.order(step)]))
        for at in range(4):
            rows_of_one = slice(2 * at, 2 * at + 2)
            assert_equal(source.batch(step, rows_of_one), data.Batch(*(x[rows_of_one] for x in b)))
    assert changed
    with pytest.raises(ValueError, match="groups=3 must divide"):
        data.source(bytelm(corpus, B=8, balance=True), seed=0, split="train", groups=3)


def test_generated_training_rows_never_repeat_and_held_out_rows_do(corpus: Path) -> None:
    for cfg in configs(corpus)[1:]:
        train, valid = (data.source(cfg, seed=0, split=s) for s in ("train", "valid"))
        assert (train.batch(0).tokens != train.batch(train.num_batches).tokens).any()
        assert_equal(valid.batch(0), valid.batch(valid.num_batches))
        assert valid.num_batches * cfg.B >= data.VALID_ROWS


def test_splits_share_no_document_and_do_not_move(corpus: Path) -> None:
    cfg = bytelm(corpus)
    names = {s: {d.name for d in data.source(cfg, seed=0, split=s).documents} for s in ("train", "valid")}
    assert not names["train"] & names["valid"]
    assert len(names["train"] | names["valid"]) == 38
    for path in corpus.glob("d1/*"):
        path.unlink()
    for split, before in names.items():
        now = {d.name for d in data.source(cfg, seed=5, split=split).documents}
        assert now == {n for n in before if not n.startswith("d1/")}


def test_info_and_hash(corpus: Path) -> None:
    train, valid = (data.source(bytelm(corpus), seed=0, split=s) for s in ("train", "valid"))
    assert json.loads(json.dumps(train.info)) == train.info
    assert train.info["empty_files_skipped"] == 2
    assert train.info["corpus_documents"] == 38
    assert train.info["corpus_sha256"] == valid.info["corpus_sha256"]
    assert train.info["bytes"] + valid.info["bytes"] == train.info["corpus_bytes"]
    path = corpus / "d0" / "f00.txt"
    before, text = train.info["corpus_sha256"], path.read_bytes()
    path.write_bytes(text[::-1] + b"!")
    assert data.source(bytelm(corpus), seed=0, split="train").info["corpus_sha256"] != before
    path.write_bytes(text)
    assert data.source(bytelm(corpus), seed=0, split="train").info["corpus_sha256"] == before
    path.rename(corpus / "d0" / "g00.txt")
    assert data.source(bytelm(corpus), seed=0, split="train").info["corpus_sha256"] != before


def test_names_do_not_depend_on_where_the_corpus_lies(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = data.read_corpus(f"{corpus}/**/*.txt")
    monkeypatch.chdir(corpus)
    relative = data.read_corpus("**/*.txt")
    assert absolute.hash == relative.hash
    assert absolute.documents == relative.documents
    assert absolute.documents[0].name == "d0/f00.txt"
    assert data.read_corpus("d0/f00.txt").documents[0].name == "f00.txt"


def test_max_bytes(corpus: Path) -> None:
    whole = data.read_corpus(f"{corpus}/**/*.txt")
    some = data.read_corpus(f"{corpus}/**/*.txt", 1000)
    assert sum(d.size for d in some.documents) == 1000
    for a, b in zip(some.documents, whole.documents, strict=False):
        assert a.name == b.name
        assert whole.read(b).startswith(some.read(a))


def test_standard_library_is_the_default_corpus() -> None:
    """Reads only its beginning."""
    corpus = data.read_corpus("", 50_000)
    first = corpus.documents[0]
    assert corpus.read(first) == (Path(sysconfig.get_path("stdlib")) / first.name).read_bytes()[: first.size]
    assert not any("site-packages" in d.name or "__pycache__" in d.name for d in corpus.documents)
    assert len(lzma.compress(corpus.read(first))) < first.size


@pytest.mark.parametrize("pattern", ["*.none", "empty*", "folder", "folder/*"])
def test_a_glob_with_no_bytes(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty1").touch()
    (tmp_path / "empty2").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="must match files with bytes"):
        data.source(config.ByteLM(glob=str(tmp_path / pattern)), seed=0, split="train")


def test_unreadable_files_are_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = corpus / "d0" / "gone.txt"
    bad.symlink_to(corpus / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.txt.*narrow the glob"):
        data.read_corpus(f"{corpus}/**/*.txt")
    bad.unlink()
    os.mkfifo(bad)  # would block for ever
    with pytest.raises(ValueError, match="not a regular file"):
        data.read_corpus(f"{corpus}/**/*.txt")
    bad.unlink()
    bad.write_bytes(b"secret")

    def denied(path: str, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", denied)  # permissions do not stop the super-user
    with pytest.raises(ValueError, match=r"f00\.txt.*Permission denied"):
        data.read_corpus(f"{corpus}/**/*.txt")


def test_a_split_without_documents(corpus: Path) -> None:
    with pytest.raises(ValueError, match="raise it or give more files"):
        data.source(bytelm(corpus, valid=0.0), seed=0, split="valid")
    with pytest.raises(ValueError, match="lower it or give more files"):
        data.source(bytelm(corpus, valid=1.0), seed=0, split="train")


def test_what_cannot_fit_is_refused_before_it_is_made(corpus: Path) -> None:
    with pytest.raises(ValueError, match="lower T or B"):
        data.source(bytelm(corpus, T=10**9), seed=0, split="train")
    with pytest.raises(ValueError, match="must be at least"):
        data.source(config.Needle(glob=f"{corpus}/**/*.txt", T=50), seed=0, split="train")
    with pytest.raises(ValueError, match="seed"):
        data.source(bytelm(corpus), seed=-1, split="train")


def test_rows_longer_than_the_corpus(corpus: Path) -> None:
    cfg = dataclasses.replace(bytelm(corpus), T=100_000)
    source = data.source(cfg, seed=0, split="train")
    assert source.num_batches == 1
    batch = source.batch(0)
    assert batch.weights.sum() == source.info["bytes"]
    assert batch.segment_ids.max() == source.info["documents"]
    assert not batch.segment_ids[1:].any()


@pytest.mark.parametrize("task", range(3))
def test_batches_on_a_mesh_are_the_source_s_and_each_row_is_read_once(
    corpus: Path, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configs(corpus)[task]
    source = data.source(cfg, seed=1, split="train")
    mesh = make_mesh(data=2, seq=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), "seq"))
    spread = data.Spread(source, (cfg.B, cfg.T), sharding)
    read, batch = [], type(source).batch

    def noting(self, step, rows=None):
        read.append(rows)
        return batch(self, step, rows)

    monkeypatch.setattr(type(source), "batch", noting)
    got = spread.batch(3)
    assert sorted((rows.start, rows.stop) for rows in read) == [(0, 2), (2, 4)]
    assert all(x.sharding == sharding for x in got)
    assert_equal(data.Batch(*map(np.asarray, got)), batch(source, 3))
    assert (spread.num_batches, spread.info) == (source.num_batches, source.info)


@pytest.mark.parametrize("name", ["zigzag", "striped"])
def test_devices_have_slices_of_rows_in_the_layout_s_order(corpus: Path, name: Any) -> None:
    source = data.source(bytelm(corpus), seed=1, split="train")
    layout, mesh = SequenceLayout(name), make_mesh(data=2, seq=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data", "seq"))
    got = data.Spread(source, (source.cfg.B, source.cfg.T), sharding, layout, 4).batch(0)
    whole = source.batch(0)
    assert_equal(data.Batch(*(layout.restore(np.asarray(x), 4) for x in got)), whole)
    first = got.tokens.addressable_shards[0]  # of the first device: rows that begin at 0, and its own tokens
    mine = layout.local_positions(0, source.cfg.T, 4)
    np.testing.assert_array_equal(first.data, whole.tokens[: first.data.shape[0], mine])
