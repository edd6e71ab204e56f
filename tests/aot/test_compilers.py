"""Compilers in processes of their own: missing, aborting and hanging ones are reported."""

import pytest

from longattn.aot import compilers
from tests.compilers import needs_cuda


def double(request):
    if request["x"] < 0:
        raise NotImplementedError("negative numbers are not doubled")
    return {"y": 2 * request["x"]}


def test_call_answers_or_gives_the_reason():
    assert compilers.call("tests.aot.test_compilers:double", {"x": 2}, {}, 60) == {"y": 4}
    refused = compilers.call("tests.aot.test_compilers:double", {"x": -1}, {}, 60)
    assert refused == {"reason": "NotImplementedError: negative numbers are not doubled"}


def test_missing_compiler_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(compilers.FOLDER, raising=False)
    monkeypatch.setattr(compilers.sys, "prefix", str(tmp_path / "environment"))
    with pytest.raises(ValueError, match=r'pip install "longattn\[aot\]"'):
        compilers.libtpu_folder()
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="holds no libtpu"):
        compilers.libtpu_folder()


def test_the_compilers_that_make_installed_are_found_without_a_variable(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(compilers.FOLDER, raising=False)
    monkeypatch.setattr(compilers.sys, "prefix", str(tmp_path))
    (tmp_path / "aot" / "libtpu").mkdir(parents=True)
    (tmp_path / "aot" / "libtpu" / "libtpu.so").touch()
    assert compilers.libtpu_folder() == (tmp_path / "aot").resolve()


def test_missing_compiler_for_gpus_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(compilers.FOLDER, raising=False)
    monkeypatch.setattr(compilers.sys, "prefix", str(tmp_path / "environment"))
    with pytest.raises(ValueError, match=r'pip install "longattn\[aot\]".*jax-cuda13-plugin'):
        compilers.cuda_folder()
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match="holds no compiler for GPUs: pip install --no-deps --target"):
        compilers.cuda_environment()
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ptxas is neither in .* nor on PATH: pip install --no-deps nvidia-cuda-nvcc"):
        compilers.cuda_environment()
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho Cuda compilation tools, release 1.2, V1.2.3\n")
    ptxas.chmod(0o755)
    assert compilers.cuda_tool("ptxas") == ptxas  # the one on PATH, where none is pinned


def test_call_tells_what_was_said_before_a_stack(monkeypatch, tmp_path):
    child = tmp_path / "python"
    child.write_text(
        "#!/bin/sh\nprintf 'hello\\nLLVM ERROR: no\\n*** SIGABRT received ***\\nPC: @ 0x7f\\n' >&2\nexit 3\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(compilers.sys, "executable", str(child))
    assert compilers.call("a:b", {}, {}, 60) == {"reason": "the compiler ended with 3: LLVM ERROR: no"}


def gpus(request):
    topology = compilers.gpu_topology(**request)
    return {"devices": [(d.process_index, d.device_kind, d.compute_capability) for d in topology.devices]}


@needs_cuda
def test_topology_of_gpus():
    answer = compilers.call(
        "tests.aot.test_compilers:gpus", {"name": "h100", "hosts": 2, "devices": 4}, compilers.cuda_environment(), 60
    )
    assert answer == {"devices": [[host, "NVIDIA H100 80GB HBM3", "9.0"] for host in (0, 0, 0, 0, 1, 1, 1, 1)]}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "h10"}, "'h10' is no GPU that can be compiled for; those are a100-40"),
        ({"name": "h100", "hosts": 0}, "hosts=0"),
    ],
)
def test_topology_refuses(request_, message):
    with pytest.raises(ValueError, match=message):
        compilers.gpu_topology(**request_)
