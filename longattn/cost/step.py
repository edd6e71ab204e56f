"""A training step's memory and messages by formula: what `longattn plan --analytic` prints.

Bytes are those of one device. n = B T / (data fsdp ring seq accumulate) is its tokens of a micro-batch, t = tensor, c
the bytes of the compute dtype, and p the parameters it holds. XLA needs most memory at one of three moments. Each has
the state (12 p: parameters and AdamW moments, float32) and what all N layers have kept of the forward pass, and adds:

    the loss        the gathered head, its gradient in float32 (4 W E), and one chunk's logits
    an MLP          backward: the gradients of the layers and of the head, cast parameters (c p), one layer's gathered
                    matrices, and activations of width F and E
    attention       backward: the same parameters, q, the gradient of out, that of q in float32, and what the strategy
                    exchanges. That is keys and values of the whole sequence and their gradients in float32; or those
                    of two hops, with sums of all gradients; or whole sequences of some heads

On TPUs the minor axis of an array in device memory is filled up to 128 lanes. Attention's kernels read and write
[B H T D], also the gradients of keys, so narrower heads cost as much as heads of 128. What layers keep in that layout
costs as much too: `kept` says when.

Where all layers call linear attention once, the moments are those that `linear.peaks` names. XLA uses memory that is
not short: it then computes an MLP's gradients beside the mixer's.

How many activations of each width are alive at once is a property of XLA's schedules. The counts below were read off
compiled programs, and `plan/calibration.py` holds the errors against the compilers' accounts. Messages are exact: the
strategies' formulas (`cost/sequence/traffic.py`) and, for linear attention, `linear.messages`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from longattn.config import Config, Mesh, Mixer, Model
from longattn.cost import flops as cost
from longattn.cost import linear
from longattn.cost.collective import BUFFER_KINDS
from longattn.cost.pairs import pairs_by_part, visible_pairs
from longattn.cost.sequence import problem, traffic
from longattn.cost.topology import Topology
from longattn.mask import Mask
from longattn.models.mixers import calls, module_of
from longattn.models.sharding import shardings
from longattn.models.transformer import init_params
from longattn.ops.attention.pallas_tpu.tiles import LANES
from longattn.ops.calls import AttentionCall
from longattn.parallel import ulysses
from longattn.parallel.attention import strategy_on

_F32 = 4


@functools.lru_cache(maxsize=256)
def _parameters(model: Model) -> dict[str, Any]:
    """The shapes of a model's parameters."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.lru_cache(maxsize=256)
def _held(config: Config) -> tuple[int, int]:
    """The numbers of parameters that one device holds: (all, those of the layers)."""
    c, shapes = config.mesh, _parameters(replace(config.model, remat="none", dtype="float32", mlp_chunk=None))
    mesh = AbstractMesh(tuple(c.sizes.values()), tuple(c.sizes), axis_types=(AxisType.Auto,) * len(c.sizes))
    lies = jax.tree.leaves(shardings(mesh, shapes, config.model))
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(sharding.shard_shape(x.shape))
        for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(shapes), lies, strict=True)
    }
    return sum(sizes.values()), sum(n for name, n in sizes.items() if "mixer" in name or "mlp" in name)


def tokens(config: Config) -> float:
    """The tokens of a micro-batch on one device."""
    c = config.mesh
    return config.data.B * config.data.T / (c.data * c.fsdp * c.P * config.optimiser.accumulate)


