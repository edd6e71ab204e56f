"""Static profiles: the parser and the weighting on a schedule written by hand, the cases' geometry by brute force, and,
where libtpu is there, kernels of known cost. Nothing runs on a TPU.
"""

import importlib.util
import json
import re
import textwrap
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from longattn.aot import compilers, kernels
from longattn.aot.kernels import command, rates, tpu
from longattn.aot.kernels.bundles import along, parse, weigh
from longattn.aot.kernels.cases import CASES, Branch, Kernel, Shape
from longattn.aot.kernels.cases.kernel import walk
from longattn.mask import Causal, Full, Window
from longattn.ops.attention.pallas_tpu import back_end, forward
from tests.compilers import needs_libtpu


def peer(case: str, *values, slow: bool = False):
    """Test parameters that are left out where the case's package is not installed."""
    module = CASES[case].module
    missing = bool(module) and importlib.util.find_spec(module) is None
    marks = [pytest.mark.skipif(missing, reason=f"{module} is not there: .[peers]"), *[pytest.mark.slow] * slow]
    return pytest.param(case, *values, marks=marks)


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- a schedule of 40 bundles: a loop of 6 trips (4 grid steps) over [2, 38), its step [9, 30), branches in the step

COLUMNS = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
CAPACITY = [2, 2, 2, 4, 2, 1, 3, 3, 2, 2, 2]


def dumps(jumps: dict[int, int], trips: int = 6, products: Container[int] = range(20, 30)) -> tuple[str, str]:
    """Returns the dumps (bundles, utilisation) of 40 bundles with `jumps`, and a product in each of `products`."""
    lines = ["= control target key start", "LH: loop header", "= control target key end", ""]
    rows = ["== CAPACTIY:", COLUMNS, " ".join(map(str, CAPACITY)), "== UTILIZATION:"]
    for i in range(40):
        what = "%1 = vadd /* a comment\n over two lines: { 0x3 */"
        if i in jumps:
            what = f"%2 = sbr.rel (!%p1_p0) target bundleno = {jumps[i]} ({jumps[i]:#x}), region = 3"
        if i == 31:
            what = f"%p5_p4 = scmp.ge.s32.totalorder %s22_s24, {trips} /* loop exit test */  ;;  {what}"
        lines.append(f"{f'{i:#x}' if i else '0':>6} {'LB' if i == 2 else '  '}: {'> ' if i > 1 else ''} {{ {what} }}")
        rows.append(" ".join("2" if column == 0 and i in products else "0" for column in range(11)))
    return "\n".join(lines) + "\n", "\n".join(rows) + "\n"


JUMPS = {4: 30, 11: 18, 19: 28, 33: 2}  # the step [9, 30), in it branches [16, 18) and [24, 28); back to 2 at 33


def test_parse_finds_loops_trips_and_branches():
    schedule = parse(*dumps(JUMPS))
    found = [(r.kind, r.start, r.end, r.trips, r.bundles) for r in schedule.root.walk()]
    assert found == [
        ("kernel", 0, 40, None, 4),
        ("loop", 2, 38, 6, 15),
        ("branch", 9, 30, None, 15),
        ("branch", 16, 18, None, 2),
        ("branch", 24, 28, None, 4),
    ]
    assert schedule.root.total("MXU") == 20
    assert sum(r.bundles for r in schedule.root.walk()) == 40
    assert schedule.capacity["VALU"] == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b, u: (b.replace("0x7 ", "0x8 "), u), "are not numbered"),
        (lambda b, u: ("", u), "are not numbered"),
        (lambda b, u: (b, u.replace("XLU", "ABC")), "has the columns MATMUL, MATPUSH, ABC"),
        (lambda b, u: (b, u + "0 0 0 0 0 0 0 0 0 0 0\n"), "40 bundles, its utilisation 41"),
        (lambda b, u: dumps({4: 20, 11: 30}), "overlap"),
    ],
)
def test_parse_refuses_what_it_does_not_know(edit, message):
    with pytest.raises(ValueError, match=message):
        parse(*edit(*dumps(JUMPS)))


KERNEL = Kernel("k", steps=4, branches=(Branch("first", 1), Branch("visible", 3)), flops=1, hbm_bytes=1)


