"""Linear attention over a mesh: batch, sequence and heads sharded.

Devices that share a sequence exchange states: see `longattn.parallel.linear_state`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from longattn.ops.linear.api import Tuning, validate
from longattn.ops.linear.api import linear_attention as local_linear_attention
from longattn.ops.linear.contract import Arrays, Beta, Decay, Ids, Key, Options, Out, Query, State, Value
from longattn.parallel import linear_state
from longattn.parallel.layout import Axis, devices_on
from longattn.parallel.mesh import axes, divide_rows, divide_tokens


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "axis", "head", "options", "names"))
def _linear_attention(
    x: Arrays, *, mesh: Mesh | AbstractMesh, batch: tuple[str, ...], axis: Axis, head: str | None, options: Options,
    names: tuple[str, ...],
) -> tuple[Out, State]:  # fmt: skip
    heads = 1 if head is None else mesh.shape[head]
    along = axis if devices_on(mesh, axis) > 1 and 0 not in x.k.shape[:2] else None
    tokens = lambda y: None if y is None else P(batch, along, head if y.shape[2] % heads == 0 else None)
    specs = Arrays(
        q=tokens(x.q),
        k=tokens(x.k),
        v=tokens(x.v),
        log_decay=P(head) if x.log_decay is not None and x.log_decay.ndim == 1 else tokens(x.log_decay),
        beta=tokens(x.beta),
        initial_state=None if x.initial_state is None else P(batch, head),
        segment_ids=None if x.segment_ids is None else P(batch, along),
    )

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=(P(batch, along, head), P(batch, head)), check_vma=True
    )
    def local(x: Arrays) -> tuple[Array, Array]:
        if along is not None:
            return linear_state.attend(x, axis, options, names)
        return local_linear_attention(**x._asdict(), scale=options.scale, implementation=names, tuning=options.tuning)

    return local(x)


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
    tuning: Tuning | None = None,
) -> tuple[Out, State]:
    """`longattn.linear_attention` of global arrays: B sharded along `batch_axes`, T along `axis`, H along `head_axis`.

    Devices that share a sequence send each other states, whose size does not depend on T. They compute 1.2 to 1.6 times
    the products of one device with as many tokens, forward and backward: see `longattn.parallel.linear_state`. Reverse
    mode only.

    Args:
      q, k, v: global arrays; those that are sharded otherwise are moved. A single head of q, k or v is replicated.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis, or several, along which the sequence is sharded, in order: device i holds shard i.
      batch_axes: mesh axes along which B is sharded; those that the mesh has.
      head_axis: the mesh axis along which heads are sharded, if the mesh has it.
      log_decay, beta, initial_state, segment_ids, scale, implementation, tuning: as for `longattn.linear_attention`.

    Returns:
      out and the final state, sharded likewise; along `axis` each device has the final state.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B or T that its devices do not
        divide.
      NotImplementedError: with the reason, for heads that `head_axis` does not divide, and where no back end asked for
        serves the call.
    """
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis)
    x, options, names = validate(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, scale=scale,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip
    assert x.q is not None  # a call has queries
    divide_rows(mesh, x.q.shape[0], batch)
    divide_tokens(mesh, x.q.shape[1], axis)
    heads = 1 if head is None else mesh.shape[head]
    for name, own in (("q", x.q.shape[2]), ("k", x.k.shape[2]), ("v", x.v.shape[2])):
        if own % heads and own > 1:
            raise NotImplementedError(
                f"the {own} heads of {name} do not divide over the {heads} devices on {head!r}; use a mesh whose "
                f"{head!r} divides {own}"
            )
    if x.H % heads:
        raise NotImplementedError(f"one head does not divide over the {heads} devices on {head!r}; use a mesh with one")
    return tuple(_linear_attention(x, mesh=mesh, batch=batch, axis=axis, head=head, options=options, names=names))
