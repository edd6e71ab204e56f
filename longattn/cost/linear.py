"""Linear attention's part of a step by formula: what its kernels for TPUs compute, what devices send each other.

Which call of `linear_attention` and which short convolutions a mixer makes is asked of its module.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longattn.config import GLA, Based, Mamba2, Mixer, Model, Performer, RetNet
from longattn.cost import flops as cost
from longattn.models import MIXERS, Context
from longattn.ops.linear.pallas_tpu.call import Call
from longattn.ops.linear.pallas_tpu.chunk import SUBLANES
from longattn.ops.linear.pallas_tpu.cost import of_chunk
from longattn.ops.linear.pallas_tpu.tuning import LANES, SPAN, choose
from longattn.parallel.linear_state import rounds
from longattn.parallel.mesh import PARAMETERS

_F32 = 4


@dataclass(frozen=True)
class Recurrence:
    """What one layer asks of `linear_attention` and of short convolutions, heads divided among the devices of `tensor`.

    Heads of one array that they do not divide are all on each.
    """

    Hq: int
    Hk: int
    Hv: int
    D: int
    V: int
    decay: str  # none, scalar, vector
    delta: bool
    scale: float
    channels: tuple[int, ...]  # of each short convolution
    taps: int  # of each; 1: there are none

    @property
    def H(self) -> int:
        return max(self.Hq, self.Hk, self.Hv)


@functools.lru_cache(maxsize=256)
def of(mixer: Mixer, model: Model, tensor: int = 1) -> Recurrence:
    """That of a mixer other than Softmax."""
    calls: list[dict[str, Any]] = []
    convolutions: list[tuple[int, int, int]] = []  # heads, channels of a head, taps

    class Asked(Context):
        def linear_attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
            calls.append({"q": q, "k": k, "v": v, **options})
            return jnp.zeros((*q.shape[:2], max(x.shape[2] for x in (q, k, v)), v.shape[3]), q.dtype), None

        def short_convolution(self, x: Any, w: Any, b: Any, **options: Any) -> Any:
            convolutions.append(w.shape)
            return x, None

    module = MIXERS[type(mixer).__name__](mixer, model, Asked())
    x = jax.ShapeDtypeStruct((1, 1, model.E), model.dtype)
    jax.eval_shape(module.init, jax.random.key(0), x)
    (options,) = calls
    q, k, v = (options[name] for name in "qkv")
    own = lambda heads: heads // tensor if heads % tensor == 0 else heads
    g = options.get("log_decay")
    return Recurrence(
        Hq=own(q.shape[2]),
        Hk=own(k.shape[2]),
        Hv=own(v.shape[2]),
        D=q.shape[3],
        V=v.shape[3],
        decay="none" if g is None else "vector" if g.ndim == 4 else "scalar",
        delta=options.get("beta") is not None,
        scale=options.get("scale", 1.0),
        channels=tuple(own(heads) * size for heads, size, _ in convolutions),
        taps=max((taps for *_, taps in convolutions), default=1),
    )


def _call(r: Recurrence, T: int, V: int, dtype: Any) -> Call:
    """Of one sequence of T tokens, with values of V numbers."""
    heads = r.Hq, r.Hk, r.Hv
    sizes = choose(None, 1, r.H, heads, T, r.D, V, dtype.itemsize, r.decay, r.delta)
    chunk, span, block_h, vmem = sizes
    return Call(1, r.H, *heads, T, r.D, V, chunk, span, block_h, r.decay, r.delta, r.scale, dtype, vmem)


def _chained(r: Recurrence, rounds: int) -> float:
    """FLOPs of a scan's products of transitions [D D] with each other and with states [D V]."""
    if rounds < 2:
        return 0.0
    return 2.0 * r.D * r.D * (2 * (rounds - 1) * r.V + 2 * (rounds - 2) * r.D)


def flops(mixer: Mixer, model: Model, T: int, devices: int, tensor: int) -> tuple[float, float]:
    """FLOPs of linear attention, (forward, backward), of one device: T tokens of one of several parts of a sequence.

    The backward pass includes what it recomputes, with the remat policy "full" the forward pass too.
    """
    r, dtype = of(mixer, model, tensor), jnp.dtype(model.dtype)
    n = _call(r, T, r.V, dtype)
    one = lambda n, what: r.H * n.spans * of_chunk(n.statics, n.D, n.V, what)[0]
    forward = n.span * one(n, "out")
    backward = n.again * one(n, "state") + n.span * one(n, "gradients")
    if devices > 1:
        wide = _call(r, T, r.V + r.D * (r.delta and rounds(devices) > 1), dtype)
        forward += n.span * one(wide, "state")
        backward += n.span * one(n, "pull")
        forward, backward = (x + r.H * r.delta * _chained(r, rounds(devices)) for x in (forward, backward))
    backward += forward * (model.remat == "full")
    return forward, backward


def features(mixer: Mixer, model: Model, T: int, tensor: int) -> float:
    """FLOPs of Performer's features of T tokens, both passes: directions have no gradient, and remat repeats them."""
    if not isinstance(mixer, Performer):
        return 0.0
    r = of(mixer, model, tensor)
    return 2.0 * T * (r.Hq + r.Hk) * mixer.features * model.D * (3 if model.remat not in ("none", "dots") else 2)


