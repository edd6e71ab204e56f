"""Descriptions of calls of the ops: which function runs, on which shapes, with which static options.

They hold no arrays. A mixer states the calls it makes (`longattn.models.mixer`), and whoever counts FLOPs, bytes or
messages, or checks a kernel, reads them from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from longattn.mask import Causal, Mask


@dataclass(frozen=True)
class AttentionCall:
    """One call of `longattn.attention`: q [B T H D], k [B S K D], v [B S K V]."""

    T: int  # queries
    H: int  # query heads
    D: int  # size of a query/key head
    B: int = 1  # sequences
    S: int | None = None  # keys; None: T
    K: int | None = None  # key/value heads; None: H
    V: int | None = None  # size of a value head; None: D
    dtype: str = "float32"  # of q, k and v
    mask: Mask = Causal()
    scale: float | None = None  # of the logits; None: D**-0.5
    softcap: float | None = None
    sinks: bool = False  # float32 [H]

    def shared(self, devices: int) -> AttentionCall:
        """The call on one of `devices` that share heads."""
        return replace(self, H=self.H // devices, K=self.heads // devices)

    @property
    def keys(self) -> int:
        """The number of keys, S."""
        return self.T if self.S is None else self.S

    @property
    def heads(self) -> int:
        """The number of key/value heads, K."""
        return self.H if self.K is None else self.K

    @property
    def values(self) -> int:
        """The size of a value head, V."""
        return self.D if self.V is None else self.V


@dataclass(frozen=True)
class LinearCall:
    """One call of `longattn.linear_attention`: q [B T Hq D], k [B T Hk D], v [B T Hv V]."""

    T: int  # tokens
    Hq: int  # heads of q
    Hk: int  # heads of k
    Hv: int  # heads of v
    D: int  # size of a query/key head
    V: int  # size of a value head
    decay: Literal["none", "scalar", "vector"] = "none"  # scalar: one per head; vector: one per channel
    delta: bool = False  # the delta rule
    scale: float = 1.0  # of the output
    B: int = 1  # sequences
    dtype: str = "float32"  # of q, k and v

    @property
    def H(self) -> int:
        """The number of heads of the state."""
        return max(self.Hq, self.Hk, self.Hv)

    def shared(self, devices: int) -> LinearCall:
        """The call on one of `devices` that share heads; heads of an array that they do not divide are on each."""
        Hq, Hk, Hv = (_own(heads, devices) for heads in (self.Hq, self.Hk, self.Hv))
        return replace(self, Hq=Hq, Hk=Hk, Hv=Hv)


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of `longattn.ops.conv.short_convolution`: x [B T H D], w [H D taps]."""

    T: int  # tokens
    H: int  # heads
    D: int  # channels of a head
    taps: int
    B: int = 1  # sequences
    dtype: str = "float32"  # of x

    def shared(self, devices: int) -> ConvolutionCall:
        """The call on one of `devices` that share heads, which are on each where the devices do not divide them."""
        return replace(self, H=_own(self.H, devices))


def _own(heads: int, devices: int) -> int:
    return heads // devices if heads % devices == 0 else heads


Call = AttentionCall | LinearCall | ConvolutionCall