def _filled(D: int, where: Topology) -> int:
    """The size of a head in an array whose minor axis it is, filled up to lanes on TPUs."""
    return D if where.is_gpu else -(-D // LANES) * LANES


def recurrence(model: Model, where: Topology) -> Mixer | None:
    """The mixer of all layers where it calls linear attention; None where all layers call softmax attention.

    Raises:
      NotImplementedError: for layers whose memory no formula knows.
    """
    (mixer, *others), remedy = dict.fromkeys(model.layers), "leave --analytic out, and the step is compiled"
    for one in (mixer, *others):
        if not (_attends(one, model) or linear.known(one, model)):
            raise NotImplementedError(
                f"layers of {type(one).__name__}: no formula says how much memory they take; {remedy}"
            )
    if all(_attends(one, model) for one in (mixer, *others)):
        return None
    if others:
        raise NotImplementedError(
            "layers of several mixers with linear attention: XLA computes parts of several of them side by side, and "
            f"no formula says how much memory that takes; {remedy}"
        )
    if where.is_gpu:
        raise NotImplementedError(f"linear attention on {where.name}: the formulas are those of TPU kernels; {remedy}")
    if model.remat in ("none", "dots"):
        raise NotImplementedError(
            f"model.remat={model.remat!r} with linear attention: no formula says what XLA keeps of it; {remedy}, or "
            "choose 'attention', 'offload' or 'full'"
        )
    return mixer


def _attends(mixer: Mixer, model: Model) -> bool:
    """Whether a layer calls softmax attention once, with the model's heads, and nothing else."""
    found = [(c.H, c.heads, c.D, c.values) for c in calls(mixer, model, 1, AttentionCall)]
    return found == [(model.H, model.K, model.D, model.D)] and len(module_of(mixer).calls(mixer, model, 1)) == 1


def kept(config: Config, where: Topology) -> float:
    """Bytes that one device keeps of the forward pass of all layers, under the remat policy.

    Where the device has one row of the batch, XLA keeps out as TPU kernels give it, heads filled up. Where it has more
    rows, or ulysses exchanges out, XLA makes tokens the minor axis, which needs no filling. Where q, k and v are kept
    too, all arrays stay as the kernels want them. In two recorded programs with 16 devices along the sequence, tokens
    are minor with one row too, and XLA needs a quarter less than this says. Of offloaded arrays, those of two layers
    are on the device, on their way to the host's memory or back.
    """
    m, t, n, c = config.model, config.mesh.tensor, tokens(config), np.dtype(config.model.dtype).itemsize
    if (mixer := recurrence(m, where)) is not None:
        part = 0.0 if m.remat == "full" else linear.kept(mixer, m, config.data.T // config.mesh.P, t)
        return n * (c * m.E + part) * (2 if m.remat == "offload" else m.N)
    one_row = n * config.mesh.P == config.data.T and not _whole_sequences(config.mesh)
    minor = m.remat in ("dots", "none") or one_row
    D = _filled(m.D, where) if minor else m.D
    E, F, q, k = m.E, m.F / t, m.H * D / t, m.K * D / t
    attention = c * q + _F32 * m.H / t  # out and lse
    per_token = {
        "full": c * E,
        "attention": c * E + attention,
        "dots": 2 * c * E + c * (q + 2 * k) + attention + 2 * c * F,
        "none": (2 * c + 6 * _F32) * E + c * (q + 2 * k) + attention + 6 * c * F,  # norms are computed in float32
    }
    per_token["offload"] = per_token["attention"] * 2 / m.N
    return m.N * n * per_token[m.remat]


def memory(config: Config, where: Topology) -> dict[str, float]:
    """Bytes of one device at the peak, by the kinds in `BUFFER_KINDS`, and their sum as "total"."""
    m, mesh, n = config.model, config.mesh, tokens(config)
    c, t, E = np.dtype(m.dtype).itemsize, mesh.tensor, m.E
    F, q = m.F / t, m.H * m.D / t
    q_filled, k_filled = (heads * _filled(m.D, where) / t for heads in (m.H, m.K))
    p, layers = _held(config)
    sequence = n * mesh.P  # keys of the device's rows, also those that other devices hold
    head = m.W * E
    sums = _F32 * p if config.optimiser.accumulate > 1 else 0.0
    spread = mesh.fsdp * mesh.P > 1
    always = {
        "parameters": _F32 * p,
        "moments": 2 * _F32 * p,
        "batch": 4 * _F32 * n * config.optimiser.accumulate,
        "forward pass": kept(config, where),
    }
    chunk = min(config.optimiser.loss_chunk, n)
    rows = sequence / config.data.T
    piece = n if m.mlp_chunk is None else min(n, m.mlp_chunk * rows)  # tokens that the MLP sees at once
    full = m.remat == "full"  # attention's forward pass runs again, and its results are alive beside the rest
    wide, narrow = {"full": (4, 3), "attention": (4, 5), "offload": (4, 5)}.get(m.remat, (2, 6))
    gradients = sums + _F32 * layers + _F32 * head
    casts = c * layers * (c < _F32) + 2 * c * E * F * spread  # two of a layer's largest matrices, gathered
    peaks = {
        "loss": {
            "gradients": sums + _F32 * head,
            "gathered or cast parameters": c * layers * (c < _F32) + 2 * c * head,
            "backward pass": 2 * c * E * n + 3 * _F32 * chunk * m.W,
        },
        "MLP": {
            "gradients": gradients,
            "gathered or cast parameters": casts,
            "backward pass": c * (wide * F * piece + (narrow * E + full * 2 * (q_filled + k_filled)) * n),
        },
        "attention": {
            "gradients": gradients,
            "gathered or cast parameters": casts,
            "backward pass": (2 * c * E + full * c * (q + E)) * n + _exchanged(config, q, q_filled, k_filled) * n,
        },
    }
    if (mixer := recurrence(m, where)) is not None:
        both = {"gradients": gradients, "gathered or cast parameters": casts}
        each = linear.peaks(mixer, m, config.data.T // mesh.P, t, piece / n)
        beside = sum((always | both).values()) + n * each.pop("beside")
        peaks = {"loss": peaks["loss"], **{name: {**both, "backward pass": n * x} for name, x in each.items()}}
    largest = max(peaks.values(), key=lambda parts: sum(parts.values()))
    parts = always | largest
    total = sum(parts.values())
    if mixer is not None and total < (most := min(where.hbm_bytes, beside)):
        parts = always | both
        parts["backward pass"] = most - sum(parts.values())
        total = most
    return {**parts, "total": total}


def _exchanged(config: Config, q: float, q_filled: float, k_filled: float) -> float:
    """Bytes per token of a device in attention's backward pass: q, k, v, their gradients, and that of out."""
    m, mesh, c = config.model, config.mesh, np.dtype(config.model.dtype).itemsize
    own, P = 2 * c * q_filled + _F32 * q, mesh.P
    keys = 2 * (c + _F32) * k_filled
    if P == 1:
        return own + keys

    def exchanged() -> float:
        given = ulysses.heads(m.H // mesh.tensor, m.K // mesh.tensor, P)
        return own * (given.each * P / given.H) + keys * (len(given.keys) * mesh.tensor / m.K)

    travelling = lambda: own + 36 * k_filled + 28 * q  # of bfloat16; float32 has a few more
    buffers = {
        "ring": travelling,
        "balanced": travelling,
        "all_gather": lambda: own + keys * P,
        "ulysses": exchanged,
        "usp": travelling,
    }
    return problem.entry(buffers, problem.way_of(mesh), "buffers")()


def _whole_sequences(mesh: Mesh) -> bool:
    """Whether the strategy exchanges tokens for heads, out too, until devices have whole sequences."""
    strategy = strategy_on(mesh)
    return strategy.exchanges_heads and strategy.axes == 1


def _pairs(mask: Mask, T: int, mesh: Mesh) -> float:
    """The visible pairs per head on the device that has most of them."""
    if strategy_on(mesh).even or mesh.layout == "striped":  # striped: up to the diagonal
        return visible_pairs(mask, T) / mesh.P
    if mesh.layout == "zigzag" and mesh.shards > 1:
        halves = pairs_by_part(mask, T, 2 * mesh.shards)
        most = max(early + late for early, late in zip(halves, reversed(halves), strict=True))
    else:
        most = max(pairs_by_part(mask, T, mesh.shards))
    return most * mesh.shards / mesh.P  # the devices of a part divide the heads


def attention_flops(config: Config) -> tuple[float, float]:
    """FLOPs of one step's softmax attention, (forward, backward), on the device that has most of it.

    The backward pass includes what it recomputes. Under a causal mask the last part of the sequence sees most keys. In
    a contiguous layout one device has that part, but balanced and ulysses divide the pairs evenly. Heads that ulysses
    adds as padding count.
    """
    model, c = config.model, config.mesh
    rows = config.data.B / (c.data * c.fsdp)
    forward = backward = 0.0
    for call in (call for mixer in model.layers for call in calls(mixer, model, config.data.T, AttentionCall)):
        heads = call.H // c.tensor
        if strategy_on(c).exchanges_heads:  # filled up
            heads = -(-heads // c.seq) * c.seq
        flops = cost.attention_flops(_pairs(call.mask, call.T, c), heads, call.D, call.V)
        forward += rows * flops.forward
        backward += rows * (flops.backward + flops.recompute + flops.forward * (model.remat == "full"))
    return forward, backward


def linear_flops(config: Config) -> tuple[float, float]:
    """FLOPs of one step's linear attention on one TPU device, (forward, backward): see `linear.flops`."""
    m, c = config.model, config.mesh
    rows, T = config.data.B / (c.data * c.fsdp), config.data.T // c.P
    each = [(times, linear.flops(mixer, m, T, c.P, c.tensor)) for mixer, times in Counter(m.layers).items()]
    forward, backward = (rows * sum(times * part[i] for times, part in each) for i in range(2))
    return forward, backward


def flops(config: Config) -> float:
    """FLOPs of one device's step as the program computes them, recomputation included."""
    m, mesh = config.model, config.mesh
    share = config.data.B / (mesh.data * mesh.fsdp * mesh.P)  # of the batch's tokens
    forward = cost.forward_flops(m, config.data.T)
    mlp = forward.mlp * share / mesh.tensor
    T = config.data.T
    projections = share * sum(_projections(mixer, m, T, mesh.tensor) for mixer in m.layers)
    own = share * sum(linear.own_flops(mixer, m, T, mesh.tensor) for mixer in m.layers)
    # A rematerialised block runs forward again, without its last product, which no gradient asks for.
    again = (projections + 2 / 3 * mlp) * (m.remat not in ("none", "dots"))
    attention = sum(attention_flops(config)) + sum(linear_flops(config))
    return 3 * (projections + mlp) + again + 3 * forward.head * share + own + attention


def _projections(mixer: Mixer, model: Model, T: int, tensor: int) -> float:
    """Forward FLOPs of a mixer's matrices over one sequence, on one of the devices that share heads."""
    whole = cost.layer_flops(mixer, model, T).projections
    divided = 2.0 * T * sum(math.prod(shape) for shape in linear.divided(mixer, model).values())
    return whole - divided * (1 - 1 / tensor)


def messages(config: Config, where: Topology) -> dict[str, float]:
    """Bytes that one device receives in a step, by what they are; for attention on the device that receives most.

    Attention's are those of the strategy's formula (`sequence.traffic`), which compiled programs match to the byte,
    with one exception. TPU kernels give gradients with heads before tokens. XLA:TPU scatters along an axis that is not
    the first in memory by an all-reduce and a slice, which sends twice as much: so it does with all_gather's gradients.

    Matrices are gathered in the compute dtype, forward and backward. Their gradients are summed in it, by
    reduce-scatter where they are sliced and by all-reduce over `data`. Here programs may differ from the formula. XLA
    may pass slices around a ring of P devices P times instead of P - 1, inside the products that use them. It may also
    sum by all-reduce what is then sliced, which sends twice as much.
    """
    m, mesh, n = config.model, config.mesh, tokens(config)
    c, pieces = np.dtype(m.dtype).itemsize, config.optimiser.accumulate
    slices = mesh.fsdp * mesh.P
    others = lambda devices: (devices - 1) / devices
    held, layers = _held(config)
    matrices = layers * slices  # of one tensor slice, whole
    found = {
        **_attention_messages(config, where),
        **_state_messages(config),
        "matrices": 2 * pieces * c * matrices * others(slices),
        "their gradients, slices": pieces * c * matrices * others(slices),
        "their gradients, replicas": 2 * (c * layers + _F32 * (held - layers)) * others(mesh.data),
        "activations over tensor": pieces * _sums(m) * 2 * c * n * m.E * others(mesh.tensor),
        "embedding": 2 * pieces * c * n * m.E * others(slices),
        "head": pieces * (c + _F32) * m.W * m.E * others(slices),
    }
    return {name: size for name, size in found.items() if size}


def _sums(model: Model) -> int:
    """The number of arrays of activations [tokens, E] that `tensor` devices sum in a micro-batch.

    Forward these are the results of mixers and MLPs, and those of mixers again where remat recomputes them. Backward
    they are the gradients of the inputs of MLPs and mixers.
    """
    again = model.remat not in ("none", "dots")
    return sum(3 + again + (2 if _attends(mixer, model) else linear.sums(mixer, model)) for mixer in model.layers)


def _attention_messages(config: Config, where: Topology) -> dict[str, float]:
    """Bytes that attention sends along the sequence in a step: by pass, or if gathered, values apart from gradients.

    Raises:
      NotImplementedError: with the strategy's reason, where it does not serve a mask of the model.
    """
    most = dict.fromkeys(("forward", "backward", "gradients"), 0.0)
    for times, forward, backward in _passes(config):
        most["forward"] += times * forward.most
        most["backward"] += times * backward.most
        most["gradients"] += times * backward.received("scatter").max()
    if most["gradients"]:
        values = most["forward"] + most["backward"] - most["gradients"]
        return {"keys and values": values, "their gradients": most["gradients"] * (1 if where.is_gpu else 2)}
    return {"attention, forward": most["forward"], "attention, backward": most["backward"]}


def _passes(config: Config) -> Iterator[tuple[int, traffic.Traffic, traffic.Traffic]]:
    """Yields, for each kind of layer, how often a step runs it and what its passes send along the sequence."""
    mesh, pieces = config.mesh, config.optimiser.accumulate
    rows = config.data.B // (mesh.data * mesh.fsdp * pieces)
    for layer, times in problem.layers_of(config.model, config.data.T, rows, mesh.tensor).items():
        forward, backward = traffic.traffic(layer, problem.way_of(mesh))
        again = traffic.again(forward, config.model.remat).messages
        yield pieces * times, forward, traffic.Traffic(forward.P, (*backward.messages, *again))


def _hops(config: Config) -> float:
    """Bytes that a ring sends over one link in a step, in its busier direction."""
    sent = defaultdict[int, float](float)
    for times, *passes in _passes(config):
        for message in (m for one in passes for m in one.messages if m.scope in ("hop", "behind")):
            sent[message.step] += times * message.bytes
    return max(sent.values(), default=0.0)


def _state_messages(config: Config) -> dict[str, float]:
    """Bytes that linear attention sends along the sequence in a step: see `linear.messages`."""
    m, mesh, pieces = config.model, config.mesh, config.optimiser.accumulate
    rows = config.data.B // (mesh.data * mesh.fsdp * pieces)
    each = [
        (pieces * times, linear.messages(mixer, m, rows, mesh.P, mesh.tensor))
        for mixer, times in Counter(m.layers).items()
    ]
    passes = enumerate(("forward", "backward"))
    return {f"states, {name}": sum(times * sent[i] for times, sent in each) for i, name in passes}


def estimate(config: Config, where: Topology) -> dict[str, Any]:
    """The formulas' answer in the form of `aot.train_step.facts`. Messages take all links, a ring's hops one."""
    parts = memory(config, where)
    total = parts.pop("total")
    work, sent = flops(config), messages(config, where)
    model = cost.step_flops(config) / where.size
    products = work / where.peak_flops
    link = max(sum(sent.values()) / where.link_bandwidth, _hops(config) / where.one_link)
    return {
        "fits": total <= where.hbm_bytes,
        "hbm_bytes": round(total),
        "hbm_limit": where.hbm_bytes,
        "by_kind": {kind: round(parts.get(kind, 0.0)) for kind in BUFFER_KINDS},
        "messages": {name: round(size) for name, size in sent.items()},
        "flops": work,
        "model_flops": model,
        "seconds": {"bound": max(products, link), "products": products, "link": link},
        "mfu_bound": model / where.peak_flops / max(products, link),
    }
