"""Part 3b, text: trains a byte language model at several context lengths, and tests whether it uses its context.

Loss by position suggests what more context is worth, but it also falls because rows start with fresh documents. The
control separates the two. It predicts the same last bytes of the same documents with everything further back than k
bytes before them taken from another document. Differences are paired by document, so their intervals are narrow.

A short study cannot resolve either. It shows `longattn eval`'s figures of a run that was trained for an hour,
`longattn/recorded/text.json`; `python -m longattn.study.context RUN` remakes that file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from longattn import config
from longattn.models import bytes_read_per_token, state_elements
from longattn.recorded import load, path
from longattn.study.learn import Learned, evaluate, learn, score
from longattn.study.presets import ContextPlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit, t_interval
from longattn.study.ways import READ, Way, trained
from longattn.tasks.bytelm import BOS
from longattn.train import data

LN2 = float(np.log(2))


def units(plan: ContextPlan, store: Store) -> list[Unit]:
    """Returns one training per way and context length, longest first. Ways not measured everywhere get the longest."""
    if plan.recorded:
        return [Unit("context/recorded", lambda clock: _recorded(), always=True)]
    made = []
    for rank, T in enumerate(sorted(plan.lengths, reverse=True)):
        for way in trained(plan.windows, plan.without):
            if plan.every or rank == 0 or way.everywhere:
                work = lambda clock, w=way, T=T, control=rank == 0: _context(plan, w, T, control, clock)
                made.append(Unit(f"context/{way.name}/T={T}", work))
    return made


def _context(plan: ContextPlan, way: Way, T: int, control: bool, clock: Clock) -> Iterable[Number]:
    cfg = config.Config(
        model=dataclasses.replace(plan.model, mixers=(way.mixer,)),
        data=dataclasses.replace(plan.data, T=T, B=max(1, plan.tokens // T)),
        optimiser=config.Optimiser(lr=plan.lr, warmup=max(1, plan.steps // 10)),
        run=config.Run(steps=plan.steps),
    )
    model = learn(cfg, plan.seeds, clock)
    sums = score(model, max(1, plan.eval_tokens // (cfg.data.B * T)))
    about = {"seeds": plan.seeds, "note": model.note}
    number = lambda quantity, value, unit, badge, at, **more: Number(
        "context", quantity, way.name, float(value), unit, badge, at={"T": T, **at}, **more
    )
    bits = sums["nll_sum"] / sums["weight_sum"] / LN2
    low, high = t_interval(bits.tolist()) if len(bits) > 1 else (None, None)
    yield number("bits_per_byte", bits.mean(), "bits", "measured", {}, low=low, high=high, **about)
    nll, weight = sums["nll_by_position"].sum(0), sums["weight_by_position"].sum(0)
    for low, high in _octaves(T):
        if (total := weight[low - 1 : high].sum()) > 0:
            yield number(
                "bits_at",
                nll[low - 1 : high].sum() / total / LN2,
                "bits",
                "measured",
                {"from": low, "to": high},
                **about,
            )
    mixer = cfg.model.layers[-1]
    yield number("state_elements", state_elements(mixer, cfg.model, T), "elements", "predicted", {})
    yield number("bytes_read", bytes_read_per_token(mixer, cfg.model, T), "B", "predicted", {}, note=READ)
    if control:
        for quantity, k, value, *ends in _control(plan, model):
            at = {"k": k, "tail": plan.tail}
            yield number(quantity, value, "bits", "measured", at, low=ends[0], high=ends[1], **about)


def _recorded() -> Iterable[Number]:
    """Yields the loss of the recorded run, by position."""
    found = load("text")
    T, e = found["T"], found["environment"]
    device, host = e["device"], e["host"]
    where = f"{host['cpu']}, {host['cores']} cores" if device["platform"] == "cpu" else device["kind"]
    note = (
        f"exact attention, {found['steps']:,} steps; {where}; jax {e['versions']['jax']}; commit {e['commit'][:12]}; "
        f"{found['tokens']:,.0f} held-out bytes"
    )
    number = lambda quantity, bits, **at: Number(
        "context", quantity, "exact", bits, "bits", "recorded", {"T": T, **at}, note=note, command=found["command"]
    )
    yield number("bits_per_byte", found["bits_per_byte"])
    for row in found["by_position"]:
        yield number("bits_at", row["nll"] / LN2, **{"from": row["from"], "to": row["to"]})


def record(run: Path) -> dict[str, Any]:
    """Returns the figures of text.json from a run's folder: `longattn eval --json` saved as evaluation.json, env.json.

    run: a folder such as experiments/2026-11-bytelm_small.
    """
    evaluation, environment = (json.loads((run / f"{n}.json").read_text()) for n in ("evaluation", "env"))
    kept = ("time", "versions", "device", "host", "commit")
    return {
        "command": " ".join(environment["command"]),
        "steps": evaluation["step"],
        **{key: evaluation[key] for key in ("T", "tokens", "bits_per_byte", "by_position")},
        "environment": {key: environment[key] for key in kept},
    }


def _octaves(T: int) -> list[tuple[int, int]]:
    """Returns groups of positions by the number of tokens read: 1, 2, 3-4, 5-8, ..."""
    edges = [0] + [2**i for i in range(T.bit_length()) if 2**i < T] + [T]
    return [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False)]


def _control(plan: ContextPlan, model: Learned) -> Iterable[tuple[str, int, float, float, float]]:
    """Yields (quantity, k, bits per byte, low, high): the tail's loss with only k true bytes of context before it.

    "tail_bits" is the mean over documents; "tail_excess" is the increase over the whole context, paired by document.
    """
    text: Any = model.config.data
    T = text.T
    rows = documents(text, plan.documents)
    per_k = {}
    for k in (*sorted(k for k in plan.keep if k < T - plan.tail), T - plan.tail):
        losses = []
        for row in replace_before(rows, T - plan.tail - k):
            weights = np.zeros((1, T), np.float32)
            weights[0, T - plan.tail :] = 1
            batch = data.Batch(row[None], np.arange(T, dtype=np.int32)[None], np.ones((1, T), np.int32), weights)
            sums = evaluate(model, [batch])
            losses.append(np.mean(sums["nll_sum"] / sums["weight_sum"]) / LN2)
        per_k[k] = np.array(losses)
    for k, tail in per_k.items():
        yield "tail_bits", k, *_mean(tail)
        yield "tail_excess", k, *_mean(tail - per_k[T - plan.tail])


def _mean(x: np.ndarray) -> tuple[float, float, float]:
    half = 1.96 * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def documents(cfg: config.ByteLM, count: int) -> np.ndarray:
    """Returns the first T tokens (BOS and T - 1 bytes) of up to `count` long held-out documents, int32 `[n T]`.

    Raises ValueError if fewer than two do.
    """
    source: Any = data.source(cfg, seed=0, split="valid")
    long = [d for d in source.documents if d.size >= cfg.T - 1][:count]
    if len(long) < 2:
        raise ValueError(
            f"{len(long)} held-out documents of glob={cfg.glob!r} have T={cfg.T} bytes, must be at least 2; lower T"
        )
    return np.array([[BOS, *source.corpus.read(d)[: cfg.T - 1]] for d in long], np.int32)


def replace_before(rows: np.ndarray, cut: int) -> np.ndarray:
    """Replaces each row's tokens before index `cut` by those of the next row."""
    return np.concatenate([np.roll(rows, -1, 0)[:, :cut], rows[:, cut:]], 1)


if __name__ == "__main__":
    path("text").write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
