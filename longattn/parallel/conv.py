"""The short causal convolution over a mesh: each device receives the few inputs before its own."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from longattn.ops import conv, dispatch
from longattn.parallel.layout import Axis, devices_on
from longattn.parallel.linear_state import continues, first, last, previous, where
from longattn.parallel.mesh import axes, divide_rows, divide_tokens


def _before(x: Array, weight: Array, segment_ids: Array | None, tail: Array, axis: Axis) -> Array:
    """Returns the C - 1 inputs before this device's. The previous device sends those of its last segment."""
    taps = weight.shape[1] - 1
    ids = None if segment_ids is None else segment_ids[:, x.shape[1] - taps :]
    _, left = conv.short_convolution(x[:, x.shape[1] - taps :], weight, segment_ids=ids)
    with jax.named_scope("exchange"):
        arrived = previous(left, axis)
        return first(tail, axis) + where(None if ids is None else continues(segment_ids, axis), arrived)


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "axis", "head", "activation"))
def _short_convolution(
    x: Array, weight: Array, bias: Array | None, segment_ids: Array | None, tail: Array, *,
    mesh: Mesh | AbstractMesh, batch: tuple[str, ...], axis: Axis, head: str | None,
    activation: Literal["silu"] | None,
) -> tuple[Array, Array]:  # fmt: skip
    along = axis if devices_on(mesh, axis) > 1 and x.shape[1] else None
    tokens, tails = P(batch, along, head), P(batch, None, head)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(tokens, P(head), P(head), P(batch, along), tails),
        out_specs=(tokens, tails),
        check_vma=True,
    )
    def local(
        x: Array, weight: Array, bias: Array | None, segment_ids: Array | None, tail: Array
    ) -> tuple[Array, Array]:
        if along is not None:
            x, weight, bias, segment_ids, tail = dispatch.vary_together((x, weight, bias, segment_ids, tail))
            tail = _before(x, weight, segment_ids, tail, axis)
        y, tail = conv.short_convolution(x, weight, bias, segment_ids=segment_ids, tail=tail, activation=activation)
        return y, tail if along is None else last(tail, axis)

    return local(x, weight, bias, segment_ids, tail)


def short_convolution(
    x: Float[Array, "B T E"],
    weight: Float[Array, "E C"],
    bias: Float[Array, "E"] | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: Axis = "seq",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str | None = "tensor",
    segment_ids: Int32[Array, "B T"] | None = None,
    tail: Float[Array, "B C-1 E"] | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B C-1 E"]]:
    """`longattn.ops.conv.short_convolution` over a mesh: B along `batch_axes`, T along `axis`, E along `head_axis`.

    A device sends its last C - 1 inputs to the next, in x's dtype, and receives their gradient in the backward pass. If
    the tail is used, the last device's tail is summed, among zeros, to all.

    Args:
      x: a global array; one that is sharded otherwise is moved.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis, or several, along which the sequence is sharded, in order: device i holds shard i.
      batch_axes: mesh axes along which B is sharded; those that the mesh has.
      head_axis: the mesh axis along which channels are sharded, if the mesh has it; None: all are on each device.
      weight, bias, segment_ids, tail, activation: as for `longattn.ops.conv.short_convolution`, global.

    Returns:
      y and the tail for the next call, sharded likewise; along `axis` each device has the tail.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B or T that its devices do not
        divide.
      NotImplementedError: with the reason, for shards of fewer than C - 1 tokens, and for channels that `head_axis`
        does not divide.
    """
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis or "")
    tail = conv.validate_short(x, weight, bias, segment_ids=segment_ids, tail=tail, activation=activation)
    (B, T, E), C, devices = x.shape, weight.shape[1], devices_on(mesh, axis)
    divide_rows(mesh, B, batch)
    divide_tokens(mesh, T, axis)
    if 0 < T < devices * (C - 1) and devices > 1:
        raise NotImplementedError(
            f"{T=} tokens are {T // devices} on each of {devices} devices along {axis!r}, and {C=} taps reach {C - 1} "
            f"back, beyond the previous device; use fewer devices there, or at least {devices * (C - 1)} tokens"
        )
    if head is not None and E % mesh.shape[head]:
        raise NotImplementedError(
            f"{E=} channels do not divide over the {mesh.shape[head]} devices on {head!r}; pass head_axis=None"
        )
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    return _short_convolution(
        x, weight, bias, segment_ids, tail, mesh=mesh, batch=batch, axis=axis, head=head, activation=activation
    )
