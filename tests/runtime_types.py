"""Which functions beartype checks at run time, by jaxtyping's import hook (see conftest.py).

Internal functions are checked against their annotations, shapes included. Public entry points are not: they check their
arguments themselves, raise ValueError, and take ShapeDtypeStructs where the annotation says Array.
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# Packages, modules and functions that check their arguments themselves.
PUBLIC = {
    "longattn.cli",
    "longattn.config",
    "longattn.mask",
    "longattn.models.flax_attention.attention_fn",
    "longattn.models.transformer.Transformer.__call__",
    "longattn.models.transformer.Transformer.hidden",
    "longattn.ops.attention.api",
    "longattn.ops.attention.arguments",
    "longattn.ops.conv",
    "longattn.ops.linear.api",
    "longattn.parallel.attention",
    "longattn.parallel.conv",
    "longattn.parallel.layout",
    "longattn.parallel.linear",
    "longattn.shapes",
    "longattn.train.loss.cross_entropy",
}
# Functions that also take ShapeDtypeStructs, in any module: a back end's own refusal.
PUBLIC_NAMES = {"check"}

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 says


def checked(f: Callable) -> Callable:
    """`f` with run-time type checks, or as it is where it is public."""
    parts = f"{f.__module__}.{f.__qualname__}".split(".")
    within = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if within & PUBLIC or f.__name__ in PUBLIC_NAMES:
        return f
    return _beartype(f)
