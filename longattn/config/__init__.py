"""Configurations: frozen, hashable dataclasses that hold choices, never arrays, functions or meshes.

A config is a Python file that builds a `Config`; every field says what it is for. Kernel block sizes are not here: they
belong to each back end's `Tuning`.
"""

from longattn.config.data import MQAR, ByteLM, Data, Needle
from longattn.config.mesh import Mesh
from longattn.config.mixers import (
    GLA,
    Based,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mixer,
    Performer,
    RetNet,
    RoPE,
    Softmax,
    mixer_classes,
)
from longattn.config.model import Model
from longattn.config.run import Config, Optimiser, Run
from longattn.config.serialise import VERSION, from_json, to_json

__all__ = [
    "GLA",
    "MQAR",
    "VERSION",
    "Based",
    "ByteLM",
    "Config",
    "Data",
    "GatedDeltaNet",
    "KimiDeltaAttention",
    "LinearAttention",
    "Mamba2",
    "Mesh",
    "Mixer",
    "Model",
    "Needle",
    "Optimiser",
    "Performer",
    "RetNet",
    "RoPE",
    "Run",
    "Softmax",
    "from_json",
    "mixer_classes",
    "to_json",
]
