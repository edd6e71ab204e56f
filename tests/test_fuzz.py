"""Every option of every command, given what it does not take: exit code 2, one line, no traceback, nothing written.

Commands end before they would compile or measure.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longattn import cli, plan, study
from longattn.aot.kernels import command as tpu_command
from longattn.aot.kernels import gpu_command
from longattn.arguments import _spelling
from longattn.bench import attention, bringup, compare, run_profile
from longattn.config import Config
from longattn.plan import sequence

NONSENSE = (
    "", "nonsense", "-1", "0", "1.5", "nan", "inf", "-inf", "1e999", "99999999999999999999", "2147483647", "1" * 5000,
    "None", "True", "..", "[a/b]", "a/\x07[/]", "x" * 300, "Causal(", "~" * 3000 + "Causal()", "Window(1, -5)",
    "²", "[" * 500,
)  # fmt: skip
SHORT = {("CompareOptions", "contestants"): "with"}

# Each command up to its options, what holds these, and (module, function) of what is not to run.
COMMANDS: dict[str, tuple[Any, tuple[Any, str] | None]] = {
    "train c.py": (Config(), (cli, "_train_here")),
    "eval run": (cli.EvalOptions("run"), None),  # there is no such run
    "compare attention": (attention.AttentionOptions(), (attention, "attention")),
    "compare attention_forward": (compare.CompareOptions("attention_forward"), (compare, "run")),
    "compare linear_forward": (compare.CompareOptions("linear_forward"), (compare, "run")),
    "study": (study.StudyOptions(), (study, "run")),
    "plan llama3_1b --analytic": (plan.PlanOptions(), (plan, "run")),
    "profile kernel matmul": (tpu_command.ProfileOptions(("matmul",)), (tpu_command, "run")),
    "profile kernel matmul --target gpu": (gpu_command.ProfileOptions(("matmul",)), (gpu_command, "run")),
    "profile sequence": (sequence.SequenceOptions(), (sequence, "run")),
    "profile run run": (run_profile.RunProfileOptions("run"), None),
    "bringup": (bringup.BringupOptions(), (bringup, "run")),
}

BY_FORMULA = ("plan llama3_1b --analytic", "profile sequence")  # the slow test runs these to their end


def options(owner: Any, prefix: str = "") -> Iterator[str]:
    """Yields the names of the options that stand for the fields of a dataclass, and of those within it."""
    for field in dataclasses.fields(owner):
        key, value = (type(owner).__name__, field.name), getattr(owner, field.name)
        inner = enumerate(value) if field.name == "mixers" else [(None, value)]
        for i, part in inner:
            name = prefix + SHORT.get(key, field.name) + ("" if i is None else f".{i}")
            if dataclasses.is_dataclass(part) and field.name != "mask":
                yield from options(part, f"{name}.")
            elif not any("Positional" in str(marker) for marker in _spelling().get(key, ())):
                yield f"--{name}"


def tried(monkeypatch: Any, capsys: Any, command: str, most: int) -> None:
    """Gives up to 2 * `most` options of a command a value each, and refuses a traceback, a second line, a file."""
    owner, entry = COMMANDS[command]
    if entry is not None and (most < 1000 or command not in BY_FORMULA):
        monkeypatch.setattr(*entry, lambda *_, **__: {"verdict": "incomplete"} if entry[0] is bringup else 0)
    Path("c.py").write_text("from longattn.config import Config\nconfig = Config()\n")
    names = list(options(owner))
    assert len(names) == len(set(names)) > 2
    for name in names[:: max(1, len(names) // most)]:
        given = [*command.split(), name, random.Random(f"{command} {name} {most}").choice(NONSENSE)]
        there = set(Path().iterdir())
        code = cli.main(given)
        out, err = capsys.readouterr()
        assert code in (0, 2), (given, err)
        if code == 2:
            assert out == "", given
            assert err.startswith("longattn: ") and err.count("\n") == 1, (given, err)
            assert len(err) < 1300, given
            assert set(Path().iterdir()) == there, given


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_an_option_is_a_traceback(monkeypatch, capsys, tmp_path: Path, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    tried(monkeypatch, capsys, command, 12)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_values_of_an_option_are_a_traceback(monkeypatch, capsys, tmp_path: Path, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    tried(monkeypatch, capsys, command, 1000)
