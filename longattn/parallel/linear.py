"""Linear attention over a mesh: sequences and heads divided among devices, each sequence whole on its device."""

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
from longattn.ops.linear.spec import Beta, Decay, Ids, Key, Out, Query, State, Value
from longattn.parallel.api import axes, divide_rows


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "head", "scale", "implementation", "tuning"))
def _linear_attention(arrays, *, mesh, batch, head, scale, implementation, tuning):
    heads = 1 if head is None else mesh.shape[head]
    lies = lambda x, axis: P(batch, *(None,) * (axis - 1), head if x.shape[axis] % heads == 0 else None)
    q, k, v, log_decay, beta, state, ids = arrays
    tokens = lambda x: None if x is None else lies(x, 2)
    decays = P(head) if log_decay is not None and log_decay.ndim == 1 else tokens(log_decay)
    states = P(batch, head)
    specs = (lies(q, 2), lies(k, 2), lies(v, 2), decays, tokens(beta), None if state is None else states)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*specs, None if ids is None else P(batch)),
        out_specs=(P(batch, None, head), states),
        check_vma=True,
    )
    def local(q, k, v, log_decay, beta, state, ids):
        return local_linear_attention(
            q, k, v, log_decay=log_decay, beta=beta, initial_state=state, segment_ids=ids, scale=scale,
            implementation=implementation, tuning=tuning,
        )  # fmt: skip

    return local(*arrays)


def linear_attention(
    q: Query,
    k: Key,
    v: Value,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "seq",
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
    """`longattn.linear_attention` of global arrays: B along `batch_axes`, H along `head_axis`, T whole on each device.

    Args:
      q, k, v: global arrays; arrays that lie otherwise are moved. One head for all others to read is replicated.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis along which sequences are spread, of one device.
      batch_axes: mesh axes along which sequences are spread; those that the mesh has.
      head_axis: the mesh axis along which heads are spread, if the mesh has it.
      log_decay, beta, initial_state, segment_ids, scale, implementation, tuning: as for `longattn.linear_attention`.

    Returns:
      out and the final state, spread likewise.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B that its devices do not
        divide.
      NotImplementedError: with the reason, for a sequence in parts, for heads that `head_axis` does not divide, and
        where no back end asked for serves the call.
    """
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis)
    if mesh.shape[axis] > 1:
        raise NotImplementedError(
            f"the sequence lies in {mesh.shape[axis]} parts along {axis!r}, and no device hands its state on to the "
            "next; use a mesh with one device there, and divide the batch (data, fsdp) and the heads (tensor)"
        )
    arrays, spec, _ = validate(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, scale=scale,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip
    divide_rows(mesh, arrays[0].shape[0], batch)
    heads = 1 if head is None else mesh.shape[head]
    for name, x in zip("qkv", arrays):
        if x.shape[2] % heads and x.shape[2] > 1:
            raise NotImplementedError(
                f"the {x.shape[2]} heads of {name} do not divide over the {heads} devices on {head!r}; use a mesh "
                f"whose {head!r} divides {x.shape[2]}"
            )
    if max(x.shape[2] for x in arrays[:3]) % heads:
        raise NotImplementedError(f"one head does not divide over the {heads} devices on {head!r}; use a mesh with one")
    names = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    return tuple(
        _linear_attention(
            arrays, mesh=mesh, batch=batch, head=head, scale=spec.scale, implementation=names, tuning=tuning
        )
    )
