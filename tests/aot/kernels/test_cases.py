"""The cases' declarations: geometry by brute force, and branches counted in interpret mode."""

import importlib.util
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from longattn.aot.kernels import rates
from longattn.aot.kernels.cases import CASES, Branch, Kernel, Shape
from longattn.aot.kernels.cases.kernel import walk
from longattn.mask import Causal, Full, Window
from longattn.ops.attention.pallas_tpu import back_end, forward
from tests.aot.kernels.peers import peer


@pytest.mark.parametrize("mask", [Causal(), Full(), Window(20), Window(31)], ids=str)
@pytest.mark.parametrize(("bT", "bS"), [(16, 16), (32, 8), (8, 32)])
def test_visible_blocks_are_those_with_a_visible_pair(mask, bT, bS):
    shape = Shape(T=64, H=2, D=8, mask=mask, bT=bT, bS=bS)
    dense = np.asarray(mask.dense(64, 64)).reshape(64 // bT, bT, 64 // bS, bS)
    assert (shape.visible() == dense.any((1, 3))).all()


@pytest.mark.parametrize("documents", [0, 1, 3, 64])
def test_documents_hide_the_blocks_that_share_none(documents):
    shape = Shape(T=64, mask=Full(), bT=8, bS=16, documents=documents)
    ids = shape.segment_ids() if documents else np.zeros(64)
    same = (ids[:, None] == ids[None]).reshape(8, 8, 4, 16)
    assert (shape.share_a_document() == same.any((1, 3))).all()
    assert shape.pairs() == same.sum()
    assert len(shape.lengths) == documents
    assert shape.lengths == Shape(T=64, bT=64, bS=64, documents=documents).lengths  # whatever the blocks


@pytest.mark.parametrize("order", ["hqk", "hkq", "khq"])
def test_a_walk_visits_each_block_that_runs_in_its_order(order):
    run = np.tril(np.ones((3, 3), bool))
    steps = walk(run, 2, order)
    tuples = list(zip(*({"h": steps.head, "q": steps.query, "k": steps.key}[axis].tolist() for axis in order)))
    assert tuples == sorted(tuples) and len(set(tuples)) == len(steps) == 12
    assert steps.changes(steps.head) == (6 if order == "khq" else 2)


# The `pl.when` of the sources, without those never asked, that are the declared branches of each case.
BRANCHES = {
    "jax_flash": (0, 1, 2),
    "jax_splash": (0, 1, 2),
    "tokamax_splash": (0, 1, 2, 3),
    "flywheel": (1, 8, 9, 10, 11, 12),  # the others start and wait for copies
    "jax_flash_backward": (6, 7, 9, 3, 4, 5),  # dk and dv come first; the forward pass before
    "jax_splash_backward": (3, 4, 5),
    "jax_splash_backward_unfused": (6, 7, 8, 3, 4, 5),
    "tokamax_splash_backward": (4, 5, 6, 7),
}
SMALL = Shape(T=1024, H=2, D=128, bT=256, bS=256, bC=128, bR=128)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        peer("tokamax_splash", {"documents": 3}),
        peer("flywheel", {}),
        peer("jax_splash", {}),
        # Every other case once, and each change with one of the cases that can have it.
        peer("jax_flash", {}, slow=True),
        peer("tokamax_splash_backward", {}, slow=True),
        peer("flywheel", {"K": 1}, slow=True),
        *(peer(case, {"documents": 3}, slow=True) for case in ("jax_splash", "jax_flash_backward")),
        peer("jax_splash_backward_unfused", {"mask": Window(300), "K": 1}, slow=True),
        peer("jax_splash_backward", {"bT": 128, "bC": None}, slow=True),
        peer("tokamax_splash", {"mask": Window(500), "bT": 128, "bR": None}, slow=True),
    ],
)
def test_what_is_declared_is_what_a_kernel_does_when_it_runs(case, change):
    shape = replace(SMALL, **change)
    with jax.numpy_rank_promotion("allow"):  # the peers' code is their own
        counts = [count for count in rates.count(case, shape) if count.asked]
    declared = [branch for kernel in CASES[case].kernels(shape) for branch in kernel.branches]
    counted = [counts[i] for i in BRANCHES[case]]
    assert [b.runs for b in declared] == [count.asked if b.data else count.runs for b, count in zip(declared, counted)]
    for branch, count in zip(declared, counted):
        assert not branch.data or (count.name == branch.data and count.runs == 0)  # of N(0, 1): the recorded rate


