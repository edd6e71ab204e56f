"""Writes sentences about a study. A sentence ranks two ways only if their intervals separate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longattn.study.report.load import way_title
from longattn.study.store import Number, Store

UNRESOLVED = "not resolved by this preset"


def separate(a: Number, b: Number) -> bool:
    """Returns whether both numbers have intervals and these do not touch."""
    if any(x is None for x in (a.low, a.high, b.low, b.high)):
        return False
    return a.high < b.low or b.high < a.low  # type: ignore[operator]


def ranking(numbers: Sequence[Number], word: str) -> str:
    """Compares neighbours in the order of their values: "x WORD y" if they separate, else "x against y: not resolved".

    `word` is such as "is faster than".
    """
    ordered = sorted(numbers, key=lambda n: n.value)
    clauses = []
    for a, b in zip(ordered, ordered[1:], strict=False):
        names = way_title(a.way), way_title(b.way)
        whole = not (a.cut_short or b.cut_short)
        clauses.append(
            f"{names[0]} {word} {names[1]}"
            if whole and separate(a, b)
            else f"{names[0]} against {names[1]}: {UNRESOLVED}"
        )
    return "; ".join(clauses)


Sentence = list[str | Number]


def _listed(numbers: Iterable[Number]) -> Sentence:
    parts: Sentence = []
    for n in numbers:
        parts += [", " if parts else "", f"{way_title(n.way)} ", n]
    return parts


def sentences(store: Store) -> list[Sentence]:
    """Returns at most five sentences about the numbers of a study."""
    return [s for s in (f(store) for f in (_time, _growth, _longest, _recalled, _context)) if s]


def common_T(store: Store) -> int | None:
    """Returns the length at which most ways were timed; the largest of several."""
    times = store.select("cost", "seconds_forward_backward")
    counts = {T: sum(n.at["T"] == T for n in times) for T in {n.at["T"] for n in times}}
    return max(counts, key=lambda T: (counts[T], T), default=None)


def _time(store: Store) -> Sentence | None:
    T = common_T(store)
    times = store.select("cost", "seconds_forward_backward", T=T)
    if len(times) < 2:
        return None
    return [
        f"One attention layer, forward and backward at T = {T:,}, takes: ",
        *_listed(times),
        f" ({ranking(times, 'is faster than')}).",
    ]


def _growth(store: Store) -> Sentence | None:
    time, memory = (store.select("cost", f"exponent_{q}") for q in ("time_training", "memory"))
    if not time or not memory:
        return None
    return [
        "Over the three largest lengths, time grows as T to the power ",
        *_listed(time),
        "; scratch memory as ",
        *_listed(memory),
        ".",
    ]


def _longest(store: Store) -> Sentence | None:
    found = [n for n in store.select("memory", "longest_T", chip="v5e") if n.at["remat"] == "attention"]
    if not found:
        return None
    held = store.select("memory", "held_parameters", remat="attention")
    size = f"{held[0].value / 4e6:,.3g} million parameters, " if held else ""  # float32
    return [
        f"The longest sequence whose training step fits in a v5e ({size}remat: attention): ",
        *_listed(found),
        " tokens.",
    ]


def _recalled(store: Store) -> Sentence | None:
    found = store.select("recall", "accuracy", task="mqar")
    settings = list(dict.fromkeys((n.at["T"], n.at["pairs"]) for n in found))
    hardest = [n for n in found if (n.at["T"], n.at["pairs"]) == settings[0]] if settings else []
    if not hardest:
        return None
    text = f"Associative recall of {settings[0][1]} pairs within {settings[0][0]} tokens: "
    rank = f" ({ranking(hardest, 'recalls less than')})" if len(hardest) > 1 else ""
    return [text, *_listed(hardest), f"{rank}."]


def _context(store: Store) -> Sentence | None:
    excess = [n for n in store.select("context", "tail_excess") if n.way == "exact"] or store.select(
        "context", "tail_excess"
    )
    used = [n for n in excess if n.low is not None and n.low > 0]
    if not excess:
        return None
    if not used:
        return [f"Text: whether bytes further back than k = {min(n.at['k'] for n in excess)} are used is {UNRESOLVED}."]
    far, tail = max(used, key=lambda n: n.at["k"]), excess[0].at["tail"]
    return [
        f"Text: replacing everything further back than {far.at['k']} bytes costs {way_title(far.way)} ",
        far,
        f" per byte on the last {tail} bytes; whether context beyond that is used is {UNRESOLVED}.",
    ]
