"""The table of the ways to attend that a study compares, and the small model that carries each.

It is derived from `models.MIXERS`: a mixer that joins there joins every part of the study. `VARIANTS` says which
settings of a mixer are worth a row; a mixer without an entry gets one row with its defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longattn import config
from longattn.mask import Causal, Window
from longattn.models import MIXERS, Context
from longattn.ops.calls import ConvolutionCall, LinearCall

READ = "one layer; keys and values are bfloat16, states float32"  # of bytes read per token


@dataclass(frozen=True)
class Way:
    """One way to attend: a mixer's config, and which implementation computes it."""

    name: str  # in keys of numbers and on the command line
    title: str  # in figures and tables
    mixer: config.Mixer
    implementation: str | None = None  # as in `longattn.attention`
    time_exponent: float | None = None  # of T, in theory
    memory_exponent: float | None = None
    same_as: str | None = None  # the way that computes the same function: it is not trained again
    everywhere: bool = False  # measured at every point of the quick preset; the others at one

    @property
    def context(self) -> Context:
        return Context(implementation=self.implementation)


def _softmax(windows: tuple[int, ...]) -> list[Way]:
    causal = config.Softmax(mask=Causal())
    local = [
        Way(f"window_{n}", f"window {n}", config.Softmax(mask=Causal() & Window(n - 1)), None, 1, 1, everywhere=True)
        for n in windows
    ]
    return [
        Way("exact", "exact, blockwise", causal, None, 2, 1, everywhere=True),
        *local,
        Way("dense", "exact, dense", causal, "reference", 2, 2, same_as="exact", everywhere=True),
    ]


VARIANTS: dict[str, Callable[[tuple[int, ...]], list[Way]]] = {"Softmax": _softmax}


def ways(windows: tuple[int, ...], without: tuple[str, ...] = ()) -> list[Way]:
    """Every way to attend. `windows`: how many keys each sliding window sees, the query's own among them; `without`:
    mixers to leave out.
    """
    table = []
    for name in (name for name in MIXERS if name not in without):
        table += VARIANTS[name](windows) if name in VARIANTS else [_default(name)]
    return table


def _default(name: str) -> Way:
    """The row of a mixer without variants. Theory knows what grows with T where all that it calls is linear in it."""
    mixer = config.mixer_classes()[name]()
    kinds = {type(call) for call in MIXERS[name].calls(mixer, config.Model(mixers=(mixer,)), 1)}
    exponent = 1.0 if LinearCall in kinds <= {LinearCall, ConvolutionCall} else None
    return Way(name.lower(), name, mixer, time_exponent=exponent, memory_exponent=exponent)


def trained(windows: tuple[int, ...], without: tuple[str, ...] = ()) -> list[Way]:
    """The ways that are different functions: those that learn differently."""
    return [w for w in ways(windows, without) if w.same_as is None]


def without_positions(way: Way) -> config.Mixer:
    """The mixer with its rotary positions off, where it has them: content is all that its queries can match."""
    off: dict[str, Any] = {"rope": None}
    return dataclasses.replace(way.mixer, **off) if hasattr(way.mixer, "rope") else way.mixer
