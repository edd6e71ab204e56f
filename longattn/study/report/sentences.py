"""Writes sentences about a study: one fact each, and only what is resolved.

A sentence compares two ways only if their intervals separate. Numbers that were refused (cut short, two speeds) are in
none.
"""

from __future__ import annotations

from collections.abc import Iterator

from longattn.study.report.load import way_title
from longattn.study.store import Number, Store

UNRESOLVED = "not resolved by this pair"
Sentence = list[str | Number]


def separate(a: Number, b: Number) -> bool:
    """Returns whether both numbers have intervals and these do not touch."""
    if any(x is None for x in (a.low, a.high, b.low, b.high)) or a.refused or b.refused:
        return False
    return a.high < b.low or b.high < a.low  # type: ignore[operator]


def sentences(store: Store) -> list[Sentence]:
    """Returns the sentences about a study's numbers, at most 25 words each."""
    return [sentence for facts in (_time, _growth, _longest, _recalled, _context) for sentence in facts(store)]


def common_T(store: Store) -> int | None:
    """Returns the length at which most ways were timed; the largest of several."""
    times = store.select("cost", "seconds_forward_backward")
    counts = {T: sum(n.at["T"] == T for n in times) for T in {n.at["T"] for n in times}}
    return max(counts, key=lambda T: (counts[T], T), default=None)


def _whole(store: Store, part: str, quantity: str, way: str | None = None, **at: object) -> list[Number]:
    """Returns the numbers that were not refused, smallest first."""
    return sorted((n for n in store.select(part, quantity, way, **at) if not n.refused), key=lambda n: n.value)


def _time(store: Store) -> Iterator[Sentence]:
    T = common_T(store)
    times = _whole(store, "cost", "seconds_forward_backward", T=T)
    if len(times) < 2:
        return
    if separate(times[0], times[1]):
        yield [f"Fastest layer at T = {T:,}, forward and backward: {way_title(times[0].way)}, ", times[0], "."]
    if separate(times[-1], times[-2]):
        yield [f"Slowest layer at T = {T:,}: {way_title(times[-1].way)}, ", times[-1], "."]


def _growth(store: Store) -> Iterator[Sentence]:
    for way in ("exact", "dense"):
        for quantity, text in (("exponent_time_training", "Time"), ("exponent_memory", "Scratch memory")):
            for n in _whole(store, "cost", quantity, way):
                if way == "exact" or quantity == "exponent_memory":
                    yield [f"{text} of {way_title(way)} grows as T to the power ", n, "."]


def _longest(store: Store) -> Iterator[Sentence]:
    parameters = store.one("memory", "parameters", "")
    for n in store.select("memory", "longest_T", "exact", chip="v5e", remat="attention"):
        size = f"{parameters.value / 1e6:,.0f} million parameters, " if parameters else ""
        yield [f"Longest training sequence on a v5e ({size}remat attention), {way_title(n.way)}: ", n, "."]


def _recalled(store: Store) -> Iterator[Sentence]:
    found = store.select("recall", "accuracy", task="mqar")
    if not found:
        return
    T, pairs = found[0].at["T"], found[0].at["pairs"]  # the hardest setting comes first
    ordered = _whole(store, "recall", "accuracy", task="mqar", T=T, pairs=pairs)[::-1]
    for best, next_best in zip(ordered, ordered[1:], strict=False):
        if separate(best, next_best):
            # One seed's interval is that over questions: another training may differ by more.
            names = [way_title(n.way) + " (one seed)" * (len(n.seeds) == 1) for n in (best, next_best)]
            where = f"of {pairs} pairs in {T} tokens"
            yield [f"Recall {where}: {names[0]} ", best, f", more than {names[1]} ", next_best, "."]


def _context(store: Store) -> Iterator[Sentence]:
    used = [n for n in _whole(store, "context", "tail_excess", "exact") if n.low is not None and n.low > 0]
    if used:
        n = max(used, key=lambda n: n.at["k"])
        yield [f"Text: replacing all but the last {n.at['k']} bytes before a tail costs it ", n, " per byte."]
    at = [n for n in store.select("context", "bits_at", "exact") if n.badge == "recorded"]
    if at:
        first, last = min(at, key=lambda n: n.at["to"]), max(at, key=lambda n: n.at["to"])
        yield ["Text, a recorded run: the first byte of a row takes ", first,
               f", bytes {last.at['from']:,} to {last.at['to']:,} take ", last, "."]  # fmt: skip
