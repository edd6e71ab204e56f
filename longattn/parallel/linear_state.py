"""Linear attention of a sequence in parts: devices hand each other what their tokens do to the state, not the tokens.

A device's t = T / P tokens map the state before them to the one after by S -> M S + N (`longattn.partial.Affine`): M is
a decay per channel or head, with the delta rule a matrix [D D]. Every back end has its `fold`, the pass that computes N
alone; with the delta rule M is what the same pass makes of the identity where zeros are written.

Forward:
    1. Each device folds its tokens.
    2. An exclusive scan over the devices, in ceil(log2 P) rounds of Hillis and Steele (doi:10.1145/7902.7903), gives
       each the state before its tokens. The last round sends states only: with P = 2 no M exists.
    3. Each attends from there; the state after the last device's tokens is summed, among zeros, to all of them.
Backward, with dS the gradient of the state after a device's tokens:
    4. Each device pulls do back to the state before its tokens, in one pass that depends on no state (`pull`).
    5. The same scan from the last device to the first, with the transposes of M, gives each its dS.
    6. The back end's own gradient, of the states that it saved, gives all others. Nothing differentiates 1.

What parts cost are the passes 1 and 4. Products that a device computes, in those of one device with as many tokens
(counted in programs compiled of `xla`, t = 2048, D = 128, chunks of 32):

                                 forward             forward and backward
    devices                   2     4     8             2     4     8
    Mamba-2, V 64           1.39  1.39  1.39          1.22  1.22  1.22
    GLA, V 128              1.42  1.42  1.42          1.24  1.24  1.24
    Gated DeltaNet, V 256   1.64  1.97  2.02          1.38  1.47  1.49
    KDA, V 128              1.64  2.27  2.33          1.38  1.54  1.57

M costs as much as a state of V = D, which is why more than two devices with the delta rule and small V compute more
than twice what one forward pass has. It is no less the other way round, attending from zero and adding what the state
before adds, scale * (q_t e^g(0, t]) S: the products are as many, but outputs are kept in float32 until then, and with
the delta rule every token has a matrix in the place of e^g.

A device sends [B H D V] float32 in each round, forward and again backward, beside it M in all rounds but the last
(D numbers of V D, with the delta rule as many as a state), and a final state that is asked for: nothing depends on T.
LASP-2 (arXiv:2502.07563) gathers all P states at once instead.

A segment goes on over the boundary of two devices where the ids beside it are equal; elsewhere M is 0.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.linear.api import BACK_ENDS, check_fold, prepared
from longattn.ops.linear.contract import Beta, Ids, Key, Options, Out, Query, State, Value
from longattn.ops.partial import Affine, advance, chain
from longattn.parallel.layout import Axis

_Arrays = tuple[Array | None, ...]  # q, k, v, log_decay, beta


def previous(x: Array, axis: Axis, hop: int = 1, *, reverse: bool = False) -> Array:
    """`x` of the device `hop` places before this one (`reverse`: after it); zeros where there is none."""
    places = [(i, i + hop) for i in range(lax.axis_size(axis) - hop)]
    return lax.ppermute(x, axis, [(b, a) for a, b in places] if reverse else places)


def continues(segment_ids: Ids, axis: Axis) -> Bool[Array, "B"]:
    """Whether this device's first token goes on with the segment of the previous device's last; on the first: True."""
    return (previous(segment_ids[:, -1], axis) == segment_ids[:, 0]) | (lax.axis_index(axis) == 0)


def first(x: Array, axis: Axis) -> Array:
    """`x` on the first device, zeros on the others."""
    return jnp.where(lax.axis_index(axis) == 0, x, 0)


def last(x: Array, axis: Axis) -> Array:
    """On all devices what `x` is on the last one."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, 0), axis)


def where(rows: Bool[Array, "B"] | None, x: Array) -> Array:
    """`x` in these rows, None for all; zeros elsewhere."""
    return x if rows is None else jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def scan(state: State, transition: Array | None, axis: Axis, *, reverse: bool = False) -> State:
    """What the tokens of all devices before this one (`reverse`: after it) make of a state of zeros, in their order.

    Round r chains with what arrives from 2^r devices away: `window` grows to the last 2^r devices, this one included,
    `before` to the 2^r - 1 before this one. Zeros arrive from beyond the first device: the map to a state of zeros.

    Args:
      state, transition: what this device's tokens do, as of `Affine`; no transition is needed of one or two devices.
      axis: of the devices.
    """
    arrived = functools.partial(previous, axis=axis, reverse=reverse)
    last_round, before = rounds(lax.axis_size(axis)) - 1, None
    for r in range(last_round):
        found = Affine(arrived(transition, hop=1 << r), arrived(state, hop=1 << r))
        before = found if before is None else chain(found, before)
        transition, state = chain(found, Affine(transition, state))
    if last_round < 0:
        return jnp.zeros_like(state)
    state = arrived(state, hop=1 << last_round)
    return state if before is None else advance(state, before)


