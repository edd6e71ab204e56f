"""Part 1, cost against T: time, scratch memory, FLOPs and throughput of an attention layer, and its share of a model.

It times the mixer's own module at model width `WIDTH`: the projections then cost next to nothing, and any mixer can be
timed, whatever its arguments.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longattn import config
from longattn.bench.timing import fit_exponent, interleave, two_speeds
from longattn.cost import flops
from longattn.environment import available_memory
from longattn.models import bytes_read_per_token, module_of, sequential_steps, state_elements
from longattn.study.presets import CostPlan
from longattn.study.store import UNSTEADY, Badge, Number, Store
from longattn.study.units import Unit
from longattn.study.ways import READ, Way, trained, ways

WIDTH = 8
FITTED = 3  # exponents are fitted to the largest sizes: in small ones overhead dominates
SEVEN_BILLION = config.Model(N=32, E=4096, F=11008, H=32, K=32, D=128, W=32000, tie=False)  # arXiv:2302.13971


def units(plan: CostPlan, store: Store) -> list[Unit]:
    """Returns the formulas, then a unit per length in which all ways take turns, shortest first, then the fits."""
    made = [Unit("cost/share", lambda clock: _share(plan), weight=0.02 * plan.lengths[-1])]
    made.append(Unit("cost/state", lambda clock: _state(plan), weight=0.02 * plan.lengths[-1]))
    for T in plan.lengths:
        made.append(Unit(f"cost/T={T}", lambda clock, T=T: _length(plan, T), weight=T))
    for T in [T for T in plan.lengths if plan.tokens >= T]:  # none if tokens is 0
        made.append(Unit(f"cost/tokens/T={T}", lambda clock, T=T: _throughput(plan, T), weight=0.2 * plan.lengths[-1]))
    made.append(Unit("cost/fit", lambda clock: _fits(plan, store), weight=0.02 * plan.lengths[-1], always=True))
    return made


def _model(plan: CostPlan, way: Way) -> config.Model:
    return config.Model(N=1, E=WIDTH, F=1, H=plan.H, K=plan.H, D=plan.D, mixers=(way.mixer,), dtype=plan.dtype)


def _at(plan: CostPlan, T: int) -> list[Way]:
    """Returns the ways to measure at T. Dense attention stops at a limit; some ways get a single length."""
    single = plan.lengths[-2] if len(plan.lengths) > 1 else plan.lengths[-1]
    table = ways(plan.windows, plan.without)
    return [
        w
        for w in table
        if (w.memory_exponent != 2 or plan.dense_limit >= T) and (plan.every or w.everywhere or single == T)
    ]


def _programs(plan: CostPlan, way: Way, B: int, T: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Compiles forward and forward + backward of one layer; returns the programs with their arguments."""
    model = _model(plan, way)
    module = module_of(way.mixer)(way.mixer, model, way.context)
    x = jax.random.normal(jax.random.key(T), (B, T, WIDTH), jnp.dtype(plan.dtype))
    params = module.init(jax.random.key(0), x[:, :1])

    def forward(params: Any, x: Any) -> Any:
        return module.apply(params, x)[0]

    def both(params: Any, x: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(y)

    return {
        name: (jax.jit(f).lower(params, x).compile(), (params, x))
        for name, f in (("forward", forward), ("forward_backward", both))
    }


def _all_programs(plan: CostPlan, chosen: Sequence[Way], B: int, T: int) -> dict[str, Any]:
    """Compiles the programs of several ways, two at a time: XLA releases the interpreter's lock."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip([w.name for w in chosen], pool.map(lambda w: _programs(plan, w, B, T), chosen), strict=True))


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Returns the order statistics that cover the median with at least 95%; below six samples, the whole range."""
    ordered, n, k, below = sorted(samples), len(samples), 0, 0.5 ** len(samples)
    while 2 * (below + math.comb(n, k + 1) * 0.5**n) <= 0.05:
        k += 1
        below += math.comb(n, k) * 0.5**n
    return ordered[k], ordered[n - 1 - k]


def _timed(fns: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Times the callables in turns; returns the median, interval and samples of each, in seconds.

    One that ran at two speeds is timed again by itself. If it does so again it has no interval, and a note says why.
    """
    result = {}
    for name, samples in interleave(fns, repeats).items():
        if two_speeds(samples):
            samples = interleave({name: fns[name]}, repeats)[name]
        low, high = median_interval(samples)
        result[name] = {"value": statistics.median(samples), "low": low, "high": high, "samples": tuple(samples)}
        if two_speeds(samples):
            result[name] |= {"low": None, "high": None, "note": f"{UNSTEADY}, {low:.3g} s and {high:.3g} s"}
    return result


def _length(plan: CostPlan, T: int) -> Iterable[Number]:
    fns: dict[str, Callable[[], Any]] = {}
    chosen = _at(plan, T)
    programs = _all_programs(plan, chosen, 1, T)
    for way in chosen:
        for what, (program, arguments) in programs[way.name].items():
            scratch = program.memory_analysis().temp_size_in_bytes
            note = "" if _fits_here(scratch) else "not run: it does not fit into the memory of this device"
            yield Number("cost", f"scratch_{what}", way.name, scratch, "B", "compiled", {"T": T}, note=note)
            if not note:
                fns[f"{what}/{way.name}"] = functools.partial(program, *arguments)
        if way.same_as is None:
            predicted = flops.layer_flops(way.mixer, _model(plan, way), T).attention
            yield Number("cost", "flops_forward", way.name, predicted, "FLOP", "predicted", {"T": T})
    for name, numbers in _timed(fns, plan.repeats).items():
        what, way_name = name.split("/")
        yield Number("cost", f"seconds_{what}", way_name, unit="s", badge="measured", at={"T": T}, **numbers)


def _fits_here(scratch: int) -> bool:
    free = available_memory()
    return free is None or scratch < 0.7 * free


def _throughput(plan: CostPlan, T: int) -> Iterable[Number]:
    fns, B = {}, plan.tokens // T
    for name, programs in _all_programs(plan, _at(plan, T), B, T).items():
        program, arguments = programs["forward_backward"]
        if _fits_here(program.memory_analysis().temp_size_in_bytes):
            fns[name] = functools.partial(program, *arguments)
    for name, timed in _timed(fns, plan.repeats).items():
        rate = {"value": B * T / timed["value"], "low": B * T / timed["high"], "high": B * T / timed["low"]}
        samples = tuple(B * T / s for s in timed["samples"])
        at = {"T": T, "tokens": B * T}
        yield Number(
            "cost", "tokens_per_second", name, unit="tokens/s", badge="measured", at=at, samples=samples, **rate
        )


def _share(plan: CostPlan) -> Iterable[Number]:
    for way in ways(plan.windows, plan.without):
        if way.same_as is None:
            for T in plan.share_lengths:
                model = config.Model(**{**vars(SEVEN_BILLION), "mixers": (way.mixer,)})
                share = flops.attention_share(model, T)
                yield Number("cost", "attention_share", way.name, share, "share", "predicted", {"T": T})


def _state(plan: CostPlan) -> Iterable[Number]:
    """Yields the state, reads and sequential steps of a layer of every way: formulas, which take no time."""
    for way in trained(plan.windows):
        model = _model(plan, way)
        for T in plan.lengths:
            number = functools.partial(Number, "cost", way=way.name, badge="predicted", at={"T": T})
            elements, read = state_elements(way.mixer, model, T), bytes_read_per_token(way.mixer, model, T)
            yield number(quantity="state_elements", value=elements, unit="elements")
            yield number(quantity="bytes_read", value=read, unit="B", note=READ)
            yield number(
                quantity="sequential_steps", value=sequential_steps(way.mixer, model, T), unit="steps",
                note="one layer, forward",
            )  # fmt: skip


def _fits(plan: CostPlan, store: Store) -> Iterable[Number]:
    """Yields the fitted exponents of time and scratch memory, beside those of the theory."""
    for way in ways(plan.windows, plan.without):
        for name, quantity, theory in (
            ("time", "seconds_forward", way.time_exponent),
            ("time_training", "seconds_forward_backward", way.time_exponent),
            ("memory", "scratch_forward_backward", way.memory_exponent),
        ):
            numbers = sorted(store.select("cost", quantity, way.name), key=lambda n: n.at["T"])[-FITTED:]
            if len(numbers) < FITTED or min(n.value for n in numbers) <= 0:
                continue
            sizes = [n.at["T"] for n in numbers]
            fit = fit_exponent(sizes, [n.samples or [n.value] for n in numbers])
            unsteady = next((n.note for n in numbers if n.refused), "")
            note = unsteady or f"fitted on T = {', '.join(map(str, sizes))}"
            badge: Badge = "measured" if numbers[0].samples else "compiled"
            yield Number(
                "cost", f"exponent_{name}", way.name, fit.value, "", badge, low=fit.low, high=fit.high, note=note
            )
            if theory is not None:
                yield Number("cost", f"theory_{name}", way.name, theory, "", "predicted")
