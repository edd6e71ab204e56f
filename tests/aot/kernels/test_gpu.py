"""Static resources on GPUs: the parsers on a report and a listing written by hand, and, where the compilers are there,
kernels whose instructions are known. Nothing runs on a GPU.
"""

import importlib.util
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from rich.console import Console

from longattn.aot import compilers
from longattn.aot.kernels import gpu, gpu_command, sass
from longattn.aot.kernels.cases.gpu import CASES, Blocks, Shape
from longattn.mask import Full, Window
from tests.compilers import needs_cuda

# ---- the parsers

REPORT = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'b_2'
ptxas warning : Registers are spilled to local memory in function 'b_2', 96 bytes spill stores, 112 bytes spill loads
ptxas info    : 0 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 207.216 ms
ptxas info    : Compiling entry function 'b_2' for 'sm_90a'
ptxas info    : Function properties for called_by_b
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for b_2
    624 bytes stack frame, 96 bytes spill stores, 112 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 624 bytes cumulative stack size
ptxas info    : Compile time = 2.888 ms
"""


def test_assembled_reads_each_kernel_of_a_report():
    found = sass.assembled(REPORT)
    assert found["a"] == sass.Assembled("sm_90a", 168, 0, 0, 0, 1, ())
    assert (found["b_2"].registers, found["b_2"].shared_bytes, found["b_2"].stack_bytes) == (255, 0, 624)
    assert (found["b_2"].spill_store_bytes, found["b_2"].spill_load_bytes) == (96, 112)
    assert [w.split()[0] for w in found["b_2"].warnings] == ["Potential", "Registers"]
    assert sass.assembled("") == {}


@pytest.mark.parametrize("missing", ["Used 168 registers", "Function properties for a\n"])
def test_assembled_refuses_a_report_that_lacks_a_number(missing):
    with pytest.raises(ValueError, match="a: ptxas reports no registers or no stack frame"):
        sass.assembled(REPORT.replace(missing, ""))


LISTING = """\
        .target sm_90a
        .section        .text.a,"ax",@progbits
.text.a:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 UTMALDG.5D [UR8], [UR4], desc[UR10] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT, gsb0 ;
.L_x_1:
        /*0030*/             @!UP1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        .section        .nv.info.a,"",@"SHT_CUDA_INFO"
        .section        .text.b_2,"ax",@progbits
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0020*/              @UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
        /*10000*/                  LDG.E.64.CONSTANT R4, desc[UR4][R4.64] ;
