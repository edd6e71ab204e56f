"""The walk through a schedule, on programs whose times are added up by hand."""

import textwrap

import pytest

from longattn.aot import hlo
from longattn.aot.schedule import Rates, bound, walk
from longattn.cost.torus import Torus

# A product of [8 8] x [8 8] takes 1024 FLOP; copies of its result move 512 bytes each.
RATES = Rates(flops=1024.0, hbm=1e9, link=64.0, network=16.0, node=4)
PRODUCT = "f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def times(*lines: str, others: str = "") -> hlo.Program:
    body = "\n".join(f"  {line}" for line in ("%x = f32[8,8]{1,0} parameter(0)", *lines))
    return hlo.parse(f"{textwrap.dedent(others).strip()}\n\nENTRY %m (x: f32[8,8]) -> f32[8,8] {{\n{body}\n}}\n")


GATHER = "all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}"  # 256 bytes received: 4 s


def test_a_synchronous_collective_stops_the_chip():
    totals = walk(times(f"%g = f32[16,8]{{1,0}} {GATHER}", f"ROOT %p = {PRODUCT}"), RATES)
    assert (totals.flops, totals.compute, totals.exposed) == (1024, pytest.approx(1), pytest.approx(4))
    ((key, runs),) = totals.collectives.items()
    assert (key[0].kind, key[0].bytes, key[1], runs) == ("all-gather", 256, False, 1)


def started(*between: str) -> hlo.Program:
    return times(
        "%s = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}",
        *between,
        "%d = f32[16,8]{1,0} all-gather-done(%s)",
        f"ROOT %last = {PRODUCT}",
    )


@pytest.mark.parametrize(("products", "exposed"), [(0, 4), (1, 3), (3, 1), (4, 0), (6, 0)])
def test_what_runs_between_start_and_done_hides_the_transfer(products, exposed):
    totals = walk(started(*(f"%p{i} = {PRODUCT}" for i in range(products))), RATES)
    assert totals.exposed == pytest.approx(exposed, abs=1e-5) and totals.compute == pytest.approx(products + 1)
    assert sum(totals.waits.values()) == pytest.approx(exposed, abs=1e-5)


def test_transfers_share_the_links():
    """Two transfers of 4 s beside 5 s of work leave 3 s of the second one."""
    totals = walk(
        times(
            "%s1 = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}",
            "%s2 = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=2, replica_groups={{0,1}}",
            *(f"%p{i} = {PRODUCT}" for i in range(5)),
            "%d1 = f32[16,8]{1,0} all-gather-done(%s1)",
            "%d2 = f32[16,8]{1,0} all-gather-done(%s2)",
            f"ROOT %last = {PRODUCT}",
        ),
        RATES,
    )
    assert totals.exposed == pytest.approx(3, abs=1e-5) and totals.compute == pytest.approx(6)


def test_what_is_awaited_first_has_the_links_first():
    """Two transfers of 4 s; the later one is awaited at once, the other after 5 s of work."""
    totals = walk(
        times(
            "%s1 = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}",
            "%s2 = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=2, replica_groups={{0,1}}",
            "%d2 = f32[16,8]{1,0} all-gather-done(%s2)",
            *(f"%p{i} = {PRODUCT}" for i in range(5)),
            "%d1 = f32[16,8]{1,0} all-gather-done(%s1)",
            f"ROOT %last = {PRODUCT}",
        ),
        RATES,
    )
    assert totals.exposed == pytest.approx(4, abs=1e-5)


# Gathers on a tpu7x's sparse core, as a compiled program writes them and as a dump does.
SPARSE_CORE = """
    %gathering (p: f32[8,8]) -> f32[16,8] {
      %p = f32[8,8]{1,0} parameter(0)
      ROOT %ag = f32[16,8]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}
    }, execution_thread="sparsecore"

    %offloading (p.1: f32[8,8]) -> f32[16,8] {
      %p.1 = f32[8,8]{1,0} parameter(0)
      ROOT %call = f32[16,8]{1,0} call(%p.1), to_apply=%gathering
    }, execution_thread="sparsecore"
"""
CALLED = (
    '%s = ((), (), (s32[1]{0:S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%gathering',
    "%u = ((f32[8,8]{1,0}), f32[16,8]{1,0}) call-update(%s, %x)",
)
NESTED = (
    "%s = ((f32[8,8]{1,0}), f32[16,8]{1,0}, s32[]) async-start(%x), "
    'async_execution_thread="sparsecore", calls=%offloading',
    "%u = ((f32[8,8]{1,0}), f32[16,8]{1,0}, s32[]) async-update(%s)",
)