@pytest.mark.parametrize(
    "change", [{"mask": Window(300)}, {"mask": Window(200, 100)}, {"bT": 512}, {"bS": 512}], ids=str
)
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("flywheel_tpu") is None, reason="flywheel_tpu is not there: .[peers]")
def test_flywheel_has_a_copy_of_its_body_per_distance_from_the_diagonal(change):
    shape = replace(SMALL, **change)
    (kernel,) = CASES["flywheel"].kernels(shape)
    counts = [c for c in rates.count("flywheel", shape) if c.name in ("_run_block", "_run_window_block")]
    assert [b.runs for b in kernel.branches if b.what.startswith(("whole", "block"))] == [c.runs for c in counts]
    assert kernel.steps == counts[0].asked


OWN = Shape(T=1024, H=2, K=1, bT=512, bS=256, bC=128, bR=128)
CHANGES = [{}, {"mask": Full()}, {"mask": Window(300)}, {"mask": Window(300), "documents": 3}]


@pytest.mark.parametrize("case", ["longattn", "longattn_backward"])
@pytest.mark.parametrize("change", [*CHANGES[:3], {"mask": Full(), "documents": 3}], ids=str)
def test_lists_lead_to_the_blocks_that_hold_a_visible_pair(case, change):
    shape = replace(OWN, **change)
    ids = shape.segment_ids() if shape.documents else np.zeros(shape.T)
    seen = np.asarray(shape.mask.dense(shape.T, shape.T)) & (ids[:, None] == ids[None])
    seen = seen.reshape(shape.blocks[0], shape.bT, shape.blocks[1], shape.bS)
    whole, some = seen.all((1, 3)), seen.any((1, 3))
    (kernel,) = CASES[case].kernels(shape)
    always = [branch for branch in kernel.branches if branch.data in ("", "of_bounded")]
    count = lambda kind: sum(b.runs for b in always if b.what.startswith(kind))
    assert count("whole block") + count("first whole block") == 2 * whole.sum()
    if shape.documents:
        tiles = seen.reshape(shape.blocks[0], 4, 128, shape.blocks[1], 2, 128).transpose(0, 3, 1, 4, 2, 5)
        tiles = tiles[some & ~whole].reshape(-1, 128 * 128)
        for kind, n in ("cut", (tiles.any(1) & ~tiles.all(1)).sum()), ("whole", tiles.all(1).sum()):
            bodies = [b for b in always if f" {kind} tiles" in b.what]
            assert sum(int(b.what[0]) * b.runs for b in bodies) == 2 * n
            assert {b.loop for b in bodies} == {2 * (some & ~whole).sum()}
    else:
        assert count("cut block") == 2 * (some & ~whole).sum()
    visits, row, stats = some.sum(), 128 * 2, 4
    number = 4 * bool(shape.documents)
    if case == "longattn":
        words = kernel.hbm_bytes - 2 * visits * 256 * (2 * row + number) - 2 * 1024 * (2 * row + stats + number)
        assert words % (2 * 2 * 4) == 0 and 0 < words <= 2 * 2 * 4 * 40  # two heads' two short lists
    else:
        later = visits - some.any(1).sum()  # dq is there to be read
        of_visits = visits * 512 * (2 * row + 2 * stats + number + 128 * 4) + later * 512 * 128 * 4
        words = kernel.hbm_bytes - 2 * of_visits - 1024 * (4 * row + number)
        assert words % (4 * 4) == 0 and 0 < words <= 4 * 4 * 40
        assert kernel.after_bytes == 2 * 1024 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (CHANGES[0], "bounded"),
        (CHANGES[0], "unbounded"),
        (CHANGES[3], "computed again"),  # unbounded before: that is counted too
    ],
    ids=str,
)
def test_the_bodies_of_our_forward_kernel_run_as_declared(change, rows, monkeypatch):
    shape = replace(OWN, **change)
    if rows != "bounded":
        monkeypatch.setattr(back_end, "BOUND", -1.0)
    if rows == "computed again":
        monkeypatch.setattr(forward, "SAFE", -1.0)
    jax.clear_caches()  # these are constants of what is traced
    counts = rates.count("longattn", shape)
    jax.clear_caches()
    (kernel,) = CASES["longattn"].kernels(shape)
    asked = {c.name: (c.asked, c.runs) for c in counts if c.name.startswith("of_")}
    steps, unbounded = kernel.steps, kernel.steps * (rows != "bounded")
    again = kernel.steps * (rows == "computed again")
    runs = {"of_bounded": steps - unbounded, "of_unbounded": unbounded, "of_others": again}
    assert asked == {name: (steps, n) for name, n in runs.items()}
    # Each block's body sends for the block after it, if there is one.
    blocks: dict[str, list[float]] = {"of_bounded": [], "of_unbounded": [], "of_others": []}
    for branch in kernel.branches:
        if "tiles" in branch.what:
            blocks[branch.data] = [branch.loop]  # one loop, whichever tiles a block has
        elif "block" in branch.what and branch.runs:
            blocks[branch.data].append(branch.runs)
    expected = blocks["of_bounded"] if rows == "bounded" else blocks["of_unbounded"] + (again > 0) * blocks["of_others"]
    assert [c.asked for c in counts if c.name == "_next" and c.asked] == expected
    if rows == "bounded" and not shape.documents:
        sent = [b.asides[0][0] for b in kernel.branches if b.data == "of_bounded" and b.runs]
        assert [c.runs for c in counts if c.name == "_fetch" and c.asked] == sent


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES[1:3], ids=str)
def test_the_bodies_of_our_backward_kernel_run_as_declared(change):
    shape = replace(OWN, **change)
    (kernel,) = CASES["longattn_backward"].kernels(shape)
    counts = rates.count("longattn_backward", shape)
    first = [c for c in counts if c.name == "_zero" and c.asked]
    asides = [b.asides[0] for b in kernel.branches if b.runs]
    for i, name in ((0, "_fetch"), (3, "_zero"), (4, "_arrive")):
        found = [c.runs for c in counts if c.name == name and c.asked]
        assert found[-len(asides) :] == [runs[i] for runs in asides]  # the forward kernel fetches before
    assert sum(c.runs for c in counts if c.name == "_read") == sum(runs[5] for runs in asides)
    assert sum(runs[2] + runs[5] for runs in asides) == sum(runs[4] for runs in asides)  # each sum is sent for once
    assert all(b.asides[1] == b.asides[0][:2] + b.asides[0][3:4] for b in kernel.branches)
    assert [c.asked for c in first] == [b.runs for b in kernel.branches if b.runs]
    assert sum(c.runs for c in first) == 2 * shape.blocks[0]  # dq of each block is begun once


