"""The contract of a mixer: what its module computes, and what it states about itself.

A mixer is a config dataclass in `config/mixers.py`, a subclass of `MixerModule` of the same name, and one line in
`MIXERS`. Training, evaluation, `plan` and `study` know nothing else about it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from longattn import config
from longattn.models.context import Context
from longattn.ops.calls import AttentionCall, Call, ConvolutionCall, LinearCall
from longattn.parallel.mesh import SLICED, Rule

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Widths:
    """Numbers per token in the arrays of one layer on one device; heads are filled up to the kernels' lanes."""

    E: int
    F: float  # the MLP's width, times the share of the tokens that the MLP sees at once
    q: int
    k: int
    v: int
    out: int
    channels: tuple[int, ...]  # of each short convolution's input, not filled up
    itemsize: int  # bytes of the compute dtype

    @property
    def convolved(self) -> int:
        """The channels of all short convolutions."""
        return sum(self.channels)


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Bytes per token that XLA keeps alive in the backward pass of one layer, at the moments when it may need most.

    They are read off compiled programs of layers that call linear attention once.
    """

    mlp: float  # while it computes the MLP's gradients: activations of widths E and F, what it recomputed of the mixer
    kernel: float = 0.0  # while the backward kernel runs, beyond the kernel's operands and the convolutions' arrays
    features: float = 0.0  # while it computes gradients of feature maps; 0: there are none
    overlaps_mlp: bool = True  # whether XLA computes an MLP's gradients beside the mixer's where there is memory


class MixerModule(nn.Module):
    """A layer's way to mix tokens, and what it states about itself.

    A subclass defines `__call__` and the class methods that raise NotImplementedError here. The other class methods
    have answers that hold for every layer whose matrix products are those of its parameters and of the ops it calls
    through `self.context`. Each takes the mixer's config, the model's config and, where it matters, T.
    """

    config: Any
    model: config.Model
    context: Context | None = None

    in_order = False  # True: a device's tokens must follow one another and those of the device before

    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        state: None = None,
    ) -> tuple[Float[Array, "B T E"], None]:
        """Returns the mixed tokens, and None in the place of a state."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    # ---- what a subclass must say

    @classmethod
    def state_elements(cls, mixer: Any, model: config.Model, T: int) -> int:
        """Returns the elements of state that a layer keeps per sequence after T tokens, to continue with token T."""
        raise NotImplementedError(f"{cls.__name__} must define state_elements")

    @classmethod
    def bytes_read_per_token(cls, mixer: Any, model: config.Model, T: int, itemsize: int = 2) -> int:
        """Returns the bytes of state that a layer reads per sequence to predict token T.

        Keys, values and inputs have `itemsize` bytes per element, states of recurrences 4.
        """
        raise NotImplementedError(f"{cls.__name__} must define bytes_read_per_token")

    @classmethod
    def sequential_steps(cls, mixer: Any, model: config.Model, T: int) -> int:
        """Returns how many results of a forward pass over T tokens wait for each other, with XLA's chunks."""
        raise NotImplementedError(f"{cls.__name__} must define sequential_steps")

    # ---- what holds unless a subclass says otherwise

    @classmethod
    def calls(cls, mixer: Any, model: config.Model, T: int) -> tuple[Call, ...]:
        """Returns the ops that a layer calls over one sequence of T tokens, in order.

        The default traces the module under a context that records calls and computes nothing.
        """
        return _traced(cls, mixer, model, T)[0]  # type: ignore[arg-type]  # mypy asks instances for __hash__

    @classmethod
    def parameters(cls, mixer: Any, model: config.Model) -> dict[str, Shape]:
        """Returns the shapes of the parameters by name, such as "q" or "norm/scale"."""
        return dict(_traced(cls, mixer, model, 1)[1])  # type: ignore[arg-type]  # likewise

    @classmethod
    def matrices(cls, mixer: Any, model: config.Model) -> dict[str, Shape]:
        """Returns the parameters that every token is multiplied by as by a matrix.

        The default is all of at least two axes but convolutions and biases, which it knows by the ends of their names.
        """
        found = cls.parameters(mixer, model).items()
        return {name: shape for name, shape in found if len(shape) > 1 and not name.endswith(("conv", "bias"))}

    @classmethod
    def own_flops(cls, mixer: Any, model: config.Model, T: float) -> tuple[float, float]:
        """Returns FLOPs over T tokens, (forward, backward), of products that neither `matrices` nor `calls` show."""
        return 0.0, 0.0

    @classmethod
    def decay_free(cls, mixer: Any, model: config.Model) -> frozenset[str]:
        """Returns the names of the parameters that weight decay leaves alone.

        The default is all vectors and those whose names end in "bias".
        """
        found = cls.parameters(mixer, model).items()
        return frozenset(name for name, shape in found if len(shape) < 2 or name.endswith("bias"))

    @classmethod
    def sharding(cls, mixer: Any, model: config.Model) -> tuple[Rule, ...]:
        """Returns rules for how parameters lie on a mesh: (a pattern that matches the whole name, PartitionSpec).

        A parameter takes the first rule that matches. The default slices each matrix along an axis of size E and
        replicates the rest; no device shares heads with another.
        """

        def spec(shape: Shape) -> P:
            if len(shape) < 2 or model.E not in shape:
                return P()
            at = shape.index(model.E)
            return P(*(SLICED if i == at else None for i in range(len(shape))))

        return tuple((re.escape(name), spec(shape)) for name, shape in cls.parameters(mixer, model).items())

    @classmethod
    def buffers(cls, mixer: Any, model: config.Model, call: LinearCall, widths: Widths) -> Buffers | None:
        """Returns what XLA keeps alive beside the one call of linear attention; None where nobody has counted it.

        `plan --analytic` and searches need it; compiled plans do not.
        """
        return None


