"""Formulas for the cost of attention and of models: FLOPs, parameters, bytes of training state.

A multiply-add is 2 FLOPs, and only matrix products count. Attention is charged for its visible (query, key) pairs, so
causal attention counts half of T x T, whatever a kernel computes besides. Training is forward + backward.
Recomputation, by blockwise attention or by a remat policy, is listed apart and is no part of the MFU. Megatron-LM
(arXiv:2104.04473) and PaLM (arXiv:2204.02311, appendix B) count all of T x T: their figures are higher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace

from longattn.config import Config, Mixer, Model
from longattn.cost.pairs import visible_pairs
from longattn.models import module_of
from longattn.ops.calls import AttentionCall, Call, ConvolutionCall, LinearCall


@dataclass(frozen=True)
class AttentionFlops:
    """FLOPs of softmax attention without projections."""

    forward: float  # q k^T and p v: 2 pairs H (D + V)
    backward: float  # dv, dp, dq, dk: twice the forward
    recompute: float  # q k^T again, in a backward pass that kept only out and lse; no part of the MFU


def attention_flops(pairs: float, H: int, D: int, V: int | None = None) -> AttentionFlops:
    """FLOPs of H heads over `pairs` visible pairs each (arXiv:2205.14135: 4 D, 8 D and 2 D per pair where V = D)."""
    V = D if V is None else V
    forward = 2.0 * pairs * H * (D + V)
    return AttentionFlops(forward, 2 * forward, 2.0 * pairs * H * D)


@dataclass(frozen=True)
class Flops:
    """FLOPs by part of the model."""

    attention: float  # the mixers' calls and their own products; of softmax attention the visible pairs
    projections: float  # the mixers' matrices, such as q, k, v and out
    mlp: float
    head: float  # the product with the vocabulary; the embedding is a look-up

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(factor * x for x in astuple(self)))


def linear_flops(tokens: float, state: int, *, delta: bool = False) -> float:
    """FLOPs of a recurrence: per token and element of state 2 to write and 2 to read, with the delta rule 2 more.

    A chunked form computes more; decays are no matrix products.
    """
    return (6.0 if delta else 4.0) * tokens * state


def call_flops(call: Call, documents: tuple[int, ...] | None = None) -> float:
    """Forward FLOPs of one call over one sequence (`documents`: as for `visible_pairs`)."""
    match call:
        case AttentionCall():
            pairs = visible_pairs(call.mask, call.T, call.keys, documents=documents)
            return attention_flops(pairs, call.H, call.D, call.values).forward
        case LinearCall():
            tokens = call.T if documents is None else sum(documents)
            return linear_flops(tokens, call.H * call.D * call.V, delta=call.delta)
        case ConvolutionCall():
            return 0.0  # no matrix product


def mixing_flops(mixer: Mixer, model: Model, T: int, documents: tuple[int, ...] | None = None) -> float:
    """Forward FLOPs of one layer's mixer over one sequence besides its matrices: its calls, and its own products."""
    module = module_of(mixer)
    own, _ = module.own_flops(mixer, model, T if documents is None else sum(documents))
    return sum(call_flops(call, documents) for call in module.calls(mixer, model, T)) + own


def layer_flops(mixer: Mixer, model: Model, T: int, documents: Iterable[int] | None = None) -> Flops:
    """Forward FLOPs of one layer over one sequence of T tokens (`documents`: as for `visible_pairs`)."""
    documents = None if documents is None else tuple(documents)
    attention = mixing_flops(mixer, model, T, documents)
    projections = 2.0 * T * sum(map(math.prod, module_of(mixer).matrices(mixer, model).values()))
    return Flops(attention, projections, 6.0 * T * model.E * model.F, 0.0)


def forward_flops(model: Model, T: int, documents: Iterable[int] | None = None) -> Flops:
    """Forward FLOPs of a model over one sequence of T tokens (`documents`: as for `visible_pairs`)."""
    documents = None if documents is None else tuple(documents)
    layers = [layer_flops(mixer, model, T, documents) for mixer in model.layers]
    parts = [sum(part) for part in zip(*(astuple(layer) for layer in layers), strict=True)]
    return Flops(*parts[:3], head=2.0 * T * model.E * model.W)


def flops_per_token(model: Model, T: int, *, training: bool = True, documents: Iterable[int] | None = None) -> Flops:
    """FLOPs per token of sequences of T tokens: forward + backward (three forwards); training=False: forward only."""
    return forward_flops(model, T, documents) * ((3 if training else 1) / T)


def step_flops(config: Config, documents: Mapping[int, float] | None = None) -> float:
    """FLOPs of one training step over all devices, recomputation left out.

    `documents`: how many documents of each length a row holds on average, since attention sees no further. None means
    one document of T tokens. Padding counts outside attention, where it is computed.
    """
    model, T = config.model, config.data.T
    flops = forward_flops(model, T)
    if documents is not None:
        attention = [
            layers * rows * mixing_flops(mixer, model, T, (length,))
            for mixer, layers in Counter(model.layers).items()
            for length, rows in documents.items()
        ]
        flops = replace(flops, attention=sum(attention))
    return config.data.B * 3 * flops.total


def attention_share(model: Model, T: int, *, head: bool = True) -> float:
    """Attention's share of the FLOPs of the whole model at length T, in [0, 1]; head=False: of its layers alone.

    Forward and training have the same shares, since the backward pass is twice the forward in every part.
    """
    flops = forward_flops(model, T)
    return flops.attention / (flops.total - (0 if head else flops.head))


@dataclass(frozen=True)
class Parameters:
    """Parameters by part of the model."""

    embedding: int
    mixers: int
    mlp: int
    norms: int
    head: int  # 0 where it is tied to the embedding

    @property
    def total(self) -> int:
        return sum(astuple(self))


def _numbers(mixer: Mixer, model: Model) -> int:
    return sum(map(math.prod, module_of(mixer).parameters(mixer, model).values()))


def parameters(model: Model) -> Parameters:
    """How many parameters `models.init_params` makes."""
    return Parameters(
        embedding=model.W * model.E,
        mixers=sum(times * _numbers(mixer, model) for mixer, times in Counter(model.layers).items()),
        mlp=3 * model.N * model.E * model.F,
        norms=(2 * model.N + 1) * model.E,
        head=0 if model.tie else model.W * model.E,
    )


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training holds at any batch size and length."""

    parameters: int  # float32
    optimiser: int  # AdamW's two moments, float32
    gradients: int  # float32, alive between the backward pass and the update

    @property
    def total(self) -> int:
        return sum(astuple(self))


def training_state_bytes(model: Model) -> StateBytes:
    """16 bytes per parameter: float32 parameters, AdamW's moments, gradients (without scalars such as the step)."""
    n = 4 * parameters(model).total
    return StateBytes(n, 2 * n, n)