def test_linear_attention_counts_what_the_recurrence_needs():
    """q and k have 2 heads, v and out 4, all padded to 128 numbers; log_decay and beta are float32."""
    shape = Shape(T=2048, H=4, K=2, D=128, V=64, kind="vector_delta", bT=512)
    (forward,), (backward,) = (CASES[f"longattn_linear{which}"].kernels(shape) for which in ("", "_backward"))
    assert forward.steps == backward.steps == 4  # 512 tokens of all heads
    assert [(b.what, b.runs) for b in (*forward.branches, *backward.branches)] == [
        ("chunk", 16), ("states", 16), ("gradients of a chunk", 16)
    ]  # fmt: skip
    given, out, state = 2048 * (8 * 256 + 4 * 512 + 4 * 4), 2048 * 4 * 256, 4 * 128 * 128 * 4
    assert forward.hbm_bytes == given + out + state
    assert backward.hbm_bytes == 2 * given + out + (4 + 2) * state
    assert forward.flops == backward.flops / 2 == 2048 * 4 * 6 * 128 * 64
    (forward,), (backward,) = (
        CASES[f"longattn_linear{which}"].kernels(replace(shape, kind="none")) for which in ("", "_backward")
    )
    assert forward.flops == 2048 * 4 * 4 * 128 * 64
    assert backward.branches[0].runs == 12  # the state after a span's last chunk is not needed
    with pytest.raises(ValueError, match="kind='delta' must be one of none, none_delta, scalar"):
        replace(shape, kind="delta")