FUSED = (
    "%s = ((f32[8,8]{1,0}), f32[16,8]{1,0}) fusion-start(%x), kind=kCustom, calls=%gathering",
    "%u = ((f32[8,8]{1,0}), f32[16,8]{1,0}) fusion-update(%s)",
)


@pytest.mark.parametrize(("begun", "done"), [(CALLED, "call-done"), (NESTED, "async-done"), (FUSED, "fusion-done")])
def test_collectives_inside_other_computations_are_counted(begun, done):
    end = f"%d = f32[16,8]{{1,0}} {done}(%u)"
    totals = walk(times(*begun, f"%p0 = {PRODUCT}", end, f"ROOT %last = {PRODUCT}", others=SPARSE_CORE), RATES)
    ((key, runs),) = totals.collectives.items()
    assert (key[0].kind, key[0].bytes, key[1], runs) == ("all-gather", 256, True, 1)
    assert totals.exposed == pytest.approx(3, abs=1e-5) and totals.compute == pytest.approx(2)
    assert totals.hbm_bytes == 2 * 3 * 256  # of the products
    assert totals.missing == []


def test_collectives_that_the_walk_does_not_reach_are_named():
    hidden = SPARSE_CORE.replace(
        "call(%p.1), to_apply=%gathering", "custom-call(%p.1), called_computations={%gathering}"
    )
    totals = walk(times(*NESTED, "%d = f32[16,8]{1,0} async-done(%u)", f"ROOT %p = {PRODUCT}", others=hidden), RATES)
    assert totals.missing == ["ag"] and not totals.collectives


# Eight chips in a ring, each link of which takes 4 s for the 256 bytes of %x.
ONWARDS, BACK = (",".join(f"{{{i},{(i + way) % 8}}}" for i in range(8)) for way in (1, -1))
RING = Rates(1024.0, 1e9, 128.0, 128.0, 8, Torus((8,), (True,), 64.0, 128.0, tuple((i,) for i in range(8))))


def hops(*pairs: str, work: int) -> hlo.Program:
    """Makes a program that starts permutes together and awaits them after `work` products."""
    sends = [
        f"%s{i} = (f32[8,8]{{1,0}}, f32[8,8]{{1,0}}) collective-permute-start(%x), channel_id={i + 1}, "
        f"source_target_pairs={{{p}}}"
        for i, p in enumerate(pairs)
    ]
    ends = [f"%d{i} = f32[8,8]{{1,0}} collective-permute-done(%s{i})" for i in range(len(pairs))]
    return times(*sends, *(f"%p{i} = {PRODUCT}" for i in range(work)), *ends, f"ROOT %last = {PRODUCT}")


@pytest.mark.parametrize(
    ("pairs", "work", "exposed"),
    [
        ((ONWARDS,), 0, 4),  # by one link: all links of a chip together would take 2 s
        ((ONWARDS,), 3, 1),
        ((ONWARDS, ONWARDS), 3, 5),  # over the same links
        ((ONWARDS, BACK), 3, 1),  # each over its own
        (("{0,1},{1,2}", "{2,3},{3,4}"), 3, 1),
        (("{0,1},{1,2}", "{1,3}"), 3, 5),  # they meet between 1 and 2
        (("{0,4}",), 1, 1),  # a half each way
    ],
)
def test_permutes_wait_for_each_other_where_they_need_the_same_links(pairs, work, exposed):
    totals = walk(hops(*pairs, work=work), RING)
    assert totals.exposed == pytest.approx(exposed, abs=1e-5) and totals.compute == pytest.approx(work + 1)
    assert sum(totals.waits.values()) == pytest.approx(totals.exposed)


def test_while_one_transfer_is_awaited_others_go_on():
    """A hop of 4 s is awaited at once; one the other way, started with it, is then there; one behind it is not."""
    start = "%s = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), channel_id=1, source_target_pairs="
    whole = f"%h = f32[8,8]{{1,0}} collective-permute(%x), channel_id=2, source_target_pairs={{{ONWARDS}}}"
    end = "%d = f32[8,8]{1,0} collective-permute-done(%s)"
    for pairs, exposed in ((BACK, 4), (ONWARDS, 8)):
        program = times(f"{start}{{{pairs}}}", whole, end, f"ROOT %last = {PRODUCT}")
        assert walk(program, RING).exposed == pytest.approx(exposed)


