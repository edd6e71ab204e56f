"""Which functions beartype checks at run time, by jaxtyping's import hook (see conftest.py).

Internal functions are checked against their annotations, shapes included. Public entry points are not: they check their
arguments themselves, raise ValueError, and take ShapeDtypeStructs where the annotation says Array.
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# Modules whose functions and dataclasses check their arguments themselves.
PUBLIC_MODULES = {"longattn.config", "longattn.mask", "longattn.shapes", "longattn.ops.attention.api", "longattn.cli"}
# Functions that also take ShapeDtypeStructs, in any module: a back end's own refusal.
PUBLIC_NAMES = {"check", "__post_init__"}

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 says


def checked(f: Callable) -> Callable:
    """`f` with run-time type checks, or as it is where it is public."""
    if f.__module__ in PUBLIC_MODULES or f.__name__ in PUBLIC_NAMES:
        return f
    return _beartype(f)
