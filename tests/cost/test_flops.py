"""Formulas against counting: pairs against dense masks, parameters against an initialised model, FLOPs against XLA."""

import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.config import (
    ByteLM,
    Config,
    GatedDeltaNet,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Model,
    Performer,
    RetNet,
    RoPE,
    Softmax,
    mixer_classes,
)
from longattn.cost import flops
from longattn.cost.pairs import visible_pairs
from longattn.mask import (
    And,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Fn,
    Full,
    Global,
    Not,
    Or,
    Prefix,
    Window,
)
from longattn.models import MIXERS

LLAMA_7B = Model(N=32, E=4096, F=11008, H=32, K=32, D=128, W=32000, tie=False)

small = st.integers(0, 40)
simple = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, small, small),
    st.builds(Chunked, st.integers(1, 40)),
    st.builds(Prefix, small),
    st.builds(Global, small),
    st.builds(Dilated, st.integers(0, 6), st.integers(1, 7)),
)
masks = st.recursive(
    simple, lambda m: st.one_of(st.builds(And, m, m), st.builds(Or, m, m), st.builds(Not, m)), max_leaves=4
)
lengths = st.integers(0, 150)


@given(mask=masks, T=lengths, S=lengths)
@settings(max_examples=300, deadline=None)
def test_visible_pairs_equal_the_dense_mask(mask, T, S):
    assert visible_pairs(mask, T, S) == mask.dense(T, S).sum()


@given(mask=masks, documents=st.lists(st.integers(0, 40), max_size=5), padding=small)
@settings(max_examples=50, deadline=None)
def test_packed_documents_see_themselves_with_restarting_positions(mask, documents, padding):
    T = sum(documents) + padding
    segments = np.repeat(np.arange(len(documents) + 1), [*documents, 0])
    positions = np.concatenate([np.arange(n) for n in [*documents, 0]]).astype(np.int32)
    visible = mask(positions[:, None], positions[None]) & (segments[:, None] == segments[None])
    assert visible_pairs(mask, T, documents=documents) == visible.sum()


def _parity(q, k):
    return (q + k) % 3 == 0


def test_visible_pairs_of_a_function_and_of_arrays():
    assert visible_pairs(Fn(_parity), 70, 50) == Fn(_parity).dense(70, 50).sum()
    visible = np.random.default_rng(0).random((2, 3, 5, 4)) < 0.5
    for mask in (BlockSparse(16, visible), BlockSparse(16, jax.numpy.asarray(visible)) & Causal()):
        assert visible_pairs(mask, 75, 61) == pytest.approx(np.asarray(mask.dense(75, 61)).sum((2, 3)).mean())
    mask = Prefix(np.array([3, 40], np.int32)) | Causal()
    assert visible_pairs(mask, 75, 61) == pytest.approx(mask.dense(75, 61).sum((2, 3)).mean())


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Causal(), lambda T: T * (T + 1) // 2),
        (Causal() & Window(1024), lambda T: 1025 * T - 1024 * 1025 // 2),
        (Causal() & Chunked(4096), lambda T: T * 4097 // 2),
        (Causal() | Prefix(512), lambda T: T * (T + 1) // 2 + 512 * 511 // 2),
    ],
    ids=["causal", "window", "chunked", "prefix"],
)
def test_a_million_tokens_are_counted_without_a_dense_mask(mask, expected):
    start = time.perf_counter()
    assert visible_pairs(mask, 2**20) == expected(2**20)
    assert time.perf_counter() - start < 30  # 2**40 pairs one by one would take hours


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        visible_pairs(Causal(), -1)
    with pytest.raises(ValueError, match="must fit into T=10"):
        visible_pairs(Causal(), 10, documents=[6, 5])
    with pytest.raises(ValueError, match="packed for queries and keys alike"):
        visible_pairs(Causal(), 10, 11, documents=[5])


def test_attention_flops_are_4_8_and_2_per_pair_and_channel():
    found = flops.attention_flops(pairs=7, H=3, D=5)
    assert (found.forward, found.backward, found.recompute) == (7 * 3 * 5 * 4, 7 * 3 * 5 * 8, 7 * 3 * 5 * 2)
    found = flops.attention_flops(pairs=7, H=3, D=5, V=11)
    assert (found.forward, found.backward, found.recompute) == (2 * 21 * 16, 4 * 21 * 16, 2 * 21 * 5)


def test_attention_flops_equal_those_xla_counts_for_the_plain_form():
    T, H, D, V = 64, 2, 32, 16
    q, k, v = (jax.ShapeDtypeStruct((T, H, n), "float32") for n in (D, D, V))

    def plain(q, k, v):
        return jax.numpy.einsum("HTS,SHV->THV", jax.numpy.einsum("THD,SHD->HTS", q, k), v)

    counted = jax.jit(plain).lower(q, k, v).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flops.attention_flops(T * T, H, D, V).forward, rel=0.02)


