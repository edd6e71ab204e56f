"""Finds and calls the compilers for accelerators that are not attached.

libtpu compiles for any TPU, jax's CUDA plugin for any GPU. Each compilation runs in a process of its own with a time
limit, for three reasons. The compilers read their flags only once, when they load. They may abort or hang, which must
not stop the caller. And jax complains about a compiler whose device is missing, so only that process may see it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from longattn.cost import hardware
from longattn.cost.topology import Topology

FOLDER = "LONGATTN_AOT"  # environment variable: the folder that `pip install --target` put the compilers into


def _folder(module: str, marker: str, kind: str, name: str, packages: str) -> Path:
    """Returns the folder of a compiler's packages.

    It is `LONGATTN_AOT`, else where `module` is installed beside jax, else where make puts it: `aot` in the environment
    of this Python.

    Raises ValueError, with the remedy, if it is not installed.
    """
    if named := os.environ.get(FOLDER):
        if not (Path(named) / marker).exists():
            raise ValueError(f"{FOLDER}={named} holds no {kind}: pip install --no-deps --target {named} {packages}")
        return Path(named).resolve()
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent package is missing
        spec = None
    if spec is None or spec.origin is None:
        if Path(sys.prefix, "aot", marker).exists():
            return Path(sys.prefix, "aot").resolve()
        raise ValueError(
            f'{name} is not installed: pip install "longattn[aot]"; or, leaving other commands alone, pip install '
            f"--no-deps --target FOLDER {packages} and {FOLDER}=FOLDER, as make does in a clone"
        )
    return Path(spec.origin).parents[module.count(".") + 1]


def libtpu_folder() -> Path:
    """Returns the folder of the package libtpu. Raises ValueError, with the remedy, if it is not installed."""
    return _folder("libtpu", "libtpu/libtpu.so", "libtpu", "libtpu, the compiler for TPUs,", "libtpu")


def libtpu_version() -> str:
    """Returns libtpu's version."""
    found = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_folder())])
    return next((d.version for d in found), "unknown")


def tpu_environment(flags: str = "") -> dict[str, str]:
    """Returns the environment of a process that compiles for TPUs and computes on its CPU; `flags` go to libtpu."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(libtpu_folder() / "libtpu" / "libtpu.so"),
        "LIBTPU_INIT_ARGS": flags,
        # Keep libtpu from asking a metadata server, which is not there, about its machine.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }


def cuda_folder() -> Path:
    """Returns the folder of jax's plugin for CUDA. Raises ValueError, with the remedy, if it is not installed."""
    return _folder(
        "jax_plugins.xla_cuda13",
        "jax_plugins/xla_cuda13",
        "compiler for GPUs",
        "jax's plugin for CUDA, the compiler for GPUs,",
        "jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-nvdisasm",
    )


def cuda_tool(name: str) -> Path:
    """Returns the path of ptxas or nvdisasm: the one beside jax's plugin for CUDA, else the one on PATH.

    Raises ValueError, with the remedy, if there is none.
    """
    pinned = cuda_folder() / "nvidia" / "cu13" / "bin" / name
    if pinned.is_file():
        return pinned
    if found := shutil.which(name):
        return Path(found)
    package = {"ptxas": "nvidia-cuda-nvcc"}.get(name, f"nvidia-cuda-{name}")
    raise ValueError(f"{name} is neither in {cuda_folder()} nor on PATH: pip install --no-deps {package} there")


def cuda_versions() -> dict[str, str]:
    """Returns the versions of the compilers for GPUs by name."""
    found = importlib.metadata.distributions(name="jax-cuda13-plugin", path=[str(cuda_folder())])
    versions = {"jax-cuda13-plugin": next((d.version for d in found), "unknown")}
    for tool in ("ptxas", "nvdisasm"):
        output = subprocess.run([cuda_tool(tool), "--version"], capture_output=True, text=True, check=False).stdout
        number = re.search(r"\bV(\d[\d.]*)", output)
        versions[tool] = number[1] if number else "unknown"
    return versions


def cuda_environment() -> dict[str, str]:
    """Returns the environment of a process that compiles for GPUs and computes on its CPU."""
    ptxas = cuda_tool("ptxas")
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(cuda_folder()),
        # XLA and Mosaic emit PTX for the ptxas that they find here, so it must be the one that compiles it.
        "CUDA_ROOT": str(ptxas.parents[1]),
        "PATH": os.pathsep.join([str(ptxas.parent), os.environ.get("PATH", os.defpath)]),
    }


