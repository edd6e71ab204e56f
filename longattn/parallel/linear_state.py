"""Linear attention with the sequence sharded: devices exchange what their tokens do to the state, not the tokens.

A device's t = T / P tokens map the state before them to the one after by S -> M S + N (`longattn.partial.Affine`): M is
a decay per channel or head, with the delta rule a matrix [D D]. Every back end has a `fold`, a pass that computes N
alone. With the delta rule, M is the result of the same pass on the identity where zeros are written.

Forward:
    1. Each device folds its tokens.
    2. An exclusive scan over the devices, in ceil(log2 P) rounds of Hillis and Steele (doi:10.1145/7902.7903), gives
       each the state before its tokens. The last round sends states only: with P = 2 no M exists.
    3. Each device attends from its state. The final state of the last device is summed, among zeros, to all of them.
Backward, with dS the gradient of the state after a device's tokens:
    4. Each device pulls do back to the state before its tokens, in one pass that depends on no state (`pull`).
    5. The same scan from the last device to the first, with the transposes of M, gives each its dS.
    6. The back end's own gradient, from the states that it saved, gives all others. Nothing differentiates 1.

The passes 1 and 4 are the price of sharding. Products that a device computes, relative to one device with as many
tokens (counted in compiled programs of `xla`, t = 2048, D = 128, chunks of 32):

                                 forward             forward and backward
    devices                   2     4     8             2     4     8
    Mamba-2, V 64           1.39  1.39  1.39          1.22  1.22  1.22
    GLA, V 128              1.42  1.42  1.42          1.24  1.24  1.24
    Gated DeltaNet, V 256   1.64  1.97  2.02          1.38  1.47  1.49
    KDA, V 128              1.64  2.27  2.33          1.38  1.54  1.57

M costs as much as a state of V = D. So with the delta rule and a small V, more than two devices compute more than twice
the products of one forward pass. The alternative is no cheaper: attend from zero, then add what the state before adds,
scale * (q_t e^g(0, t]) S. It takes as many products and keeps outputs in float32 until then, and with the delta rule
every token has a matrix in the place of e^g.

A device sends a state [B H D V] float32 in each round, forward and again backward; in all rounds but the last M too,
which is [B H 1], [B H D] or, with the delta rule, [B H D D]; and a final state if one is asked for. Nothing depends on
T. LASP-2 (arXiv:2502.07563) gathers all P states at once instead.

A segment continues across the boundary of two devices if the ids beside it are equal; otherwise M is 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.linear.api import BACK_ENDS, check_fold, prepare
from longattn.ops.linear.contract import Arrays, Ids, Options, Out, State
from longattn.ops.partial import Affine, advance, chain
from longattn.parallel.layout import Axis


def previous(x: Array, axis: Axis, hop: int = 1, *, reverse: bool = False) -> Array:
    """Receives `x` of the device `hop` places before this one (`reverse`: after it); zeros where there is none."""
    places = [(i, i + hop) for i in range(lax.axis_size(axis) - hop)]
    return lax.ppermute(x, axis, [(b, a) for a, b in places] if reverse else places)


def continues(segment_ids: Ids, axis: Axis) -> Bool[Array, "B"]:
    """Returns whether this device's first token continues the previous device's segment; True on the first device."""
    return (previous(segment_ids[:, -1], axis) == segment_ids[:, 0]) | (lax.axis_index(axis) == 0)


def first(x: Array, axis: Axis) -> Array:
    """Returns `x` on the first device, zeros on the others."""
    return jnp.where(lax.axis_index(axis) == 0, x, 0)


def last(x: Array, axis: Axis) -> Array:
    """Returns the last device's `x` on all devices."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, 0), axis)


