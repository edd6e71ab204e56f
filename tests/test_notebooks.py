"""The notebooks: clean, thin, and run in an environment where only their first cell has installed anything."""

import ast
import builtins
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEWER = {  # of what a notebook measures, where all that counts is that it runs
    "01_cost_and_recall": {
        "lengths=(512, 1024, 2048, 4096)": "lengths=(256, 512), tokens=256",
        "mqar_steps=150": "mqar_steps=5",
    },
    "02_comparing_kernels": {
        "T=1024 if on_cpu": "T=256 if on_cpu",
        "rounds=10": "rounds=3",
        "(256, 512, 1024, 2048) if on_cpu": "(128, 256) if on_cpu",
    },
}
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def sources(path: pathlib.Path) -> list[str]:
    """The code cells, without their magics."""
    cells = nbformat.read(path, as_version=4).cells
    return [re.sub(r"(?m)^%.*$", "pass", cell.source) for cell in cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@BY_NAME
def test_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], "clear the outputs before committing"
            assert cell.execution_count is None


@BY_NAME
def test_defines_nothing(path):
    """Functions and classes belong in the package; what a slider calls is the exception, and short."""
    for source in sources(path):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert any("interact" in ast.unparse(d) for d in node.decorator_list), node.name
                assert node.end_lineno - node.lineno <= 12, f"{node.name} is long enough to belong in the package"


@BY_NAME
def test_every_name_is_bound(path):
    tree = ast.parse("\n".join(sources(path)))
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.arg):
            bound.add(node.name if isinstance(node, ast.FunctionDef) else node.arg)
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} <= bound


@BY_NAME
def test_first_cell_asks_for_a_restart(path, monkeypatch):
    """An imported numpy of another version than the installed one stops the notebook and says what to do."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    first = sources(path)[0]
    exec(first, {})
    assert pathlib.Path.cwd() == ROOT
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.raises(SystemExit, match=r"(?i)restart.*numpy 1\.0"):
        exec(first, {})


@BY_NAME
def test_first_cell_asks_for_a_repository(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(sources(path)[0], {})


def test_first_cells_are_the_same():
    """So that one environment may serve all: whichever runs first has installed what they all install."""
    assert len({sources(path)[0] for path in NOTEBOOKS}) == 1


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A clone, a Python that has what a notebook's server has, and the variables to run it with."""
    clone, env = tmp_path_factory.mktemp("machine") / "longattn", tmp_path_factory.mktemp("env")
    leave = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, clone, ignore=leave)
    for path in (clone / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        for many, few in FEWER.get(path.stem, {}).items():
            assert text.count(many) == 1, many
            text = text.replace(many, few)
        path.write_text(text)
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    python = env / "bin" / "python"
    # The notebook is no part of this suite; TPU_ ones are what importing jax has set. CI pins what a reader need not.
    left_out = ("PYTEST_", "COV_", "TPU_", "PYTHONPATH", "MPLBACKEND")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    variables["PIP_CONSTRAINT"] = str(clone / "constraints.txt")
    variables["PIP_NO_COMPILE"] = "1"  # the few modules that are imported, Python compiles itself
    # IPython, and what reads the file.
    install = [python, "-m", "pip", "install", "--quiet", "ipykernel", "nbformat"]
    subprocess.run(install, check=True, env=variables)
    return clone, python, variables


@pytest.mark.slow
@BY_NAME
def test_runs_where_only_its_first_cell_installed_anything(path, machine):
    """Cell by cell in one IPython, without a kernel: now and then the reply of a kernel under load never comes."""
    clone, python, variables = machine
    command = [python, "-m", "IPython", "--no-banner", "--colors=NoColor", path.name]
    done = subprocess.run(command, cwd=clone / "notebooks", env=variables, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("<Figure") >= 3
