"""The table of linear attention in docs/status.md equals the one that the contract makes."""

from __future__ import annotations

from pathlib import Path

from tests.ops.contract import support


def test_status_page_holds_the_table():
    text = (Path(__file__).parents[3] / "docs" / "status.md").read_text()
    _, block, *_ = text.split("<!-- linear support -->")
    assert block.strip() == support.table(), "paste the output of `python -m tests.ops.contract.support` there"
