"""Where and how a model's operations run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from longattn import parallel
from longattn.ops.attention import attention
from longattn.ops.conv import short_convolution
from longattn.ops.linear import linear_attention
from longattn.parallel import embedding
from longattn.parallel.mesh import parts, place


@dataclasses.dataclass(frozen=True)
class Context:
    """Where and how the ops run: static and hashable. None in its place is one device and the best back end."""

    implementation: str | tuple[str, ...] | None = None  # as in `longattn.attention` and `longattn.linear_attention`
    mesh: Mesh | AbstractMesh | None = None  # None: one device
    axis: str = "seq"  # the rest as in `longattn.parallel.attention`
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    head_axis: str = "tensor"
    strategy: str = "all_gather"

    def attention(self, q: Array, k: Array, v: Array, **options: Any) -> Array:
        """`longattn.attention`, or where there is a mesh `longattn.parallel.attention`."""
        if self.mesh is None:
            return attention(q, k, v, implementation=self.implementation, **options)
        return parallel.attention(
            q, k, v, mesh=self.mesh, axis=self.axis, batch_axes=self.batch_axes, head_axis=self.head_axis,
            strategy=self.strategy, implementation=self.implementation, **options,
        )  # fmt: skip

    def linear_attention(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
        """`longattn.linear_attention`, or where there is a mesh `longattn.parallel.linear_attention`."""
        if self.mesh is None:
            return linear_attention(q, k, v, implementation=self.implementation, **options)
        return parallel.linear_attention(
            q, k, v, mesh=self.mesh, axis=self.axis, batch_axes=self.batch_axes, head_axis=self.head_axis,
            implementation=self.implementation, **options,
        )  # fmt: skip

    def short_convolution(
        self, x: Float[Array, "B T H D"], w: Float[Array, "H D C"], b: Float[Array, "H D"] | None, **options: Any
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B C-1 E"]]:
        """`longattn.ops.conv.short_convolution`, or of a sequence in parts `longattn.parallel.short_convolution`.

        Heads that `head_axis` does not divide are all on each of its devices.
        """
        channels = (*x.shape[:2], -1)
        arrays = x.reshape(channels), w.reshape(-1, w.shape[2]), None if b is None else b.reshape(-1)
        if self.mesh is None or self.parts == 1:
            y, tail = short_convolution(*arrays, **options)
        else:
            divided = x.shape[2] % self.mesh.shape.get(self.head_axis, 1) == 0
            y, tail = parallel.short_convolution(
                *arrays, mesh=self.mesh, axis=self.axis, batch_axes=self.batch_axes,
                head_axis=self.head_axis if divided else None, **options,
            )  # fmt: skip
        return y.reshape(x.shape), tail

    @property
    def tokens(self) -> PartitionSpec:
        """How [B T ...] lies on the mesh: rows and positions divided, the rest whole."""
        return PartitionSpec(self.batch_axes, self.axis)

    @property
    def parts(self) -> int:
        """In how many parts the sequence lies on the mesh."""
        return 1 if self.mesh is None else parts(self.mesh, self.axis)

    def spread(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Activations, held to lie like the tokens."""
        return x if self.mesh is None else place(x, self.mesh, self.tokens, "the activations")

    def rows(
        self, table: Float[Array, "W E"], tokens: Int32[Array, "B T"], scale: float, dtype: Any
    ) -> Float[Array, "B T E"]:
        """`scale * table[tokens]` in `dtype`."""
        if self.mesh is None:  # cast after: the gradient of a row that is met often is summed in the table's dtype
            return (jnp.take(table, tokens, axis=0) * scale).astype(dtype)
        return embedding.rows(table, tokens, self.mesh, self.tokens, scale, dtype)
