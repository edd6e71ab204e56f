"""Look-up of embedding rows over a mesh, with the table sliced along E and the tokens sharded."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from longattn.ops import dispatch
from longattn.parallel.mesh import SLICED, fit, sharding


def rows(
    table: Float[Array, "W E"],
    tokens: Int32[Array, "B T"],
    mesh: Mesh | AbstractMesh,
    spec: P,
    scale: float,
    dtype: DTypeLike,
) -> Float[Array, "B T E"]:
    """`scale * table[tokens]` in `dtype`, sharded like the tokens; the table is never whole on a device.

    Each device looks up its slice of the rows of all tokens on the axes `SLICED`, and an all-to-all joins the slices of
    a row. All devices together send B T E elements of `dtype`, whatever W is, and the same in the backward pass. There
    each device sums the gradient of its slice in the table's dtype.

    Args:
      table: the embedding, sliced along E over the axes `SLICED` of the mesh, which must divide E.
      tokens: int32 in [0, W), with B and T sharded by `spec`.
      mesh: the mesh, all of whose axes are Auto.
      spec: the sharding of the tokens.
      scale: factor of the rows.
      dtype: dtype of the rows sent, and of the result.

    Raises:
      ValueError: where the devices on `SLICED` do not divide E.
    """
    axes = tuple(axis for axis in SLICED if axis in mesh.axis_names)
    token_spec, table_spec = fit(spec, mesh), sharding(mesh, P(None, axes), table.shape, "the embedding").spec
    devices = math.prod(mesh.shape[axis] for axis in axes)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(table_spec, token_spec), out_specs=P(*token_spec, None), check_vma=True
    )
    def local(table: Array, tokens: Array) -> Array:
        table, tokens = dispatch.vary_together((table, tokens))
        if not axes:
            return (jnp.take(table, tokens, axis=0) * scale).astype(dtype)
        with jax.named_scope("gather"):
            everyone = lax.all_gather(tokens, axes)  # [devices b t]
        slices = (jnp.take(table, everyone, axis=0) * scale).astype(dtype)  # [devices b t e]
        with jax.named_scope("exchange"):  # brings this device's tokens a slice from each device
            mine = lax.all_to_all(slices, axes, split_axis=0, concat_axis=0)
        return jnp.moveaxis(mine, 0, 2).reshape(*tokens.shape, devices * table.shape[1])

    return local(table, tokens)
