"""What every strategy of sequence parallelism is given, inside the shard_map and after validation.

A strategy is a function of one device's shards, differentiable in q, k, v and bias,

    strategy(q, k, v, extras, call) -> (out in call.out_dtype, lse)

q [B t H D] and the queries' side of `extras` are this device's T / P positions, k [B s K D] and v [B s K V] its S / P
keys; the keys' side of `extras` is whole ([B S]): ids are small. There are no sinks. All arrays vary over the same mesh
axes (`dispatch.vary_together`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from longattn.ops.attention.spec import Extras


@dataclass(frozen=True)
class Call:
    """The static side of a call; where not said otherwise as in `longattn.attention`."""

    axis: str  # the mesh axis along which the sequence is spread
    out_dtype: str  # name of the dtype of `out`: q's, or the statistics' where sinks are still to rescale it
    scale: float
    softcap: float | None
    implementation: str | tuple[str, ...] | None
    tuning: Any

    def options(self, extras: Extras, B: int) -> dict[str, Any]:
        """The keyword arguments of `attend_partial` and its like, for B sequences; without the bias."""
        positions = (jnp.broadcast_to(x, (B, x.shape[1])) for x in (extras.q_positions, extras.k_positions))
        return {
            "mask": extras.mask,
            "positions": tuple(positions),
            "segment_ids": None if extras.q_segments is None else (extras.q_segments, extras.k_segments),
            "scale": self.scale,
            "softcap": self.softcap,
            "implementation": self.implementation,
            "tuning": self.tuning,
        }
