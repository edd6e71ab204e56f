"""Exact softmax attention as a mixer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from longattn import config
from longattn.mask import EMPTY
from longattn.models.context import Context
from longattn.models.layers import RMSNorm, fan_in, no_state, rope_frequencies, rope_temperature, rotate
from longattn.models.mixer import MixerModule
from longattn.parallel.mesh import SLICED, Rule


class Softmax(MixerModule):
    """Exact softmax attention: projections, optional RMSNorm of q and k, rotary positions, grouped key/value heads."""

    config: config.Softmax

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        state: None = None,
    ) -> tuple[Float[Array, "B T E"], None]:
        no_state(state)
        cfg, m, context = self.config, self.model, self.context or Context()
        heads = fan_in(0, (1, 2))
        wq, wk, wv = (
            self.param(n, heads, (m.E, h, m.D), jnp.float32).astype(x.dtype) for n, h in zip("qkv", (m.H, m.K, m.K))
        )
        wo = self.param("out", fan_in((0, 1), 2, 1 / (2 * m.N)), (m.H, m.D, m.E), jnp.float32).astype(x.dtype)
        with jax.named_scope("projections"):
            q = jnp.einsum("BTE,EHD->BTHD", x, wq)
            k = jnp.einsum("BSE,EKD->BSKD", x, wk)
            v = jnp.einsum("BSE,EKV->BSKV", x, wv)
        if cfg.qk_norm:
            q, k = RMSNorm(m.norm_eps, name="q_norm")(q), RMSNorm(m.norm_eps, name="k_norm")(k)
        if cfg.rope is not None:
            frequencies = rope_frequencies(cfg.rope, m.D)
            at = context.positions(x.shape[1]) if positions is None else positions
            with jax.named_scope("rotary"):
                q, k = rotate(q, at, frequencies), rotate(k, at, frequencies)
        y = context.attention(
            q, k, v, mask=cfg.mask, segment_ids=segment_ids, positions=positions,
            scale=m.D**-0.5 * rope_temperature(cfg.rope), softcap=cfg.softcap,
            sinks=self.param("sinks", nn.initializers.zeros, (m.H,), jnp.float32) if cfg.sinks else None,
        )  # fmt: skip
        with jax.named_scope("out"):
            return jnp.einsum("BTHV,HVE->BTE", y, wo), None

    @staticmethod
    def state_elements(mixer: config.Softmax, model: config.Model, T: int) -> int:
        """Keys and values of the tokens before T that a query at T - 1 or later may see."""
        keys, last = np.arange(T, dtype=np.int32), np.int32(T - 1)
        needed = mixer.mask.kind(last, np.int32(2**30), keys, keys) != EMPTY
        return model.K * 2 * model.D * int(np.sum(needed))

    @staticmethod
    def bytes_read_per_token(mixer: config.Softmax, model: config.Model, T: int, itemsize: int = 2) -> int:
        """Keys and values visible to the query at T - 1."""
        visible = mixer.mask(np.int32(T - 1), np.arange(T, dtype=np.int32))
        return model.K * 2 * model.D * int(np.sum(np.asarray(visible))) * itemsize

    @staticmethod
    def sequential_steps(mixer: config.Softmax, model: config.Model, T: int) -> int:
        """No token waits for another."""
        return 1

    @classmethod
    def sharding(cls, mixer: config.Softmax, model: config.Model) -> tuple[Rule, ...]:
        """Returns rules that slice matrices along E and divide heads over `tensor`."""
        return (
            ("q|k|v", P(SLICED, "tensor", None)),  # [E H D]
            ("out", P("tensor", None, SLICED)),  # [H D E]
            ("sinks", P("tensor")),  # [H]
            ("(q|k)_norm/scale", P()),  # [D]
        )
