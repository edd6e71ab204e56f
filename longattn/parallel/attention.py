"""Exact softmax attention over a mesh: the public functions and the table of strategies.

The functions validate the global arrays, then run a strategy inside a shard_map. The sequence is sharded along one axis
of the mesh in the order of a layout, the batch along others, heads along a third. Each device holds
[B / (data fsdp), T / P, H / tensor, D] of q. The strategy decides what the devices along the sequence send each other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from longattn import config
from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention.arguments import Ids, validate
from longattn.ops.attention.back_ends import Tuning
from longattn.ops.attention.contract import Visibility
from longattn.ops.partial import Partial
from longattn.parallel import positions as positions_rule
from longattn.parallel.all_gather import ALL_GATHER
from longattn.parallel.balanced import BALANCED
from longattn.parallel.layout import Axis, SequenceLayout, names_of
from longattn.parallel.mesh import axes, divide_rows, divide_tokens
from longattn.parallel.ring import RING
from longattn.parallel.strategy import Call, Strategy
from longattn.parallel.ulysses import ULYSSES
from longattn.parallel.usp import USP
from longattn.shapes import Key, Out, Query, Shaped, Statistic, Value, statistics_dtype, suggest

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (RING, BALANCED, ALL_GATHER, ULYSSES, USP)}


def strategy_of(name: str, axis: Axis) -> Strategy:
    """The strategy of this name.

    Raises ValueError where `STRATEGIES` has no such name, and where `axis` is not of as many mesh axes as it takes.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r} must be a strategy of attention; {suggest(str(name), STRATEGIES)}")
    found = STRATEGIES[name]
    if found.axes != len(names_of(axis)):
        wanted = "one axis" if found.axes == 1 else "two axes"
        outer = "" if found.axes == 1 else " (the outer one, then the inner one)"
        raise ValueError(f"{axis=} must be {wanted} of the mesh for strategy={name!r}{outer}")
    return found


def strategy_on(mesh: config.Mesh) -> Strategy:
    """The strategy of a config's mesh.

    Raises ValueError where `STRATEGIES` has none of this name, or it does not go with the mesh's ring or layout.
    """
    name = mesh.strategy
    if name not in STRATEGIES:
        raise ValueError(f"Mesh.strategy={name!r} must be a strategy of attention; {suggest(str(name), STRATEGIES)}")
    found = STRATEGIES[name]
    if (mesh.ring > 1) != (found.axes == 2):
        two = [s.name for s in STRATEGIES.values() if s.axes == 2]
        raise ValueError(
            f"Mesh.ring={mesh.ring} with strategy={name!r}: {' or '.join(two)}, and no other, has shards that several "
            f"devices hold, at least 2; set ring and strategy={two[0]!r}, or neither (of one shard, usp is "
            "strategy='ulysses')"
        )
    if mesh.layout not in found.layouts:
        raise ValueError(
            f"Mesh.layout={mesh.layout!r} with strategy={name!r}, which serves {' or '.join(found.layouts)} alone: set "
            f"layout={found.layouts[0]!r}, or strategy='ring'"
        )
    return found


def _divide(
    mesh: Mesh | AbstractMesh, q: Shaped, k: Shaped, call: Call, batch: tuple[str, ...], head: str | None
) -> None:
    """Raises unless the mesh's axes divide B, T, S and the heads."""
    for name, size in (("T", q.shape[1]), ("S", k.shape[1])):
        call.layout.check(size, call.shards, name)
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
    """PartitionSpecs of the side arrays: the bias like the queries, ids and positions whole along the sequence."""

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
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, strategy: Strategy, call: Call
) -> tuple[Array, Array]:
    """out and lse of a strategy on one device's shards."""
    return strategy.forward(q, k, v, bias, visibility, call)[:2]


def _strategic_forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, strategy: Strategy, call: Call
) -> Any:
    out, lse, kept = strategy.forward(q, k, v, bias, visibility, call)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (kept, visibility, out, lse)


