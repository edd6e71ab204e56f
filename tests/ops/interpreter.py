"""Pallas kernels for TPUs on a CPU, where their memory starts as NaN and a race is an error."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def as_on_tpu() -> Iterator[None]:
    """Kernels called here are interpreted. Results must be read here too: what goes wrong is raised then."""
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    races = {"on_race": "raise"} if "on_race" in fields else {}  # jax 0.10.2 only prints them
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **races)
    with pltpu.force_tpu_interpret_mode(params):
        try:
            yield
        finally:
            pltpu.reset_tpu_interpret_mode_state()  # after an error it would meet the next kernel
