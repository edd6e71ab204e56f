"""Configs as JSON: `from_json` restores what `to_json` writes, a version and objects with class names.

The version rises when a field is added or means something else. Version 4 has the layers and the YaRN that published
checkpoints have; a config of version 3 is read as one that computes what version 3 did.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from longattn import mask as masks
from longattn.config.data import MQAR, ByteLM, Needle
from longattn.config.mesh import Mesh
from longattn.config.mixers import RoPE, mixer_classes
from longattn.config.model import Model
from longattn.config.run import Config, Optimiser, Run

VERSION = 4

_CLASSES: dict[str, type] = {c.__name__: c for c in (RoPE, Model, ByteLM, MQAR, Needle, Mesh, Optimiser, Run, Config)}


def _encode(value: Any) -> Any:
    if isinstance(value, masks.Mask):
        return {"class": "Mask", "expression": str(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    return value


def _from_3(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns an object of version 3 with the fields of version 4 that compute the same."""
    if name in ("GatedDeltaNet", "KimiDeltaAttention"):
        return {"scale": 1.0, **fields}  # q kept the length 1
    if name == "Mamba2":
        return {"norm_groups": 1, "step_limit": [0.0, None], **fields}
    if name != "RoPE":
        return fields
    ramp = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = {**ramp, "attention_factor": None, "mscale": None, "mscale_all_dim": None, **fields}
    if fields.get("scaling") == "yarn":  # its ramp ran in turns, which is llama3's with other bounds
        attention_factor = 0.1 * math.log(max(fields["factor"], 1)) + 1
        fields |= {"scaling": "llama3", "high_freq_factor": 32.0, "attention_factor": attention_factor}
    return fields


def _decode(value: Any, version: int) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v, version) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    if name == "Mask":
        return masks.parse(value["expression"])
    classes = _CLASSES | mixer_classes()
    if name not in classes:
        raise ValueError(f"class {name!r} in the JSON is no config of this version; it knows {sorted(classes)}")
    cls = classes[name]
    fields = {k: v for k, v in value.items() if k != "class"}
    given = {k: _decode(v, version) for k, v in (_from_3(name, fields) if version == 3 else fields).items()}
    known = {f.name for f in dataclasses.fields(cls)}
    if given.keys() != known:
        extra, missing = sorted(given.keys() - known), sorted(known - given.keys())
        raise ValueError(
            f"{name} in the JSON has unknown fields {extra} and lacks {missing}: it was written by another version"
        )
    return cls(**given)


def to_json(config: Config) -> str:
    """The config as JSON text with a version and class names."""
    return json.dumps({"version": VERSION, "config": _encode(config)}, indent=2)


def from_json(text: str) -> Config:
    """The inverse of `to_json`, which also reads what version 3 wrote. Raises ValueError for anything else."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("the config is no JSON of ours: it is nested too deep") from None
    version = document.get("version") if isinstance(document, dict) else None
    if version not in (3, VERSION):
        raise ValueError(
            f"config version {version!r} must be {VERSION} or 3: it was written by another version of longattn"
        )
    try:
        config = _decode(document.get("config"), version)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the JSON is no config: {error}") from error
    except RecursionError:
        raise ValueError("the JSON is no config: it is nested too deep") from None
    if not isinstance(config, Config):
        raise ValueError(f"the JSON holds a {type(config).__name__}, not a Config")
    return config
