"""DistFlashAttn's balanced schedule (arXiv:2310.03294, section 3.2): devices without work of their own help others.

Under a causal mask device i of a contiguous layout has i + 1 shards of keys to see. At step t = 1 .. P // 2, device
i >= t attends to the keys of device i - t, which sent them; device i < t, which has no such keys, takes the queries of
device i - t + P against its own keys, and sends back the partial result, which its owner merges. Every pair is computed
once, in P // 2 + 1 steps; for even P half of the devices idle in the last one. (The paper's algorithm 2 stops its
helpers at the last step for odd P, too, which loses (P - 1) / 2 pairs; here they go on.)

In the backward pass keys, or queries with the cotangent and its statistics, go the same ways, and the gradients of what
was lent go back. What step t + 1 needs is sent while step t is computed, not before: one step's keys wait at a time.

Per device and layer on average, in units of S K D elements of k and as many of v, T H D of q and T H V of out:

    forward     (P - 1) / 2P pairs; half of them, a little more for even P, cost 1 / P of k and of v, the others 1 / P
                of q, and of out in float32
    backward    the former 1 / P of k and of v, and of dk and of dv in float32; the others 1 / P of q and of dout, and
                of dq in float32

The steps differ in who sends to whom, so the program grows with P / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from longattn.mask import Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention.spec import Extras
from longattn.ops.partial import Partial
from longattn.parallel import pairs
from longattn.parallel.spec import Call, Strategy, refuse_bias, without_out

Edges = list[tuple[int, int]]  # (from, to)


@dataclass(frozen=True, eq=False)
class Step:
    """Who lends what to whom, and which pairs are computed."""

    t: int
    keys: Edges  # from their owner to the device whose queries see them
    queries: Edges  # from their owner to the device that helps
    which: np.ndarray  # bool [P P], all pairs that a device may be at, those without work too


def steps(needed: np.ndarray) -> list[Step]:
    """The schedule for the pairs that are needed [P P], on and below the diagonal; steps without any are left out."""
    P, found = len(needed), []
    for t in range(1, P // 2 + 1):
        keys = [(i - t, i) for i in range(t, P) if needed[i, i - t]]
        helped = range(P - t, P) if 2 * t < P else ()  # at 2 t = P the pairs of helpers are the others' own
        queries = [(i, i + t - P) for i in helped if needed[i, i + t - P]]
        which = np.zeros((P, P), bool)
        for device in range(P):
            which[_at(device, t, P)] = True
        if keys or queries:
            found.append(Step(t, keys, queries, which))
    return found


def _at(device: Any, t: int, P: int) -> tuple[Any, Any]:
    """The pair (queries of, keys of) that a device is at; it is empty where it idles."""
    xp = jnp if isinstance(device, jax.Array) else np
    if 2 * t < P:  # whose keys a device has not, it helps
        return xp.where(device >= t, device, device - t + P), xp.where(device >= t, device - t, device)
    return device, (device - t) % P


def _back(edges: Edges) -> Edges:
    return [(b, a) for a, b in edges]


def _sent(arrays: Any, axis: Any, edges: Edges, scope: str) -> Any:
    with jax.named_scope(scope):
        return jax.tree.map(lambda x: lax.ppermute(x, axis, edges), arrays)


class _Roles:
    """What this device does at a step."""

    def __init__(self, step: Step, call: Call):
        self.step, self.axis, self.P = step, call.axis, call.devices
        self.device = lax.axis_index(call.axis)
        self.pair = _at(self.device, step.t, self.P)
        self.own = self.device >= step.t if step.queries else None  # None: nobody helps

    def choose(self, own: Any, other: Any) -> Any:
        """Of this device's queries, or of those that it helps."""
        return own if self.own is None else jax.tree.map(lambda a, b: jnp.where(self.own, a, b), own, other)

    def lend(self, queries: Any, keys: Any) -> tuple[Any, Any]:
        """What arrives here: queries to help with (None where nobody helps), and keys."""
        lent = _sent(queries, self.axis, self.step.queries, "queries") if self.step.queries else None
        return lent, _sent(keys, self.axis, self.step.keys, "keys")


