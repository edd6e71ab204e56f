"""Choosing a back end: an ordered table, refusals with reasons before any compute, never a silent fall-back.

An operation keeps a table {name: module}, best first. Each module has `check(...)`: it raises NotImplementedError with
a reason where the back end cannot serve the call, and returns the plan of the call otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.compat import interpreted_as_tpu
from longattn.shapes import Given, suggest

BackEnd = Any  # a module with the names that its op's contract.py lists


def vary_together[Tree](tree: Tree) -> Tree:
    """Returns the same arrays, each varying over every manual mesh axis that any of them varies over.

    Under shard_map(check_vma=True) replicated arrays meet sharded ones here, once, so a back end sees one axis type in
    its loop carries and cotangents. The transpose sums the gradients of replicated arrays. Outside of shard_map nothing
    changes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    axes = sorted(frozenset().union(*varying))
    missing = [tuple(axis for axis in axes if axis not in own) for own in varying]
    return treedef.unflatten(jax.lax.pcast(x, m, to="varying") if m else x for x, m in zip(leaves, missing))


def fold_vmap[R](function: Callable[..., R], *arrays: Any, shared: tuple[int, ...] = ()) -> R:
    """Returns `function(*arrays)` for trees of arrays [B ...]; vmap's axis is folded into B.

    Pallas's own rule would prepend a grid axis, and our kernels iterate over the grid serially.

    Args:
      shared: indices of arguments whose arrays may be [1 ...] beside B > 1; those that vmap does not map stay [1 ...].
    """
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def _rule(size: int, batched: Any, *arrays: Any) -> Any:
        B = arrays[0].shape[int(batched[0])]

        def fold(x: Array, batched: bool, shared: bool) -> Array:
            if shared and not batched and x.shape[0] == 1:
                return x
            x = x if batched else x[None]
            return jnp.broadcast_to(x, (size, B, *x.shape[2:])).reshape(size * B, *x.shape[2:])

        pairs = enumerate(zip(arrays, batched))
        folded = [jax.tree.map(functools.partial(fold, shared=i in shared), *pair) for i, pair in pairs]
        out = call(*folded)
        return jax.tree.map(lambda x: x.reshape(size, B, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return call(*arrays)


def once[R](backward: Callable[..., R], *arrays: Any) -> R:
    """Returns `backward(*arrays)`, a back end's gradients; differentiating them raises an error that names the remedy.

    Raises:
      NotImplementedError: in jvp, linearisation and reverse mode.
    """
    rule = jax.custom_jvp(backward)

    @rule.defjvp
    def refuse(primals: object, tangents: object) -> NoReturn:
        raise NotImplementedError(
            "gradients of this back end cannot be differentiated again; implementation='reference' has derivatives "
            "of any order, in both modes"
        )

    return rule(*arrays)


class Target(NamedTuple):
    """The device that a program is compiled for."""

    platform: str  # "cpu", "tpu", "gpu"
    kind: str  # such as "TPU v5 lite", "NVIDIA H100 80GB HBM3"


def target() -> Target:
    """Returns the device of the abstract mesh if one is set (attached to this host or not), else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Target(device.platform, device.device_kind)


def require_tpu(dtype: DTypeLike) -> None:
    """Raises NotImplementedError unless the target is a TPU (or interpreted as one) that multiplies `dtype`."""
    to = target()
    if to.platform != "tpu" and not interpreted_as_tpu():
        raise NotImplementedError(f"the kernels are for TPUs, the target is {to.kind!r}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype} products are not what TPUs have; cast to bfloat16 or float32")


def candidates(implementation: Given, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """Returns the back ends to try, in order: `default` for None, else those given. All must be `known`."""
    if implementation is None:
        return tuple(default)
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not names:
        raise ValueError(f"{implementation=} must be None, a name or a sequence of names; {suggest('', known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"implementation {name!r} must be a back end of this op; {suggest(str(name), known)}")
    return tuple(names)


def check_tuning(tuning: Given, implementation: Given, names: Sequence[str], table: Mapping[str, BackEnd]) -> None:
    """Raises ValueError unless `tuning` is None, or the Tuning of exactly one named back end."""
    if tuning is None:
        return
    if implementation is None or len(names) != 1:
        raise ValueError(f"{tuning=} must come with exactly one named implementation; {implementation=}")
    if not isinstance(tuning, getattr(table[names[0]], "Tuning", type(None))):
        raise ValueError(f"{tuning=} must be None or a Tuning of {names[0]!r}")


def choose[Plan](
    names: Sequence[str], table: Mapping[str, BackEnd], check: Callable[[BackEnd], Plan]
) -> tuple[str, Plan]:
    """Returns the first back end of `names` that accepts the call, and the plan that its check returned.

    Args:
      names: candidates, best first.
      table: back ends by name.
      check: calls a back end's check, which raises NotImplementedError(reason) or returns its plan.

    Raises:
      NotImplementedError: with the reason of each candidate, if all refuse.
    """
    reasons = []
    for name in names:
        try:
            return name, check(table[name])
        except NotImplementedError as refusal:
            reasons.append(f"{name}: {refusal}")
    raise NotImplementedError("no back end accepts this call; " + "; ".join(reasons))
