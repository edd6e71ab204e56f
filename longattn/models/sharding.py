"""How a model's parameters lie on a mesh: the transformer's rules, and those that its mixers state."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from longattn import config
from longattn.models.mixers import module_of
from longattn.parallel import mesh as meshes
from longattn.parallel.mesh import SLICED, Rule

TRANSFORMER: tuple[Rule, ...] = (
    (r"(^|/)(embedding|head)$", P(None, SLICED)),  # [W E]; not along W, which for bytes is 257, a prime
    (r"/mlp/(gate|up)$", P(SLICED, "tensor")),  # [E F]
    (r"/mlp/down$", P("tensor", SLICED)),  # [F E]
    (r"(^|/)((mixer|mlp)_)?norm/scale$", P()),  # [E]
)


@functools.lru_cache(maxsize=256)
def rules(model: config.Model) -> tuple[Rule, ...]:
    """The rules for all parameters of a model, by path."""
    layers = defaultdict[config.Mixer, list[int]](list)
    for i, mixer in enumerate(model.layers):
        layers[mixer].append(i)
    found = []
    for mixer, numbers in layers.items():
        layer = f"layer_({'|'.join(map(str, numbers))})"
        for pattern, spec in module_of(mixer).sharding(mixer, model):
            found.append((rf"(^|/){layer}/mixer/({pattern})$", spec))
    return (*found, *TRANSFORMER)


def shardings(mesh: Mesh | AbstractMesh, tree: Any, model: config.Model) -> Any:
    """The shardings of a model's parameters, of its optimiser state, or of both: see `parallel.mesh.shardings`."""
    return meshes.shardings(mesh, tree, rules(model))