@pytest.mark.parametrize(
    ("kind", "groups", "received", "seconds"),
    [
        ("all-gather", "{{0,4}}", 256, 16),  # one of each node: all of it over the network
        ("all-gather", "{{0,1,2,3}}", 768, 12),  # within a node: over its links
        # Two nodes of four: 7 shards are received, and each device fetches one of the other node's four itself.
        ("all-gather", "{{0,1,2,3,4,5,6,7}}", 1792, 28),
        ("all-gather", "{{0,1,4,5}}", 768, 16),
        ("all-to-all", "{{0,1,2,3,4,5,6,7}}", 224, 8),  # half of the data is for the other node
        ("all-to-all", "{{0,1,4,5}}", 192, 8),
    ],
)
def test_between_nodes_the_network_counts_for_what_must_cross_it(kind, groups, received, seconds):
    text = f"%g = f32[16,8]{{1,0}} {kind}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    totals = walk(times(text, f"ROOT %p = {PRODUCT}"), RATES)
    ((what, _),) = totals.collectives
    assert (what.bytes, totals.exposed) == (received, pytest.approx(seconds))


@pytest.mark.parametrize(
    ("pairs", "group", "seconds"),
    [
        ("{{0,1},{1,2},{2,3},{3,0}}", (0, 1, 2, 3), 4),
        ("{{0,1},{1,0},{2,3},{3,2}}", (0, 1), 4),
        ("{{1,0},{3,2}}", (0, 1), 4),
        ("{{0,1},{1,2},{2,3},{3,4},{4,0}}", (0, 1, 2, 3, 4), 16),
    ],
)
def test_permutes_know_their_ring_and_whether_it_leaves_the_node(pairs, group, seconds):
    text = f"%g = f32[8,8]{{1,0}} collective-permute(%x), channel_id=1, source_target_pairs={pairs}"
    totals = walk(times(text, f"ROOT %p = {PRODUCT}"), RATES)
    ((what, _),) = totals.collectives
    assert (what.bytes, what.group, totals.exposed) == (256, group, pytest.approx(seconds))


def test_copies_that_are_started_ahead_take_no_time_of_their_own():
    totals = walk(
        times(
            "%s = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]) copy-start(%x)",
            "%d = f32[8,8]{1,0:S(1)} copy-done(%s)",
            f"ROOT %p = {PRODUCT}",
        ),
        RATES,
    )
    assert totals.compute == pytest.approx(1, abs=1e-5) and totals.hbm_bytes == 256 + 3 * 256


LOOP = """
    %less (c: (s32[], f32[8,8])) -> pred[] {
      %c = (s32[], f32[8,8]{1,0}) parameter(0)
      %n = s32[] constant(3)
      ROOT %lt = pred[] compare(%c#0, %n), direction=LT
    }

    %step (c.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
      %c.1 = (s32[], f32[8,8]{1,0}) parameter(0)
      %one = s32[] constant(1)
      %i = s32[] add(%c.1#0, %one)
      %g.1 = f32[16,8]{1,0} all-gather(%c.1#1), channel_id=7, replica_groups={{0,1}}, dimensions={0}
      %p.1 = f32[8,8]{1,0} dot(%c.1#1, %c.1#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT %t.1 = (s32[], f32[8,8]{1,0}) tuple(%i, %p.1)
    }
"""


# A loop that carries %x, and one whose bound is data.
CARRIED = ("%zero = s32[] constant(0)", "%t = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)")
OPEN_LOOP = LOOP.replace("%n = s32[] constant(3)", '%n = s32[] custom-call(), custom_call_target="measure"')


def test_loops_count_as_often_as_they_run():
    totals = walk(
        times(
            *CARRIED,
            "%w = (s32[], f32[8,8]{1,0}) while(%t), condition=%less, body=%step",
            f"ROOT %p = {PRODUCT}",
            others=LOOP,
        ),
        RATES,
    )
    assert (totals.flops, totals.exposed) == (4 * 1024, pytest.approx(12))
    assert list(totals.collectives.values()) == [3]


