"""The compilers of accelerators that are not there: where they are, and how to call them.

libtpu compiles for any TPU without one. It reads its flags once, when it loads, and a compiler may abort or never end,
which must not take the rest of a table with it: so each compilation is a process of its own, with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "LONGATTN_AOT"  # a folder that `pip install --target` put the compilers into


def libtpu_folder() -> Path:
    """The folder that holds the package libtpu: `LONGATTN_AOT`, else where it is installed beside jax.

    Raises:
      ValueError: where there is none, with the remedy.
    """
    if named := os.environ.get(FOLDER):
        if not (Path(named) / "libtpu" / "libtpu.so").is_file():
            raise ValueError(f"{FOLDER}={named} holds no libtpu: pip install --no-deps --target {named} libtpu")
        return Path(named).resolve()
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise ValueError(
            f'libtpu, the compiler for TPUs, is not installed: pip install "longattn[aot]"; or, leaving other commands '
            f"alone, pip install --no-deps --target FOLDER libtpu and {FOLDER}=FOLDER, as make does in a clone"
        )
    return Path(spec.origin).parents[1]


def libtpu_version() -> str:
    """libtpu's version."""
    found = importlib.metadata.distributions(name="libtpu", path=[str(libtpu_folder())])
    return next((d.version for d in found), "unknown")


def tpu_environment(flags: str = "") -> dict[str, str]:
    """The variables under which a process compiles for TPUs and computes on its CPU; `flags` are libtpu's."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(libtpu_folder() / "libtpu" / "libtpu.so"),
        "LIBTPU_INIT_ARGS": flags,
        # No machine with a TPU is asked who it is.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }


def call(function: str, request: Mapping[str, Any], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """`function(request)` in a process of its own: its answer, or {"reason": why there is none}.

    Args:
      function: "module:name" of a function from JSON to JSON.
      request: what it is given.
      environment: variables to set, beside this process's own.
      timeout: seconds.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="longattn_aot_") as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.Popen(
            [sys.executable, "-c", "from longattn.analysis import aot; aot.serve()", function, str(answer)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _, said = child.communicate(json.dumps(request), timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"reason": f"the compiler took more than {timeout:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if not answer.is_file():
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            ended = f"the compiler ended with {child.returncode}"
            return {"reason": f"{ended}: {lines[-1] if lines else 'it said nothing'}"}
        return json.loads(answer.read_text())


def serve() -> None:
    """The child of `call`: a request on stdin, the answer in the file that is named."""
    function, path = sys.argv[1:]
    module, name = function.split(":")
    request = json.load(sys.stdin)
    try:
        answer = getattr(importlib.import_module(module), name)(request)
    except Exception as error:  # the compilers' refusals are of many classes; each becomes a row with its reason
        answer = {"reason": f"{type(error).__name__}: {error}"}
    Path(path).write_text(json.dumps(answer))
