"""The transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longattn.config.checks import positive, typed
from longattn.config.mixers import Mixer, Softmax

_DEEPEST = 10_000  # layers


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer: pre-norm residual blocks of (mixer, SwiGLU)."""

    N: int = 4  # layers
    E: int = 256  # model width
    F: int = 704  # MLP width
    H: int = 4  # query heads
    K: int = 4  # key/value heads; must divide H
    D: int = 64  # size of a query/key/value head
    W: int = 257  # vocabulary
    mixers: tuple[Mixer, ...] = (Softmax(),)  # a pattern: layer i takes mixers[i % len(mixers)]
    tie: bool = True  # the output head is the embedding, transposed
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # dtype of the computation; parameters are float32
    norm_eps: float = 1e-6  # eps of every RMSNorm
    mlp_chunk: int | None = None  # the MLP runs over the sequence in chunks of this many tokens
    scan: bool = True  # scan over the layers where all mixers are equal
    remat: Literal["none", "full", "attention", "dots", "offload"] = (
        "none"  # what the backward pass recomputes; see models/transformer.py
    )

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "N", "E", "F", "H", "K", "D", "W", "mlp_chunk")
        if self.N > _DEEPEST:
            raise ValueError(f"Model.N={self.N} must be at most {_DEEPEST:,}: every layer is counted one by one")
        if not self.mixers:
            raise ValueError("Model.mixers=() must name at least one mixer")
        if self.H % self.K:
            raise ValueError(f"Model.K={self.K} must divide Model.H={self.H}")
        if self.D % 2:
            raise ValueError(f"Model.D={self.D} must be even: RoPE rotates pairs")

    @property
    def layers(self) -> tuple[Mixer, ...]:
        """The mixer of each of the N layers."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.N))
