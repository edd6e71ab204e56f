"""The static checks name the value and the remedy, and take ShapeDtypeStructs."""

import jax
import jax.numpy as jnp
import pytest

from longattn import shapes

x = jax.ShapeDtypeStruct((2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: shapes.check_rank("x", x, "B T H"), r"x.shape=\(2, 3\) must have rank 3: \[B T H\]"),
        (lambda: shapes.check_rank("x", [1.0], "B"), "x=.* must be an array; it is a list"),
        (lambda: shapes.check_shape("x", x, (3, 2), "T B"), r"x.shape=\(2, 3\) must be \(3, 2\), that is \[T B\]"),
        (lambda: shapes.check_dtype("x", x, ("int32",)), r"x.dtype=float32 must be int32; convert it with .astype"),
        (lambda: shapes.check_broadcast("x", x, (2, 1), "B T"), r"must be broadcastable to \(2, 1\)"),
        (lambda: shapes.check_broadcast("x", x, (3, 5), "B T"), r"must be broadcastable to \(3, 5\)"),
        (lambda: shapes.check_positive("x", 0), "x=0 must be positive and finite"),
        (lambda: shapes.check_positive("x", float("nan")), "must be positive and finite"),
        (lambda: shapes.check_positive("x", float("inf")), "must be positive and finite"),
        (lambda: shapes.check_positive("x", True), "must be a Python float"),
        (lambda: shapes.check_positive("x", jnp.ones(())), "must be a Python float"),
    ],
)
def test_errors(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_accepts():
    shapes.check_rank("x", x, "B T")
    shapes.check_shape("x", x, (2, 3), "B T")
    shapes.check_dtype("x", x, shapes.FLOATS)
    shapes.check_broadcast("x", x, (5, 2, 3), "N B T")
    assert isinstance(shapes.check_positive("x", 2), float)


def test_suggest():
    assert shapes.suggest("refrence", ["xla", "reference"]).startswith("did you mean 'reference'?")
    assert shapes.suggest("zzz", ["xla"]) == "known: xla"