def gpu_topology(name: str, hosts: int = 1, devices: int = 1) -> topologies.TopologyDescription:
    """Describes `hosts` hosts with `devices` GPUs each, connected by NVLink within a host, without having them.

    Works in a process with `cuda_environment()`. Trace and lower under `jax.default_device(topology.devices[0])`:
    Pallas asks that device, and not the mesh, what it lowers for.

    Args:
      name: a key of `hardware.GPUS`.
      hosts: number of hosts. The GPUs of a host share a `process_index`; jax reports no slices here.
      devices: GPUs per host.

    Raises ValueError for an unknown GPU or a number below 1.
    """
    if name not in hardware.GPUS:
        raise ValueError(f"{name!r} is no GPU that can be compiled for; those are {', '.join(hardware.GPUS)}")
    if hosts < 1 or devices < 1:
        raise ValueError(f"{hosts=} and {devices=} must be at least 1")
    return topologies.get_topology_desc(
        topology_name=name,
        platform="cuda",
        topology=f"{hosts}x1x{devices}",  # slices x hosts per slice x devices per host
        target_config=hardware.gpu_target(name),
    )


def environment_of(where: Topology) -> dict[str, str]:
    """Returns the environment of a process that compiles for `where`. Raises ValueError if it has no compiler."""
    return cuda_environment() if where.is_gpu else tpu_environment()


def devices_of(where: Topology) -> list[Any]:
    """Returns the devices of `where`, in a process with `environment_of(where)`.

    Without `wrap` libtpu takes slices of v5p, v6e and tpu7x for meshes without wrap-around links, and compiles gathers
    over all their axes as sums of zero-padded arrays, which are twice the bytes.
    """
    if where.is_gpu:
        return list(gpu_topology(where.chip.name, *where.dims).devices)
    wrap = (*where.rings, False)[:3]  # libtpu counts three axes everywhere
    return list(topologies.get_topology_desc(topology_name=where.name, platform="tpu", wrap=wrap).devices)


def _inherited() -> dict[str, str]:
    """Returns this process's environment without variables that change a compiler's output."""
    return {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "XLA_FLAGS", "LIBTPU_INIT_ARGS"))}


_children: set[subprocess.Popen[str]] = set()


def stop() -> None:
    """Kills the compilations that other threads of this process wait for."""
    for child in list(_children):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def call(function: str, request: Mapping[str, Any], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Calls `function(request)` in a process of its own; returns its answer, or {"reason": why there is none}.

    Args:
      function: "module:name" of a function from JSON to JSON.
      request: its argument.
      environment: variables to set on top of this process's own.
      timeout: seconds.
    """
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory(prefix="longattn_aot_") as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.Popen(
            [sys.executable, "-c", "from longattn.aot import compilers; compilers.serve()", function, str(answer)],
            env={**_inherited(), **environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        _children.add(child)
        try:
            _, errors = child.communicate(json.dumps(request), timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"reason": f"the compiler took more than {timeout:g} s"}
        finally:
            _children.discard(child)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if not answer.is_file():
            # An aborting compiler prints its message, and then the stack of its signal handler.
            lines = [line.strip() for line in errors.split("\n*** ")[0].splitlines() if line.strip()]
            ended = f"the compiler ended with {child.returncode}"
            return {"reason": f"{ended}: {lines[-1] if lines else 'it said nothing'}"}
        found = json.loads(answer.read_text())
        where = found.pop("traceback", None)
        if where and os.environ.get("LONGATTN_TRACEBACK"):
            print(where, file=sys.stderr)
        return found


def serve() -> None:
    """Runs the child of `call`: reads a request on stdin and writes the answer to a file. It dies with its parent."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # No core dump in the caller's folder when a compiler aborts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    function, path = sys.argv[1:]
    module, name = function.split(":")
    request = json.load(sys.stdin)
    try:
        answer = getattr(importlib.import_module(module), name)(request)
    except Exception as error:  # compilers raise many classes; each becomes a row with its reason
        answer = {"reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    Path(path).write_text(json.dumps(answer))