def specs(module: type[MixerModule], mixer: Any, model: config.Model) -> dict[str, P]:
    """Returns the PartitionSpec of each parameter that a rule of the mixer matches."""
    rules = module.sharding(mixer, model)
    found = {}
    for name in module.parameters(mixer, model):
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is not None:
            found[name] = spec
    return found


@dataclasses.dataclass(frozen=True)
class _Recorder(Context):
    """A context whose ops record their calls and return zeros."""

    calls: list[Call] = dataclasses.field(default_factory=list, compare=False)

    def attention(self, q: Array, k: Array, v: Array, **options: Any) -> Array:
        (B, T, H, D), (_, S, K, V) = q.shape, v.shape
        call = AttentionCall(
            T=T, H=H, D=D, B=B, S=None if S == T else S, K=K, V=None if V == D else V, dtype=q.dtype.name,
            mask=options.get("mask", AttentionCall.mask), scale=options.get("scale"), softcap=options.get("softcap"),
            sinks=options.get("sinks") is not None,
        )  # fmt: skip
        self.calls.append(call)
        return jnp.zeros((B, T, H, V), q.dtype)

    def linear_attention(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, None]:
        B, T, Hq, D = q.shape
        decay = options.get("log_decay")
        call = LinearCall(
            T=T, Hq=Hq, Hk=k.shape[2], Hv=v.shape[2], D=D, V=v.shape[3], B=B, dtype=q.dtype.name,
            decay="none" if decay is None else "vector" if decay.ndim == 4 else "scalar",
            delta=options.get("beta") is not None, scale=options.get("scale", 1.0),
        )  # fmt: skip
        self.calls.append(call)
        return jnp.zeros((B, T, call.H, call.V), q.dtype), None

    def short_convolution(self, x: Array, w: Array, b: Array | None, **options: Any) -> tuple[Array, None]:
        (B, T, H, D), taps = x.shape, w.shape[2]
        self.calls.append(ConvolutionCall(T=T, H=H, D=D, taps=taps, B=B, dtype=x.dtype.name))
        return x, None


@functools.lru_cache(maxsize=512)
def _traced(
    module: type[MixerModule], mixer: Any, model: config.Model, T: int
) -> tuple[tuple[Call, ...], tuple[tuple[str, Shape], ...]]:
    """Returns the calls and the parameters of a layer over one sequence of T tokens, from shapes alone."""
    context = _Recorder()
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    x = jax.ShapeDtypeStruct((1, T, model.E), model.dtype)
    made = jax.eval_shape(module(mixer, model, context).init, jax.random.key(0), x, ids, ids)
    flat = jax.tree_util.tree_leaves_with_path(made.get("params", {}))
    return tuple(context.calls), tuple(
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape) for path, leaf in flat
    )
