"""Attention and its gradients in NumPy, from the formulas of a textbook: none of them is shared with the library.

In float64 it is the truth. In a lower precision it rounds after every operation, as a plain implementation of that
precision does: its error is the yardstick for a back end's (tolerances are derived from it, never chosen).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from longattn import numerics


def attention(q, k, v, visible, *, scale, softcap=None, bias=None, sinks=None, do, dlse, dtype=np.float64, saved=False):
    """A dict of out, lse and the gradients dq, dk, dv, dbias, dsinks for the cotangents do and dlse, in float64.

    saved: whether the gradients come from exp(s - lse) and a rounded lse, all that is kept where P is not: at logits of
    1e4 its last place alone is 1e-3 of P. Algorithm 2 of arXiv:2307.08691.
    visible: bool [B H T S]. Rows without a visible key (and without sinks) are zero, lse -inf, and send no gradient.
    """
    work = np.float64 if dtype == np.float64 else np.float32
    K, G = k.shape[2], q.shape[2] // k.shape[2]

    def r(x):
        return np.asarray(x).astype(dtype).astype(work)

    q, k, v, do, dlse = (np.asarray(x).astype(work) for x in (q, k, v, do, dlse))
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    s = r(scale * r(np.einsum("BTHD,BSHD->BHTS", q, k)))
    if softcap is not None:
        slope = r(np.tanh(r(s / softcap)))
        s = r(softcap * slope)
        slope = r(1 - slope**2)
    if bias is not None:
        s = r(s + np.asarray(bias).astype(work))
    s = np.where(visible, s, -np.inf)
    sink = np.full((1, s.shape[1], 1), -np.inf) if sinks is None else np.asarray(sinks).astype(work)[None, :, None]
    m = np.maximum(s.max(-1, initial=-np.inf), sink)
    m = np.where(m == -np.inf, 0, m)
    e = np.exp(s - m[..., None])
    total = e.sum(-1) + np.exp(sink - m)
    empty = total == 0
    total = np.where(empty, 1, total)
    p = r(e / total[..., None])
    out = r(np.einsum("BHTS,BSHV->BTHV", p, v))
    lse = np.where(empty, -np.inf, m + np.log(total))

    if saved:
        p = r(np.exp(s - np.where(empty, 0, r(lse))[..., None]))
    dlse = np.where(empty, 0, dlse.transpose(0, 2, 1))
    dv = r(np.einsum("BHTS,BTHV->BSHV", p, do))
    dp = r(np.einsum("BTHV,BSHV->BHTS", do, v))
    inner = dlse - r((do * out).sum(-1)).transpose(0, 2, 1)
    ds = r(p * (dp + inner[..., None]))
    dsinks = (np.where(empty, 0, np.exp(sink - np.where(empty, 0, lse))) * inner).sum((0, 2))
    dbias = None if bias is None else r(unbroadcast(ds, np.shape(bias)))
    if softcap is not None:
        ds = r(ds * slope)
    dq = r(scale * np.einsum("BHTS,BSHD->BTHD", ds, k))
    dk = r(scale * np.einsum("BHTS,BTHD->BSHD", ds, q))
    dk, dv = (r(x.reshape(*x.shape[:2], K, G, -1).sum(3)) for x in (dk, dv))
    results = {
        "out": out,
        "lse": lse.transpose(0, 2, 1),
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dbias": dbias,
        "dsinks": dsinks,
    }
    return {name: None if x is None else x.astype(np.float64) for name, x in results.items()}


def unbroadcast(x, shape):
    """The sum of `x` over the axes along which `shape` was broadcast."""
    padded = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x.sum(axis=tuple(i for i, n in enumerate(padded) if n == 1), keepdims=True).reshape(shape)


def assert_accurate(got: Mapping[str, Any], truth: Mapping[str, Any], plain: Mapping[str, Any], work: Any) -> None:
    """Each result's error is at most twice the plain implementation's, both against the truth, beside rounding.

    What is allowed is derived as for `longattn bringup`: see `numerics.deviations`.
    """
    for name, deviation in numerics.deviations(got, truth, plain, work).items():
        assert deviation.agrees, f"{name}: {deviation}"


def pairwise(domains: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Few combinations that hold every pair of values of every two factors (greedy; the same on each run)."""
    names = list(domains)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(domains[a]))
        for j in range(len(domains[b]))
    }
    rng = np.random.default_rng(0)
    while open_pairs:
        a, i, b, j = min(open_pairs)
        best: dict[str, int] = {}
        for _ in range(30):
            row = {name: int(rng.integers(len(domains[name]))) for name in names} | {a: i, b: j}
            if not best or _covered(row, open_pairs) > _covered(best, open_pairs):
                best = row
        open_pairs -= {(x, best[x], y, best[y]) for x, y in itertools.combinations(names, 2)}
        yield {name: domains[name][best[name]] for name in names}


def covering(cases: Iterable[Any]) -> list[Any]:
    """The cases (dataclasses or dicts), in order, that hold a value of some field that none before them holds."""
    found, seen = [], set()
    for case in cases:
        values = case.values() if isinstance(case, dict) else (getattr(case, f.name) for f in dataclasses.fields(case))
        if new := set(enumerate(map(str, values))) - seen:
            found, seen = [*found, case], seen | new
    return found


def fewest(cases: Sequence[Any], holds: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """Few of the cases that hold between them all that any of them holds (greedy)."""
    held = {case: set(holds(case)) for case in cases}
    found, left = [], set().union(*held.values())
    while left:
        best = max(cases, key=lambda case: len(held[case] & left))
        found.append(best)
        left -= held[best]
    return found


def _covered(row: Mapping[str, int], pairs: set) -> int:
    return sum((x, row[x], y, row[y]) in pairs for x, y in itertools.combinations(row, 2))
