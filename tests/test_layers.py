"""Who may import whom: shapes, mask, config < ops < parallel < models < train; analysis reads all; flax in models."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "longattn").rglob("*.py"))

BASE = {"shapes", "mask", "config"}
ALLOWED = {  # package or module of longattn -> what it may import from longattn
    "shapes": set(),
    "mask": {"shapes"},
    "config": {"shapes", "mask"},
    "ops": BASE | {"ops"},
    "parallel": BASE | {"ops", "parallel"},
    "models": BASE | {"ops", "parallel", "models"},
    "tasks": BASE | {"tasks"},
    "train": BASE
    | {"ops", "parallel", "models", "tasks", "train", "launch"}
    | {f"analysis.{name}" for name in ("agreement", "cache", "cost", "hardware")},
    "analysis": BASE | {"ops", "parallel", "models", "tasks", "train", "analysis"},
    "analysis.hardware": BASE,  # these are below train, so they may not read it
    "analysis.cost": BASE | {"models"},
    "analysis.cache": BASE,
    "analysis.agreement": BASE | {"ops", "analysis.agreement"},
    "launch": set(),
    "cli": BASE | {"ops", "parallel", "models", "tasks", "train", "analysis", "launch", "cli"},
    "__main__": {"cli"},
    "__init__": BASE | {"ops", "parallel"},
}
CORE = {"jax", "jaxlib", "numpy", "jaxtyping"}  # what longattn.ops and longattn.parallel may need
THIRD_PARTY = {  # beyond CORE
    "models": {"flax"},
    "train": {"optax", "orbax", "grain", "rich", "tensorboardX", "psutil"},
    "analysis": {"rich", "matplotlib", "jinja2", "markupsafe", "scipy", "torch", "tokamax", "flywheel_tpu"},
    "cli": {"tyro", "rich"},
}


def module_of(path: pathlib.Path) -> str:
    """The dotted name below longattn: "ops.attention.api"; "ops" for ops/__init__.py; "__init__" for longattn's own."""
    parts = path.relative_to(ROOT / "longattn").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def imports_of(path: pathlib.Path) -> list[tuple[str, int]]:
    """Every (dotted name, line) that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found += [(f"{node.module}.{a.name}", node.lineno) for a in node.names]
    return found


def covered(name: str, allowed: set[str]) -> bool:
    """Whether `name` is one of `allowed` or lies inside one of them."""
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    module = module_of(path)
    parts = module.split(".")
    within = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    layer = next((name for name in within if name in ALLOWED), None)
    assert layer is not None, f"{path} belongs to no layer: say in ALLOWED what it may import"
    for name, line in imports_of(path):
        top, _, inner = name.partition(".")
        if top == "longattn":
            assert covered(inner, ALLOWED[layer]), f"{path}:{line}: {layer} must not import {name}"
        elif top not in sys.stdlib_module_names:
            allowed = CORE | THIRD_PARTY.get(module.split(".")[0], set())
            assert top in allowed, f"{path}:{line}: {layer} must not import {name}"


@pytest.mark.parametrize("path", [f for f in FILES if f.name == "__init__.py"], ids=module_of)
def test_init_files_only_re_export(path):
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        exports = isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]
        assert docstring or exports or isinstance(node, ast.Import | ast.ImportFrom), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if module_of(f).split(".")[0] not in ("train", "analysis", "cli", "launch")],
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
    """Finds what `finder` finds, but no other package than those that jax, numpy and jaxtyping install."""

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