def test_weigh_charges_each_region_for_its_executions():
    weighted = weigh(parse(*dumps(JUMPS)), KERNEL, cores=1)
    assert [r.runs for r in weighted.regions] == [1, 6, 4, 1, 3]
    assert [r.what for r in weighted.regions] == ["", "", "grid step", "first", "visible"]
    assert weighted.cycles == 4 + 6 * 15 + 4 * 15 + 2 + 3 * 4
    assert weighted.busy["MXU"] == 4 * 6 + 3 * 4  # one per bundle that holds a product
    assert weighted.cores == 1


def test_weigh_spreads_over_cores():
    kernel = Kernel("k", steps=8, branches=(Branch("first", 2), Branch("visible", 6)), flops=1, hbm_bytes=1)
    weighted = weigh(parse(*dumps(JUMPS)), kernel, cores=2)
    assert weighted.cores == 2
    assert weighted.cycles == weigh(parse(*dumps(JUMPS)), KERNEL, cores=2).cycles


def test_weigh_believes_a_dynamic_grid_where_the_schedule_has_no_constant():
    bundles, utilisation = dumps(JUMPS)
    bundles = bundles.replace(", 6 /* loop exit", ", %s9 /* loop exit")
    with pytest.raises(ValueError, match="no loop over the grid with a known number"):
        weigh(parse(bundles, utilisation), KERNEL, cores=1)
    dynamic = replace(KERNEL, dynamic=True)
    expected = weigh(parse(*dumps(JUMPS)), KERNEL, cores=1)
    assert weigh(parse(bundles, utilisation), dynamic, cores=1).cycles == expected.cycles
    assert weigh(parse(bundles, utilisation), dynamic, cores=2).cores == 1  # nothing says that the grid is divided
    divided = bundles.replace(
        "%1 = vadd", "%s4_s12 = sld [smem:[#allocation0]] /* megacore core id */  ;;  %1 = vadd", 1
    )
    assert weigh(parse(divided, utilisation), dynamic, cores=2).cores == 2
    first_only = divided.replace("%1 = vadd", "%p3_p0 = scmp.ne.s32.totalorder %s4_s12, 0  ;;  %1 = vadd", 1)
    assert weigh(parse(first_only, utilisation), dynamic, cores=2).cores == 1


LOOPS = Kernel(
    "k", steps=12, branches=(Branch("a", 3), Branch("b", 5, data="guard")), flops=1, hbm_bytes=1, loops=(6, 12)
)


def test_weigh_follows_a_kernels_own_loops():
    # Loops [2, 38) of 6 trips and [9, 30) of 2, in which branches [16, 18) and [24, 28) hold the products.
    bundles, utilisation = dumps({11: 18, 19: 28, 25: 9, 33: 2}, products=range(9, 30))
    weighted = weigh(parse(bundles, utilisation), LOOPS, cores=2, rates={"guard": 0.2})
    assert [r.runs for r in weighted.regions] == [1, 6, 12, 3, 1]
    assert weighted.cores == 1
    assert weighted.cycles == 4 + 6 * 15 + 12 * 15 + 3 * 2 + 1 * 4
    assert weighted.cycles_worst == weighted.cycles + 4 * 4
    with pytest.raises(ValueError, match="loop 0 has 6 trips, the case counts 7 over 1"):
        weigh(parse(bundles, utilisation), replace(LOOPS, loops=(7, 12)), cores=1, rates={"guard": 0.2})


def test_weigh_charges_no_branch_silently_whose_rate_is_not_known():
    guarded = replace(KERNEL, branches=(Branch("first", 1), Branch("guard", 3, data="recover")))
    with pytest.raises(ValueError, match="how often the branch 'guard' runs depends on the data, and no rate is known"):
        weigh(parse(*dumps(JUMPS)), guarded, cores=1, rates={"other": 0.5})


LISTS = Kernel(
    "k", steps=4, flops=1, hbm_bytes=1, lists=True,
    branches=(Branch("a", 8, data="fast", alternative="a", loop=5), Branch("b", 7, data="slow", alternative="b")),
)  # fmt: skip


