"""The contestants: this project's back ends and their rivals; for linear attention exact attention as a yardstick."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from longattn.aot.kernels import cases
from longattn.bench import attention
from longattn.bench.compare.problems import Attention, Linear, Problem
from longattn.mask import Causal, Full
from longattn.ops.attention.api import BACK_ENDS
from longattn.ops.attention.api import attention as ours
from longattn.ops.linear.api import BACK_ENDS as LINEAR_BACK_ENDS
from longattn.ops.linear.api import linear_attention


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention [B T H D] from the inputs that its problem names."""

    about: str
    build: Callable[[Any], Callable[..., Any]]  # takes a problem; raises NotImplementedError with the reason
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")  # where it runs
    case: str | None = None  # the forward case in `cases.CASES` that gives its static cycles
    instead: Callable[[Any], Problem] | None = None  # a yardstick's own problem


def _heads_first(attend: Callable[..., Any]) -> attention.Attend:
    """Returns `attend`, a function on [B H T D], as one on [B T H D]."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return attend(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return call


def _jax_flash(options: Attention) -> attention.Attend:
    if options.heads != options.H:
        raise NotImplementedError(f"it has no grouped heads: K={options.heads} must be H={options.H}")
    return _heads_first(cases.CASES["jax_flash"].build(options.shape())[0])


def _splash(options: Attention) -> attention.Attend:
    if options.heads != options.H:
        raise NotImplementedError(f"it is built without grouped heads: K={options.heads} must be H={options.H}")
    kernel = jax.vmap(cases.CASES["jax_splash"].build(options.shape())[0])
    scale = options.D**-0.5  # the kernel has none
    return _heads_first(lambda q, k, v: kernel((q * scale).astype(q.dtype), k, v))


def _cudnn(options: Attention) -> attention.Attend:
    if options.dtype == "float32":
        raise NotImplementedError("cuDNN's attention takes bfloat16 and float16, dtype is float32")
    return attention.jax_nn(options.mask, "cudnn")


def _tokamax(options: Attention) -> attention.Attend:
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("not installed here: pip install tokamax")
    import tokamax

    mask = options.mask

    def attend(q: Any, k: Any, v: Any) -> Any:
        if isinstance(mask, Causal | Full):
            return tokamax.dot_product_attention(q, k, v, is_causal=isinstance(mask, Causal))
        T = jnp.arange(q.shape[1], dtype=jnp.int32)
        return tokamax.dot_product_attention(q, k, v, mask=mask(T[:, None], T[None])[None, None])

    return attend


def _linear(name: str) -> Contestant:
    def build(options: Linear) -> Callable[..., Any]:
        names = tuple(options.call.shaped().arrays)
        return lambda *arrays: linear_attention(**dict(zip(names, arrays)), implementation=name)[0]

    case = "longattn_linear" if name == "pallas_tpu" else None
    return Contestant(f"longattn.linear_attention, {name}", build, case=case)


def _exact(options: Linear) -> Attention:
    return Attention(T=(options.T,), B=options.B, H=options.H, D=options.D, window=0, dtype=options.dtype)


def _ours(name: str) -> Contestant:
    return Contestant(
        f"longattn.attention, {name}",
        lambda o: functools.partial(ours, mask=o.mask, implementation=name),
        case="longattn" if name == "pallas_tpu" else None,
    )


RIVALS: dict[str, Contestant] = {
    "jax_nn": Contestant("jax.nn.dot_product_attention", lambda o: attention.jax_nn(o.mask)),
    "jax_flash": Contestant("jax's Pallas flash attention", _jax_flash, ("tpu",), "jax_flash"),
    "splash": Contestant("jax's Pallas splash attention", _splash, ("tpu",), "jax_splash"),
    "cudnn": Contestant("cuDNN, through jax.nn", _cudnn, ("gpu",)),
    "tokamax": Contestant("tokamax.dot_product_attention", _tokamax),
}
CONTESTANTS: dict[str, Contestant] = {name: _ours(name) for name in BACK_ENDS} | {
    name: rival for name, rival in RIVALS.items() if name not in BACK_ENDS
}
LINEAR: dict[str, Contestant] = {name: _linear(name) for name in LINEAR_BACK_ENDS} | {
    "attention": Contestant(
        "longattn.attention, exact and causal, of as many heads", lambda o: functools.partial(ours, mask=o.mask),
        instead=_exact,
    )
}  # fmt: skip
