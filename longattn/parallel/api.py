"""Exact softmax attention over a mesh: the public functions. They validate globally, then shard_map a strategy.

The sequence is spread along one axis of the mesh in an order that a layout says, sequences along others, heads along a
third; each device holds [B / (data fsdp), T / P, H / tensor, D] of q. A strategy says what the devices along the
sequence send each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention.arguments import Ids, validate
from longattn.ops.attention.contract import Visibility
from longattn.ops.partial import Partial
from longattn.parallel.balanced import BALANCED
from longattn.parallel.exchange import ALL_GATHER, ULYSSES, USP
from longattn.parallel.layout import Axis, SequenceLayout, names_of
from longattn.parallel.mesh import divide_tokens
from longattn.parallel.ring import RING
from longattn.parallel.spec import Call, Strategy
from longattn.shapes import Key, Out, Query, Statistic, Value, statistics_dtype, suggest

STRATEGIES: dict[str, Strategy] = {
    "ring": RING,
    "balanced": BALANCED,
    "all_gather": ALL_GATHER,
    "ulysses": ULYSSES,
    "usp": USP,
}


def _mesh(mesh: Mesh | AbstractMesh | None, axis: Axis) -> Mesh | AbstractMesh:
    """The mesh to use. Raises ValueError unless it has the axis, and all its axes are Auto."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError("mesh=None needs a current mesh: pass mesh= or set one with jax.set_mesh(mesh)")
    for name in names_of(axis):
        if name not in mesh.axis_names:
            raise ValueError(f"{axis=} must be an axis of the mesh; {suggest(str(name), mesh.axis_names)}")
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind != AxisType.Auto:
            remedy = (
                "call longattn.attention inside a shard_map" if kind == AxisType.Manual else "make it with Auto axes"
            )
            raise ValueError(f"axis {name!r} of the mesh is {kind.name} and must be Auto; {remedy}")
    return mesh


def axes(
    mesh: Mesh | AbstractMesh | None, axis: Axis, batch_axes: tuple[str, ...], head_axis: str
) -> tuple[Mesh | AbstractMesh, tuple[str, ...], str | None]:
    """The mesh to use, and those of its axes that sequences and heads lie along. Raises ValueError for invalid ones."""
    mesh = _mesh(mesh, axis)
    batch = tuple(name for name in batch_axes if name in mesh.axis_names)
    head = head_axis if head_axis in mesh.axis_names else None
    if len({*names_of(axis), *batch, head}) != len(names_of(axis)) + len(batch) + 1:
        raise ValueError(f"{axis=}, {batch_axes=} and {head_axis=} must be different axes of the mesh")
    return mesh, batch, head


def divide_rows(mesh: Mesh | AbstractMesh, B: int, batch: tuple[str, ...]) -> None:
    """Raises ValueError unless the batch axes divide B."""
    rows = math.prod(mesh.shape[name] for name in batch)
    if B % rows:
        raise ValueError(f"{B=} must be a multiple of {rows}, the devices on the batch axes {batch}")


def _divide(mesh: Mesh | AbstractMesh, q: Any, k: Any, call: Call, batch: tuple[str, ...], head: str | None) -> None:
    """Raises unless the mesh's axes divide B, T, S and the heads."""
    for name, size in (("T", q.shape[1]), ("S", k.shape[1])):
        call.layout.check(size, call.ring, name)
        divide_tokens(mesh, size, call.axis, name)
    divide_rows(mesh, q.shape[0], batch)
    K, heads = k.shape[2], 1 if head is None else mesh.shape[head]
    if K % heads:
        raise NotImplementedError(
            f"{K=} key/value heads do not divide over the {heads} devices on {head!r}, and are not replicated; "
            f"use a mesh whose {head!r} divides {K}, and spread the sequence instead"
        )


def _specs(
    bias: Array | None, visibility: Visibility, batch: tuple[str, ...], axis: Axis, head: str | None
) -> tuple[P | None, Visibility]:
    """How the side arrays lie: the bias like the queries, ids and positions whole along the sequence."""

    def spec(x: Array, *names: Any) -> P:
        return P(*(name if size > 1 else None for name, size in zip(names, x.shape)))

    ids = lambda x, *names: None if x is None else spec(x, *names)
    return ids(bias, batch, head, axis), Visibility(
        mask=jax.tree.map(lambda x: spec(x, batch, *([head] if x.ndim > 1 else [])), visibility.mask),
        q_positions=spec(visibility.q_positions, batch),
        k_positions=spec(visibility.k_positions, batch),
        q_segments=ids(visibility.q_segments, batch),
        k_segments=ids(visibility.k_segments, batch),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _strategic(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, strategy: str, call: Call
) -> tuple[Array, Array]:
    """A strategy on one device's shards."""
    return STRATEGIES[strategy].forward(q, k, v, bias, visibility, call)[:2]


def _strategic_forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, strategy: str, call: Call
) -> Any:
    out, lse, kept = STRATEGIES[strategy].forward(q, k, v, bias, visibility, call)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (kept, visibility, out, lse)


