"""The contract of exact attention (rule 8 of the style): every back end passes all of it. A new one joins by one line.

Sizes differ pairwise and are odd where they can be, so that a swapped axis cannot pass.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import longattn
from longattn import mask as m
from longattn.ops import partial as partials
from tests.ops import oracle


@dataclass(frozen=True)
class BackEnd:
    name: str
    tuning: Any = None  # small blocks, so that small cases have many
    names_residuals: bool = True  # its custom_vjp names attention_out and attention_lse

    def __str__(self) -> str:
        return self.name


BACK_ENDS = [BackEnd("reference", names_residuals=False)]
every_back_end = pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)


def every_third(q, k):
    return (q + k) % 3 != 0


LENGTHS = {"T<S": (37, 53), "T=S": (43, 43), "T>S": (53, 37), "T=1": (1, 53)}
B, D, V = 4, 5, 7
_rng = np.random.default_rng(0)
PREFIX = _rng.integers(0, 30, B).astype(np.int32)
BLOCKS = _rng.random((B, 6, 8, 8)) < 0.4

MASKS = {  # a mask, and its definition on NumPy arrays of positions [B 1 T 1] and [B 1 1 S]
    "full": (m.Full(), lambda q, k: q == q),
    "causal": (m.Causal(), lambda q, k: k <= q),
    "window": (m.Window(9, 3), lambda q, k: (q - k <= 9) & (k - q <= 3)),
    "chunked": (m.Causal() & m.Chunked(16), lambda q, k: (k <= q) & (q // 16 == k // 16)),
    "prefix": (m.Causal() | m.Prefix(PREFIX), lambda q, k: (k <= q) | (k < PREFIX[:, None, None, None])),
    "global": (m.Window(7) | m.Global(3), lambda q, k: ((k <= q) & (q - k <= 7)) | (q < 3) | (k < 3)),
    "dilated": (m.Dilated(4, 3), lambda q, k: (q >= k) & (q - k <= 12) & ((q - k) % 3 == 0)),
    "blocks": (
        m.BlockSparse(8, BLOCKS),
        lambda q, k: BLOCKS[np.arange(B)[:, None, None, None], np.arange(6)[:, None, None], q // 8, k // 8],
    ),
    "function": (m.Fn(every_third) & m.Causal(), lambda q, k: ((q + k) % 3 != 0) & (k <= q)),
    "distant": (m.Causal() & ~m.Window(11), lambda q, k: q - k > 11),
}


@dataclass(frozen=True)
class Case:
    mask: str = "causal"
    lengths: str = "T<S"
    heads: tuple[int, int] = (6, 3)  # H, K
    ids: str = "none"  # of segments and positions
    logits: str = "plain"  # "sinks" comes with a soft cap, "all" is both of these and a broadcast bias
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(str(x) for x in dataclasses.astuple(self)).replace(" ", "")


DOMAINS = {
    "mask": list(MASKS),
    "lengths": list(LENGTHS),
    "heads": [(6, 3), (6, 6), (6, 1)],
    "ids": ["none", "segments", "positions", "both"],
    "logits": ["plain", "sinks", "bias", "all"],
    "dtype": ["float32", "bfloat16", "float64", "float16"],
}
SAMPLE = [Case(**row) for row in oracle.pairwise(DOMAINS)]
_everything = [Case(*values) for values in itertools.product(*DOMAINS.values())]
REST = [_everything[i] for i in np.random.default_rng(1).permutation(len(_everything))[:200]]


@functools.lru_cache(maxsize=None)
def inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """(differentiable arrays, the other keyword arguments, cotangents, visible [B H T S]) of a case, in NumPy."""
    rng = np.random.default_rng(7)
    (T, S), (H, K) = LENGTHS[case.lengths], case.heads
    dtype = jnp.dtype(case.dtype)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    arrays = {"q": normal(B, T, H, D), "k": normal(B, S, K, D), "v": normal(B, S, K, V)}
    cotangents = {"out": normal(B, T, H, V), "lse": rng.standard_normal((B, T, H))}
    mask, rule = MASKS[case.mask]
    options: dict[str, Any] = {"mask": mask}
    if case.logits in ("sinks", "all"):
        options |= {"softcap": 1.5, "scale": 0.7}
    if case.logits in ("sinks", "all"):
        arrays["sinks"] = rng.standard_normal(H).astype(np.float32)
    if case.logits == "bias":
        arrays["bias"] = normal(B, H, T, S)
    if case.logits == "all":
        arrays["bias"] = rng.standard_normal((H, 1, S)).astype(np.float32)
    q_pos, k_pos = np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)
    visible = np.ones((B, H, T, S), bool)
    if case.ids in ("positions", "both"):
        q_pos, k_pos = rng.integers(0, 50, (B, T)), rng.permuted(np.arange(S)[None].repeat(B, 0), axis=1)
        options["positions"] = (q_pos.astype(np.int32), k_pos.astype(np.int32))
    if case.ids in ("segments", "both"):
        documents = rng.integers(0, 4, (B, T + S)) * 7 - 3  # unsorted, negative, none reserved
        q_ids, k_ids = documents[:, :T].astype(np.int32), documents[:, T:].astype(np.int32)
        if T == S:
            k_ids = q_ids
        options["segment_ids"] = q_ids if T == S else (q_ids, k_ids)
        visible &= q_ids[:, None, :, None] == k_ids[:, None, None, :]
    visible &= rule(q_pos[:, None, :, None], k_pos[:, None, None, :])
    return arrays, options, cotangents, visible


@functools.lru_cache(maxsize=None)
def expected(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """(truth, plain implementation of the case's precision)."""
    arrays, options, cotangents, visible = inputs(case)
    results = []
    for dtype in (np.float64, jnp.dtype(case.dtype)):
        results.append(
            oracle.attention(
                **arrays, visible=visible, scale=options.get("scale", D**-0.5), softcap=options.get("softcap"),
                do=cotangents["out"], dlse=cotangents["lse"], dtype=dtype,
            )  # fmt: skip
        )
    return results[0], results[1]


def work(case: Case) -> Any:
    """The dtype of statistics and accumulators."""
    return np.float64 if case.dtype == "float64" else np.float32


def with_gradients(attend, arrays, cotangents):
    """out, lse and the gradients of every array, as a dict."""
    (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
    (gradients,) = pull((cotangents["out"].astype(out.dtype), cotangents["lse"].astype(lse.dtype)))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}


def run(back_end: BackEnd, case: Case) -> dict[str, Any]:
    arrays, options, cotangents, _ = inputs(case)
    attend = functools.partial(longattn.attention_with_lse, implementation=back_end.name, tuning=back_end.tuning)
    traced = {name: options.pop(name) for name in ("positions", "segment_ids", "mask") if name in (options := {**options})}
    with jax.enable_x64(case.dtype == "float64"):
        f = jax.jit(lambda arrays, cotangents, traced: with_gradients(functools.partial(attend, **options, **traced), arrays, cotangents))
        return f(arrays, cotangents, traced)


def check(back_end: BackEnd, case: Case) -> None:
    results = run(back_end, case)
    dtypes = {name: x.dtype.name for name, x in results.items()}
    arrays = inputs(case)[0]
    assert dtypes["out"] == case.dtype
    assert dtypes["lse"] == np.dtype(work(case)).name
    assert all(dtypes[f"d{name}"] == x.dtype for name, x in arrays.items())
    oracle.assert_accurate(results, *expected(case), work(case))


@every_back_end
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_forward_and_gradients(back_end, case):
    check(back_end, case)


@pytest.mark.slow
@every_back_end
@pytest.mark.parametrize("case", REST, ids=str)
def test_forward_and_gradients_of_the_rest(back_end, case):
    check(back_end, case)
