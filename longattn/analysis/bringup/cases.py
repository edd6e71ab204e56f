"""What the numerics try: together every part of both contracts, softmax and linear, that a kernel may accept."""

from __future__ import annotations

import itertools
from dataclasses import replace

from longattn.analysis.agreement import AnyProblem, Problem
from longattn.analysis.agreement_linear import LinearProblem
from longattn.mask import Causal, Full, Window


def problems(T: int) -> dict[str, AnyProblem]:
    """By name, what training uses most first; `T`, at least 64, is about the length of each."""
    odd, half, quarter = T - 37, T // 2, T // 4
    causal = Problem(T=T, H=2, D=128, dtype="bfloat16")
    single = replace(causal, dtype="float32")
    everything = Problem(
        T=half + 1, H=8, K=4, D=128, mask=Causal() & Window(quarter), documents=3, softcap=20.0, sinks=True,
        dtype="bfloat16",
    )  # fmt: skip
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
        **_linear(half),
    }


def _linear(T: int) -> dict[str, LinearProblem]:
    """Every kind in both precisions, in one as documents are trained on and in the other as nothing is a whole chunk.

    The plain implementation keeps a state for every token, hence shorter lengths than attention's.
    """
    packed = LinearProblem(T=T, H=2, D=128, heads=(1, 1, 2), documents=3, state=True)
    odd = LinearProblem(T=T + 13, H=2, D=64, V=128, B=2, rate=3.0)
    found = {}
    for i, (decay, delta) in enumerate(itertools.product(("none", "scalar", "vector"), (False, True))):
        for precision, dtype in enumerate(("bfloat16", "float32")):
            what, problem = (("packed documents", packed), ("odd T, D 64", odd))[(i + precision) % 2]
            kind = {"none": "", "scalar": ", head decay", "vector": ", channel decay"}[decay]
            name = f"linear{kind}{', delta rule' * delta}, {what}{', float32' * precision}"
            found[name] = replace(problem, decay=decay, delta=delta, dtype=dtype)
    return found


NAMES = tuple(problems(64))
