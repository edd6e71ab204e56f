"""Tests of longattn.compat: what is private in jax is read there alone."""

import pathlib
import re

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