"""


def test_instructions_counts_each_mnemonic_of_each_kernel():
    counts = sass.instructions(LISTING)
    assert counts["a"] == {"LDC": 1, "UTMALDG": 1, "HGMMA": 2, "BRA": 1, "USETMAXREG": 1}
    assert counts["b_2"] == {"HMMA": 1, "LDGSTS": 1, "UTCHMMA": 1, "LDG": 1}
    assert sass.of_kind(sass.TENSOR_CORE, counts["a"]) == {"HGMMA": 2}
    assert sass.of_kind(sass.TENSOR_CORE, counts["b_2"]) == {"HMMA": 1, "UTCHMMA": 1}
    assert sass.of_kind(sass.COPIES, counts["b_2"]) == {"LDG": 1, "LDGSTS": 1}


LOG = """\
#loc = loc("mpmd_map")
    %c1 = arith.constant 1 : index
    %mpmd_map3A_6 = arith.constant 165976 : i32 loc(#loc31)
    %mpmd_map3A_8 = gpu.launch async [%c1] dynamic_shared_memory_size %mpmd_map3A_6 {
    %mpmd_map3A_6 = arith.constant 7 : i32
    dynamic_shared_memory_size %mpmd_map3A_6
"""


def test_a_launch_tells_its_shared_memory(tmp_path):
    log = tmp_path / "entry_0.mlir-passes.log"
    log.write_text(LOG)
    assert gpu._launched(log) == 165_976
    for without in (LOG.replace("mpmd_map3A_6 = ", "x = "), LOG.replace("dynamic_shared_memory_size", "")):
        log.write_text(without)
        with pytest.raises(ValueError, match="entry_0.mlir-passes.log does not tell the shared memory"):
            gpu._launched(log)


def test_tensor_memory_is_read_off_its_allocations():
    ptx = "mov.b32 \t%r43, 512;\ntcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r42], %r43;\n"
    assert gpu._columns(ptx) == 512
    assert gpu._columns("mov.b32 %r43, 512;") == 0
    with pytest.raises(ValueError, match="does not tell how many columns"):
        gpu._columns(ptx.replace("512", "%r44"))


def test_a_program_without_a_pallas_kernel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the program has no Pallas kernel, but none"):
        gpu.kernels_of(tmp_path)


# ---- the options and the child


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cases": ()}, "needs a case; for gpu the cases are matmul"),
        ({"cases": ("matmul",), "archs": ()}, r"archs=\(\) must name at least one"),
        ({"cases": ("flash",)}, "unknown case 'flash'; the cases are matmul"),
        ({"cases": ("matmul",), "timeout": 0}, "timeout=0 must be positive"),
        ({"cases": ("matmul",), "bT": 96}, "bT=96 must be a multiple of 64 that divides T=8192"),
        ({"cases": ("matmul",), "stages": 1}, "stages=1 must be at least 2"),
        ({"cases": ("matmul",), "H": 0}, "H=0 must be at least 1"),
    ],
)
def test_mistaken_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gpu_command.ProfileOptions(**fields)


def child(tmp_path, monkeypatch, script: str) -> None:
    """Let `script`, a shell's, take the place of the process that compiles, and of its tools."""
    for name in ("python", "ptxas", "nvdisasm"):
        path = tmp_path / name
        path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo V1.2.3 && exit\n' + textwrap.dedent(script))
        path.chmod(0o755)
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(compilers.sys, "executable", str(tmp_path / "python"))


def test_a_compiler_that_aborts_is_a_row(tmp_path, monkeypatch, capsys):
    child(tmp_path, monkeypatch, "echo 'LLVM ERROR: cannot [select]' >&2; kill -ABRT $$")
    options = gpu_command.ProfileOptions(cases=("matmul", "jax_mgpu"), archs=("sm_90a",))
    document = gpu_command.run(options, Console(width=200))
    assert [(row["case"], row["reason"]) for row in document["rows"]] == [
        (case, "the compiler ended with -6: LLVM ERROR: cannot [select]") for case in ("matmul", "jax_mgpu")
    ]
    assert document["versions"]["ptxas"] == "1.2.3"
    said = capsys.readouterr().out
    assert "jax_mgpu on sm_90a: the compiler ended with -6: LLVM ERROR: cannot [select]" in said
    assert "compiled, not run" in said


def test_a_compiler_that_hangs_is_a_row(tmp_path, monkeypatch):
    child(tmp_path, monkeypatch, "sleep 100")
    (row,) = gpu.profile("matmul", "sm_90a", Shape(), timeout=0.2)
    assert row["reason"] == "the compiler took more than 0.2 s"


def test_missing_compilers_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="holds no compiler for GPUs: pip install --no-deps --target"):
        gpu_command.run(gpu_command.ProfileOptions(cases=("matmul",)))


# ---- the kernel that is counted


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])  # the interpreter knows no products of a warp
def test_matmul_multiplies(arch):
    fn, (square, _) = CASES["matmul"].build(Shape(T=256), Blocks(128, 64, 2), jnp.dtype("bfloat16"), arch)
    a, b = (jax.random.normal(jax.random.key(i), square.shape, square.dtype) for i in range(2))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.jit(fn)(a, b)
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_matmul_refuses_more_stages_than_steps():
    with pytest.raises(ValueError, match="T=256 must be at least 320, 64 for each of the stages"):
        CASES["matmul"].build(Shape(T=256), Blocks(128, 64, 5), jnp.dtype("bfloat16"), "sm_90a")


