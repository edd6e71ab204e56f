"""Where and how a model's operations run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from longattn import parallel
from longattn.ops.attention import attention
from longattn.ops.conv import short_convolution
from longattn.ops.linear import linear_attention
from longattn.parallel import SequenceLayout, embedding
from longattn.parallel.layout import Axis, convert, devices_on, names_of
from longattn.parallel.mesh import fit, place


@dataclasses.dataclass(frozen=True)
class Context:
    """A static, hashable value that says where and how the ops run; None is one device and the best back end."""

    implementation: str | tuple[str, ...] | None = None  # as in `longattn.attention` and `longattn.linear_attention`
    mesh: Mesh | AbstractMesh | None = None  # None: one device
    axis: Axis = "seq"  # the rest as in `longattn.parallel.attention`
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    head_axis: str = "tensor"
    strategy: str = "ring"
    layout: SequenceLayout = SequenceLayout()  # of tokens, ids and activations

    def attention(self, q: Array, k: Array, v: Array, **options: Any) -> Array:
        """Calls `longattn.attention`, or on a mesh `longattn.parallel.attention`."""
        if self.mesh is None:
            return attention(q, k, v, implementation=self.implementation, **options)
        return parallel.attention(
            q, k, v, mesh=self.mesh, axis=self.axis, batch_axes=self.batch_axes, head_axis=self.head_axis,
            strategy=self.strategy, layout=self.layout, implementation=self.implementation, **options,
        )  # fmt: skip

    def linear_attention(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
        """Calls `longattn.linear_attention`, or on a mesh `longattn.parallel.linear_attention`."""
        self._insist_on_order()
        if self.mesh is None:
            return linear_attention(q, k, v, implementation=self.implementation, **options)
        return parallel.linear_attention(
            q, k, v, mesh=self.mesh, axis=self.axis, batch_axes=self.batch_axes, head_axis=self.head_axis,
            implementation=self.implementation, **options,
        )  # fmt: skip

    def short_convolution(
        self, x: Float[Array, "B T H D"], w: Float[Array, "H D C"], b: Float[Array, "H D"] | None, **options: Any
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B C-1 E"]]:
        """Calls `longattn.ops.conv.short_convolution`, or on a sharded sequence `longattn.parallel.short_convolution`.

        Each device has all heads where `head_axis` does not divide them.
        """
        self._insist_on_order()
        channels = (*x.shape[:2], -1)
        arrays = x.reshape(channels), w.reshape(-1, w.shape[2]), None if b is None else b.reshape(-1)
        if self.mesh is None or self.P == 1:
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
        """The PartitionSpec of [B T ...]: rows and tokens are sharded."""
        return PartitionSpec(self.batch_axes, self.axis)

    @property
    def P(self) -> int:
        """Devices along the sequence."""
        return 1 if self.mesh is None else devices_on(self.mesh, self.axis)

    @property
    def shards(self) -> int:
        """Shards that `layout` permutes: one for each device on the outer of two axes, else on the only one.

        Along the inner axis the tokens of a shard lie in order. This is the argument P of the methods of `layout`.
        """
        if self.mesh is None:
            return 1
        return devices_on(self.mesh, names_of(self.axis)[0])

    def described(self) -> str:
        """The devices in words: "8 devices: data 2 x seq 4, ring, zigzag"."""
        if self.mesh is None:
            return "one device"
        axes = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1)
        return f"{self.mesh.size} devices: {axes}" + (f", {self.strategy}, {self.layout.name}" if self.P > 1 else "")

    @property
    def in_order(self) -> bool:
        """Whether the layout keeps the order of the sequence."""
        return self.shards == 1 or self.layout == SequenceLayout()

    def _insist_on_order(self) -> None:
        if not self.in_order:
            raise ValueError(
                f"layout={self.layout.name!r} must be contiguous for what is handed on from token to token: `convert` "
                "the activations and take the context `lying` so, as Transformer does"
            )

    def lying(self, layout: SequenceLayout) -> Context:
        """The same context with another layout of the tokens."""
        return dataclasses.replace(self, layout=layout)

    def positions(self, T: int) -> Int32[Array, "1 T"]:
        """The positions of T tokens of one document."""
        return jnp.asarray(self.layout.positions(T, self.shards))[None]

    def restore(self, ids: Any) -> Any:
        """A tree of ids [B T] in the order of the sequence, with each row gathered on all devices that share it.

        Ids are small, so an all-gather of each array is cheap.
        """
        if self.in_order:
            return ids
        return jax.tree.map(lambda x: self._whole(self.layout.restore(self._whole(x), self.shards)), ids)

    def permute(self, ids: Any) -> Any:
        """The inverse of `restore`. Each device takes its own tokens, and nothing is sent."""
        if self.in_order:
            return ids
        take = lambda x: place(self.layout.permute(self._whole(x), self.shards), self.mesh, self.tokens, "the ids")
        return jax.tree.map(take, ids)

    def _whole(self, x: Array) -> Array:
        return place(x, self.mesh, PartitionSpec(self.batch_axes), "the ids")

    def convert(
        self, x: Float[Array, "B T E"], source: SequenceLayout, target: SequenceLayout
    ) -> Float[Array, "B T E"]:
        """Activations converted to another layout: see `longattn.parallel.layout.convert`."""
        if source == target or self.shards == 1:
            return x
        (batch,) = fit(PartitionSpec(self.batch_axes), self.mesh)
        return convert(x, source, target, mesh=self.mesh, axis=self.axis, batch_axes=batch)

    def spread(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Activations with the sharding of the tokens."""
        return x if self.mesh is None else place(x, self.mesh, self.tokens, "the activations")

    def rows(
        self, table: Float[Array, "W E"], tokens: Int32[Array, "B T"], scale: float, dtype: Any
    ) -> Float[Array, "B T E"]:
        """`scale * table[tokens]` in `dtype`."""
        if self.mesh is None:  # cast after: the gradient of a row that is met often is summed in the table's dtype
            return (jnp.take(table, tokens, axis=0) * scale).astype(dtype)
        return embedding.rows(table, tokens, self.mesh, self.tokens, scale, dtype)