@pytest.mark.parametrize(
    ("T", "share"), [(2048, 4.0), (4096, 7.7), (8192, 14.2), (32768, 39.9), (131072, 72.6), (524288, 91.4)]
)
def test_attention_share_of_a_llama_7b_layer(T, share):
    assert 100 * flops.attention_share(LLAMA_7B, T, head=False) == pytest.approx(share, abs=0.05)


def test_breakdown_of_a_whole_model():
    model = Model(N=3, E=32, F=48, H=4, K=2, D=6, W=301, mixers=(Softmax(), Softmax(mask=Causal() & Window(7))))
    T = 50
    found = flops.forward_flops(model, T)
    pairs = 2 * Causal().dense(T, T).sum() + (Causal() & Window(7)).dense(T, T).sum()  # layers 0 and 2, and 1
    assert found.attention == 4 * pairs * 4 * 6
    assert found.projections == 3 * 2 * T * 32 * 6 * (4 + 2 + 2 + 4)
    assert found.mlp == 3 * 3 * 2 * T * 32 * 48
    assert found.head == 2 * T * 32 * 301
    assert found.total == found.attention + found.projections + found.mlp + found.head
    assert flops.flops_per_token(model, T).total == pytest.approx(3 * found.total / T)
    assert flops.flops_per_token(model, T, training=False).mlp == pytest.approx(found.mlp / T)
    packed = flops.forward_flops(model, T, documents=[20, 30])
    assert packed.attention < found.attention
    assert packed.projections == found.projections
    config = Config(model=Model(), data=ByteLM(T=64, B=4))
    assert flops.step_flops(config) == pytest.approx(4 * 64 * flops.flops_per_token(Model(), 64).total)
    packed = 4 * 3 * flops.forward_flops(Model(), 64, documents=[20, 20, 24]).total
    assert flops.step_flops(config, {20: 2, 24: 1}) == pytest.approx(packed)


MODELS = {
    "default": Model(),
    "untied": Model(N=2, E=24, F=40, H=3, K=1, D=10, W=300, tie=False),
    "everything": Model(N=3, E=16, F=24, H=4, K=2, D=8, W=300, mixers=(Softmax(qk_norm=True, sinks=True, rope=None),)),
    "pattern": Model(
        N=5,
        E=16,
        F=24,
        H=4,
        K=4,
        D=4,
        W=257,
        mixers=(Softmax(sinks=True), Softmax(rope=RoPE(base=5e5)), Softmax(qk_norm=True)),
    ),
    "linear": Model(N=9, E=16, F=24, H=4, K=2, D=6, W=257, mixers=tuple(mixer_classes()[name]() for name in MIXERS)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_equal_those_of_the_initialised_model(model):
    init_params = pytest.importorskip("longattn.models.transformer", reason="needs the extra `train`").init_params
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert flops.parameters(model).total == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert flops.training_state_bytes(model).parameters == sum(leaf.size * 4 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("mixer", "attention", "matrices"),
    [  # E 16, H 4, K 2, D 6; T 50
        (LinearAttention(), 4 * 4 * 6 * 7, 16 * 6 * (4 + 2 + 2 + 4)),
        (Performer(features=10), 4 * 4 * 10 * 7 + 2 * (4 + 2) * 10 * 6, 16 * 6 * (4 + 2 + 2 + 4)),
        (RetNet(V=5), 4 * 4 * 6 * 5, 16 * 4 * (6 + 6 + 5 + 5 + 5)),
        (Mamba2(expand=2, state=7), 4 * 8 * 7 * 6, 16 * (8 * 6 * 3 + 2 * 7 + 8)),
        (GatedDeltaNet(V=5), 6 * 4 * 6 * 5, 16 * (2 * 6 * 2 + 4 * 5 * 3 + 4 + 4)),
        (KimiDeltaAttention(V=5, rank=3), 6 * 4 * 6 * 5, 16 * 4 * (6 + 6 + 5 + 5 + 1) + 3 * (16 * 2 + 4 * 6 + 4 * 5)),
    ],
)
def test_flops_of_recurrences(mixer, attention, matrices):
    """By hand: states are written and read once per token, with the delta rule read once more."""
    model = Model(E=16, F=24, H=4, K=2, D=6, mixers=(mixer,))
    found = flops.layer_flops(mixer, model, 50)
    assert found.attention == 50 * attention
    assert found.projections == 2 * 50 * matrices
    assert flops.layer_flops(mixer, model, 50, documents=[20, 10]).attention == 30 * attention


def test_training_state_is_sixteen_bytes_per_parameter():
    assert flops.training_state_bytes(LLAMA_7B).total == 16 * flops.parameters(LLAMA_7B).total
    assert (
        flops.parameters(LLAMA_7B).total == 6_738_415_616
    )  # as in the released weights of LLaMA-7B (arXiv:2302.13971)
