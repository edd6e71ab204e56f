"""Says in one sentence what would help a training step most, by formula: every change of one kind is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from longattn.config import Config, Mesh
from longattn.cost import step
from longattn.cost.sequence import problem
from longattn.cost.topology import Topology
from longattn.models.transformer import REMAT
from longattn.plan import search

_WORTH = 0.03  # of the bound: less is not worth a sentence


def _said(before: Mesh, after: Mesh) -> str:
    """Returns the options that make one mesh of another."""
    changed = {name: size for name, size in vars(after).items() if size != vars(before)[name]}
    return " ".join(f"--mesh.{name} {value}" for name, value in changed.items())


def _spreads(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields other strategies and layouts for the same devices along the sequence, with the options that say so."""
    mesh = config.mesh
    if mesh.P == 1:
        return
    for way in problem.ways(mesh.P, config.model.K // mesh.tensor):
        spread = problem.with_way(mesh, way)
        try:
            changed = replace(config, mesh=spread)
        except ValueError:
            continue  # its layout does not divide T
        if spread != mesh:
            yield _said(mesh, spread), changed


def _remats(config: Config) -> Iterator[tuple[str, Config]]:
    remat: Any
    for remat in ("none", *REMAT):
        if remat != config.model.remat:
            yield f"--remat {remat}", replace(config, model=replace(config.model, remat=remat))


def advice(config: Config, where: Topology, fits: bool) -> str | None:
    """Returns a sentence about the change that helps most, or None where none does.

    Args:
      config: of the step, as planned.
      fits: whether the step was found to fit; the compiler may know better than the formulas.

    Raises NotImplementedError for a model whose memory no formula knows.
    """
    now = step.estimate(config, where)
    changes = [
        (text, row)
        for text, changed in (*_spreads(config), *_remats(config))
        if (row := step.estimate(changed, where))["fits"]
    ]
    bound = lambda row: row["seconds"]["bound"]
    if fits:
        # Offloading costs time on the host's link, which this bound leaves out.
        quick = [change for change in changes if not change[0].endswith("offload")]
        text, best = min(quick, key=lambda change: bound(change[1]), default=("", now))
        less = 1 - bound(best) / bound(now)
        return f"{text} takes {less:.0%} off the bound, by formula." if less >= _WORTH else None
    if changes:
        text, best = min(changes, key=lambda change: bound(change[1]))
        return f"{text} makes it fit, by formula: {best['hbm_bytes'] / 2**30:.2f} GiB."
    unit = config.mesh.P * search.TILE
    shorter = lambda T: replace(config, data=replace(config.data, T=T))
    T = search.by_formula(shorter, where, unit, unit, config.data.T)
    return None if T is None else f"No other strategy or rematerialisation makes it fit; --T {T} does, by formula."
