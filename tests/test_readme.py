"""README.md is true: its Python runs, and the targets, commands and files it names exist."""

import pathlib
import re

import pytest

from longattn import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    assert sum(1 for line in blocks[0].splitlines() if line.strip()) <= 16, "the library in 15 lines"
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (8, 1000, 8, 64)
    assert namespace["y"].shape == (8, 1000, 512)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word for words in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", README, re.MULTILINE) for word in words.split()
    }
    assert {"study", "test", "help"} <= named
    assert named <= targets, f"README names {named - targets}, which the Makefile lacks"


def test_commands_exist():
    named = set(
        re.findall(r"\blongattn (\w+) ", "".join(re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)))
    )
    assert {"train", "eval", "bench"} <= named
    assert named <= set(cli.COMMANDS)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:longattn|configs|notebooks|experiments|tests)/[\w./]*)`", README)))
)
def test_files_exist(path):
    assert (ROOT / path).exists()
