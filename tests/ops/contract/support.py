"""What each back end of linear attention serves, from the table that the contract's cases are drawn from.

    python -m tests.ops.contract.support

prints it as Markdown. Every cell that says yes is a case that the contract compares with the oracle, every other one a
case that has to be refused for the reason given.
"""

from __future__ import annotations

from tests.ops.contract.test_linear import BACK_ENDS, BackEnd, Case

KINDS = {  # heading of a row, kinds of the contract
    "no decay": ("plain",),
    "decay per head, constant or per token": ("constant decay", "scalar decay"),
    "decay per channel": ("vector decay",),
    "delta rule": ("delta",),
    "delta rule, decay per head": ("constant decay, delta", "scalar decay, delta"),
    "delta rule, decay per channel": ("vector decay, delta",),
}
FEATURES = {  # heading of a column, values of the contract's cases
    "packed documents": {"ids": ("segments",)},
    "initial state": {"state": ("from a state",)},
    "fewer heads of q, k or v": {"heads": ("one q and k", "fewer q and k", "fewer v")},
    "decays from 0 to 1": {"decays": ("from e^-30 to 1", "beyond exp")},
    "float32": {"dtype": ("float32",)},
    "bfloat16": {"dtype": ("bfloat16",)},
    "float16": {"dtype": ("float16",)},
    "float64": {"dtype": ("float64",)},
}


def cases(row: str, column: str) -> list[Case]:
    """The cases of a cell."""
    ((field, values),) = FEATURES[column].items()
    return [Case(kind=kind, **{field: value}) for kind in KINDS[row] for value in values]


def table() -> str:
    """The table, and the reasons of refusals below it. Back ends that serve the same of a row share it."""
    reasons: list[str] = []

    def cell(back_end: BackEnd, row: str, column: str) -> str:
        found = {reason for case in cases(row, column) if (reason := back_end.refusal(case))}
        reasons.extend(sorted(found - set(reasons)))
        return "no " + ", ".join(f"({reasons.index(r) + 1})" for r in sorted(found)) if found else "yes"

    lines = ["| | back ends | " + " | ".join(FEATURES) + " |", "|---" * (2 + len(FEATURES)) + "|"]
    for row in KINDS:
        groups: dict[tuple[str, ...], list[str]] = {}
        for back_end in BACK_ENDS:
            groups.setdefault(tuple(cell(back_end, row, c) for c in FEATURES), []).append(f"`{back_end}`")
        lines += [f"| {row} | {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    notes = [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join(lines + (["", "; ".join(notes) + "."] if notes else []))


if __name__ == "__main__":
    print(table())
