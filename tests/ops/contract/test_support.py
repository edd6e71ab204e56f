"""The table of what the back ends of linear attention serve says what the contract tests."""

from __future__ import annotations

import itertools

import pytest

from tests.ops.contract import support
from tests.ops.contract.test_linear import BACK_ENDS, DOMAINS, KINDS, BackEnd, Case, accepted, rest, sample


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_every_value_is_compared_and_with_every_other_one_where_that_is_cheap(back_end):
    """Each back end runs every value it takes, so every cell that says yes; `xla`, the quickest, every pair of them."""
    domains = accepted(back_end)
    ran = [case for case in sample(back_end) + rest(back_end) if not back_end.refusal(case)]
    for name, values in domains.items():
        assert set(values) <= {getattr(case, name) for case in ran}, name
    if back_end.name == "xla":
        pairs = list(itertools.combinations(domains, 2))
        found = {(a, getattr(case, a), b, getattr(case, b)) for case in ran for a, b in pairs}
        assert {(a, v, b, w) for a, b in pairs for v in domains[a] for w in domains[b]} <= found


@pytest.mark.parametrize("column", support.FEATURES)
def test_every_refusal_is_asked_for(column):
    """A value that a back end refuses is among the cases that it has to refuse, with the reason in the table."""
    ((field, values),) = support.FEATURES[column].items()
    for back_end in BACK_ENDS:
        refused = {value for value in values if back_end.refusal(Case(**{field: value}))}
        assert refused <= {getattr(case, field) for case in sample(back_end)}, back_end


def test_every_kind_and_every_value_has_a_cell():
    assert [kind for kinds in support.KINDS.values() for kind in kinds] == sorted(KINDS, key=list(KINDS).index)
    values = [value for column in support.FEATURES.values() for values in column.values() for value in values]
    assert set(values) <= {value for domain in DOMAINS.values() for value in domain}
    assert {"float32", "bfloat16", "float16", "float64"} <= set(values)


def test_refusals_are_in_the_table(monkeypatch):
    refusing = BackEnd(
        "half", refuses=(("float64", "no float64; cast", "float32"), ("plain", "a decay please", "delta"))
    )
    monkeypatch.setattr(support, "BACK_ENDS", [*BACK_ENDS[:1], refusing])
    lines = support.table().splitlines()
    assert sum("`half`" in line for line in lines) == len(support.KINDS)
    assert "| no decay | `half` | " + "no (1) | " * 7 + "no (2) |" in lines
    assert lines[-1] == "(1) a decay please; (2) no float64; cast."
