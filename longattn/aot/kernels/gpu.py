"""Reports a Pallas kernel's resources on a GPU: XLA, Mosaic and ptxas compile it in a process of its own.

The report says whether a kernel fits and what it consists of: registers, spills, shared memory, and the instructions
that multiply and copy. It says nothing about time. Nothing here has run on a GPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from longattn import mask
from longattn.aot import compilers
from longattn.aot.kernels import sass
from longattn.aot.kernels.cases.gpu import CASES, Shape

CHIPS = {"sm_80": "a100-80", "sm_90a": "h100", "sm_100a": "b200"}  # the GPU of each instruction set

_MOSAIC = "MOSAIC_GPU_DUMP_TO"  # Mosaic reads this variable while lowering and while compiling
_ENTRY = "_mosaic_gpu_kernel"  # suffix of Mosaic's kernels

_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_THREADS = re.compile(r"\.entry (?P<kernel>[\w$.]+)\([^{]*?\.(?:maxntid|reqntid) (?P<threads>\d+(?:, *\d+)*)")
_LAUNCHED = re.compile(r"(?P<kernel>\S+) grid: .* shared_memory: (?P<bytes>\d+) bytes")  # launched by XLA itself
_CONSTANT = re.compile(r"(?P<name>%\w+) = arith\.constant (?P<value>\d+) : i32")
_SHARED = re.compile(r"dynamic_shared_memory_size (?P<name>%\w+)")
_COLUMNS = re.compile(r"tcgen05\.alloc\.[\w.:]+ \[%\w+\], (?P<register>%\w+);")


def compile_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a case in this process, whose environment is `compilers.cuda_environment()` and Mosaic's folder.

    Returns {"kernels": one JSON object per kernel, Pallas's first}.
    """
    shape = Shape(**{**request["shape"], "mask": mask.parse(request["shape"]["mask"])})
    case = CASES[request["case"]]
    device = compilers.gpu_topology(CHIPS[request["arch"]]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):
        fn, arrays = case.build(shape, case.blocks_of(shape), jnp.dtype(case.dtype), request["arch"])
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays]
        lowered = jax.jit(fn).trace(*arrays).lower()
    folder = Path(os.environ[_MOSAIC])
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx"})
    return {"kernels": kernels_of(folder)}


def kernels_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the kernels whose PTX is in `folder`, Pallas's first.

    Raises ValueError if none is Pallas's, or the dumps have an unknown form.
    """
    launches = "\n".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    dynamic = {m["kernel"]: int(m["bytes"]) for m in _LAUNCHED.finditer(launches)}
    pallas, xla = [], []
    number = lambda path: path.stem.rpartition("_")[2]  # counts compilations
    for path in sorted(folder.glob("*.ptx"), key=lambda path: (len(number(path)), number(path), path.stem)):
        log = path.with_suffix(".mlir-passes.log")
        for kernel in _assemble(path):
            name = kernel["kernel"]
            if name.endswith(_ENTRY):
                pallas.append({**kernel, "kernel": path.stem, "pallas": True, "shared_dynamic_bytes": _launched(log)})
            else:
                xla.append({**kernel, "pallas": False, "shared_dynamic_bytes": dynamic.get(name, 0)})
    if not pallas:
        raise ValueError(f"the program has no Pallas kernel, but {', '.join(k['kernel'] for k in xla) or 'none'}")
    return pallas + xla


def _launched(log: Path) -> int:
    """Returns the shared memory of a launch in bytes, barriers included, from the input of Mosaic's passes."""
    values: dict[str, int] = {}
    with log.open() as lines:  # up to 100 MB, but the answer comes early
        for line in lines:
            if constant := _CONSTANT.search(line):
                values[constant["name"]] = int(constant["value"])
            elif shared := _SHARED.search(line):
                if shared["name"] in values:
                    return values[shared["name"]]
                break
    raise ValueError(f"{log.name} does not tell the shared memory of a launch")


def _columns(ptx: str) -> int:
    """Returns the columns of tensor memory that a kernel allocates."""
    total = 0
    for taken in _COLUMNS.finditer(ptx):
        moved = re.findall(rf"mov\.b32\s+{re.escape(taken['register'])}, (\d+);", ptx)
        if len(moved) != 1:
            raise ValueError(f"the PTX does not tell how many columns {taken[0]} takes")
        total += int(moved[0])
    return total


def _assemble(ptx: Path) -> list[dict[str, Any]]:
    """Assembles a file of PTX; returns its kernels as ptxas and nvdisasm report them."""
    text, program = ptx.read_text(), ptx.with_suffix(".cubin")
    target = _TARGET.search(text)
    if target is None:
        raise ValueError(f"{ptx.name} names no target")
    arguments = ["-v", f"-arch={target[1]}", str(ptx), "-o", str(program)]
    report = _run("ptxas", arguments).stderr
    counts = sass.instructions(_run("nvdisasm", ["-c", str(program)]).stdout)
    threads = {m["kernel"]: math.prod(map(int, m["threads"].split(","))) for m in _THREADS.finditer(text)}
    return [
        {
            "kernel": name,
            "arch": kernel.arch,
            "registers": kernel.registers,
            "sets_registers": sass.SETS_REGISTERS in counts[name],
            "spill_store_bytes": kernel.spill_store_bytes,
            "spill_load_bytes": kernel.spill_load_bytes,
            "stack_bytes": kernel.stack_bytes,
            "shared_static_bytes": kernel.shared_bytes,
            "threads": threads.get(name),
            "tensor_memory_columns": _columns(text),
            "tensor_core": sass.of_kind(sass.TENSOR_CORE, counts[name]),
            "copies": sass.of_kind(sass.COPIES, counts[name]),
            "instructions": sum(counts[name].values()),
            "warnings": list(kernel.warnings),
        }
        for name, kernel in sass.assembled(report).items()
    ]


def _run(tool: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([compilers.cuda_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{tool} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def profile(case: str, arch: str, shape: Shape, timeout: float = 300) -> list[dict[str, Any]]:
    """Returns one row per kernel of a case for one instruction set, or a single row with the `reason` of a failure.

    Args:
      case: a key of `CASES`.
      arch: a key of `CHIPS`.
      shape: shape of the case.
      timeout: seconds for the compilation.

    Raises ValueError, with the remedy, if the compilers are not installed.
    """
    row: dict[str, Any] = {"case": case, "chip": CHIPS[arch], "arch": arch, "dtype": CASES[case].dtype}
    try:
        blocks = CASES[case].blocks_of(shape)
    except NotImplementedError as error:
        return [{**row, "blocks": None, "reason": f"NotImplementedError: {error}"}]
    row["blocks"] = blocks and vars(blocks)
    with tempfile.TemporaryDirectory(prefix="longattn_static_") as folder:
        request = {"case": case, "arch": arch, "shape": {**vars(shape), "mask": str(shape.mask)}}
        environment = {**compilers.cuda_environment(), _MOSAIC: folder}
        answer = compilers.call("longattn.aot.kernels.gpu:compile_here", request, environment, timeout)
    if "reason" in answer:
        return [{**row, "reason": " ".join(answer["reason"].split())[:500]}]
    return [{**row, **kernel} for kernel in answer["kernels"]]