def test_weigh_charges_bodies_that_lists_lead_to():
    """The worst case is the costliest alternative."""
    schedule = parse(*dumps(JUMPS, products=(16, 17, 24)))  # [16, 18) and [24, 28)
    always = 4 + 6 * 15 + 4 * 15
    for fast in (0.0, 0.25, 1.0):
        weighted = weigh(schedule, LISTS, cores=1, rates={"fast": fast, "slow": 1 - fast})
        assert weighted.cycles == always + fast * 8 * 2 + (1 - fast) * 7 * 4
        assert weighted.cycles_worst == always + 7 * 4
    both = replace(LISTS, branches=tuple(replace(b, alternative="") for b in LISTS.branches))
    weighted = weigh(schedule, both, cores=1, rates={"fast": 1.0, "slow": 1.0})
    assert weighted.cycles == weighted.cycles_worst == always + 8 * 2 + 7 * 4
    with pytest.raises(ValueError, match="branch 'b' runs depends on the data, and no rate is known"):
        weigh(schedule, LISTS, cores=1, rates={"fast": 1.0})


def test_weigh_charges_the_branches_of_a_body_as_often_as_declared_if_so_many_jump():
    schedule = parse(
        *dumps({4: 30, 11: 18, 19: 28, 33: 2}, products=(9,))
    )  # the step holds products, its branches none
    body = Branch("body", 4, asides=((9, 9, 9), (1, 3)))
    always = 4 + 6 * 15 + 4 * 15
    weighted = weigh(schedule, replace(LISTS, branches=(body,)), cores=1)
    assert weighted.cycles == weighted.cycles_worst == always + 1 * 2 + 3 * 4
    for other in ((), ((1,), (1, 2, 3))):
        weighted = weigh(schedule, replace(LISTS, branches=(replace(body, asides=other),)), cores=1)
        assert weighted.cycles == always + 4 * 2 + 4 * 4


@pytest.mark.parametrize(("products", "found"), [(range(9, 30), 3), ((24,), 1)])
def test_weigh_refuses_bodies_that_no_list_leads_to(products, found):
    with pytest.raises(ValueError, match=f"step has {found} regions with matrix products, its source 2"):
        weigh(parse(*dumps(JUMPS, products=products)), LISTS, cores=1)


LOOP_IN_STEP = {4: 30, 15: 22, 25: 12, 33: 2}  # in the step [9, 30) a loop [12, 30), in it a branch [20, 22)


def test_weigh_charges_a_loop_around_bodies_as_often_as_they_run():
    kernel = replace(LISTS, branches=(Branch("a", 7),))
    weighted = weigh(parse(*dumps(LOOP_IN_STEP, products=(20,))), kernel, cores=1)
    assert [(r.what, r.runs) for r in weighted.regions] == [("", 1), ("", 6), ("grid step", 4), ("", 7), ("a", 7)]
    assert weighted.cycles == 4 + 6 * 15 + 4 * 3 + 7 * 16 + 7 * 2
    no_body_inside = parse(*dumps(LOOP_IN_STEP, products=(9,)))
    with pytest.raises(ValueError, match="the loop at bundle 12 has no constant number of trips"):
        weigh(no_body_inside, kernel, cores=1)


@pytest.mark.parametrize(
    ("test", "trips"),
    [
        ("%p1_p0 = scmp.ge.s32.totalorder %s3_s4, 5", 5),
        ("%p1_p0 = pmov 1 /* materialized constant */", 1),
        ("%p1_p0 = scmp.ge.s32.totalorder %s3_s4, %s5", None),
        ("%p7_p0 = scmp.ge.s32.totalorder %s3_s4, 5", None),
    ],
)
def test_parse_finds_the_trips_of_loops_made_for_copies(test, trips):
    bundles, utilisation = dumps(LOOP_IN_STEP)
    bundles, n = re.subn(r"( 0xe .*?\{ )", rf"\1{test}  ;;  ", bundles)
    assert n == 1
    found = [r for r in parse(bundles, utilisation).root.walk() if r.kind == "loop"]
    assert [(r.start, r.trips) for r in found] == [(2, 6), (12, trips)]


def test_along_the_schedule_every_bundle_is_as_wide_as_it_runs_often():
    schedule = parse(*dumps(JUMPS))
    weighted = weigh(schedule, KERNEL, cores=1)
    picture = along(schedule, weighted, bins=60)
    for slot, shares in picture["slots"].items():
        assert sum(shares) / 60 == pytest.approx(weighted.busy[slot] / weighted.cycles, abs=0.002), slot
    assert picture["spans"][-1]["to"] == weighted.cycles
    step = [(span["bundles"], span["runs"]) for span in picture["spans"] if span["what"] == "grid step"]
    assert step == [(7, 4), (6, 4), (2, 4)]  # [9, 16), [18, 24), [28, 30)