def divided(mixer: Mixer, model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes by name of those of a mixer's matrices that the devices of `tensor` share."""
    found = {}
    for name, shape in cost.mixer_shapes(mixer, model).items():
        lies = next(spec for rule, spec in PARAMETERS if re.search(rule, f"/mixer/{name}"))
        if cost.is_matrix(name, shape) and "tensor" in lies:
            found[name] = shape
    return found


def kept(mixer: Mixer, model: Model, T: int, tensor: int) -> float:
    """Bytes per token that a layer keeps of the forward pass besides its input: out, and the states between spans."""
    r, c = of(mixer, model, tensor), np.dtype(model.dtype).itemsize
    return c * r.H * _filled(r.V) + _states(r, T)


def _filled(D: int) -> int:
    return -(-D // LANES) * LANES


def _states(r: Recurrence, T: int) -> float:
    """Bytes per token of the states before each span."""
    return _F32 * r.H * -(-r.D // SUBLANES) * SUBLANES * _filled(r.V) / min(T, SPAN)


def peaks(mixer: Mixer, model: Model, T: int, tensor: int, piece: float) -> dict[str, float]:
    """Bytes per token of what is alive of a layer's backward pass where XLA may need most, besides its matrices.

    That is where memory is short; `beside` is what it needs where there is room.

    mlp: activations of widths F and E, and what has been computed again of the mixer: its convolutions' inputs, out,
        gate, q and k; with the remat policy "full" also what the kernel reads and gives.
    kernels: what the backward kernel reads and gives, filled up to 128 lanes, beside the convolutions' inputs and
        results in float32.
    convolutions: backward, shifted by each tap, in float32; those of equal size at once.
    beside: the kernels' and, but for Mamba-2, of width F: where there is room, XLA orders the backward pass for speed.
    features: of Performer in float32; of Based each product of a channel with those after it, filled up.

    Args:
      mixer, model: of all layers.
      T: tokens of a sequence on a device.
      tensor: devices among which heads and the MLP's width are divided.
      piece: of these tokens, the share that the MLP sees at once.
    """
    r, c = of(mixer, model, tensor), np.dtype(model.dtype).itemsize
    E, F, D, V = model.E, model.F / tensor * piece, _filled(r.D), _filled(r.V)
    q, k, v, out, inputs = r.Hq * D, r.Hk * D, r.Hv * V, r.H * V, sum(r.channels)
    found = {}
    vector = 2 * _F32 * q * (r.decay == "vector")
    states = _states(r, T)
    if isinstance(mixer, Mamba2):  # a skip and a norm over all channels, in float32
        found["mlp"] = c * (4 * F + 4 * E + 4 * out) + 3 * _F32 * r.channels[0]
    elif inputs:
        found["mlp"] = c * (5 * F + 6 * E + inputs + 2 * out)
    else:
        found["mlp"] = c * (4 * F + 4 * E + (1 + isinstance(mixer, RetNet | GLA)) * out)
        found["mlp"] += c * (q + k) * isinstance(mixer, RetNet)  # before they are rotated
    if model.remat == "full":
        again = c * (4 * F + 4 * E + q + k + 3 * out) + (1 + r.delta) * vector + 2 * _F32 * inputs
        found["mlp"] = max(found["mlp"], again)
    found["kernels"] = c * (2 * (q + k + v + out) + 3 * E) + (1 + r.delta) * vector + 2 * _F32 * inputs + states
    if isinstance(mixer, Mamba2):
        found["kernels"] += (2 * c + _F32) * out
    if inputs:
        largest = sum(n for n in r.channels if n == max(r.channels))
        found["convolutions"] = _F32 * ((r.taps + 1) * largest + inputs - largest) + c * (out + 3 * E)
    if isinstance(mixer, Performer):
        found["features"] = (_F32 + c) * (q + k) + c * (5 * E + (r.Hq + r.Hk) * model.D + v)
    if isinstance(mixer, Based):
        found["features"] = _F32 * r.H * (LANES * (2 * mixer.features - 1) + D) + 2 * c * E
    found["beside"] = 4 * c * F * (not isinstance(mixer, Mamba2)) + max(found["kernels"], found.get("features", 0.0))
    return found


def sums(mixer: Mixer, model: Model) -> int:
    """How many arrays [tokens, E] of the compute dtype the devices of `tensor` sum in a mixer's backward pass.

    XLA sums the gradient of each matrix's input by itself; those of numbers per head are float32.
    """
    wide = _F32 // np.dtype(model.dtype).itemsize
    inputs = {name: shape for name, shape in divided(mixer, model).items() if shape[0] == model.E and name != "out"}
    return sum(wide if len(shape) == 2 else 1 for shape in inputs.values())


def messages(mixer: Mixer, model: Model, rows: int, devices: int, tensor: int) -> tuple[float, float]:
    """Bytes that a device receives in one layer, (forward, backward), the most of any: scans of states, and inputs
    before its own that short convolutions read. The backward pass has those that remat repeats.
    """
    if devices == 1:
        return 0.0, 0.0
    r, c = of(mixer, model, tensor), np.dtype(model.dtype).itemsize
    transition = r.D * r.D if r.delta else r.D if r.decay == "vector" else 1
    scan = _F32 * rows * r.H * (rounds(devices) * r.D * r.V + (rounds(devices) - 1) * transition)
    before = c * rows * (r.taps - 1) * sum(r.channels)
    again = scan * (model.remat == "full") + before * (model.remat != "none")
    return scan + before, scan + before + again
