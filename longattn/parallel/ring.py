"""Ring attention (arXiv:2310.01889): keys and values travel from device to device, queries stay.

At hop t device i holds the keys of device i - t and merges their part of its attention. In the backward pass the
gradients of keys and values follow one hop behind, and at the end return to their owner in one message. A hop is sent
before the previous one is computed, so that computation hides it. Loops over hops keep the program's size independent
of P. Outside the loops barriers order the transfers: otherwise XLA awaits one as soon as some sum has run since its
start, before the computation that is to hide it.

The mask tells beforehand (`pairs`) at which hops there is something to compute. Hops beyond the last are not sent.
Where both neighbours' keys are visible (windows), keys travel both ways, each only as far as needed. Over a zigzag or
striped layout every hop of a causal mask is equal work on every device, half of a shard's pairs.

Per device and layer, in units of S K D elements of k and as many of v, all P - 1 hops:

    forward     (P - 1) / P of k and of v
    backward    the same again, and (P - 1) / P of dk and of dv in float32: P - 2 hops behind, and the way home
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from longattn.ops.attention.contract import Visibility
from longattn.ops.partial import Partial
from longattn.parallel import pairs
from longattn.parallel.pairs import at_distance
from longattn.parallel.strategy import Call, Edges, Gradients, Kept, Pair, Strategy, sent


@dataclass(frozen=True)
class Route:
    """Keys travel `hops` times to the next device (shift 1) or to the previous one (-1)."""

    shift: int
    hops: int

    def distance(self, hop: int, P: int) -> int:
        """i - j mod P at a hop, where device i then holds the keys of device j."""
        return self.shift * hop % P

    def edges(self, needed: np.ndarray) -> list[tuple[int, int]]:
        """(from, to) of every device that ever sends keys on: a device further along the route needs them [P P]."""
        P = len(needed)

        def used(i: int) -> bool:
            for hop in range(1, self.hops + 1):
                source = (i - self.shift * (hop - 1)) % P
                if any(needed[(source + self.shift * h) % P, source] for h in range(hop, self.hops + 1)):
                    return True
            return False

        return [(i, (i + self.shift) % P) for i in range(P) if used(i)]


def routes(needed: np.ndarray) -> list[Route]:
    """The shortest routes, at most one in each direction, that bring every device the keys it needs [P P]."""
    P = len(needed)
    i, j = np.nonzero(needed)
    distances = sorted(set(((i - j) % P).tolist()) - {0})
    splits = [
        (distances[n - 1] if n else 0, P - distances[n] if n < len(distances) else 0)
        for n in reversed(range(len(distances) + 1))
    ]
    onwards, back = min(splits, key=sum)
    return [Route(shift, hops) for shift, hops in ((1, onwards), (-1, back)) if hops]


def _all(P: int, shift: int) -> list[tuple[int, int]]:
    return [(i, (i + shift) % P) for i in range(P)]


def forward(q: Array, k: Array, v: Array, bias: None, visibility: Visibility, call: Call) -> tuple[Array, Array, Kept]:
    """Returns (out, lse, kept) of this device's queries over the keys of all devices on `call.axis`."""
    mine, P, local = lax.axis_index(call.axis), call.P, pairs.local(q, k, visibility, call)
    needed = local.pairs.needed
    planned = [(route, route.edges(needed)) for route in routes(needed)]
    arriving = [sent((k, v), call.axis, edges, "hop") for _, edges in planned]
    so_far = local.attend(at_distance(P, [0]), mine, mine, q, (k, v), None)
    arriving, so_far = lax.optimization_barrier((arriving, so_far))
    for (route, edges), held in zip(planned, arriving):

        def hop(
            carry: tuple[Pair, Partial], t: Array, route: Route = route, edges: Edges = edges
        ) -> tuple[tuple[Pair, Partial], None]:
            held, so_far = carry
            coming = sent(held, call.axis, edges, "hop")
            which = at_distance(P, (route.distance(n, P) for n in range(1, route.hops)))
            return (coming, local.attend(which, mine, (mine - route.shift * t) % P, q, held, so_far)), None

        if route.hops > 1:
            (held, so_far), _ = lax.scan(hop, (held, so_far), jnp.arange(1, route.hops))
        last = (mine - route.shift * route.hops) % P
        so_far = local.attend(at_distance(P, [route.distance(route.hops, P)]), mine, last, q, held, so_far)
    return so_far.out.astype(call.out_dtype), so_far.lse, (q, k, v)


def backward(
    kept: Kept, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Gradients:
    """Returns dq, dk, dv and no dbias for `forward`."""
    q, k, v = kept
    mine, P, local = lax.axis_index(call.axis), call.P, pairs.local(q, k, visibility, call)
    needed = local.pairs.needed
    planned = [(route, route.edges(needed)) for route in routes(needed)]
    arriving = [sent((k, v), call.axis, edges, "hop") for _, edges in planned]

    def computed(route: Route, hops: range, t: Array | int, held: Pair) -> tuple[Array, Array, Array]:
        which = at_distance(P, (route.distance(n, P) for n in hops))
        return local.backward(which, mine, (mine - route.shift * t) % P, q, held, out, lse, do, dlse)

    dq, *own = local.backward(at_distance(P, [0]), mine, mine, q, (k, v), out, lse, do, dlse)
    arriving, dq, own = lax.optimization_barrier((arriving, dq, own))
    for (route, edges), held in zip(planned, arriving):
        all_edges, n = _all(P, route.shift), route.hops

        def hop(carry: Any, t: Array, route: Route = route, edges: Edges = edges, all_edges: Edges = all_edges) -> Any:
            held, behind, dq = carry
            coming = sent(held, call.axis, edges, "hop")
            behind = sent(behind, call.axis, all_edges, "behind")
            more, *new = computed(route, range(2, route.hops), t, held)
            return (coming, jax.tree.map(jnp.add, behind, new), dq + more), None

        coming = sent(held, call.axis, edges, "hop") if n > 1 else held
        more, *behind = computed(route, range(1, 2), 1, held)
        coming, more, behind = lax.optimization_barrier((coming, more, behind))
        dq = dq + more
        if n > 2:
            (coming, behind, dq), _ = lax.scan(hop, (coming, behind, dq), jnp.arange(2, n))
        if n > 1:
            behind = sent(behind, call.axis, all_edges, "behind")
            more, *new = computed(route, range(n, n + 1), n, coming)
            behind, dq = jax.tree.map(jnp.add, behind, new), dq + more
        home = sent(behind, call.axis, _all(P, -route.shift * n), "home")
        own = jax.tree.map(jnp.add, own, home)
    return dq, *own, None


RING = Strategy("ring", "keys and values travel around the devices, queries stay", forward, backward, skips=True)
