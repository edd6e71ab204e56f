"""longattn: how long a context can I afford, with which attention, and will the model still remember what it read?"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longattn import mask
    from longattn.ops import partial
    from longattn.ops.attention import attend_partial, attention, attention_with_lse, backward_partial
    from longattn.ops.linear import linear_attention, linear_step

__all__ = [
    "attend_partial",
    "attention",
    "attention_with_lse",
    "backward_partial",
    "linear_attention",
    "linear_step",
    "mask",
    "partial",
]
_HOMES = {
    "mask": "longattn.mask",
    "partial": "longattn.ops.partial",
    "linear_attention": "longattn.ops.linear:linear_attention",
    "linear_step": "longattn.ops.linear:linear_step",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first read: JAX takes a second, in which the command line listens for Ctrl-C."""
    if name not in __all__:
        raise AttributeError(f"module 'longattn' has no attribute {name!r}")
    import pkgutil

    globals()[name] = found = pkgutil.resolve_name(_HOMES.get(name, f"longattn.ops.attention:{name}"))
    return found


def __dir__() -> list[str]:
    """Lists the public names, also those that nothing has read yet."""
    return sorted({*globals(), *__all__})