@pytest.mark.parametrize(
    ("text", "kernel", "message"),
    [
        (dumps(JUMPS, trips=7), KERNEL, "walks over 5 grid steps per core, the case counts 4"),
        (dumps({4: 30, 11: 18, 33: 2}), KERNEL, "has 1 branches, its source 2"),
        (dumps(JUMPS, products=range(0)), KERNEL, "no loop over the grid"),
        (dumps(JUMPS, products=range(3, 4)), KERNEL, "0 regions of the grid's loop hold"),
    ],
)
def test_weigh_refuses_what_does_not_fit_the_case(text, kernel, message):
    with pytest.raises(ValueError, match=message):
        weigh(parse(*text), kernel, cores=1)


# ---- geometry


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
        peer("jax_splash_backward_unfused", {"K": 1}),
        peer("tokamax_splash", {"documents": 3}),
        peer("flywheel", {}),
        *(peer(case, {}, slow=True) for case in BRANCHES if case != "flywheel"),
        peer("flywheel", {"K": 1}, slow=True),
        *(peer(case, {"documents": 3}, slow=True) for case in BRANCHES if case not in ("tokamax_splash", "flywheel")),
        *(peer(case, {"mask": Window(300), "K": 1}, slow=True) for case in BRANCHES if "splash" in case),
        *(peer(case, {"mask": Full()}, slow=True) for case in ("jax_splash", "jax_splash_backward_unfused")),
        *(peer(case, {"bT": 128, "bC": None}, slow=True) for case in BRANCHES if "splash_backward" in case),
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


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        *((CHANGES[0], rows) for rows in ("bounded", "unbounded", "computed again")),
        # Rows that are computed again were unbounded before: that is counted too.
        *(pytest.param(c, rows, marks=pytest.mark.slow) for c in CHANGES[1:] for rows in ("bounded", "computed again")),
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


@pytest.mark.parametrize(
    "change", [CHANGES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CHANGES[1:3])], ids=str
)
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