def _walk(queries: Any, keys: Any, call: Call, needed: np.ndarray, computed: Any, state: Any) -> Any:
    """`computed(state, roles, queries, keys)` of every step; what the next one needs is on its way meanwhile."""
    todo = [_Roles(step, call) for step in steps(needed)]
    lent = todo[0].lend(queries, keys) if todo else None
    for n, roles in enumerate(todo):
        coming = None
        if n + 1 < len(todo):  # the barrier keeps XLA from sending what later steps need as well
            (queries, keys), state = lax.optimization_barrier(((queries, keys), state))
            coming = todo[n + 1].lend(queries, keys)
        given_queries, given_keys = lent
        at = roles.choose(queries, given_queries), roles.choose(given_keys, keys)
        state = computed(state, roles, *at)
        lent = coming
    return state


def forward(q: Array, k: Array, v: Array, bias: None, extras: Extras, call: Call) -> Any:
    """Attention of this device's queries over the keys of all devices on `call.axis`."""
    local, device = pairs.local(q, k, extras, call), lax.axis_index(call.axis)
    own = local.attend(pairs.at_distance(call.devices, [0]), device, device, q, (k, v), None)
    hidden = dispatch.vary_together((jnp.full(own.lse.shape, -jnp.inf, own.lse.dtype), q))[0]

    def computed(so_far: Partial, roles: _Roles, q: Array, kv: Any) -> Partial:
        found = local.attend(roles.step.which, *roles.pair, q, kv, None)
        if not roles.step.queries:
            return partials.merge(so_far, found)
        returned = Partial(*_sent(tuple(found), call.axis, _back(roles.step.queries), "results"))
        helped = np.isin(np.arange(call.devices), [owner for owner, _ in roles.step.queries])
        lse = jnp.where(jnp.asarray(helped)[roles.device], returned.lse, -jnp.inf)
        so_far = partials.merge(so_far, found._replace(lse=roles.choose(found.lse, hidden)))
        return partials.merge(so_far, returned._replace(lse=lse))

    out, lse = _walk(q, (k, v), call, local.pairs.needed, computed, own)
    return out.astype(call.out_dtype), lse, (q, k, v)


def backward(kept: Any, out: Array, lse: Array, do: Array, dlse: Array, extras: Extras, call: Call) -> Any:
    """Its gradients."""
    q, k, v = kept
    local, device = pairs.local(q, k, extras, call), lax.axis_index(call.axis)
    dlse = without_out(out, do, dlse)
    zeros = dispatch.vary_together((jnp.zeros_like(out), q))[0]

    def gradients(which: np.ndarray, pair: Any, queries: Any, kv: Any) -> Any:
        q, lse, do, dlse = queries
        return local.backward(which, *pair, q, kv, zeros, lse, do, dlse)

    def computed(sums: Any, roles: _Roles, queries: Any, kv: Any) -> Any:
        dq, *dkv = gradients(roles.step.which, roles.pair, queries, kv)
        own_dq, *own_dkv = sums
        nothing = jax.tree.map(jnp.zeros_like, (dq, dkv))
        added = [roles.choose(dq, nothing[0]), *roles.choose(nothing[1], dkv)] if roles.step.queries else [dq]
        sums = [a + b for a, b in zip((own_dq, *own_dkv), added)] + own_dkv[len(added) - 1 :]
        home = _sent(dkv, call.axis, _back(roles.step.keys), "gradients")
        sums = [sums[0], *(a + b for a, b in zip(sums[1:], home))]
        if roles.step.queries:
            sums[0] = sums[0] + _sent(dq, call.axis, _back(roles.step.queries), "gradients")
        return sums

    queries = q, lse, do, dlse
    own = gradients(pairs.at_distance(call.devices, [0]), (device, device), queries, (k, v))
    return *_walk(queries, (k, v), call, local.pairs.needed, computed, list(own)), None


def _check(mask: Mask, bias: bool, T: int, S: int, H: int, K: int, call: Call) -> None:
    refuse_bias(bias, "balanced")
    if call.layout.name != "contiguous":
        raise NotImplementedError(
            f"strategy='balanced' balances the contiguous layout, not {call.layout.name}, which is balanced by itself; "
            "use strategy='ring'"
        )
    i, j = np.nonzero(pairs.pairs(mask, call, T, S).needed)
    if (j > i).any():
        raise NotImplementedError(
            f"strategy='balanced' is for causal masks: {mask} may show queries of device {i[j > i][0]} keys of device "
            f"{j[j > i][0]}, after them; use strategy='ring'"
        )


BALANCED = Strategy(forward, backward, _check)