def _strategic_backward(strategy: str, call: Call, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    kept, visibility, out, lse = residuals
    # Without the barrier XLA may find that keys were sent here before, and keep them until now.
    kept, cotangents = jax.lax.optimization_barrier((kept, cotangents))
    dq, dk, dv, dbias = STRATEGIES[strategy].backward(kept, out, lse, *cotangents, visibility, call)
    return *(x.astype(kept[0].dtype) for x in (dq, dk, dv)), dbias, None


_strategic.defvjp(_strategic_forward, _strategic_backward)


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "head", "strategy", "call", "dtype"))
def _attention(q, k, v, bias, visibility, sinks, *, mesh, batch, head, strategy, call, dtype):
    tokens, statistic = P(batch, call.axis, head, None), P(batch, call.axis, head)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *_specs(bias, visibility, batch, call.axis, head), P(head)),
        out_specs=(tokens, statistic),
        check_vma=True,
    )
    def local(q, k, v, bias, visibility, sinks):
        if bias is not None:  # so that the gradient of what is replicated is summed in float32
            bias = bias.astype(statistics_dtype(q.dtype))
        with jax.named_scope(strategy):
            q, k, v, bias, visibility = dispatch.vary_together((q, k, v, bias, visibility))
            out, lse = _strategic(q, k, v, bias, visibility, strategy, call)
            return tuple(partials.finish(Partial(out, lse), sinks, dtype))

    return local(q, k, v, bias, visibility, sinks)


def attention_with_lse(
    q: Query,
    k: Key,
    v: Value,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: Axis = "seq",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    strategy: str = "ring",
    layout: SequenceLayout = SequenceLayout(),
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> tuple[Out, Statistic]:
    """`attention`, and its log-sum-exp: natural logarithm, float32 (float64 for float64 inputs), differentiable."""
    if strategy not in STRATEGIES:
        raise ValueError(f"{strategy=} must be a strategy of attention; {suggest(str(strategy), STRATEGIES)}")
    if not isinstance(layout, SequenceLayout):
        raise ValueError(f"{layout=} must be a SequenceLayout, such as SequenceLayout('zigzag')")
    if (strategy == "usp") != (len(names_of(axis)) == 2):
        raise ValueError(
            f"{axis=} must be two axes of the mesh for strategy='usp' (of the ring, and of the all-to-all), and one "
            f"for the others; {strategy=}"
        )
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis)
    q, k, v, bias, visibility, sinks, options, names = validate(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks,
        bias=bias, implementation=implementation, tuning=tuning, rounded=sinks is None,
    )  # fmt: skip
    T, (S, K) = q.shape[1], k.shape[1:3]
    heads = 1 if head is None else mesh.shape[head]
    axis = axis if isinstance(axis, str) else axis[0] if len(axis) == 1 else tuple(axis)
    call = Call(
        axis, tuple(mesh.shape[name] for name in names_of(axis)), layout, options.in_order, options.out_dtype,
        options.scale, options.softcap, None if implementation is None else names, tuning, K // heads,
    )  # fmt: skip
    _divide(mesh, q, k, call, batch, head)
    if options.in_order:
        q_positions, k_positions = (
            layout.permute(x, call.ring) for x in (visibility.q_positions, visibility.k_positions)
        )
        visibility = visibility._replace(q_positions=q_positions, k_positions=k_positions)
    if bias is not None and not STRATEGIES[strategy].bias:
        raise NotImplementedError(
            f"{strategy=} takes no bias: its columns would have to travel with the keys, and their gradient back; use "
            "strategy='all_gather'"
        )
    STRATEGIES[strategy].check(visibility.mask, T, S, call)
    return _attention(
        q,
        k,
        v,
        bias,
        visibility,
        sinks,
        mesh=mesh,
        batch=batch,
        head=head,
        strategy=strategy,
        call=call,
        dtype=q.dtype.name,
    )


def attention(
    q: Query,
    k: Key,
    v: Value,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: Axis = "seq",
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    head_axis: str = "tensor",
    strategy: str = "ring",
    layout: SequenceLayout = SequenceLayout(),
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> Out:
    """Exact softmax attention of global arrays spread over a mesh: `longattn.attention`, equal to it up to rounding.

    Reverse mode only. dk and dv are summed over the devices in float32. A bias is differentiable, and with one the
    backward pass runs the forward pass again, in float32.

    Args:
      q, k, v: global arrays, T and S split along `axis`, B along `batch_axes`, the heads along `head_axis`; arrays that
        lie otherwise are moved.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis along which the sequence is spread; of usp two, that of the ring and that of the all-to-all.
      batch_axes: mesh axes along which sequences are spread; those that the mesh has.
      head_axis: the mesh axis along which heads are spread, if the mesh has it.
      strategy: a name in `STRATEGIES`, how keys and values meet the queries.
      layout: the order in which the sequence lies on the devices, and in which q, k, v, ids, positions and the result
        are given; of usp, on the devices of the ring.
      mask, segment_ids, positions, scale, softcap, sinks, bias, implementation, tuning: as for `longattn.attention`;
        ids, positions and mask are global, and the implementation runs on each device. Positions that are given must
        rise by one per token within a segment, in sequence order: what a mask of q - k hides by that is neither sent
        nor computed.

    Returns:
      [B T H V] in q's dtype, spread like q.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B, T or S that its devices do
        not divide.
      NotImplementedError: with the reason, for key/value heads that `head_axis` does not divide, where the strategy
        does not serve the call (a bias, or for `balanced` a mask that is not causal), and where no back end asked for
        does.
    """
    return attention_with_lse(
        q, k, v, mesh=mesh, axis=axis, batch_axes=batch_axes, head_axis=head_axis, strategy=strategy, layout=layout,
        mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks, bias=bias,
        implementation=implementation, tuning=tuning,
    )[0]  # fmt: skip
