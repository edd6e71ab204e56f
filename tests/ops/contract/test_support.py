"""The table of what the back ends of linear attention serve says what the contract tests."""

from __future__ import annotations

import pytest

from tests.ops.contract import support
from tests.ops.contract.test_linear import BACK_ENDS, DOMAINS, KINDS, REST, SAMPLE, BackEnd


@pytest.mark.parametrize("column", support.FEATURES)
@pytest.mark.parametrize("row", support.KINDS)
def test_every_cell_is_compared(row, column):
    """Of each cell a case of each kind, with each value, is among those that every back end has to pass or refuse."""
    ((field, _),) = support.FEATURES[column].items()
    tested = {(case.kind, getattr(case, field)) for case in SAMPLE + REST}
    assert {(case.kind, getattr(case, field)) for case in support.cases(row, column)} <= tested


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