@pytest.mark.parametrize(("way", "exposed"), [(BACK, 12), (ONWARDS, 12 + 1)])
def test_a_loop_hides_what_its_own_transfers_leave_of_the_links(way, exposed):
    """Three times 4 s of hops and 1 s of work; a hop of 4 s beside it goes the other way, or waits for 1 s of links."""
    permute = f"collective-permute(%c.1#1), channel_id=7, source_target_pairs={{{ONWARDS}}}"
    loop = LOOP.replace("f32[16,8]{1,0} all-gather(%c.1#1), channel_id=7, replica_groups={{0,1}}, dimensions={0}",
                        f"f32[8,8]{{1,0}} {permute}")  # fmt: skip
    totals = walk(
        times(
            "%s = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), channel_id=1, "
            f"source_target_pairs={{{way}}}",
            *CARRIED,
            "%w = (s32[], f32[8,8]{1,0}) while(%t), condition=%less, body=%step",
            "%d = f32[8,8]{1,0} collective-permute-done(%s)",
            f"ROOT %p = {PRODUCT}",
            others=loop,
        ),
        RING,
    )
    assert totals.exposed == pytest.approx(exposed, abs=1e-5) and totals.compute == pytest.approx(4)


def test_loops_whose_bound_is_data_are_named_and_not_counted():
    totals = walk(
        times(
            *CARRIED,
            '%w = (s32[], f32[8,8]{1,0}) while(%t), condition=%less, body=%step, metadata={op_name="jit(f)/attention"}',
            f"ROOT %p = {PRODUCT}",
            others=OPEN_LOOP,
        ),
        RATES,
    )
    assert dict(totals.unknown) == {"jit(f)/attention": 1} and totals.flops == 1024 and not totals.collectives
    assert totals.missing == ["g.1"]  # its gather is not counted either


def test_what_is_under_way_while_such_a_loop_runs_is_taken_for_hidden():
    totals = walk(
        times(
            "%s = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}",
            *CARRIED,
            "%w = (s32[], f32[8,8]{1,0}) while(%t), condition=%less, body=%step",
            "%d = f32[16,8]{1,0} all-gather-done(%s)",
            f"ROOT %p = {PRODUCT}",
            others=OPEN_LOOP,
        ),
        RATES,
    )
    assert totals.exposed == 0


TPU = """
    %starting (p: f32[8,8]) -> f32[16,8] {
      %p = f32[8,8]{1,0} parameter(0)
      ROOT %ag = f32[16,8]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1}}, dimensions={0}
    }

    %async_collective_fusion.1 (q: f32[8,8]) -> f32[8,8] {
      %q = f32[8,8]{1,0} parameter(0)
      %ag.1 = f32[16,8]{1,0} all-gather(%q), channel_id=5, replica_groups={{0,1}}, dimensions={0}
      ROOT %dot = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %ending (r: f32[8,8]) -> f32[16,8] {
      %r = f32[8,8]{1,0} parameter(0)
      ROOT %ag.2 = f32[16,8]{1,0} all-gather(%r), channel_id=5, replica_groups={{0,1}}, dimensions={0}
    }

    %all-reduce-scatter.3 (s: f32[8,8]) -> f32[4,8] {
      %s = f32[8,8]{1,0} parameter(0)
      %ar = f32[8,8]{1,0} all-reduce(%s), channel_id=6, replica_groups={{0,1}}, to_apply=%starting
      ROOT %ds = f32[4,8]{1,0} slice(%ar), slice={[0:4], [0:8]}
    }
"""


def test_a_tpu_carries_a_collective_through_fusions():
    """Started, carried along by a product and awaited, it is one; a sum of which a part is kept is a reduce-scatter."""
    totals = walk(
        times(
            "%async-collective-start.1 = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%starting",
            "%fusion.1 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1",
            "%async-collective-done.1 = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%ending",
            "ROOT %fusion.2 = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3",
            others=TPU,
        ),
        RATES,
    )
    found = {(what.kind, what.bytes, asynchronous): n for (what, asynchronous), n in totals.collectives.items()}
    assert found == {("all-gather", 256, True): 1, ("reduce-scatter", 128, False): 1}
    assert totals.compute == pytest.approx(1, abs=1e-5)
    assert totals.exposed == pytest.approx(3 + 2, abs=1e-5)


