"""Formulas for linear attention's part of a step: FLOPs of its TPU kernels, messages between devices, buffers.

The mixers' modules state their calls of linear attention and of short convolutions, and what XLA keeps beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longattn.config import Mixer, Model
from longattn.models import module_of
from longattn.models.mixer import Buffers, Widths, specs
from longattn.models.mixers import calls
from longattn.ops.calls import ConvolutionCall, LinearCall
from longattn.ops.linear.pallas_tpu.call import Call, plan_call
from longattn.ops.linear.pallas_tpu.cost import chunk_cost
from longattn.ops.linear.pallas_tpu.products import SUBLANES
from longattn.ops.linear.pallas_tpu.tuning import LANES, SPAN, Problem
from longattn.parallel.linear_state import rounds

_F32 = 4


@dataclass(frozen=True)
class Recurrence:
    """The one call of linear attention that a layer makes on a device, and its short convolutions."""

    call: LinearCall
    channels: tuple[int, ...]  # of each short convolution
    taps: int  # the number of taps of each; 1: there are none


def _calls[C: LinearCall | ConvolutionCall](mixer: Mixer, model: Model, tensor: int, kind: type[C]) -> list[C]:
    """A layer's calls of one kind on one of the devices that share heads, with one token: no formula here reads it."""
    return [call.shared(tensor) for call in calls(mixer, model, 1, kind)]


def of(mixer: Mixer, model: Model, tensor: int = 1) -> Recurrence | None:
    """The recurrence of a layer; None for a layer that does anything else than call linear attention once."""
    kinds = {type(call) for call in module_of(mixer).calls(mixer, model, 1)}
    found = _calls(mixer, model, tensor, LinearCall)
    if len(found) != 1 or not kinds <= {LinearCall, ConvolutionCall}:
        return None
    convolutions = _calls(mixer, model, tensor, ConvolutionCall)
    taps = max((c.taps for c in convolutions), default=1)
    return Recurrence(found[0], tuple(c.H * c.D for c in convolutions), taps)


def known(mixer: Mixer, model: Model) -> bool:
    """Whether a formula knows the memory of a layer, as a recurrence."""
    return (r := of(mixer, model)) is not None and _buffers(mixer, model, r, 1.0) is not None


def _call(r: LinearCall, T: int, V: int, dtype: DTypeLike) -> Call:
    """The kernels' call for one sequence of T tokens and value heads of size V."""
    return plan_call(Problem(1, r.H, r.Hq, r.Hk, r.Hv, T, r.D, V, r.decay, r.delta, dtype), r.scale)


def _chained(r: LinearCall, rounds: int) -> float:
    """FLOPs of a scan's products of transitions [D D] with each other and with states [D V]."""
    if rounds < 2:
        return 0.0
    return 2.0 * r.D * r.D * (2 * (rounds - 1) * r.V + 2 * (rounds - 2) * r.D)


def flops(mixer: Mixer, model: Model, T: int, devices: int, tensor: int) -> tuple[float, float]:
    """FLOPs of a layer's linear attention, (forward, backward), on one device with T tokens of a sequence.

    The backward pass includes what it recomputes, with the remat policy "full" the forward pass too.

    Args:
      mixer, model: of the layer.
      T: tokens of a sequence on a device.
      devices: along the sequence.
      tensor: devices that share heads.
    """
    found = [_recurrence_flops(r, T, devices, jnp.dtype(model.dtype)) for r in _calls(mixer, model, tensor, LinearCall)]
    forward, backward = (sum(call[i] for call in found) for i in range(2))
    return forward, backward + forward * (model.remat == "full")


def _recurrence_flops(r: LinearCall, T: int, devices: int, dtype: DTypeLike) -> tuple[float, float]:
    n = _call(r, T, r.V, dtype)
    one = lambda n, what: r.H * n.J * chunk_cost(n.statics, n.D, n.V, what)[0]
    forward = n.M * one(n, "out")
    backward = n.recomputed * one(n, "state") + n.M * one(n, "gradients")
    if devices > 1:
        wide = _call(r, T, r.V + r.D * (r.delta and rounds(devices) > 1), dtype)
        forward += n.M * one(wide, "state")
        backward += n.M * one(n, "pull")
        forward, backward = (x + r.H * r.delta * _chained(r, rounds(devices)) for x in (forward, backward))
    return forward, backward


def own_flops(mixer: Mixer, model: Model, T: int, tensor: int) -> float:
    """FLOPs of both passes of a layer's own products over T tokens; remat repeats the forward pass."""
    forward, backward = module_of(mixer).own_flops(mixer, model, T)
    return (forward * (2 if model.remat not in ("none", "dots") else 1) + backward) / tensor


