"""DistFlashAttn's balanced schedule (arXiv:2310.03294, section 3.2): idle devices help others.

Under a causal mask device i of a contiguous layout sees i + 1 shards of keys. At step t = 1 .. P // 2, device i >= t
attends to the keys of device i - t, which sent them. Device i < t has no such keys. It takes the queries of device
i - t + P, attends with them to its own keys, and sends the partial result back to their owner, which merges it. Every
pair is computed once, in P // 2 + 1 steps; for even P half of the devices idle in the last one. (The paper's algorithm
2 stops its helpers at the last step for odd P, too, which loses (P - 1) / 2 pairs. Here they go on.)

The backward pass has the same schedule. Keys travel, or queries with the cotangent and its statistics, and the
gradients of what was lent come back. While step t is computed, the inputs of step t + 1 and the results that step t - 1
found for others are in transit.

Per device and layer on average, in units of S K D elements of k and as many of v, T H D of q and T H V of out:

    forward     (P - 1) / 2P pairs. Half of them, a little more for even P, cost 1 / P of k and of v; the others 1 / P
                of q, and of out in float32
    backward    the former 1 / P of k and of v, and of dk and of dv in float32; the others 1 / P of q and of dout, and
                of dq in float32

The steps differ in who sends to whom, so the program grows with P / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from longattn.mask import Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention.contract import Visibility
from longattn.ops.partial import Partial
from longattn.parallel import pairs
from longattn.parallel.strategy import Call, Edges, Gradients, Kept, Pair, Strategy, sent, without_out


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the schedule: who lends what to whom, and which pairs are computed."""

    t: int
    keys: Edges  # (owner, device whose queries see them)
    queries: Edges  # (owner, device that helps)
    which: np.ndarray  # bool [P P], the pair of every device, those without work too

    def at(self, device: Any) -> tuple[Any, Any]:
        """A device's pair at this step: (whose queries, whose keys); the mask shows none of it where it idles."""
        t, P, xp = self.t, len(self.which), jnp if isinstance(device, jax.Array) else np
        if 2 * t < P:  # device i < t helps device i - t + P
            return xp.where(device >= t, device, device - t + P), xp.where(device >= t, device - t, device)
        return device, (device - t) % P


