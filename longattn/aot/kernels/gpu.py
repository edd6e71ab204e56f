"""A Pallas kernel's resources on a GPU: compiled by XLA, Mosaic and ptxas in a process of its own, and taken apart.

What it says is whether a kernel fits and what it is made of: registers, spills, shared memory, which instructions
multiply and copy. It says nothing of time. Nothing here has run on a GPU.
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

CHIPS = {"sm_80": "a100-80", "sm_90a": "h100", "sm_100a": "b200"}  # which GPU has which instruction set

_MOSAIC = "MOSAIC_GPU_DUMP_TO"  # Mosaic's variable, read as it lowers and as it compiles
_ENTRY = "_mosaic_gpu_kernel"  # how the names of its kernels end

_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_THREADS = re.compile(r"\.entry (?P<kernel>[\w$.]+)\([^{]*?\.(?:maxntid|reqntid) (?P<threads>\d+(?:, *\d+)*)")
_LAUNCHED = re.compile(r"(?P<kernel>\S+) grid: .* shared_memory: (?P<bytes>\d+) bytes")  # by XLA itself
_CONSTANT = re.compile(r"(?P<name>%\w+) = arith\.constant (?P<value>\d+) : i32")
_SHARED = re.compile(r"dynamic_shared_memory_size (?P<name>%\w+)")
_COLUMNS = re.compile(r"tcgen05\.alloc\.[\w.:]+ \[%\w+\], (?P<register>%\w+);")


def compile_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one case for one GPU in this process, whose environment is `aot.cuda_environment()` and Mosaic's folder.

    Returns:
      {"kernels": one JSON object per kernel, Pallas's first}
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
    """The kernels whose PTX was dumped into `folder`, Pallas's first.

    Raises:
      ValueError: where none is Pallas's, or the compilers write what is not known here.
    """
    launches = "\n".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    asked = {m["kernel"]: int(m["bytes"]) for m in _LAUNCHED.finditer(launches)}
    pallas, others = [], []
    number = lambda path: path.stem.rpartition("_")[2]  # in the order of compilation
    for path in sorted(folder.glob("*.ptx"), key=lambda path: (len(number(path)), number(path), path.stem)):
        log = path.with_suffix(".mlir-passes.log")
        for kernel in _assemble(path):
            name = kernel["kernel"]
            if name.endswith(_ENTRY):
                pallas.append({**kernel, "kernel": path.stem, "pallas": True, "shared_dynamic_bytes": _launched(log)})
            else:
                others.append({**kernel, "pallas": False, "shared_dynamic_bytes": asked.get(name, 0)})
    if not pallas:
        raise ValueError(f"the program has no Pallas kernel, but {', '.join(k['kernel'] for k in others) or 'none'}")
    return pallas + others


def _launched(log: Path) -> int:
    """Bytes of shared memory that a launch asks for, from what Mosaic's passes were given: barriers are among them."""
    values: dict[str, int] = {}
    with log.open() as lines:  # of up to 100 MB, whose beginning tells
        for line in lines:
            if constant := _CONSTANT.search(line):
                values[constant["name"]] = int(constant["value"])
            elif shared := _SHARED.search(line):
                if shared["name"] in values:
                    return values[shared["name"]]
                break
    raise ValueError(f"{log.name} does not tell the shared memory of a launch")


def _columns(ptx: str) -> int:
    """Columns of tensor memory that a kernel takes."""
    total = 0
    for taken in _COLUMNS.finditer(ptx):
        moved = re.findall(rf"mov\.b32\s+{re.escape(taken['register'])}, (\d+);", ptx)
        if len(moved) != 1:
            raise ValueError(f"the PTX does not tell how many columns {taken[0]} takes")
        total += int(moved[0])
    return total


def _assemble(ptx: Path) -> list[dict[str, Any]]:
    """The kernels of one file of PTX, as ptxas and nvdisasm show them."""
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
    """The rows of one case and one instruction set, as JSON: one per kernel; or one with a `reason` why there is none.

    Args:
      case: a key of `CASES`.
      arch: a key of `CHIPS`.
      shape: what the case is built for.
      timeout: seconds for the compilation.

    Raises:
      ValueError: where the compilers are not installed, with the remedy.
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
