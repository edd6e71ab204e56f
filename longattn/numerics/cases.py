"""Lists problems that together cover all of both contracts, softmax and linear, that a kernel may accept.

They include calls of devices that share a sequence: attention to a shard of the keys, and passes of the state alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longattn.mask import Causal, Full, Window
from longattn.numerics import AnyProblem, LinearProblem, PartsProblem, Problem, StateProblem


def problems(T: int) -> dict[str, AnyProblem]:
    """Returns the problems by name, the most used in training first; `T` (at least 64) is about their length."""
    odd, half, quarter = T - 37, T // 2, T // 4
    causal = Problem(T=T, H=2, D=128, dtype="bfloat16")
    single = replace(causal, dtype="float32")
    everything = Problem(
        T=half + 1, H=8, K=4, D=128, mask=Causal() & Window(quarter), documents=3, softcap=20.0, sinks=True,
        dtype="bfloat16",
    )  # fmt: skip
    packed_parts = PartsProblem(
        T=odd, H=4, K=2, D=64, mask=Causal() & Window(quarter), documents=5, softcap=20.0, dtype="bfloat16"
    )
    return {
        "causal": causal,
        "causal, float32": single,
        "packed documents, grouped heads": replace(causal, H=4, K=2, documents=5),
        "packed documents, odd T, D 64, float32": replace(single, T=odd, D=64, K=1, documents=5),
        "full, odd T, D 64": replace(causal, T=odd, D=64, mask=Full()),
        "window": replace(causal, K=1, mask=Causal() & Window(quarter)),
        "window on both sides, float32": replace(single, mask=Window(quarter, quarter // 2)),
        "soft cap, D 256": replace(causal, D=256, softcap=20.0),
        "sinks, D 64": replace(causal, T=half, H=8, D=64, sinks=True, mask=Causal() & Window(quarter)),
        "prefixes of two sequences": replace(causal, B=2, prefix=quarter),
        "bias": replace(causal, bias=(1, 2, T, T)),
        "bias, float32": replace(single, D=64, bias=(2, 1, T)),
        "more keys, values of another size": replace(causal, T=half + 1, S=T, D=192, V=128, mask=Full()),
        "empty rows": replace(causal, S=quarter, mask=Window(T // 8)),
        "large logits, float32": replace(single, scale=10.0),
        "rising logits": replace(causal, rise=40.0),
        "rising logits, float32": replace(single, rise=40.0),
        "everything": everything,
        "everything, float32": replace(everything, dtype="float32"),
        "longer": replace(causal, T=2 * T, H=1),
        "keys in parts, packed documents, odd T, window": packed_parts,
        "keys in parts, float32": PartsProblem(T=T, H=2, D=128),
        **_linear(half),
        **_states(half),
    }


_KINDS: dict[str, dict[str, Any]] = {
    f"{name}{', delta rule' * delta}": {"decay": decay, "delta": delta}
    for decay, name in (("none", ""), ("scalar", ", head decay"), ("vector", ", channel decay"))
    for delta in (False, True)
}  # of linear attention, by the words for them in a problem's name


def _linear(T: int) -> dict[str, LinearProblem]:
    """Returns every kind in both precisions: in one with packed documents, in the other with no whole chunk.

    They are shorter than attention's problems, because the plain implementation keeps a state for every token.
    """
    packed = LinearProblem(T=T, H=2, D=128, heads=(1, 1, 2), documents=3, state=True)
    odd = LinearProblem(T=T + 13, H=2, D=64, V=128, B=2, rate=3.0)
    found = {}
    for i, (name, kind) in enumerate(_KINDS.items()):
        for precision, dtype in enumerate(("bfloat16", "float32")):
            label, problem = (("packed documents", packed), ("odd T, D 64", odd))[(i + precision) % 2]
            found[f"linear{name}, {label}{', float32' * precision}"] = replace(problem, **kind, dtype=dtype)
    return found


def _states(T: int) -> dict[str, StateProblem]:
    """Returns every kind once, with documents; precision and length differ with and without the delta rule.

    Decays are so slow that no token is forgotten.
    """
    whole = StateProblem(T=T, H=2, D=128, heads=(1, 1, 2), B=2, documents=3, rate=4 / T, dtype="bfloat16")
    odd = StateProblem(T=T + 13, H=2, D=64, V=128, B=2, documents=3, rate=4 / T)
    found = {}
    for i, (name, kind) in enumerate(_KINDS.items()):
        label, problem = (("whole chunks", whole), ("odd T, D 64, float32", odd))[(i + i // 2) % 2]
        found[f"linear state alone{name}, {label}"] = replace(problem, **kind)
    return found


NAMES = tuple(problems(64))
