"""Files: JSON without NaN, damage that names the file, locks that follow no link."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from longattn import files


def test_json_has_no_nan_and_no_infinity() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": np.float64("inf"), "d": None}, "e": "NaN"}
    read = json.loads(files.json_text(value, indent=1), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"a": [None, [1.5, None]], "b": {"c": None, "d": None}, "e": "NaN"}
    assert files.json_text({"x": 0.1}) == '{"x": 0.1}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"step": 1, "lo', "it is no JSON (Unterminated string"),
        (b"\xff\xfe", "it is no UTF-8 text (invalid start byte)"),
        (b"[" * 100_000, "it is no JSON (it is nested too deep)"),
        (b"[1]", "it holds a list, not an object"),
        (b'{"step": "1"}', "its 'step' must be a JSON integer"),
        (b'{"step": true}', "its 'step' must be a JSON integer"),
        (b"{}", "its 'step' must be a JSON integer"),
    ],
)
def test_damage_names_the_file_the_reason_and_the_remedy(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as found:
        files.read_object(path, "move it away", step=int)
    said = str(found.value)
    assert said.startswith(f"{path} is damaged: {reason}")
    assert said.endswith("; move it away")
    assert "\n" not in said


def test_writing_leaves_the_whole_file_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("before")
    files.write_whole(tmp_path / "x", "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "after")]


def test_a_lock_excludes_keeps_its_file_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("kept")
    with files.locked(tmp_path, "busy"), pytest.raises(ValueError, match="^busy$"), files.locked(tmp_path, "busy"):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"
    (tmp_path / ".lock").rename(tmp_path / "mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"\.lock cannot be opened .*: delete it"), files.locked(tmp_path, "busy"):
        pass
    assert (tmp_path / "mine").read_text() == "kept"
