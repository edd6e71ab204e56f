"""XLA's buffers, parsed from dumps as XLA writes them."""

import textwrap

import pytest

from longattn.aot import buffers, hlo

PROGRAM = """
    ENTRY %m (p0: f32[2,8], p1: f32[2,8], p2: s32[4]) -> f32[2,8] {
      %p0 = f32[2,8]{1,0} parameter(0), metadata={op_name="state.params[\\'w\\']"}
      %p1 = f32[2,8]{1,0} parameter(1), metadata={op_name="state.opt_state[0].mu[\\'w\\']"}
      %p2 = s32[4]{0} parameter(2), metadata={op_name="batch.tokens"}
      %cast = bf16[2,8]{1,0} convert(%p0)
      %kept = bf16[3,5]{1,0} custom-call(%cast), metadata={op_name="jit(f)/jvp(M)/layer_0/mlp/mul"}
      %chip = f32[9]{0:S(1)} custom-call()
      %both = (f32[2,8], f32[7]) custom-call(%kept), metadata={op_name="jit(f)/transpose(jvp(M))/layer_0/mlp/mul"}
      ROOT %new = f32[2,8]{1,0} add(%both#0, %p0)
    }
"""
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 64, page 0, parameter 0, shape |f32[2,8]| at ShapeIndex {}, maybe-live-out:
 value: <1 p0 @0> (size=64,offset=0): f32[2,8]{1,0}
 value: <2 new @0> (size=64,offset=0): f32[2,8]{1,0}
allocation 1: size 64, page 0, parameter 1, shape |f32[2,8]| at ShapeIndex {}:
 value: <3 p1 @0> (size=64,offset=0): f32[2,8]{1,0}
allocation 2: size 16, page 0, parameter 2, shape |s32[4]| at ShapeIndex {}:
 value: <4 p2 @0> (size=16,offset=0): s32[4]{0}
allocation 3: size 160, page 0, preallocated-temp:
 value: <5 cast @0> (size=32,offset=0): bf16[2,8]{1,0}
 value: <6 kept (phi) @0> (size=30,offset=32): bf16[3,5]{1,0}
 value: <7 both{0} @0> (size=64,offset=64): f32[2,8]{1,0}
 value: <8 both{1} @0> (size=28,offset=128): f32[7]{0}
allocation 4: size 36, color 1, page 0, preallocated-temp:
 value: <9 chip @1> (size=36,offset=0): f32[9]{0:S(1)}
"""
RANGES = """\
HloLiveRange (max 9):
  InstructionSequence:
    0:p0
  BufferLiveRange:
    p0{}:0-9
    p1{}:0-9
    p2{}:0-9
    cast{}:1-4
    kept{}:2-6
    chip{}:3-4
    both{0}:5-7
    both{1}:5-6
    new{}:8-9
  Live ranges at 3 (peak):
    p0{}: 64 bytes (cumulative: 64 bytes)
"""


@pytest.fixture
def folder(tmp_path):
    start = "module_0.jit_f.after_optimizations-"
    (tmp_path / f"{start}memory-usage-report.txt").write_text("Memory Space: default (color=0)\nTotal bytes: 300 (1)\n")
    (tmp_path / f"{start}buffer-assignment.txt").write_text(ASSIGNMENT)
    (tmp_path / f"{start}live-range.txt").write_text(RANGES)
    return tmp_path


def test_buffers_of_device_memory_are_named_where_they_need_most(folder):
    program = hlo.parse(textwrap.dedent(PROGRAM).strip())
    total, alive = buffers.account(folder, program, [(2, 8), (8, 16)])
    assert total == 300
    # The peak is at 5: state, batch, `kept` and both results. Values on the chip do not count.
    assert {(b.name, b.kind, b.type, b.bytes) for b in alive} == {
        ("state.params['w']", "parameters", "f32[2,8]", 64),
        ("state.opt_state[0].mu['w']", "moments", "f32[2,8]", 64),
        ("batch.tokens", "batch", "s32[4]", 16),
        ("layer_0/mlp/mul", "forward pass", "bf16[3,5]", 30),
        ("backward layer_0/mlp/mul", "gradients", "f32[2,8]", 64),
        ("backward layer_0/mlp/mul", "backward pass", "f32[7]", 28),
    }
    assert [b.bytes for b in alive] == sorted((b.bytes for b in alive), reverse=True)
    assert buffers.by_kind(alive) == {
        "parameters": 64, "moments": 64, "batch": 16, "gradients": 64, "gathered or cast parameters": 0,
        "forward pass": 30, "backward pass": 28, "other": 0,
    }  # fmt: skip


def test_a_missing_or_unknown_account_is_told(folder):
    program = hlo.parse(textwrap.dedent(PROGRAM).strip())
    (folder / "module_0.jit_f.after_optimizations-live-range.txt").write_text("something else")
    with pytest.raises(ValueError, match="not of a known form"):
        buffers.account(folder, program, [])
    (folder / "module_0.jit_f.after_optimizations-live-range.txt").unlink()
    with pytest.raises(ValueError, match="XLA wrote no live-range.txt"):
        buffers.account(folder, program, [])


@pytest.mark.parametrize(
    ("scope", "shown"),
    [
        ("jit(_train_step)/jvp(Transformer.hidden)/while", "forward"),
        ("jit(_train_step)/jvp(M)/while/body/eval_jaxpr/layers/layer_0/mlp/mul", "layer_0/mlp/mul"),
        ("jit(_train_step)/transpose(jvp(M))/while/body/checkpoint/layer_0/mlp/mul", "backward layer_0/mlp/mul"),
        ("jit(_train_step)/transpose(jvp())/while", "backward"),
        ("state.params[\\'embedding\\']", "state.params['embedding']"),
        ("", ""),
    ],
)
def test_scopes_are_shown_without_transformations(scope, shown):
    assert buffers.short(scope) == shown
