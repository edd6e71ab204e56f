"""The contract of attention over a mesh: what every strategy is asked for over every layout, and what it refuses.

    python -m tests.parallel.contract

prints the table of it as Markdown. Every cell is a case: one that says yes is served, one that says no is refused for
the reason given. `test_strategies` compares with NumPy in float64 so many that every strategy, and every layout, meets
everything that it serves.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from longattn import mask as m
from longattn import parallel
from tests.ops import oracle

B, D, V = 4, 5, 7
_rng = np.random.default_rng(0)
PREFIX = _rng.integers(0, 40, B).astype(np.int32)
BLOCKS = _rng.random((B, 6, 12, 24)) < 0.5

MASKS = {  # windows and documents cross the boundaries between devices
    "causal": (m.Causal(), lambda q, k: k <= q),
    "full": (m.Full(), lambda q, k: (q >= 0) & (k >= 0)),
    "window": (m.Window(9), lambda q, k: (q - k <= 9) & (k <= q)),
    "two-sided window": (m.Window(9, 3), lambda q, k: (q - k <= 9) & (k - q <= 3)),
    "dilated": (m.Dilated(5, 4), lambda q, k: (q >= k) & (q - k <= 20) & ((q - k) % 4 == 0)),
    "distant": (m.Causal() & ~m.Window(11), lambda q, k: q - k > 11),  # some rows see nothing
    "chunked": (m.Causal() & m.Chunked(10), lambda q, k: (k <= q) & (q // 10 == k // 10)),
    "prefix": (m.Causal() | m.Prefix(PREFIX), lambda q, k: (k <= q) | (k < PREFIX[:, None, None, None])),
    "constant prefix": (m.Causal() | m.Prefix(33), lambda q, k: (k <= q) | (k < 33)),
    "block-sparse, per head": (
        m.BlockSparse(4, BLOCKS),
        lambda q, k: BLOCKS[np.arange(B)[:, None, None, None], np.arange(6)[:, None, None], q // 4, k // 4],
    ),
}
ROWS = list(itertools.product(parallel.STRATEGIES, ("contiguous", "zigzag", "striped")))
MESHES = {  # data, tensor, and devices along the sequence: in all, and along each of two axes
    "2": (1, 1, 2, (1, 2)),
    "3": (1, 1, 3, (3, 1)),
    "4": (2, 1, 4, (2, 2)),
    "8": (1, 1, 8, (4, 2)),
    "2 x 2 x 2": (2, 2, 2, (2, 1)),
    "2 x 3": (2, 1, 3, (1, 3)),
}


@dataclass(frozen=True)
class Case:
    row: tuple[str, str]  # strategy, layout
    mesh: str = "4"
    mask: str = "causal"
    heads: tuple[int, int] = (6, 2)  # H, K
    ids: str = "one document"
    sinks: bool = False  # with a soft cap
    longer: bool = False  # twice as many keys as queries
    bias: tuple[int, ...] | None = None  # 1 for each axis of [B H T S] along which it is broadcast
    dtype: str = "float32"

    def __str__(self) -> str:
        words = [*self.row, self.mesh, self.mask, *map(str, self.heads), self.ids, self.dtype]
        words += ["sinks"] * self.sinks + ["longer"] * self.longer + ["bias"] * (self.bias is not None)
        return "-".join(words).replace(",", "").replace(" ", "_")

    @property
    def lengths(self) -> tuple[int, int]:
        return 48, 96 if self.longer else 48

    @property
    def refusal(self) -> str | None:
        """The reason why it is not served."""
        strategy, layout = self.row
        if self.bias is not None and strategy != "all_gather":
            return "takes no bias: its columns would have to travel with the keys, and their gradient back"
        if strategy == "balanced" and layout != "contiguous":
            return "strategy='balanced' balances the contiguous layout"
        later = ("full", "two-sided window", "prefix", "constant prefix", "block-sparse, per head")
        return "strategy='balanced' is for causal masks" if strategy == "balanced" and self.mask in later else None


FEATURES = {  # heading of a row, what a case of it has
    "causal": {"mask": "causal"},
    "window": {"mask": "window"},
    "two-sided window": {"mask": "two-sided window"},
    "dilated": {"mask": "dilated"},
    "chunked": {"mask": "chunked"},
    "rows without keys": {"mask": "distant"},
    "prefix": {"mask": "prefix"},
    "block-sparse, per head": {"mask": "block-sparse, per head"},
    "full": {"mask": "full"},
    "packed documents": {"ids": "positions restart"},
    "sinks, soft cap": {"sinks": True},
    "one key/value head": {"heads": (6, 1)},
    "heads that P does not divide": {"heads": (5, 5)},
    "T != S": {"longer": True},
    "bias": {"bias": (B, 6, 48, 48)},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
}
_FACTORS = {
    "row": [row for row in ROWS if not Case(row).refusal],
    "mask": list(MASKS),
    "heads": [(6, 2), (6, 1), (5, 5), (4, 4)],
    "ids": ["one document", "documents", "positions restart"],
    "sinks": [False, True],
    "longer": [False, True],
    "dtype": ["float32", "bfloat16", "float64"],
}


def _possible(case: Case) -> Case:
    """The case, or one like it whose parts go together."""
    changes: dict[str, Any] = {}
    if case.mask == "block-sparse, per head" or case.bias is not None:
        changes["heads"] = (6, 2)  # the patterns and biases are of six heads
    if "heads" not in changes and case.mesh == "2 x 2 x 2" and case.heads[1] % 2:
        changes["heads"] = (4, 4)  # key/value heads divide over `tensor`
    if case.mask == "two-sided window":
        changes["longer"] = False  # of longer shards of keys, later ones may lie on the same device
    if case.longer and case.ids == "positions restart":
        changes["ids"] = "documents"
    return Case(**{f.name: changes.get(f.name, getattr(case, f.name)) for f in fields(Case)})


def has(case: Case, feature: dict[str, Any]) -> bool:
    return all(getattr(case, name) == value for name, value in feature.items())


# A program has as many rounds as a mesh has devices, and compiling them is what takes the time: every row meets every
# mesh, and small ones most often.
_MESHES = ["2 x 2 x 2", "2", "3", "2 x 2 x 2", "2", "4", "2", "2 x 3", "2 x 2 x 2", "8"]


def _on_meshes(cases: Iterator[dict[str, Any]]) -> Iterator[Case]:
    met: Counter[Any] = Counter()
    for case in cases:
        row = case["row"]
        mesh = _MESHES[(met[row] + 3 * ROWS.index(row)) % len(_MESHES)]
        mesh = "4" if mesh == "2" and parallel.STRATEGIES[row[0]].axes == 2 else mesh  # of "2" one axis has one device
        yield _possible(Case(**case, mesh=mesh))
        met[row] += 1


_pairwise = list(_on_meshes(oracle.pairwise(_FACTORS)))
_rest = [  # cells of the table that these leave out
    _possible(Case(row, mesh="2", **feature))
    for row, feature in itertools.product(ROWS, FEATURES.values())
    if not any(
        case.row == row and has(case, feature) and bool(case.refusal) == bool(Case(row, **feature).refusal)
        for case in _pairwise
    )
]
CASES = list(dict.fromkeys(_pairwise + _rest))  # every cell of the table
REFUSED = [case for case in CASES if case.refusal]


def _compared(case: Case) -> Iterator[Any]:
    """Yields what has to be compared with NumPy: a strategy's exchange and a layout's order, with what a case has."""
    strategy, layout = case.row
    yield strategy, layout
    yield from ((strategy, name, getattr(case, name)) for name in (*_FACTORS, "mesh", "bias") if name != "row")
    yield from ((layout, name, getattr(case, name)) for name in ("mask", "ids", "mesh"))


COMPARED = oracle.fewest([case for case in CASES if not case.refusal], _compared)


def sample() -> list[Case]:
    """One of each strategy, on a small mesh, with layouts and masks of all kinds between them."""
    small = [case for case in COMPARED if case.mesh in ("2", "2 x 2 x 2", "4")]
    strategies = ([case for case in small if case.row[0] == name] for name in parallel.STRATEGIES)
    return [cases[5 * n % len(cases)] for n, cases in enumerate(strategies)]


def table() -> str:
    """Markdown: what each strategy serves over each layout, and the reasons of refusals below."""
    reasons: list[str] = []
    columns: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # strategy and cells: the layouts that share them
    for row in ROWS:
        cells = []
        for feature in FEATURES.values():
            reason = Case(row, **feature).refusal
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
        columns.setdefault((row[0], tuple(cells)), []).append(row[1])
    layouts = len({layout for _, layout in ROWS})
    heads = [
        f"`{strategy}`" + ("" if len(some) == layouts else f", {', '.join(some)}")
        for (strategy, _), some in columns.items()
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    lines += [f"| {feature} | {' | '.join(cells[i] for _, cells in columns)} |" for i, feature in enumerate(FEATURES)]
    return "\n".join([*lines, "", "; ".join(f"({i}) {reason}" for i, reason in enumerate(reasons, 1)) + "."])


# ---- a case's call


def mesh_of(case: Case) -> tuple[Mesh, Any, int]:
    """The mesh, the axis along which the sequence is sharded, and the shards that the layout permutes."""
    data, tensor, P, (ring, within) = MESHES[case.mesh]
    if parallel.STRATEGIES[case.row[0]].axes == 1:
        devices = jax.devices()[: data * tensor * P]
        return parallel.make_mesh(data=data, tensor=tensor, seq=P, devices=devices), "seq", P
    shape = (data, tensor, ring, within)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    names = ("data", "tensor", "ring", "seq")
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * 4), ("ring", "seq"), ring


def inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """(differentiable arrays, the other keyword arguments, cotangents, visible [B H T S]), in NumPy, in order."""
    rng = np.random.default_rng(7)
    (T, S), (H, K), dtype = case.lengths, case.heads, jnp.dtype(case.dtype)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    arrays = {"q": normal(B, T, H, D), "k": normal(B, S, K, D), "v": normal(B, S, K, V)}
    cotangents = {"out": normal(B, T, H, V), "lse": rng.standard_normal((B, T, H))}
    mask, rule = MASKS[case.mask]
    options: dict[str, Any] = {"mask": mask}
    if case.sinks:
        options |= {"softcap": 1.5, "scale": 0.7}
        arrays["sinks"] = rng.standard_normal(H).astype(np.float32)
    if case.bias is not None:
        arrays["bias"] = normal(*case.bias)
    q_pos, k_pos = (np.arange(n, dtype=np.int32)[None].repeat(B, 0) for n in (T, S))
    visible = np.ones((B, H, T, S), bool)
    if case.ids != "one document":
        starts = rng.random((B, S)) < 0.1
        starts[:, 0] = True
        documents = np.cumsum(starts, 1).astype(np.int32)
        options["segment_ids"] = (documents[:, :T], documents)
        if case.ids == "positions restart":
            k_pos = (k_pos - np.maximum.accumulate(np.where(starts, k_pos, 0), 1)).astype(np.int32)
            q_pos = k_pos[:, :T]
            options["positions"] = (q_pos, k_pos)
        visible &= documents[:, None, :T, None] == documents[:, None, None, :]
    visible &= rule(q_pos[:, None, :, None], k_pos[:, None, None, :])
    return arrays, options, cotangents, visible


if __name__ == "__main__":
    print(table())