def test_rates_are_shares_of_the_times_a_branch_is_asked(monkeypatch):
    counts = [rates.Count("guard", 4, 1), rates.Count("guard", 6, 0), rates.Count("other", 9, 9)]
    guarded = Kernel("k", steps=12, branches=(Branch("guard", 5, data="guard"),), flops=1, hbm_bytes=1)
    monkeypatch.setattr(rates, "count", lambda case, shape: counts)
    monkeypatch.setitem(CASES, "k", replace(CASES["matmul"], kernels=lambda shape: (guarded,)))
    request = {"case": "k", "shape": SMALL.as_json()}
    assert rates.measure_here(request) == {"rates": {"guard": 0.1}}
    counts[:] = counts[2:]
    with pytest.raises(ValueError, match="k never asked for guard in interpret mode"):
        rates.measure_here(request)


def test_moved_bytes_are_counted_by_changes_of_a_block():
    block = 1024 * 128 * 2
    (full,) = CASES["jax_flash"].kernels(Shape(mask=Full()))
    assert full.hbm_bytes == 8 * (8 * 2 + 64 * 2) * block
    (causal,) = CASES["jax_flash"].kernels(Shape())  # rows 0 and 1 both begin with block 0, which stays
    assert causal.hbm_bytes == 8 * (8 * 2 + 35 * 2) * block
    (product,) = CASES["matmul"].kernels(Shape(T=4096, bT=512, bS=4096))
    assert product.hbm_bytes == 2 * 4096 * 4096 * (1 + 8 + 1)
    assert product.flops == 2 * 4096**3
    # Two heads share their keys, but each begins at the first block anew; ids and positions are fetched again too.
    (grouped,) = CASES["jax_splash"].kernels(Shape(mask=Full(), K=4))
    assert grouped.hbm_bytes == full.hbm_bytes
    (one_block,) = CASES["jax_splash"].kernels(Shape(T=1024, mask=Full(), K=4))
    assert one_block.hbm_bytes == (8 * 2 + 4 * 2) * block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 3}, "K=3 must divide H=8"),
        ({"V": 0}, "V=0 must be at least 1"),
        ({"bR": 300}, "bR=300 must divide bT=1024"),
        ({"bS": 1000}, "bS=1000 must divide T=8192"),
        ({"documents": 9000}, "documents=9000 must be at least 0 and at most T=8192"),
    ],
)
def test_shapes_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Shape(**change)


def test_shapes_go_through_json():
    shape = Shape(T=2048, H=4, K=2, V=64, mask=Window(7) & Causal(), documents=3, bT=512, bS=256, bC=128, bR=64)
    shape = replace(shape, kind="vector")
    assert Shape.from_json(json.loads(json.dumps(shape.as_json()))) == shape


def test_blocks_worth_trying_are_legal():
    for name, case in CASES.items():
        for shape in case.blocks(Shape(T=4096, mask=Window(2047), documents=2)):
            assert shape.T % shape.bT == shape.T % shape.bS == 0, name
        assert len(set(case.blocks(Shape()))) == len(case.blocks(Shape())) > 2, name


def test_rows_of_narrow_heads_are_moved_as_they_are_stored():
    """A register has 128 lanes, so a row of 64 or of 96 takes as much as one of 128."""
    (narrow,), (wide,) = (CASES["jax_splash"].kernels(Shape(D=D)) for D in (64, 128))
    assert narrow.hbm_bytes == wide.hbm_bytes and narrow.flops == wide.flops / 2


def test_statistics_of_flash_are_fetched_at_hidden_steps_too():
    """Follows the index maps of jax flash's dk and dv step by step: l and m are not clamped; q, do and di are."""
    shape = Shape(T=4096, H=2)
    J, token, statistic = 4, 128 * 2, 128 * 4
    fetched, before = 0, (None, None)
    for head in range(2):
        for key in range(J):
            for query in range(J):
                now = (head, query if query >= key else 0), (head, query)
                fetched += (now[0] != before[0]) * (2 * token + statistic) + (now[1] != before[1]) * 2 * statistic
                before = now
    of_keys = 2 * J * 1024 * 4 * token  # k, v, dk, dv
    assert CASES["jax_flash_backward"].kernels(shape)[1].hbm_bytes == 1024 * fetched + of_keys
