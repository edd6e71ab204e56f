"""Configs as JSON: `from_json` restores what `to_json` writes, a version and objects with class names."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from longattn import mask as masks
from longattn.config.data import MQAR, ByteLM, Needle
from longattn.config.mesh import Mesh
from longattn.config.mixers import RoPE, mixer_classes
from longattn.config.model import Model
from longattn.config.run import Config, Optimiser, Run

VERSION = 3


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


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    if name == "Mask":
        return masks.parse(value["expression"])
    classes = _CLASSES | mixer_classes()
    if name not in classes:
        raise ValueError(f"class {name!r} in the JSON is no config of this version; it knows {sorted(classes)}")
    cls = classes[name]
    given = {k: _decode(v) for k, v in value.items() if k != "class"}
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
    """The inverse of `to_json`. Raises ValueError for anything else, also another version's."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("the config is no JSON of ours: it is nested too deep") from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise ValueError(f"config version {version!r} must be {VERSION}: it was written by another version")
    try:
        config = _decode(document.get("config"))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the JSON is no config: {error}") from error
    except RecursionError:
        raise ValueError("the JSON is no config: it is nested too deep") from None
    if not isinstance(config, Config):
        raise ValueError(f"the JSON holds a {type(config).__name__}, not a Config")
    return config