def where(rows: Bool[Array, "B"] | None, x: Array) -> Array:
    """Returns `x` in these rows (None: all), zeros elsewhere."""
    return x if rows is None else jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def scan(state: State, transition: Array | None, axis: Axis, *, reverse: bool = False) -> State:
    """Returns the state that all devices before this one (`reverse`: after it) leave, if the first starts from zeros.

    In round r, a map arrives from 2^r devices away. Chaining it, (`transition`, `state`) grows to the map of 2^(r+1)
    devices, this one included, and `before` to that of the 2^(r+1) - 1 before this one. Beyond the first device zeros
    arrive, the map to a state of zeros.

    Args:
      state, transition: the map of this device's tokens, see `Affine`. One or two devices need no transition.
      axis: mesh axis of the devices.
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
    """Returns the rounds of the scan over so many devices."""
    return (devices - 1).bit_length()


class _Static(NamedTuple):
    """Static arguments of a call."""

    axis: Axis
    name: str  # of the back end
    options: Options
    plan: Any  # to attend and to pull
    fold_plan: Any


def _fold(x: Arrays, start: State, continued: Bool[Array, "B"] | None, n: _Static) -> tuple[State, Array | None]:
    """Returns the state that this device's tokens make of `start`, and the transition from the state before them.

    The transition is None where no device needs it.
    """
    (*rows, D, V), needed = start.shape, rounds(lax.axis_size(n.axis)) > 1
    fold = lambda S: BACK_ENDS[n.name].fold(x._replace(q=None, initial_state=S), n.options, n.fold_plan)
    if (ids := x.segment_ids) is not None:  # else nothing is left of the state before
        continued = continued & jnp.all(ids[:, 1:] == ids[:, :-1], 1)
    if x.beta is not None and needed:
        one = jnp.broadcast_to(jnp.eye(D, dtype=start.dtype)[None, None], (*rows, D, D))
        both = fold(jnp.concatenate([start, one], 3))
        return both[..., :V], where(continued, both[..., V:])
    state = fold(start)
    if not needed:
        return state, None
    total = jnp.zeros_like(start[..., 0, :1]) if x.log_decay is None else jnp.sum(x.log_decay, 1).reshape(*rows, -1)
    return state, where(continued, jnp.exp(total))


def _before(x: Arrays, n: _Static) -> tuple[State, Array | None, Array | None]:
    """Returns the state before this device's tokens, the transition from it, and the rows whose segment continues."""
    continued = None if x.segment_ids is None else continues(x.segment_ids, n.axis)
    start = first(x.initial_state, n.axis)
    state, transition = _fold(x, start, continued, n)
    with jax.named_scope("exchange"):
        return start + where(continued, scan(state, transition, n.axis)), transition, continued


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(x: Arrays, n: _Static) -> tuple[Out, State]:
    """Returns out and the state after this device's tokens."""
    S, _, _ = _before(x, n)
    return BACK_ENDS[n.name].attend(x._replace(initial_state=S), n.options, n.plan)


def _attend_forward(x: Arrays, n: _Static) -> tuple[tuple[Out, State], Any]:
    S, *kept = _before(x, n)
    kept = jax.tree.map(lambda y: checkpoint_name(y, "linear_state"), kept)
    attend = lambda x: BACK_ENDS[n.name].attend(x, n.options, n.plan)
    results, transpose = jax.vjp(attend, x._replace(initial_state=S))
    return results, (x._replace(initial_state=None), kept, transpose)


def _attend_backward(n: _Static, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Arrays]:
    x, (transition, continued), transpose = residuals
    do, dS = cotangents
    before = BACK_ENDS[n.name].pull(x, do, dS, n.options, n.plan)
    if transition is not None and transition.ndim == 4:
        transition = transition.swapaxes(2, 3)
    with jax.named_scope("exchange"):
        dS = dS + scan(where(continued, before), transition, n.axis, reverse=True)
    (gradients,) = transpose((do, dS))
    return (gradients._replace(initial_state=first(gradients.initial_state, n.axis), segment_ids=None),)


_attend.defvjp(_attend_forward, _attend_backward)


def attend(x: Arrays, axis: Axis, options: Options, names: tuple[str, ...]) -> tuple[Out, State]:
    """`longattn.linear_attention` inside a shard_map, with the sequence sharded along `axis`.

    Args:
      x: this device's arrays, validated (`linear.api.validate`). The initial state is the one before the first device's
        tokens.
      axis: mesh axis along which the sequence is sharded, in order.
      options, names: as `validate` returns them.

    Returns:
      This device's out, and the state after the last device's tokens, equal on all devices of `axis`.

    Raises:
      NotImplementedError: with the reasons, if no back end serves the call.
    """
    (B, _, _, D), V = x.k.shape, x.v.shape[3]
    if x.initial_state is None:
        x = x._replace(initial_state=jnp.zeros((B, x.H, D, V), shapes.statistics_dtype(x.k.dtype)))
    x = prepare(x)
    shaped = jax.eval_shape(lambda x: x, x)
    columns = V + D if x.beta is not None and rounds(lax.axis_size(axis)) > 1 else V

    def accepts(back_end: dispatch.BackEnd) -> tuple[Any, Any]:
        return back_end.check(shaped, options), check_fold(back_end, shaped, columns, options)

    name, plans = dispatch.choose(names, BACK_ENDS, accepts)
    with jax.named_scope("linear_attention"), jax.named_scope(name):
        out, S = _attend(x, _Static(axis, name, options, *plans))
        return out, last(S, axis)
