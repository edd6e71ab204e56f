"""Imports go down the floors only, and flax is imported in models alone."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "longattn").rglob("*.py"))

# From the ground up. A room may import itself and rooms on lower floors; rooms on one floor do not know each other.
FLOORS = (
    ("terminal", "files"),
    ("shapes", "compat", "environment", "display", "cache", "launch", "recorded"),
    ("mask",),
    ("config",),
    ("ops",),
    ("parallel", "numerics"),
    ("models",),
    ("cost", "tasks"),
    ("train",),
    ("aot",),
    ("bench", "plan"),
    ("study",),
    ("arguments",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CORE = {"jax", "jaxlib", "numpy", "jaxtyping"}  # what longattn.ops and longattn.parallel may need
THIRD_PARTY = {  # beyond CORE
    "models": {"flax"},
    "display": {"rich", "markupsafe"},
    "cost": {"rich"},
    "train": {"optax", "orbax", "grain", "rich", "tensorboardX", "psutil"},
    "aot": {"rich", "matplotlib", "tokamax", "flywheel_tpu"},
    "bench": {"rich", "matplotlib", "jinja2", "scipy", "torch", "tokamax"},
    "plan": {"rich", "jinja2"},
    "study": {"rich", "matplotlib", "jinja2", "markupsafe"},
    "arguments": {"tyro"},
}
IO = {
    "files", "environment", "display", "cache", "launch", "terminal", "recorded", "train", "aot", "bench", "plan",
    "study", "cli",
}  # fmt: skip
SHARE = 0.25  # of all lines, at most in one room


def module_of(path: pathlib.Path) -> str:
    """The dotted name below longattn: "ops.attention.api"; "ops" for ops/__init__.py; "__init__" for longattn's own."""
    parts = path.relative_to(ROOT / "longattn").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def imports_of(path: pathlib.Path) -> list[tuple[str, int]]:
    """Yields the dotted name and line of every import in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(f"{node.module}.{a.name}", node.lineno) for a in node.names]
    return found


def room_of(path: pathlib.Path) -> str:
    return module_of(path).split(".")[0]


@pytest.mark.parametrize("path", [f for f in FILES if room_of(f) != "__init__"], ids=module_of)
def test_imports_go_down(path):
    room = room_of(path)
    assert room in FLOOR, f"{path} belongs to no room: give {room} its floor in FLOORS"
    for name, line in imports_of(path):
        top, _, inner = name.partition(".")
        if top == "longattn":
            to = inner.split(".")[0]
            assert to == room or FLOOR[to] < FLOOR[room], f"{path}:{line}: {room} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in CORE | THIRD_PARTY.get(room, set()), f"{path}:{line}: {room} must not import {name}"


def test_no_room_is_too_large():
    lines: dict[str, int] = {}
    for path in FILES:
        lines[room_of(path)] = lines.get(room_of(path), 0) + len(path.read_text().splitlines())
    total = sum(lines.values())
    assert {room: n for room, n in lines.items() if n > SHARE * total} == {}, f"of {total} lines"


@pytest.mark.parametrize("path", [f for f in FILES if f.name == "__init__.py"], ids=module_of)
def test_init_files_only_re_export(path):
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] in (
            ["__all__"],
            ["_HOMES"],
        )
        lazily = isinstance(node, ast.If | ast.FunctionDef) and path.parent.name == "longattn"  # by PEP 562
        assert docstring or exports or lazily or isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}"


def test_public_names_are_listed_before_they_are_read():
    """They are imported when they are read, and a notebook completes what `dir` lists."""
    command = (
        "import sys, longattn; assert 'jax' not in sys.modules; assert set(longattn.__all__) <= set(dir(longattn))"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if room_of(f) not in IO],
    ids=module_of,
)
def test_no_input_or_output_below_train(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert name not in {"open", "print", "input", "read_text", "write_text", "read_bytes", "write_bytes"}, (
                f"{path}:{node.lineno}: {name}()"
            )


BARE = '''
import sys

class Bare:
    """Hides every package from `finder` that jax, numpy and jaxtyping do not install."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ALLOWED | sys.stdlib_module_names or top.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)

ALLOWED = {"longattn", "jax", "jaxlib", "numpy", "jaxtyping", "ml_dtypes", "opt_einsum", "scipy", "wadler_lindig"}
sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
for name in ("rich", "flax"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError(f"{name} was to be hidden")

import importlib, pkgutil
import longattn, longattn.ops
import jax.numpy as jnp

packages = [longattn.ops]
try:
    import longattn.parallel
    packages.append(longattn.parallel)
except ModuleNotFoundError as error:
    assert error.name == "longattn.parallel", error
for package in packages:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
x = jnp.ones((1, 4, 2, 8))
assert longattn.attention(x, x, x).shape == x.shape
'''


def test_ops_need_jax_numpy_and_jaxtyping_alone():
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