def steps(needed: np.ndarray) -> list[Step]:
    """The schedule for the pairs needed [P P], all on or below the diagonal; steps without pairs are left out."""
    P, found = len(needed), []
    for t in range(1, P // 2 + 1):
        keys = [(i - t, i) for i in range(t, P) if needed[i, i - t]]
        helped = range(P - t, P) if 2 * t < P else ()  # at 2 t = P the helpers' pairs are those of the owners
        queries = [(i, i + t - P) for i in helped if needed[i, i + t - P]]
        step = Step(t, keys, queries, np.zeros((P, P), bool))
        step.which[step.at(np.arange(P))] = True
        if keys or queries:
            found.append(step)
    return found


def _back(edges: Edges) -> Edges:
    return [(b, a) for a, b in edges]


class _Roles:
    """This device's part in a step: it computes for itself or helps another device."""

    def __init__(self, step: Step, call: Call):
        self.step, self.axis = step, call.axis
        self.device = lax.axis_index(call.axis)
        self.pair = step.at(self.device)
        self.own = self.device >= step.t if step.queries else None  # None: nobody helps

    def choose[Tree](self, own: Tree, other: Tree) -> Tree:
        """`own` where this device computes for itself, `other` where it helps."""
        return own if self.own is None else jax.tree.map(lambda a, b: jnp.where(self.own, a, b), own, other)

    def lend(self, queries: Any, keys: Any) -> tuple[Any, Any]:
        """Sends and returns what arrives here: queries to help with (None where nobody helps), and keys."""
        lent = sent(queries, self.axis, self.step.queries, "queries") if self.step.queries else None
        return lent, sent(keys, self.axis, self.step.keys, "keys")


class _Work(NamedTuple):
    """The work of each step of a pass: the forward and the backward pass walk the same schedule."""

    compute: Callable[..., Any]  # (roles, queries, keys) -> found
    keep: Callable[..., Any]  # (sums, roles, found) -> sums, with the results of this device's own queries or keys
    give: Callable[..., Any]  # (roles, found) -> results that other devices found for this one, sent here
    take: Callable[..., Any]  # (sums, roles, given) -> sums, with those


def _walk(queries: Any, keys: Any, call: Call, needed: np.ndarray, work: _Work, sums: Any) -> Any:
    """Runs all steps and returns the sums; the next step's inputs and the last one's results travel meanwhile.

    XLA's scheduler awaits a transfer once it estimates enough work to have passed, and it counts cheap additions. The
    barriers leave nothing between start and end but the attention of a step. They also keep XLA from sending the inputs
    of later steps at once.
    """
    planned = [_Roles(step, call) for step in steps(needed)]
    lent = planned[0].lend(queries, keys) if planned else None
    given = None
    lent, sums = lax.optimization_barrier((lent, sums))
    for n, roles in enumerate(planned):
        coming = planned[n + 1].lend(queries, keys) if n + 1 < len(planned) else None
        given_queries, given_keys = lent
        found = work.compute(roles, roles.choose(queries, given_queries), roles.choose(given_keys, keys))
        found, queries, keys, lent, given = lax.optimization_barrier((found, queries, keys, coming, given))
        sums = work.take(sums, planned[n - 1], given) if n else sums
        sums = work.keep(sums, roles, found)
        given = work.give(roles, found)
    return work.take(sums, planned[-1], given) if planned else sums


def forward(q: Array, k: Array, v: Array, bias: None, visibility: Visibility, call: Call) -> tuple[Array, Array, Kept]:
    """Returns (out, lse, kept) of this device's queries over the keys of all devices on `call.axis`."""
    local, device = pairs.local(q, k, visibility, call), lax.axis_index(call.axis)
    own = local.attend(pairs.at_distance(call.P, [0]), device, device, q, (k, v), None)
    hidden = dispatch.vary_together((jnp.full(own.lse.shape, -jnp.inf, own.lse.dtype), q))[0]

    def compute(roles: _Roles, q: Array, kv: Pair) -> Partial:
        return local.attend(roles.step.which, *roles.pair, q, kv, None)

    def keep(so_far: Partial, roles: _Roles, found: Partial) -> Partial:
        return partials.merge(so_far, found._replace(lse=roles.choose(found.lse, hidden)))

    def give(roles: _Roles, found: Partial) -> Partial | None:
        if not roles.step.queries:
            return None
        return Partial(*sent(tuple(found), call.axis, _back(roles.step.queries), "results"))

    def take(so_far: Partial, roles: _Roles, given: Partial | None) -> Partial:
        if given is None:
            return so_far
        helped = np.isin(np.arange(call.P), [owner for owner, _ in roles.step.queries])
        return partials.merge(so_far, given._replace(lse=jnp.where(jnp.asarray(helped)[device], given.lse, -jnp.inf)))

    out, lse = _walk(q, (k, v), call, local.pairs.needed, _Work(compute, keep, give, take), own)
    return out.astype(call.out_dtype), lse, (q, k, v)


def backward(
    kept: Kept, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Gradients:
    """Returns dq, dk, dv and no dbias for `forward`."""
    q, k, v = kept
    local, device = pairs.local(q, k, visibility, call), lax.axis_index(call.axis)
    dlse = without_out(out, do, dlse)
    zeros = dispatch.vary_together((jnp.zeros_like(out), q))[0]

    def gradients(which: np.ndarray, pair: Pair, queries: Any, kv: Pair) -> Any:
        q, lse, do, dlse = queries
        return local.backward(which, *pair, q, kv, zeros, lse, do, dlse)

    def compute(roles: _Roles, queries: Any, kv: Pair) -> Any:
        return gradients(roles.step.which, roles.pair, queries, kv)

    def keep(sums: Any, roles: _Roles, found: Any) -> Any:
        (dq, *dkv), (own_dq, *own_dkv) = found, sums
        if not roles.step.queries:
            return own_dq + dq, *own_dkv
        nothing = jax.tree.map(jnp.zeros_like, (dq, dkv))
        return jax.tree.map(jnp.add, sums, (roles.choose(dq, nothing[0]), *roles.choose(nothing[1], dkv)))

    def give(roles: _Roles, found: Any) -> Any:
        dq, *dkv = found
        home = sent(dkv, call.axis, _back(roles.step.keys), "gradients")
        return (sent(dq, call.axis, _back(roles.step.queries), "gradients") if roles.step.queries else None), *home

    def take(sums: Any, roles: _Roles, given: Any) -> Any:
        return tuple(a if b is None else a + b for a, b in zip(sums, given))

    queries = q, lse, do, dlse
    own = gradients(pairs.at_distance(call.P, [0]), (device, device), queries, (k, v))
    return *_walk(queries, (k, v), call, local.pairs.needed, _Work(compute, keep, give, take), own), None


def check(mask: Mask, T: int, S: int, call: Call) -> None:
    """Raises NotImplementedError for a layout that is balanced by itself, and for a mask that shows later keys."""
    if call.layout.name not in BALANCED.layouts:
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


BALANCED = Strategy(
    "balanced",
    "devices without work of their own under a causal mask help others",
    forward,
    backward,
    layouts=("contiguous",),
    even=True,
    skips=True,
    check=check,
)
