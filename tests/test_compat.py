"""Tests of longattn.compat: what is private in jax is read there alone."""

import pathlib
import re
import tomllib

import pytest
from jax.experimental.pallas import tpu as pltpu

from longattn import compat

ROOT = pathlib.Path(__file__).parents[1]


def test_nothing_else_reads_private_modules_or_versions():
    private = re.compile(r"^\s*(?:from|import) (?:jax|jaxlib)\._src|jax\.version|jax\.__version_info__", re.MULTILINE)
    readers = {path.name for path in (ROOT / "longattn").rglob("*.py") if private.search(path.read_text())}
    assert readers == {"compat.py"}


def test_the_interpret_mode_is_read():
    assert not compat.interpreted_as_tpu()
    with pltpu.force_tpu_interpret_mode():
        assert compat.interpreted_as_tpu()
    assert not compat.interpreted_as_tpu()


def test_one_process_has_no_coordination_client():
    assert compat.coordination_client() is None


@pytest.mark.parametrize("extra", ["core", "train"])
def test_oldest_is_what_is_tested(extra):
    """`make test-oldest` installs the lower bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] if extra == "core" else project["optional-dependencies"][extra]
    pins = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / ".ci" / "oldest" / f"{extra}.txt").read_text(), re.MULTILINE))
    for requirement in needed:
        name, bound = requirement.split(">=")
        parts = bound.split(".")
        parts += ["0"] * (3 - len(parts))
        assert pins[name] == ".".join(parts), requirement