def divided(mixer: Mixer, model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the mixer's matrices that the devices of `tensor` divide."""
    module = module_of(mixer)
    lie = specs(module, mixer, model)
    return {name: shape for name, shape in module.matrices(mixer, model).items() if "tensor" in lie[name]}


def kept(mixer: Mixer, model: Model, T: int, tensor: int) -> float:
    """Bytes per token that a recurrence keeps of the forward pass besides its input: out, and states between spans."""
    r, c = of(mixer, model, tensor), np.dtype(model.dtype).itemsize
    assert r is not None  # callers ask `known` first
    return c * r.call.H * _filled(r.call.V) + _states(r.call, T)


def _filled(D: int) -> int:
    return -(-D // LANES) * LANES


def _states(r: LinearCall, T: int) -> float:
    """Bytes per token of the states before each span."""
    return _F32 * r.H * -(-r.D // SUBLANES) * SUBLANES * _filled(r.V) / min(T, SPAN)


def _widths(r: Recurrence, model: Model, F: float) -> Widths:
    call, D, V = r.call, _filled(r.call.D), _filled(r.call.V)
    return Widths(
        E=model.E, F=F, q=call.Hq * D, k=call.Hk * D, v=call.Hv * V, out=call.H * V, channels=r.channels,
        itemsize=np.dtype(model.dtype).itemsize,
    )  # fmt: skip


def _buffers(mixer: Mixer, model: Model, r: Recurrence, F: float) -> Buffers | None:
    """Returns the buffers that the mixer's module states for one layer on a device, with an MLP of width F."""
    return module_of(mixer).buffers(mixer, model, r.call, _widths(r, model, F))


def peaks(mixer: Mixer, model: Model, T: int, tensor: int, piece: float) -> dict[str, float]:
    """Bytes per token alive in a layer's backward pass when XLA may need most, besides its matrices, by the moment.

    mlp: activations of widths F and E, and what has been recomputed of the mixer: its convolutions' inputs, out, gate,
        q and k; with the remat policy "full" also what the kernel reads and gives.
    kernels: what the backward kernel reads and gives, filled up to 128 lanes, beside the convolutions' inputs and
        results in float32.
    convolutions: backward, shifted by each tap, in float32; those of equal size at once.
    features: of feature maps, where the mixer has any.
    beside: the kernels' or the features', and of width F where XLA orders the backward pass for speed. It does so only
        where there is room; the other moments hold where memory is short.

    Args:
      mixer, model: of all layers.
      T: tokens of a sequence on a device.
      tensor: devices among which heads and the MLP's width are divided.
      piece: of these tokens, the share that the MLP sees at once.
    """
    r, c = of(mixer, model, tensor), np.dtype(model.dtype).itemsize
    assert r is not None  # callers ask `known` first
    call, w = r.call, _widths(r, model, model.F / tensor * piece)
    stated = _buffers(mixer, model, r, w.F)
    assert stated is not None  # `known` says so
    E, F, q, k, v, out, inputs = w.E, w.F, w.q, w.k, w.v, w.out, w.convolved
    vector = 2 * _F32 * q * (call.decay == "vector")
    found = {"mlp": stated.mlp}
    if model.remat == "full":
        again = c * (4 * F + 4 * E + q + k + 3 * out) + (1 + call.delta) * vector + 2 * _F32 * inputs
        found["mlp"] = max(found["mlp"], again)
    operands = c * (2 * (q + k + v + out) + 3 * E) + (1 + call.delta) * vector + 2 * _F32 * inputs + _states(call, T)
    found["kernels"] = operands + stated.kernel
    if inputs:
        largest = sum(n for n in r.channels if n == max(r.channels))
        found["convolutions"] = _F32 * ((r.taps + 1) * largest + inputs - largest) + c * (out + 3 * E)
    if stated.features:
        found["features"] = stated.features
    found["beside"] = 4 * c * F * stated.overlaps_mlp + max(found["kernels"], stated.features)
    return found


def sums(mixer: Mixer, model: Model) -> int:
    """The number of arrays [tokens, E] of the compute dtype that `tensor` devices sum in a mixer's backward pass.

    XLA sums the gradient of each matrix's input by itself. Those of matrices with one number per head are float32.
    """
    wide = _F32 // np.dtype(model.dtype).itemsize
    inputs = {name: shape for name, shape in divided(mixer, model).items() if shape[0] == model.E and name != "out"}
    return sum(wide if len(shape) == 2 else 1 for shape in inputs.values())


def messages(mixer: Mixer, model: Model, rows: int, devices: int, tensor: int) -> tuple[float, float]:
    """The most bytes that any device receives in one layer, (forward, backward).

    They are the states of scans, and the inputs before its own that short convolutions read. The backward pass
    includes the messages that remat repeats.
    """
    if devices == 1:
        return 0.0, 0.0
    c = np.dtype(model.dtype).itemsize
    scan = before = 0.0
    for r in _calls(mixer, model, tensor, LinearCall):
        transition = r.D * r.D if r.delta else r.D if r.decay == "vector" else 1
        scan += _F32 * rows * r.H * (rounds(devices) * r.D * r.V + (rounds(devices) - 1) * transition)
    for convolution in _calls(mixer, model, tensor, ConvolutionCall):
        before += c * rows * (convolution.taps - 1) * convolution.H * convolution.D
    again = scan * (model.remat == "full") + before * (model.remat != "none")
    return scan + before, scan + before + again
