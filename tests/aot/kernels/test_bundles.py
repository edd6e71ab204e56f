"""Parsing and weighting schedules, on a schedule written by hand."""

import re
from collections.abc import Container
from dataclasses import replace

import pytest

from longattn.aot.kernels.bundles import along, parse, weigh
from longattn.aot.kernels.cases import Branch, Kernel

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