@needs_libtpu
def test_linear_attention_is_compiled_as_declared():
    row = compiled("longattn_linear", "v6e", T=1024, H=2, kind="scalar")
    (kernel,) = row["kernels"]
    assert {r["what"]: r["runs"] for r in kernel["regions"] if r["what"]} == {"grid step": 2, "chunk": 8}
    assert row["cycles"] > row["floor_cycles"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_the_gradient_of_linear_attention_is_compiled_as_declared(chip):
    row = compiled("longattn_linear_backward", chip, T=2048, H=16, kind="scalar_delta")
    (kernel,) = row["kernels"]
    assert row["cores"] == (2 if chip == "v5p" else 1)
    share = 1 / row["cores"]
    assert {r["what"]: r["runs"] for r in kernel["regions"] if r["what"]} == {
        "grid step": 8 * share, "states": 32 * share, "gradients of a chunk": 32 * share,
    }  # fmt: skip


def test_blocks_that_our_kernel_refuses_are_a_row():
    row = tpu.profile("longattn", "v6e", Shape(bS=256))
    assert "block_k must be an even multiple of tile_k" in row["reason"]


def test_rates_are_shares_of_the_times_a_branch_is_asked(monkeypatch):
    counts = [rates.Count("guard", 4, 1), rates.Count("guard", 6, 0), rates.Count("other", 9, 9)]
    monkeypatch.setattr(rates, "count", lambda case, shape: counts)
    monkeypatch.setitem(CASES, "k", replace(CASES["matmul"], kernels=lambda shape: (replace(LOOPS, loops=()),)))
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


# ---- the child


def child(tmp_path, monkeypatch, script: str) -> None:
    """Replaces the process that compiles by a shell script."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
    path.chmod(0o755)
    library = tmp_path / "libtpu" / "libtpu.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    monkeypatch.setattr(compilers.sys, "executable", str(path))


def test_a_compiler_that_aborts_is_a_row(tmp_path, monkeypatch, capsys):
    child(tmp_path, monkeypatch, "echo 'F0000 check failed' >&2; kill -ABRT $$")
    options = kernels.ProfileOptions(cases=("matmul", "jax_flash"), chips=("v6e",))
    document = kernels.run(options, Console(width=200))
    assert [(row["case"], row["reason"]) for row in document["rows"]] == [
        (case, "the compiler ended with -6: F0000 check failed") for case in ("matmul", "jax_flash")
    ]
    assert "matmul on v6e: the compiler ended with -6" in capsys.readouterr().out


def test_a_compiler_that_hangs_is_a_row(tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "sleep 100")
    assert tpu.profile("matmul", "v6e", Shape(), timeout=0.2)["reason"] == "the compiler took more than 0.2 s"


# ---- what is remembered, the sweep, the picture


def numbers(case: str, chip: str, shape: Shape, timeout: float = 300) -> dict:
    """Replaces `profile`: larger blocks are faster, and blocks of 2048 queries fail."""
    row = {"case": case, "chip": chip, **shape.as_json()}
    if shape.bT == 2048:
        return {**row, "reason": "RESOURCE_EXHAUSTED"}
    cycles = 1e9 / shape.bT / shape.bS
    kernel = {"name": "k", "cycles": cycles, "along": {
        "slots": {slot: [0.25, 0.75] for slot in ("MXU", "XLU", "VALU", "EUP", "load", "store", "fill", "spill")},
        "spans": [{"what": "grid step", "runs": 2.0, "bundles": 5, "from": 0.0, "to": cycles}],
    }}  # fmt: skip
    return {
        **row, "cycles": cycles, "cycles_worst": 2 * cycles, "rates": {"guard": 0.0}, "hbm_bytes": 1.0,
        "hbm_cycles": 1.0, "compare_cycles": cycles, "floor_cycles": 1.0, "efficiency": 0.5,
        "bound": "MXU", "cores": 1, "spills": 0,
        "utilisation": dict.fromkeys(("MXU", "XLU", "VALU", "EUP", "load", "store"), 0.5), "vmem_bytes": None,
        "kernels": [kernel], "not_counted": [],
    }  # fmt: skip


@pytest.fixture
def _pretended(monkeypatch, tmp_path):
    child(tmp_path, monkeypatch, "exit 1")
    monkeypatch.setattr(command, "profile", numbers)


@pytest.mark.usefixtures("_pretended")
def test_best_shows_each_case_at_its_own_blocks_and_keeps_all_rows(capsys):
    document = kernels.run(kernels.ProfileOptions(cases=("jax_flash", "matmul"), chips=("v6e",), best=1))
    said, err = capsys.readouterr()
    lines = {line.split()[0]: line.split()[2:5] for line in said.splitlines() if " v6e " in line}
    assert lines == {"jax_flash": ["1024", "2048", "0.000"], "matmul": ["1024", "2048", "0.000"]}
    assert len(document["rows"]) == len(CASES["jax_flash"].blocks(Shape())) + len(CASES["matmul"].blocks(Shape()))
    assert "matmul on v6e: 3 of 9 block sizes gave no number: RESOURCE_EXHAUSTED (3)" in said
    assert "worst case" in said and "ran 0% of the times it was asked" in said
    assert err.split("\n") == ["compiling jax_flash for v6e", "compiling matmul for v6e", ""]  # a bar is for terminals


@pytest.mark.usefixtures("_pretended")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_has_a_panel_per_kernel(tmp_path, suffix):
    path = tmp_path / "new" / f"picture.{suffix}"
    document = kernels.run(kernels.ProfileOptions(cases=("jax_flash",), chips=("v5e", "v6e"), plot=path))
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    if suffix == "svg":
        text = path.read_text()
        assert text.count("grid step") == 2 and "jax_flash on v5e, k: 0.001 M cycles" in text
    assert "along" not in document["rows"][0]["kernels"][0]


@pytest.mark.usefixtures("_pretended")
def test_there_is_no_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="would be empty: no case has a schedule"):
        kernels.run(kernels.ProfileOptions(cases=("matmul",), chips=("v6e",), bT=2048, plot=tmp_path / "picture.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": -1}, "best=-1 must not be negative"),
        ({"plot": Path("a.gif")}, "plot=a.gif must end in .png, .svg or .pdf"),
        ({"cases": ("flash",)}, "unknown case 'flash'"),
        ({"timeout": 0}, "timeout=0 must be positive"),
    ],
)
def test_options_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.ProfileOptions(**{"cases": ("matmul",), **change})


def test_best_needs_blocks_that_divide_the_length():
    with pytest.raises(ValueError, match="jax_flash has no block sizes that suit T=1000: try a multiple of 1024"):
        kernels.ProfileOptions(cases=("jax_flash",), T=1000, best=1).shapes("jax_flash")
    with pytest.raises(ValueError, match="best=1 chooses the blocks: leave bT, bS, bC and bR out"):
        kernels.ProfileOptions(cases=("jax_flash",), bT=512, best=1)
    tried = kernels.ProfileOptions(cases=("jax_splash",), T=1536, best=1).shapes("jax_splash")
    assert tried and {(s.bT, s.bS) for s in tried} == {(512, 512)}


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


@needs_libtpu
@pytest.mark.slow
def test_heads_that_two_cores_cannot_share_evenly_are_refused():
    assert "H=3 heads are not divided evenly" in tpu.profile("jax_flash", "v5p", Shape(T=2048, H=3))["reason"]


def test_answers_are_remembered_but_not_those_that_may_change():
    asked = []

    def answer(reason: str) -> dict:
        return tpu.remembered({"reason": reason}, lambda: asked.append(reason) or {"reason": reason})

    for _ in range(2):
        assert answer("VMEM is too small") == {"reason": "VMEM is too small"}
        answer("the compiler took more than 300 s")
        answer("ModuleNotFoundError: No module named 'einshape'")
    assert [asked.count(reason) for reason in dict.fromkeys(asked)] == [1, 2, 2]
    assert not list(tpu.cache_folder().glob("*.part"))


def test_what_is_remembered_depends_on_versions_and_sources():
    assert set(tpu.versions("matmul")) == set(tpu.versions("jax_flash")) == {"jax", "sources"}


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    row = tpu.profile("tokamax_splash", "v6e", Shape())
    assert row["reason"] == 'tokamax is not installed: pip install "longattn[peers]"'


# ---- the compiler


@needs_libtpu
def test_matmul_is_within_a_tenth_of_its_known_floor(capsys):
    # The blocks are so long that sums are read and written rarely. 2 T**3 FLOP at 131,072 per cycle.
    options = kernels.ProfileOptions(cases=("matmul",), chips=("v5e",), T=4096, bT=512, bS=2048, json=True)
    kernels.run(options)
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert "reason" not in row, row
    assert document["version"] == command.VERSION
    assert document["heading"] == "static cycles (no DMA wait, not run)"
    assert row["floor_cycles"] == 2 * 4096**3 / 131_072
    assert row["utilisation"]["MXU"] * row["cycles"] == pytest.approx(row["floor_cycles"], rel=0.01)
    assert row["cycles"] == pytest.approx(row["floor_cycles"], rel=0.10)
    assert 8 * 2**20 < row["vmem_bytes"] < 32 * 2**20
    assert row["compare_cycles"] == max(row["cycles"], row["hbm_cycles"])


def compiled(case: str, chip: str, **shape) -> dict:
    row = tpu.profile(case, chip, Shape(**shape))
    assert "reason" not in row, row
    return row


@needs_libtpu
def test_causal_flash_executes_the_steps_that_it_sees():
    row = compiled("jax_flash", "v6e")
    (kernel,) = row["kernels"]
    assert {r["what"]: r["runs"] for r in kernel["regions"] if r["what"]} == {
        "grid step": 512, "first of a row": 64, "visible block": 288, "last of a row": 64,
    }  # fmt: skip
    # An earlier measurement by an independent tool, libtpu 0.0.52.
    assert row["cycles"] == pytest.approx(1.145e6, rel=0.03)
    assert row["floor_cycles"] == pytest.approx(0.262e6, rel=0.01)


@needs_libtpu
def test_our_forward_kernel_takes_one_version_of_its_bodies_per_row():
    row = compiled("longattn", "v6e", T=2048, H=2, bT=512, bS=512, bC=256, bR=256)
    (kernel,) = row["kernels"]
    assert {r["what"]: (r["runs"], r["most"]) for r in kernel["regions"] if r["what"]} == {
        "grid step": (8, 8),
        "cut block 0, bounded": (8, 8),
        "first whole block of a row, bounded": (6, 6),
        "whole block, bounded": (6, 6),
        "first maximum, unbounded": (0, 8),
        "cut block 0, unbounded": (0, 8),
        "whole block, unbounded": (0, 12),
        "cut block 0, others": (0, 8),
        "whole block, others": (0, 12),
    }
    assert row["rates"] == {"of_bounded": 1.0, "of_unbounded": 0.0, "of_others": 0.0}
    assert row["floor_cycles"] < row["cycles"] < row["cycles_worst"] < 5 * row["cycles"]
    most = {r["what"]: r["bundles"] * r["most"] for r in kernel["regions"]}
    everything = sum(r["bundles"] * r["most"] for r in kernel["regions"])
    of_bounded = sum(cycles for what, cycles in most.items() if what.endswith(", bounded"))
    assert row["cycles_worst"] < everything - of_bounded + 1  # a row is bounded or it is not


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_our_backward_kernel_is_compiled_as_declared(chip):
    row = compiled("longattn_backward", chip, T=2048, H=4, K=2, bT=512, bS=512)
    (kernel,) = row["kernels"]
    assert row["cores"] == (2 if chip == "v5p" else 1)
    share = 1 / row["cores"]
    assert {r["what"]: r["runs"] for r in kernel["regions"] if r["what"]} == {
        "grid step": 8 * share, "cut block 0": 16 * share, "whole block": 24 * share,
    }  # fmt: skip
    assert row["cycles_worst"] == row["cycles"] > row["floor_cycles"] and row["after_cycles"] > 0
    assert any("longattn_attention_forward" in name for name in row["not_counted"])


BIG = {"bT": 2048, "bS": 2048}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "chip", "shape", "millions"),
    [
        peer("jax_flash", "v6e", {"mask": Full()}, 1.863),
        peer("jax_flash", "v5p", {}, 0.860),
        peer("jax_splash", "v6e", {**BIG, "bC": 1024}, 1.058),
        peer("jax_flash_backward", "v6e", {}, 3.27),
        peer("jax_splash_backward", "v6e", {}, 1.84),
        peer("jax_splash_backward", "v5p", {}, 3.40),  # its grid is not marked parallel: one core of two
        peer("tokamax_splash", "v6e", {**BIG, "bC": 512}, 0.874),
        peer("tokamax_splash_backward", "v6e", {}, 1.78),
        peer("flywheel", "v6e", BIG, 0.654),
    ],
)
def test_peers_cost_what_an_independent_tool_measured(case, chip, shape, millions):
    row = compiled(case, chip, **shape)
    assert row["cycles"] == pytest.approx(millions * 1e6, rel=0.03)
    assert row["cores"] == (2 if (case, chip) == ("jax_flash", "v5p") else 1)
    assert row["cycles_worst"] > row["cycles"] if case == "flywheel" else row["cycles_worst"] == row["cycles"]


@needs_libtpu
@pytest.mark.slow
def test_a_kernel_of_loops_and_a_dynamic_grid_on_two_cores():
    pytest.importorskip("tokamax", reason=".[peers]")
    pytest.importorskip("flywheel_tpu", reason=".[peers]")
    small = {"T": 2048, "bT": 512, "bS": 512, "bC": 256, "bR": 256}
    by_chip = {chip: compiled("tokamax_splash", chip, **small) for chip in ("v5e", "v5p")}
    assert [row["cores"] for row in by_chip.values()] == [1, 2]
    assert by_chip["v5p"]["cycles"] == pytest.approx(by_chip["v5e"]["cycles"] / 2, rel=0.1)  # the same units per core
    assert compiled("flywheel", "v5p", **small)["cores"] == 1


@needs_libtpu
def test_the_compiler_is_told_what_a_product_costs():
    shape = Shape(T=1024, bT=512, bS=512)
    request = {"case": "matmul", "chip": "v5e", "shape": shape.as_json()}
    cost = compilers.call("tests.compilers:cost_here", request, compilers.tpu_environment(), 60)
    (kernel,) = CASES["matmul"].kernels(shape)
    assert cost == {"flops": 2 * 1024**3, "bytes accessed": kernel.hbm_bytes}


@needs_libtpu
def test_what_the_child_refuses_is_a_row():
    shape = Shape(mask=Window(5))
    assert tpu.profile("jax_flash", "v6e", shape) == {
        "case": "jax_flash",
        "chip": "v6e",
        **shape.as_json(),
        "reason": "NotImplementedError: jax_flash knows Causal() and Full() only, mask is Window(5, 0)",
    }