def test_what_goes_to_the_host_and_back_is_counted_and_takes_no_time_of_the_chip():
    """One slice of a stack there, and back: 256 bytes each way, beside a product."""
    stack = "f32[4,8,8]{2,1,0:S(5)}"
    totals = walk(
        times(
            "%zero = s32[] constant(0)",
            f'%stack = {stack} custom-call(), custom_call_target="AllocateBuffer"',
            "%new = f32[1,8,8]{2,1,0} bitcast(%x)",
            f"%out = (({stack}, f32[1,8,8]{{2,1,0}}, s32[], s32[], s32[]), {stack}, u32[]) "
            "dynamic-update-slice-start(%stack, %new, %zero, %zero, %zero)",
            f"%there = {stack} dynamic-update-slice-done(%out)",
            f"%in = (({stack}, s32[], s32[], s32[]), f32[1,8,8]{{2,1,0}}, u32[]) "
            "dynamic-slice-start(%there, %zero, %zero, %zero)",
            "%back = f32[1,8,8]{2,1,0} dynamic-slice-done(%in)",
            f"ROOT %p = {PRODUCT}",
        ),
        RATES,
    )
    assert totals.host_bytes == 2 * 256
    assert totals.compute == pytest.approx(1) and totals.exposed == 0


KERNEL = """
%pair (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %k = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="longattn_attention"}
}

%nothing (x: f32[8,8]) -> f32[8,8] {
  ROOT %x = f32[8,8]{1,0} parameter(0)
}
"""
CHOICE = "f32[8,8]{1,0} conditional(%n, %x, %x), branch_computations={%nothing, %pair}"


@pytest.mark.parametrize(("where", "beside", "exposed"), [("between", 1, 0), ("after", 0, 4)])
def test_a_transfer_beside_attention_is_hidden(where, beside, exposed):
    """A device without work at a hop takes the other branch; the one that the formula charges is at its kernel."""
    start = "%s = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}"
    done, choice = "%d = f32[16,8]{1,0} all-gather-done(%s)", f"%c = {CHOICE}"
    order = (choice, done) if where == "between" else (done, choice)
    totals = walk(times("%n = s32[] constant(1)", start, *order, f"ROOT %p = {PRODUCT}", others=KERNEL), RATES)
    assert sum(totals.beside.values()) == beside
    assert totals.exposed == pytest.approx(exposed, abs=1e-5)
    assert list(totals.unknown) == ["longattn_attention"]


SENT = "%s = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}"
AWAITED = "%d = f32[16,8]{1,0} all-gather-done(%s)"
KERNELS = [
    f'%k{i} = f32[8,8]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", metadata={{op_name="{scope}"}}'
    for i, scope in enumerate(("longattn_attention", "transpose(longattn_attention)"))
]


def passes(*kernels: int) -> hlo.Program:
    """Transfers of 4 s, one after the other, each beside a kernel of the forward (0) or backward (1) pass."""
    pairs = (
        line.replace("%s", f"%s{i}").replace("%d", f"%d{i}").replace("%k0", f"%k{i}").replace("%k1", f"%k{i}")
        for i, kernel in enumerate(kernels)
        for line in (SENT, KERNELS[kernel], AWAITED)
    )
    return times(*pairs, f"ROOT %last = {PRODUCT}")


@pytest.mark.parametrize(
    ("kernels", "attention", "exposed"),
    [
        ((0,), {False: 1.0}, 3),
        ((0,), {False: 4.0}, 0),
        ((0,), {False: 9.0}, 0),
        ((0, 0), {False: 1.0}, 7),  # it is not known which of the two runs longer
        ((0, 0), {False: 6.0}, 2),
        ((0, 1), {False: 1.0, True: 9.0}, 3),  # but which pass does
        ((0, 1), {False: 9.0, True: 3.0}, 1),
        ((0, 1), {False: 1.0, True: 3.0}, 4),
        ((), {}, 0),
    ],
)
def test_attention_hides_no_more_than_it_takes(kernels, attention, exposed):
    program = passes(*kernels)
    free = walk(program, RATES)
    totals = bound(program, RATES, free, attention)
    assert (free.exposed, totals.exposed) == (0, pytest.approx(exposed, abs=1e-5))
    assert sum(totals.waits.values()) == pytest.approx(totals.exposed)
    assert totals.compute == free.compute and totals.beside == free.beside


def test_what_else_runs_beside_a_transfer_hides_it_too():
    """4 s, beside a kernel of 1 s and a product of 1 s; and 4 s beside no kernel."""
    lone = (line.replace("%s", "%t").replace("%d", "%u") for line in (SENT, AWAITED))
    program = times(*lone, SENT, KERNELS[0], f"%p = {PRODUCT}", AWAITED, f"ROOT %last = {PRODUCT}")
    free = walk(program, RATES)
    totals = bound(program, RATES, free, {False: 1.0})
    assert (free.exposed, totals.exposed) == (pytest.approx(4), pytest.approx(6, abs=1e-5))
    assert sum(totals.waits.values()) == pytest.approx(totals.exposed)