# ---- the compilers


@needs_cuda
@pytest.mark.parametrize(
    ("arch", "tensor_core", "copies", "shared"),
    [
        # HMMA is 16 x 8 x 16 by one of 4 warps: 128 x 128 x 64 of a step take 512 of them. A thread copies 16 bytes at
        # once: 16 times for the 32 KiB of a step, 3 steps ahead and one in the loop. LDSM reads 512 bytes: a warp reads
        # its quarter of a and all of b. 64 pairs of sums of each thread go out.
        pytest.param("sm_80", {"HMMA": 128}, {"LDGSTS": 64, "LDSM": 8 + 32, "ST": 64}, 0, marks=pytest.mark.slow),
        # wgmma is 64 x 128 x 16: 2 x 4. Two tiles are fetched for each of 4 stages, two within the loop; one goes out.
        ("sm_90a", {"HGMMA": 8}, {"UTMALDG": 10, "UTMASTG": 1}, 2 * 128 * 128 + 4 * 8),
        # tcgen05.mma is 128 x 128 x 16. 32 columns of sums at once come out of tensor memory.
        pytest.param(
            "sm_100a",
            {"UTCHMMA": 4},
            {"UTMALDG": 10, "UTMASTG": 1, "LDTM": 4},
            2 * 128 * 128 + 5 * 8 + 4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_matmul_holds_the_instructions_of_a_hand_count(arch, tensor_core, copies, shared, capsys):
    sizes = {"T": 4096, "bT": 128, "bS": 128, "stages": 4}
    gpu_command.run(gpu_command.ProfileOptions(cases=("matmul",), archs=(arch,), json=True, **sizes))
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == gpu_command.VERSION
    assert document["heading"] == "compiled, not run"
    assert set(document["versions"]) == {"jax", "jax-cuda13-plugin", "ptxas", "nvdisasm"}
    assert (document["options"]["mask"], document["options"]["archs"]) == ("Causal()", [arch])
    (row,) = document["rows"]
    assert "reason" not in row, row
    assert set(row) == {
        "case", "chip", "arch", "dtype", "blocks", "kernel", "pallas", "registers", "sets_registers",
        "spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_static_bytes", "shared_dynamic_bytes",
        "tensor_memory_columns", "threads", "tensor_core", "copies", "instructions", "warnings",
    }  # fmt: skip
    assert row["tensor_core"] == tensor_core
    assert {name: row["copies"].get(name) for name in copies} == copies
    # Blocks of a and b in 4 stages, of the result; the barriers of the stages and of the tensor core, 8 bytes each, and
    # the address in tensor memory.
    assert row["shared_dynamic_bytes"] == 2 * (4 * (128 + 128) * 64) + shared
    assert (row["threads"], row["arch"], row["chip"]) == (128, arch, gpu.CHIPS[arch])
    assert row["tensor_memory_columns"] == (128 if arch == "sm_100a" else 0)
    assert (row["spill_store_bytes"], row["spill_load_bytes"], row["stack_bytes"]) == (0, 0, 0)
    assert row["sets_registers"] is False
    assert (128 < row["registers"] < 255) == (arch != "sm_100a")  # else a thread holds 128 of the 128 x 128 sums
    assert row["warnings"] == []
    assert row["blocks"] == {"bT": 128, "bS": 128, "stages": 4}


@needs_cuda
@pytest.mark.slow
def test_what_does_not_fit_into_registers_spills():
    # 128 x 256 sums are 256 registers of each thread, which has 255.
    (row,) = gpu.profile("matmul", "sm_90a", Shape(T=4096, bT=128, bS=256, stages=3))
    assert row["tensor_core"] == {"HGMMA": 8}
    assert row["registers"] == 255
    assert row["spill_store_bytes"] > 0
    assert row["spill_load_bytes"] > 0
    (warning,) = row["warnings"]
    assert "serialized due to insufficient register resources" in warning


def compiled(case: str, arch: str = "sm_90a", **shape) -> dict[str, dict]:
    """The Pallas kernels of a case, by name."""
    rows = gpu.profile(case, arch, Shape(**shape))
    assert all("reason" not in row for row in rows), rows
    return {row["kernel"]: row for row in rows if row["pallas"]}


def spills(row: dict) -> tuple[int, int, int]:
    return row["spill_store_bytes"], row["spill_load_bytes"], row["stack_bytes"]


# What an independent tool found (shared memory without barriers, which are less than 128 bytes).


@pytest.mark.slow
@needs_cuda
def test_attention_of_jax_is_what_an_independent_tool_found():
    (row,) = compiled("jax_mgpu").values()
    assert (row["registers"], spills(row)) == (168, (0, 0, 0))
    assert row["sets_registers"] is True
    assert row["registers"] == 65_536 // row["threads"] // 8 * 8  # of the launch: all that there are, in eights
    assert 0 <= row["shared_dynamic_bytes"] - 165_888 < 128
    assert row["tensor_core"] == {"HGMMA": 32}
    assert row["copies"]["UTMALDG"] == 7


@needs_cuda
@pytest.mark.slow
def test_backward_of_jax_is_what_an_independent_tool_found():
    forward, *backward = compiled("jax_mgpu_backward", mask=Full()).values()
    assert (forward["registers"], forward["tensor_core"]) == (168, {"HGMMA": 12})
    by_results = {row["copies"]["UTMASTG"]: row for row in backward}
    assert {n: row["tensor_core"] for n, row in by_results.items()} == {2: {"HGMMA": 24}, 1: {"HGMMA": 20}}
    for row in backward:
        assert (row["registers"], spills(row)) == (255, (0, 0, 0))
        assert 0 <= row["shared_dynamic_bytes"] - 100_352 < 128


needs_tokamax = pytest.mark.skipif(not importlib.util.find_spec("tokamax"), reason="tokamax is not there: .[peers]")


@needs_cuda
@needs_tokamax
@pytest.mark.slow
def test_tokamax_is_what_an_independent_tool_found():
    (row,) = compiled("tokamax").values()
    assert (row["registers"], spills(row), row["tensor_core"]) == (168, (0, 0, 0), {"HGMMA": 32})
    assert 0 <= row["shared_dynamic_bytes"] - 163_840 < 128
    (row,) = compiled("tokamax", "sm_80").values()
    assert (spills(row), row["tensor_core"]) == ((0, 0, 0), {"HMMA": 128})
    assert row["registers"] == pytest.approx(196, rel=0.03)
    assert 0 <= row["shared_dynamic_bytes"] - 93_184 < 128


@needs_cuda
@pytest.mark.slow
def test_a_kernel_for_another_generation_is_a_row():
    (row,) = gpu.profile("jax_mgpu", "sm_100a", Shape())
    assert row["reason"].startswith("the compiler ended with -6: LLVM ERROR: Cannot select: intrinsic %llvm.nvvm.wgmma")
    (row,) = gpu.profile("jax_mgpu", "sm_80", Shape())
    assert "only supported Hopper and newer GPUs" in row["reason"]


@needs_cuda
def test_what_the_child_refuses_is_a_row():
    (row,) = gpu.profile("jax_mgpu", "sm_90a", Shape(mask=Window(5)))
    assert row == {
        "case": "jax_mgpu",
        "chip": "h100",
        "arch": "sm_90a",
        "dtype": "float16",
        "blocks": {"bT": 64, "bS": 128, "stages": 2},
        "reason": "NotImplementedError: jax_mgpu knows Causal() and Full() only, mask is Window(5, 0)",
    }
