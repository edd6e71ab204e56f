"""Flax Linen models: the only part of longattn that imports flax."""

from longattn.models.context import Context
from longattn.models.flax_attention import attention_fn
from longattn.models.mixer import MixerModule
from longattn.models.mixers import MIXERS, bytes_read_per_token, module_of, sequential_steps, state_elements
from longattn.models.transformer import REMAT, Transformer, head, init_params

__all__ = [
    "MIXERS",
    "REMAT",
    "Context",
    "MixerModule",
    "Transformer",
    "attention_fn",
    "bytes_read_per_token",
    "head",
    "init_params",
    "module_of",
    "sequential_steps",
    "state_elements",
]
