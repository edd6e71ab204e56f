"""The table of mixers, and what it says of a mixer's config."""

from __future__ import annotations

from longattn import config
from longattn.models import linear
from longattn.models.mixer import MixerModule
from longattn.models.softmax import Softmax
from longattn.ops.calls import Call
from longattn.parallel import SequenceLayout
from longattn.shapes import suggest

MIXERS: dict[str, type[MixerModule]] = {
    m.__name__: m
    for m in (
        Softmax,
        linear.LinearAttention,
        linear.Performer,
        linear.Based,
        linear.RetNet,
        linear.GLA,
        linear.Mamba2,
        linear.GatedDeltaNet,
        linear.KimiDeltaAttention,
    )
}


def module_of(mixer: config.Mixer) -> type[MixerModule]:
    """The module class that computes a mixer's config. Raises ValueError for a config whose name MIXERS lacks."""
    name = type(mixer).__name__
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} must be in longattn.models.MIXERS; {suggest(name, MIXERS)}")
    return MIXERS[name]


def layout_of(mixer: config.Mixer, layout: SequenceLayout) -> SequenceLayout:
    """The layout in which a layer takes and gives its tokens: this one, or contiguous where it needs them in order."""
    return SequenceLayout() if module_of(mixer).in_order else layout


def calls[C: Call](mixer: config.Mixer, model: config.Model, T: int, kind: type[C]) -> list[C]:
    """The calls of one kind that one layer makes over one sequence of T tokens."""
    return [call for call in module_of(mixer).calls(mixer, model, T) if isinstance(call, kind)]


def state_elements(mixer: config.Mixer, model: config.Model, T: int) -> int:
    """Elements of state that one layer keeps per sequence after T tokens, to continue with token T."""
    return module_of(mixer).state_elements(mixer, model, T)


def bytes_read_per_token(mixer: config.Mixer, model: config.Model, T: int, itemsize: int = 2) -> int:
    """Bytes of state that one layer reads per sequence to predict token T.

    Keys, values and inputs have `itemsize` bytes per element, states of recurrences 4.
    """
    return module_of(mixer).bytes_read_per_token(mixer, model, T, itemsize)


def sequential_steps(mixer: config.Mixer, model: config.Model, T: int) -> int:
    """How many results of one layer's forward pass over T tokens wait for each other, with XLA's chunks."""
    return module_of(mixer).sequential_steps(mixer, model, T)
