"""Calls on arrays that lie on explicit mesh axes, as those of `jax.make_mesh` do: sharded by rows, heads or channels.

Rows do not meet, nor do heads of attention or channels of a convolution. So each device computes its own, and nothing
is sent. Inside of `shard_map`, and on axes that are Auto, a call passes through unchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = str | tuple[str, ...]  # "BTHD": a letter for each axis; several for an argument of several ranks


def _letters(x: Any, axes: Axes) -> str:
    """Returns the letters of an array's own axes: a bias may lack leading ones, arrays of a mask last ones."""
    if isinstance(axes, tuple):
        return next(a for a in axes if len(a) == x.ndim)
    return axes[-x.ndim :] if axes == "BHTS" else axes[: x.ndim].ljust(x.ndim, ".")


def _has_explicit_axes(x: Any) -> bool:
    """Returns whether an array lies on a mesh with explicit axes. This is asked of every argument of every call."""
    return isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _found(x: Any) -> P:
    """Returns over which explicit mesh axes an array is sharded, None for each axis that is whole."""
    if not _has_explicit_axes(x):
        return P(*[None] * x.ndim)
    sharding = jax.typeof(x).sharding
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types))

    def explicit(part: Any) -> Any:
        names = part if isinstance(part, tuple) else (part,)
        names = tuple(name for name in names if kinds.get(name) == AxisType.Explicit)
        return names[0] if len(names) == 1 else names or None

    return P(*map(explicit, sharding.spec), *[None] * (x.ndim - len(sharding.spec)))


def on_explicit_axes[R](
    arrays: Mapping[str, Axes], *, main: tuple[str, ...], along: str, results: tuple[str, ...]
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Makes a function of arrays one of arrays on explicit mesh axes too.

    Args:
      arrays: the axes of each parameter that holds arrays: one, a pair, or those of a mask.
      main: the parameters that say over which mesh axes. The others are resharded to fit.
      along: the axes that can be sharded: "BH" or "BE". An array in which one of them has size 1 is whole along it.
      results: the axes of each result, of which there are several or one.

    The function raises NotImplementedError where the main arrays are sharded otherwise, or unlike each other.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> R:
            sharded = [x for x in jax.tree.leaves((args, options)) if _has_explicit_axes(x) and any(_found(x))]
            if not sharded:
                return function(*args, **options)
            given = signature.bind(*args, **options).arguments
            present = {name: given[name] for name in arrays if given.get(name) is not None}

            of: dict[str, Any] = {}  # the mesh axes of each letter: the first array that is not 1 there says which
            for letter in along:
                places = [(given[name], arrays[name].index(letter)) for name in main]
                of[letter] = next((_found(x)[axis] for x, axis in places if x.shape[axis] > 1), None)

            def wanted(x: Any, axes: Axes) -> P:
                letters = _letters(x, axes)
                return P(*(of.get(letter) if size > 1 else None for letter, size in zip(letters, x.shape)))

            for name in main:
                x = given[name]
                if _found(x) != wanted(x, arrays[name]):
                    raise NotImplementedError(
                        f"{name} {list(x.shape)} is sharded as {_found(x)} over explicit mesh axes, where "
                        f"{wanted(x, arrays[name])} can be served: axes {' and '.join(along)}, alike in "
                        f"{', '.join(main)}. Use jax.sharding.reshard, or spread the sequence with longattn.parallel"
                    )
            mesh = jax.typeof(sharded[0]).sharding.mesh
            specs = {name: jax.tree.map(lambda x, a=arrays[name]: wanted(x, a), x) for name, x in present.items()}
            static = {name: x for name, x in given.items() if name not in present}
            out_specs = tuple(P(*map(of.get, axes)) for axes in results)
            return jax.shard_map(
                lambda local: function(**local, **static),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=out_specs if len(results) > 1 else out_specs[0],
            )(jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), present, specs))

        return call

    return decorate
