"""Parsing compiled programs: types, loops, products, bytes and collectives, in hand-written texts and XLA's own."""

import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

from longattn.aot import collectives, hlo, instructions
from longattn.cost.collective import Collective, axes_of

# A loop of ceil((10 - 1) / 2) = 5 runs over a product of [4 8] x [8 16], and one whose bound is data.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (carry: (s32[], f32[4,16], f32[8,16])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[4,16]{1,0}, /*index=2*/f32[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%carry#0, %limit), direction=LT
}

%body (carry.1: (s32[], f32[4,16], f32[8,16])) -> (s32[], f32[4,16], f32[8,16]) {
  %carry.1 = (s32[]{:T(128)}, f32[4,16]{1,0}, /*index=2*/f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %two = s32[] constant(2)
  %left = f32[4,8]{1,0} constant({...})
  %product = f32[4,16]{1,0} dot(%left, %carry.1#2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], f32[4,16]{1,0}, f32[8,16]{1,0}) tuple(%next, %product, %carry.1#2)
}

%condition.2 (carry.2: (s32[], s32[])) -> pred[] {
  %carry.2 = (s32[], s32[]) parameter(0)
  ROOT %less.2 = pred[] compare(%carry.2#0, %carry.2#1), direction=LT
}

%body.2 (carry.3: (s32[], s32[])) -> (s32[], s32[]) {
  %carry.3 = (s32[], s32[]) parameter(0)
  %one = s32[] constant(1)
  %next.2 = s32[] add(%carry.3#0, %one)
  ROOT %out.2 = (s32[], s32[]) tuple(%next.2, %carry.3#1)
}

ENTRY %main (x: f32[4,16], w: f32[8,16], n: s32[]) -> f32[4,16] {
  %x = f32[4,16]{1,0} parameter(0), metadata={op_name="state.params['x']"}
  %w = f32[8,16]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %start = s32[] constant(1)
  %first = (s32[], f32[4,16]{1,0}, f32[8,16]{1,0}) tuple(%start, %x, %w)
  %loop = (s32[], f32[4,16]{1,0}, f32[8,16]{1,0}) while(%first), condition=%condition, body=%body
  %second = (s32[], s32[]) tuple(%zero, %n)
  %data = (s32[], s32[]) while(%second), condition=%condition.2, body=%body.2
  ROOT %total = f32[4,16]{1,0} all-reduce(%loop#1), channel_id=1, replica_groups=GROUPS, to_apply=%add
}
"""


def program(groups: str = "{{0,1,2,3}}") -> hlo.Program:
    return hlo.parse(textwrap.dedent(PROGRAM).replace("GROUPS", groups))


def test_parse_reads_types_operands_and_attributes():
    p = program()
    assert p.entry.name == "main" and set(p.computations) == {
        "add",
        "condition",
        "body",
        "condition.2",
        "body.2",
        "main",
    }
    loop = p.entry.by_name["loop"]
    assert loop.opcode == "while" and loop.operands == (("first", None),) and loop.attribute("body") == "body"
    assert loop.type == (hlo.Array("s32", (), 0), hlo.Array("f32", (4, 16), 0), hlo.Array("f32", (8, 16), 0))
    assert p.entry.root.operands == (("loop", 1),) and p.entry.operand(p.entry.root, 0).shape == (4, 16)
    assert p.entry.by_name["x"].scope == "state.params['x']"
    with pytest.raises(ValueError, match="no compiled program"):
        hlo.parse("HloModule empty")


@pytest.mark.parametrize(
    ("text", "space", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 1, 12),
        ("f32[]", 0, 4),
        ("pred[7]{0}", 0, 7),
        ("s4[6]", 0, 3),
        ("f8e4m3fn[5]{0}", 0, 5),
        ("c64[2]", 0, 16),
    ],
)
def test_arrays_have_a_size_and_a_place(text, space, size):
    array, end = hlo._type(text, 0)
    assert (array.space, array.bytes, end) == (space, size, len(text))


def test_loops_run_as_their_constants_say_or_are_unknown():
    p = program()
    assert instructions.trips(p, p.entry, p.entry.by_name["loop"]) == 5
    assert instructions.trips(p, p.entry, p.entry.by_name["data"]) is None
    body = p.computations["body"]
    assert instructions.flops(p, body, body.by_name["product"]) == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("groups", "members", "axes"),
    [
        ("{{0,1,2,3}}", (0, 1, 2, 3), ""),
        ("{{0,2},{1,3}}", (0, 2), ""),
        ("[2,4]<=[8]", (0, 1, 2, 3), ""),
        ("[4,2]<=[2,4]T(1,0)", (0, 4), ""),
        ("mesh['data'=1,'fsdp'=2,'tensor'=1,'seq'=4] {'seq'}", (0, 1, 2, 3), "seq"),
        ("mesh['data'=1,'fsdp'=2,'tensor'=1,'seq'=4] {'fsdp'}", (0, 4), "fsdp"),
        ("mesh['data'=1,'fsdp'=2,'tensor'=1,'seq'=4] {'fsdp','seq'}", tuple(range(8)), "fsdp,seq"),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4), ""),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3), ""),
        ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", (0, 1, 4, 5), ""),
        ("mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}", (4, 5, 6, 7), "b"),
    ],
)
def test_collectives_know_their_groups_and_bytes(groups, members, axes):
    p = program(groups)
    found = collectives.collective(p, p.entry, p.entry.root)
    n = len(members)
    assert found == Collective("all-reduce", round(2 * 4 * 16 * 4 * (n - 1) / n), members, axes, "")


def test_unknown_groups_are_refused():
    p = program("somehow")
    with pytest.raises(ValueError, match="groups is not known"):
        collectives.collective(p, p.entry, p.entry.root)


def counted(text: str) -> float:
    """Returns the FLOPs of a whole program with its loops."""
    p = hlo.parse(text)

    def total(computation: hlo.Computation) -> float:
        flops = 0.0
        for i in computation.instructions:
            if i.opcode == "while":
                flops += instructions.trips(p, computation, i) * total(p.computations[i.attribute("body")])
            elif i.opcode == "call":
                flops += total(p.computations[i.attribute("to_apply")])
            else:
                flops += instructions.flops(p, computation, i)
        return flops

    return total(p.entry)


def test_products_of_a_scan_are_counted_as_often_as_they_run():
    """XLA's own analysis counts the body of a loop once."""
    x, w = jax.ShapeDtypeStruct((24, 32), jnp.float32), jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)
    scan = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]
    text = jax.jit(scan).lower(x, w).compile().as_text()
    assert counted(text) == 7 * 2 * 24 * 32 * 32


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # [4 8] x [8 16] as a TPU writes it
        ("f32[4,16]{1,0} convolution(%l, %r), dim_labels=bf_io->bf", 2 * 4 * 8 * 16),
        # a batch of 3: each position of the window meets one element of the padded operand
        (
            "f32[3,4,16]{2,1,0} convolution(%bl, %br), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
            "dim_labels=0bf_0io->0bf",
            2 * 3 * 4 * 8 * 16,
        ),
        # a sum over two dimensions, one written as a window
        ("f32[1,4,16]{2,1,0} convolution(%bl, %br), window={size=3}, dim_labels=0bf_0io->0bf", 2 * 3 * 4 * 8 * 16),
    ],
)
def test_convolutions_are_products(line, flops):
    p = hlo.parse(
        "ENTRY %m (l: f32[4,8]) -> f32[4,16] {\n"
        "  %l = f32[4,8]{1,0} parameter(0)\n  %r = f32[8,16]{1,0} parameter(1)\n"
        "  %bl = f32[3,4,8]{2,1,0} parameter(2)\n  %br = f32[3,8,16]{2,1,0} parameter(3)\n"
        f"  ROOT %out = {line}\n}}\n"
    )
    assert instructions.flops(p, p.entry, p.entry.root) == flops


def test_bytes_of_slices_and_updates_are_those_of_the_part():
    text = """
        %fused (stack: f32[9,8,16], at: s32[]) -> f32[1,8,16] {
          %stack = f32[9,8,16]{2,1,0} parameter(0)
          %at = s32[] parameter(1)
          %none = s32[] constant(0)
          %cut = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %at, %none, %none), dynamic_slice_sizes={1,8,16}
          ROOT %twice = f32[1,8,16]{2,1,0} add(%cut, %cut)
        }

        %outer (stack.2: f32[9,8,16], at.2: s32[]) -> f32[1,8,16] {
          %stack.2 = f32[9,8,16]{2,1,0} parameter(0)
          %at.2 = s32[] parameter(1)
          ROOT %inner = f32[1,8,16]{2,1,0} fusion(%stack.2, %at.2), kind=kLoop, calls=%fused
        }

        %wrapped (stack.3: f32[9,8,16]) -> f32[1,8,16] {
          %stack.3 = f32[9,8,16]{2,1,0} parameter(0)
          ROOT %one = f32[1,8,16]{2,1,0:S(1)} slice(%stack.3), slice={[0:1], [0:8], [0:16]}
        }

        ENTRY %m (stack.1: f32[9,8,16], at.1: s32[]) -> f32[9,8,16] {
          %stack.1 = f32[9,8,16]{2,1,0} parameter(0)
          %at.1 = s32[] parameter(1)
          %part = f32[1,8,16]{2,1,0} fusion(%stack.1, %at.1), kind=kLoop, calls=%fused
          %nested = f32[1,8,16]{2,1,0} fusion(%stack.1, %at.1), kind=kOutput, calls=%outer
          %begun = ((f32[9,8,16]{2,1,0}), f32[1,8,16]{2,1,0:S(1)}, u32[]) async-start(%stack.1), calls=%wrapped
          %kept = f32[1,8,16]{2,1,0:S(1)} copy(%part)
          ROOT %put = f32[9,8,16]{2,1,0} dynamic-update-slice(%stack.1, %part, %at.1, %at.1, %at.1)
        }
    """
    p = hlo.parse(textwrap.dedent(text).strip())
    moved = {i.name: instructions.hbm_bytes(p, p.entry, i) for i in p.entry.instructions}
    part = 8 * 16 * 4
    assert moved["part"] - 4 == 2 * part  # the slice read, the result written; and the index
    assert moved["nested"] == moved["part"]  # through a fusion within the fusion
    assert moved["begun"] == part  # a slice of the stack, brought to the chip beside other work
    assert moved["kept"] == part  # what stays on the chip is not written to memory
    assert moved["put"] == 2 * part
    assert moved["stack.1"] == 0


@pytest.mark.parametrize("note", ['{{"note":"a\n b"}}', '{"x":{"note":"a"\n}}'])
def test_instructions_over_several_lines_are_one(note):
    text = re.sub(r"\), channel_id=1", f"), backend_config={note}, channel_id=1", program_text())
    program = hlo.parse(text)
    assert program.entry.root.attribute("channel_id") == "1"
    assert program.computations.keys() == hlo.parse(program_text()).computations.keys()


def program_text() -> str:
    return textwrap.dedent(PROGRAM).replace("GROUPS", "{{0,1}}")


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 0)], "seq"),
        ([(0, 4), (4, 0), (1, 5), (5, 1)], "fsdp"),
        ([(i, (i + 1) % 8) for i in range(8)], "fsdp,seq"),
        ([(2, 2)], ""),
        ([], ""),
    ],
)
def test_axes_along_which_pairs_lie_apart(pairs, axes):
    assert axes_of(pairs, {"data": 1, "fsdp": 2, "seq": 4}) == axes
