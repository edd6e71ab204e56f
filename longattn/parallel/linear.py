"""Linear attention over a mesh: sequences, their tokens and heads divided among devices.

The devices that share a sequence hand on states: see `longattn.parallel.linear_state`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from longattn.ops.linear.api import linear_attention as local_linear_attention
from longattn.ops.linear.api import validate
from longattn.ops.linear.contract import Beta, Decay, Ids, Key, Out, Query, State, Value
from longattn.parallel import linear_state
from longattn.parallel.layout import Axis, devices_on
from longattn.parallel.mesh import axes, divide_rows, divide_tokens


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "axis", "head", "options", "names"))
def _linear_attention(arrays, *, mesh, batch, axis, head, options, names):
    heads = 1 if head is None else mesh.shape[head]
    along = axis if devices_on(mesh, axis) > 1 and 0 not in arrays[0].shape[:2] else None
    tokens = lambda x: None if x is None else P(batch, along, head if x.shape[2] % heads == 0 else None)
    q, k, v, log_decay, beta, state, ids = arrays
    decays = P(head) if log_decay is not None and log_decay.ndim == 1 else tokens(log_decay)
    states = P(batch, head)
    specs = (tokens(q), tokens(k), tokens(v), decays, tokens(beta), None if state is None else states)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*specs, None if ids is None else P(batch, along)),
        out_specs=(P(batch, along, head), states),
        check_vma=True,
    )
    def local(q, k, v, log_decay, beta, state, ids):
        if along is not None:
            return linear_state.attend(q, k, v, log_decay, beta, state, ids, axis, options, names)
        return local_linear_attention(
            q, k, v, log_decay=log_decay, beta=beta, initial_state=state, segment_ids=ids, scale=options.scale,
            implementation=names, tuning=options.tuning,
        )  # fmt: skip

    return local(*arrays)


def linear_attention(
    q: Query,
    k: Key,
    v: Value,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: Axis = "seq",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    log_decay: Float[Array, "H"] | Decay | None = None,
    beta: Beta | None = None,
    initial_state: State | None = None,
    segment_ids: Ids | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> tuple[Out, State]:
    """`longattn.linear_attention` of global arrays: B along `batch_axes`, T along `axis`, H along `head_axis`.

    Where T lies in parts, devices send each other states, whose size does not depend on T, and compute 1.2 to 1.6 times
    the products of one device with as many tokens, forward and backward: see `longattn.parallel.linear_state`. Reverse
    mode only.

    Args:
      q, k, v: global arrays; arrays that lie otherwise are moved. One head for all others to read is replicated.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis, or several, along which the sequence is spread, in order: device i holds the i-th part.
      batch_axes: mesh axes along which sequences are spread; those that the mesh has.
      head_axis: the mesh axis along which heads are spread, if the mesh has it.
      log_decay, beta, initial_state, segment_ids, scale, implementation, tuning: as for `longattn.linear_attention`.

    Returns:
      out and the final state, spread likewise; along `axis` each device has the final state.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B or T that its devices do not
        divide.
      NotImplementedError: with the reason, for heads that `head_axis` does not divide, and where no back end asked for
        serves the call.
    """
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis)
    arrays, options, names = validate(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, scale=scale,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip
    divide_rows(mesh, arrays[0].shape[0], batch)
    divide_tokens(mesh, arrays[0].shape[1], axis)
    heads = 1 if head is None else mesh.shape[head]
    for name, x in zip("qkv", arrays):
        if x.shape[2] % heads and x.shape[2] > 1:
            raise NotImplementedError(
                f"the {x.shape[2]} heads of {name} do not divide over the {heads} devices on {head!r}; use a mesh "
                f"whose {head!r} divides {x.shape[2]}"
            )
    if max(x.shape[2] for x in arrays[:3]) % heads:
        raise NotImplementedError(f"one head does not divide over the {heads} devices on {head!r}; use a mesh with one")
    return tuple(_linear_attention(arrays, mesh=mesh, batch=batch, axis=axis, head=head, options=options, names=names))
