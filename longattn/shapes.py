"""The alphabet of array axes, its jaxtyping aliases, and static checks that raise ValueError.

`B` batch, `T` query positions, `S` key positions, `H` query heads, `K` key/value heads (`G = H // K`), `D` query/key
head size, `V` value head size, `E` model width, `F` MLP width, `W` vocabulary, `N` layers, `C` chunk length, `J` number
of chunks or blocks, `P` devices on the `seq` axis. Query head `h` reads key/value head `h // G`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

Query = Float[Array, "B T H D"]
Key = Float[Array, "B S K D"]
Value = Float[Array, "B S K V"]
Out = Float[Array, "B T H V"]
Statistic = Float[Array, "B T H"]
Logits = Float[Array, "B H T S"]
QueryIds = Int32[Array, "#B T"]  # positions or segment ids
KeyIds = Int32[Array, "#B S"]

Given = Any  # an argument as a caller gave it, before it is checked
Shaped = Any  # an array, or the ShapeDtypeStruct of one

FLOATS = ("bfloat16", "float16", "float32", "float64")


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype of accumulators, softmax statistics and states: float64 for float64 inputs, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: the closest known name, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"


def check_array(name: str, x: Given) -> None:
    """Raises ValueError unless `x` is an array, a tracer or a ShapeDtypeStruct."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise ValueError(f"{name}={x!r} must be an array; it is a {type(x).__name__}")


def check_shape(name: str, x: Given, expected: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless `x.shape == expected`, the sizes of `axes` (letters of the alphabet)."""
    check_array(name, x)
    if tuple(x.shape) != expected:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be {expected}, that is [{axes}]")


def check_rank(name: str, x: Given, axes: str) -> None:
    """Raises ValueError unless `x` has one axis per letter of `axes`."""
    check_array(name, x)
    if len(x.shape) != len(axes.split()):
        raise ValueError(f"{name}.shape={tuple(x.shape)} must have rank {len(axes.split())}: [{axes}]")


def check_dtype(name: str, x: Given, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the dtype of `x` is one of `allowed`."""
    check_array(name, x)
    if jnp.dtype(x.dtype).name not in allowed:
        remedy = f"; convert it with .astype(jnp.{allowed[0]})" if len(allowed) == 1 else ""
        raise ValueError(f"{name}.dtype={jnp.dtype(x.dtype).name} must be {' or '.join(allowed)}{remedy}")


def check_positive(name: str, x: Given) -> float:
    """Returns x as a float. Raises ValueError unless it is a positive, finite Python number: it is static."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise ValueError(f"{name}={x!r} must be a Python float: it is a constant of the compiled program, not an array")
    if not (math.isfinite(x) and x > 0):
        raise ValueError(f"{name}={x!r} must be positive and finite")
    return float(x)


def check_broadcast(name: str, x: Given, target: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless `x` broadcasts to `target`, the sizes of `axes`, without enlarging it."""
    check_array(name, x)
    try:
        fits = np.broadcast_shapes(tuple(x.shape), target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be broadcastable to {target}, that is [{axes}]")
