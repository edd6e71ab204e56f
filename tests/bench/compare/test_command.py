"""What the command prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from longattn.bench import compare
from longattn.bench.compare import command
from tests.bench.compare.tiny import TINY


@pytest.mark.slow
def test_the_tables_say_all(document) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    command._print(console, document)
    text = console.export_text()
    for piece in (
        "xla: top kernels",
        "Largest differences to xla",
        "splash: it runs on tpu",
        "xprof",
        "quartiles",
        "to that of xla",
    ):
        assert piece in text, piece


@pytest.mark.slow
def test_names_with_brackets_are_printed_as_they_are(document) -> None:
    row = next(row for row in document["rows"] if "samples" in row)
    named = {**row, "kernels": [{**row["kernels"][0], "name": "kernel[bold]"}]}
    refused = {"contestant": "splash", "reason": "shape [b] is not known"}
    console = Console(width=200, record=True, file=io.StringIO())
    command._print(console, {**document, "rows": [named, refused], "differences": [], "plot": None})
    text = console.export_text()
    assert "kernel[bold]" in text
    assert "shape [b] is not known" in text
    assert "Plot" not in text


def test_nothing_to_time_leaves_nothing_behind(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    options = compare.CompareOptions("attention_forward", contestants=("splash", "cudnn"), out=str(out), **TINY)
    document = compare.run(options)
    assert document["trace"] is None
    assert all("reason" in row for row in document["rows"])
    assert not out.exists()
    assert "Nothing could be timed here." in capsys.readouterr().out