def _strategic_backward(strategy: Strategy, call: Call, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    kept, visibility, out, lse = residuals
    # Without the barrier XLA may reuse the keys that the forward pass received, and so keep them until now.
    kept, cotangents = jax.lax.optimization_barrier((kept, cotangents))
    dq, dk, dv, dbias = strategy.backward(kept, out, lse, *cotangents, visibility, call)
    return *(x.astype(kept[0].dtype) for x in (dq, dk, dv)), dbias, None


_strategic.defvjp(_strategic_forward, _strategic_backward)


@functools.partial(jax.jit, static_argnames=("mesh", "batch", "head", "strategy", "call", "dtype"))
def _attention(
    q: Query, k: Key, v: Value, bias: Array | None, visibility: Visibility, sinks: Array | None, *,
    mesh: Mesh | AbstractMesh, batch: tuple[str, ...], head: str | None, strategy: Strategy, call: Call,
    dtype: DTypeLike | None,
) -> tuple[Out, Statistic]:  # fmt: skip
    tokens, statistic = P(batch, call.axis, head, None), P(batch, call.axis, head)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *_specs(bias, visibility, batch, call.axis, head), P(head)),
        out_specs=(tokens, statistic),
        check_vma=True,
    )
    def local(
        q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, sinks: Array | None
    ) -> tuple[Array, Array]:
        if bias is not None:  # so that the gradient of a replicated bias is summed in float32
            bias = bias.astype(statistics_dtype(q.dtype))
        with jax.named_scope(strategy.name):
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
    tuning: Tuning | None = None,
) -> tuple[Out, Statistic]:
    """`attention`, and its log-sum-exp: natural logarithm, float32 (float64 for float64 inputs), differentiable."""
    chosen = strategy_of(strategy, axis)
    if not isinstance(layout, SequenceLayout):
        raise ValueError(f"{layout=} must be a SequenceLayout, such as SequenceLayout('zigzag')")
    mesh, batch, head = axes(mesh, axis, batch_axes, head_axis)
    q, k, v, bias, visibility, sinks, options, names = validate(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks,
        bias=bias, implementation=implementation, tuning=tuning, rounded=sinks is None,
    )  # fmt: skip
    if visibility.read:
        raise NotImplementedError(
            f"{mask=}: a function that reads a traced array is not served over a mesh; say what it does by "
            "segment_ids, positions, Prefix or BlockSparse"
        )
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
            layout.permute(x, call.shards) for x in (visibility.q_positions, visibility.k_positions)
        )
        visibility = visibility._replace(q_positions=q_positions, k_positions=k_positions)
    positions_rule.check(visibility, call, chosen)
    chosen.refuse(visibility.mask, T, S, call, bias=bias is not None)
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
        strategy=chosen,
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
    tuning: Tuning | None = None,
) -> Out:
    """Exact softmax attention of global arrays over a mesh, equal to `longattn.attention` up to rounding.

    Reverse mode only. dk and dv are summed over the devices in float32. A bias is differentiable, and with one the
    backward pass runs the forward pass again, in float32.

    Args:
      q, k, v: global arrays, T and S sharded along `axis`, B along `batch_axes`, the heads along `head_axis`; arrays
        with another sharding are moved.
      mesh: a Mesh (its axes Auto), or an AbstractMesh; None is the current one (`jax.set_mesh`).
      axis: the mesh axis along which the sequence is sharded; for usp two, the ring's and the all-to-all's.
      batch_axes: mesh axes along which the batch is sharded; those that the mesh lacks are ignored.
      head_axis: the mesh axis along which heads are sharded, if the mesh has it.
      strategy: a name in `STRATEGIES`: how keys and values meet the queries.
      layout: the order of the sequence over the devices, in which q, k, v, ids, positions and the result are given; for
        usp over the devices of the ring.
      mask, segment_ids, positions, scale, softcap, sinks, bias, implementation, tuning: as for `longattn.attention`;
        ids, positions and mask are global, and the implementation runs on each device. Positions that are given must
        rise by one per token within a segment, in sequence order: keys that a mask of q - k hides under this rule are
        neither sent nor computed. Segments whose positions are all equal are padding.

    Returns:
      [B T H V] in q's dtype, sharded like q.

    Raises:
      ValueError: for invalid arguments: an axis that the mesh lacks or that is not Auto; B, T or S that its devices do
        not divide; positions that break their rule. For traced ones an error is logged while the program runs, and
        only where the environment has LONGATTN_DEBUG=1.
      NotImplementedError: with the reason, for key/value heads that `head_axis` does not divide, for a call that the
        strategy does not serve (a bias, or for `balanced` a mask that is not causal), and for one that no back end
        asked for serves.
    """
    return attention_with_lse(
        q, k, v, mesh=mesh, axis=axis, batch_axes=batch_axes, head_axis=head_axis, strategy=strategy, layout=layout,
        mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks, bias=bias,
        implementation=implementation, tuning=tuning,
    )[0]  # fmt: skip
