"""One comparison for all tests that only look at it."""

from __future__ import annotations

import pytest

from longattn.bench import compare
from tests.bench.compare.tiny import TINY, quiet


@pytest.fixture(scope="package")
def document(tmp_path_factory) -> dict:
    options = compare.CompareOptions(
        "attention_forward_backward", contestants=("xla", "reference", "jax_nn", "splash", "cudnn"),
        out=str(tmp_path_factory.mktemp("compare")), K=2, **TINY,
    )  # fmt: skip
    return compare.run(options, quiet())