def rounds(devices: int) -> int:
    """Of the scan over so many devices."""
    return (devices - 1).bit_length()


def _folded(
    arrays: _Arrays, start: State, ids: Ids | None, goes_on: Bool[Array, "B"] | None, axis: Axis, back_end: Any,
    options: Options,
) -> tuple[State, Array | None]:  # fmt: skip
    """The state that this device's tokens make of `start`, and the transition from the state before them, if needed."""
    _, k, v, log_decay, beta = arrays
    (*rows, D, V), needed = start.shape, rounds(lax.axis_size(axis)) > 1
    if beta is not None and needed:
        one = jnp.broadcast_to(jnp.eye(D, dtype=start.dtype)[None, None], (*rows, D, D))
        both = back_end.fold(k, v, log_decay, beta, jnp.concatenate([start, one], 3), ids, options)
        return both[..., :V], where(goes_on, both[..., V:])
    state = back_end.fold(k, v, log_decay, beta, start, ids, options)
    if not needed:
        return state, None
    total = jnp.zeros_like(start[..., 0, :1]) if log_decay is None else jnp.sum(log_decay, 1).reshape(*rows, -1)
    if ids is not None:
        goes_on = goes_on & jnp.all(ids[:, 1:] == ids[:, :-1], 1)
    return state, where(goes_on, jnp.exp(total))


def _before(
    arrays: _Arrays, initial_state: State, ids: Ids | None, axis: Axis, back_end: Any, options: Options
) -> tuple[State, Array | None, Array | None]:
    """The state before this device's tokens, the transition from it, and the rows whose segment goes on here."""
    goes_on = None if ids is None else continues(ids, axis)
    start = first(initial_state, axis)
    state, transition = _folded(arrays, start, ids, goes_on, axis, back_end, options)
    with jax.named_scope("exchange"):
        return start + where(goes_on, scan(state, transition, axis)), transition, goes_on


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(
    arrays: _Arrays, initial_state: State, ids: Ids | None, axis: Axis, name: str, options: Options
) -> tuple[Out, State]:
    """out and the state after this device's tokens."""
    S, _, _ = _before(arrays, initial_state, ids, axis, BACK_ENDS[name], options)
    return BACK_ENDS[name].attend(*arrays, S, ids, options)


def _attend_forward(
    arrays: _Arrays, initial_state: State, ids: Ids | None, axis: Axis, name: str, options: Options
) -> tuple[tuple[Out, State], Any]:
    S, *kept = _before(arrays, initial_state, ids, axis, BACK_ENDS[name], options)
    kept = jax.tree.map(lambda x: checkpoint_name(x, "linear_state"), kept)
    results, pull = jax.vjp(lambda arrays, S: BACK_ENDS[name].attend(*arrays, S, ids, options), arrays, S)
    return results, (arrays, ids, kept, pull)


def _attend_backward(axis: Axis, name: str, options: Options, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    arrays, ids, (transition, goes_on), pull = residuals
    do, dS = cotangents
    before = BACK_ENDS[name].pull(*arrays, ids, do, dS, options)
    if transition is not None and transition.ndim == 4:
        transition = transition.swapaxes(2, 3)
    with jax.named_scope("exchange"):
        dS = dS + scan(where(goes_on, before), transition, axis, reverse=True)
    gradients, before = pull((do, dS))
    return gradients, first(before, axis), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: Query, k: Key, v: Value, log_decay: Array | None, beta: Beta | None, initial_state: State | None,
    segment_ids: Ids | None, axis: Axis, options: Options, names: tuple[str, ...],
) -> tuple[Out, State]:  # fmt: skip
    """`longattn.linear_attention` inside a shard_map, of this device's tokens of a sequence in parts along `axis`.

    Args:
      q, k, v, log_decay, beta, segment_ids: this device's, as after `linear.api.validate`; log_decay may be [H].
      initial_state: before the first device's tokens, or None.
      axis: along which the parts lie, in order.
      options, names: as `validate` returns them.

    Returns:
      This device's out, and the state after the last device's tokens, equal on all devices of `axis`.

    Raises:
      NotImplementedError: with the reasons, if no back end serves the call.
    """
    H, D, V = max(x.shape[2] for x in (q, k, v)), q.shape[3], v.shape[3]
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], H, D, V), shapes.statistics_dtype(q.dtype))
    *arrays, S, ids = prepared((q, k, v, log_decay, beta, initial_state, segment_ids))
    shaped = jax.eval_shape(lambda *x: x, *arrays, S, ids)

    def accepts(back_end: Any) -> None:
        back_end.check(*shaped, options)
        if beta is not None and rounds(lax.axis_size(axis)) > 1:
            check_fold(back_end, shaped, V + D, options)

    name, _ = dispatch.choose(names, BACK_ENDS, accepts)
    with jax.named_scope("linear_attention"), jax.named_scope(name):
        out, S = _attend(tuple(arrays), S, ids, axis, name, options)
        return out, last(S, axis)
