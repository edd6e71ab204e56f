"""The command line: exit codes, one-line errors with a remedy, typed overrides, nothing heavy for the help."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from longattn import cli
from longattn.arguments import _spelling
from longattn.config import Data, Mesh, Model, RoPE, Run
from longattn.mask import Causal, Window

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line that a refused command prints."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("longattn: ")
    return err


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from longattn import cli; code = cli.main(['--help']); "
        "heavy = {'flax', 'optax', 'orbax', 'grain', 'tyro', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command in done.stdout


def test_unknown_command_suggests(capsys) -> None:
    assert "did you mean 'train'" in fails(capsys, "trian")
    assert "did you mean 'kernel'" in fails(capsys, "profile", "kernels")
    assert "config file" in fails(capsys, "train")
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        ("bench", "compare attention"),
        ("bench conv", "compare attention"),
        ("bench attention --T 64", "compare attention --T 64"),
        ("profile --static tpu jax_flash --chips v6e", "profile kernel jax_flash --chips v6e --target tpu"),
        ("profile --static=gpu matmul", "profile kernel matmul --target gpu"),
        ("profile --sequence", "profile sequence"),
        ("profile --sequence ring --T 64", "profile sequence ring --T 64"),
        ("profile --trace runs/x --json", "profile run runs/x --json"),
    ],
)
def test_commands_that_have_a_new_name_say_it(capsys, arguments: str, now: str) -> None:
    assert fails(capsys, *arguments.split()) == f"longattn: this command has a new name: longattn {now}\n"


@pytest.mark.parametrize(
    ("command", "position", "option"),
    [
        ("train", "CONFIG", "--init_from"),
        ("eval", "RUN", "--overlap"),
        ("compare", "CASE", "--with A,B"),
        ("compare attention", "", "--against"),
        ("study", "", "--preset"),
        ("plan", "MODEL", "--no_cache"),
        ("profile kernel", "CASE...", "--chips"),
        ("profile kernel --target gpu", "CASE...", "--archs"),
        ("profile sequence", "[STRATEGY]", "--layout"),
        ("profile run", "RUN", "--depth"),
        ("bringup", "", "--seconds"),
    ],
)
def test_help_shows_what_is_given_by_its_position(capsys, command: str, position: str, option: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert ("positional arguments" in said) == bool(position)
    assert position in said
    assert option in said
    assert said.split("\n")[2][:1].isupper()  # what the command does


def test_every_spelling_is_of_a_field_that_there_is() -> None:
    from longattn import plan
    from longattn.aot.kernels import command, gpu_command
    from longattn.bench import compare, run_profile
    from longattn.plan import sequence

    classes = [
        cli.TrainOptions, cli.EvalOptions, compare.CompareOptions, plan.PlanOptions, command.ProfileOptions,
        gpu_command.ProfileOptions, sequence.SequenceOptions, run_profile.RunProfileOptions, Model, Run,
        *get_args(Data),
    ]  # fmt: skip
    fields = {(c.__name__, f.name) for c in classes for f in dataclasses.fields(c)}
    assert set(_spelling()) - fields == {("PlanArguments", "options")}


def test_help_of_a_group(capsys) -> None:
    assert cli.main(["profile", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"profile {name}" in said for name in cli.PROFILES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--help", "usage: longattn"),
        ("train --help", "CONFIG"),
        ("plan --help", "--no_cache"),
        ("compare --help", "CASE"),
        ("profile kernel --help", "CASE..."),
        ("profile sequence --topology v5e:2x2 --T 8192", "Recommended: "),
        ("profile sequence ring --topology v5e:2x2 --T 8192", "whose queries"),
        ("plan llama3_1b --topology h100:8 --T 8192 --B 8 --analytic", "#"),
        ("train na\u00efve.py", "longattn: config na"),
        ("train \u8def.py", "longattn: config \\u8def.py does not exist"),
        ("train \udcff.py", "longattn: config"),
    ],
)
def test_commands_print_in_any_encoding(monkeypatch, arguments: str, said: str, encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments.split()) in (0, 2)
    stream.flush()
    assert said in written.getvalue().decode(encoding, "replace")


def test_an_ascii_terminal_shows_a_name_that_is_not_ascii() -> None:
    run = [sys.executable, "-m", "longattn", "train", "na\u00efve \u2265 \u2588.py"]
    done = subprocess.run(run, capture_output=True, env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.decode("ascii") == "longattn: config na\\xefve >= #.py does not exist\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's parameters are glibc's")
def test_training_keeps_the_memory_that_it_frees() -> None:
    code = (
        "import ctypes, resource; from longattn import cli; cli._keep_freed_memory(); libc = ctypes.CDLL(None); "
        "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = libc.memset.argtypes = [ctypes.c_void_p]; "
        "faults = []"
        "\nfor _ in range(3):\n p = libc.malloc(2**28); libc.memset(p, 1, 2**28); libc.free(p); "
        "faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
        "\nprint(faults[2] - faults[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # of 65,536 pages


def test_typed_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("from longattn.config import Config\nconfig = Config()\n")
    options = cli.train_options([
        str(path), "--json", "--T", "96",
        "--model.D", "128", "--model.mlp_chunk", "64", "--run.profile", "3", "4", "--model.tie", "False",
        "--model.mixers.0.mask", "Causal() & Window(512)", "--model.mixers.0.rope.base", "500", "--init-from", "x",
        "--mesh.data", "2", "--mesh.seq", "4", "--mesh.layout", "zigzag",
    ])  # fmt: skip
    config = options.config
    assert options.json
    assert (config.run.init_from, config.data.T) == ("x", 96)
    assert (config.model.D, config.model.mlp_chunk, config.model.tie) == (128, 64, False)
    assert config.run.profile == (3, 4)
    assert config.mesh == Mesh(data=2, seq=4, layout="zigzag")
    assert config.model.mixers[0].mask == Causal() & Window(512)
    assert config.model.mixers[0].rope == RoPE(base=500.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.DD", "3"], "did you mean --model.D?"),
        (["--model.D", "wide"], "--model.D"),
        (["--model.K", "3"], "Model.K=3 must divide Model.H=4"),
        (["--model.mixers.0.mask", "Causl()"], "did you mean 'Causal'?"),
        (["--data.T", "-1"], "ByteLM.T=-1 must be at least 1"),
    ],
)
def test_mistaken_overrides_are_one_line(capsys, tmp_path: Path, arguments: list[str], message: str) -> None:
    path = tmp_path / "c.py"
    path.write_text("from longattn.config import Config\nconfig = Config()\n")
    assert message in fails(capsys, "train", str(path), *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must define `config = Config(...)`"),
        ("import nothing_here", "c.py:1: ModuleNotFoundError"),
        ("\nx = 1 / 0", "c.py:2: ZeroDivisionError"),
        ("config = (", "c.py: SyntaxError"),
        ("from longattn.config import Model\nModel(D=3)", "Model.D=3 must be even"),
    ],
)
def test_bad_config_files_are_one_line(capsys, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.py"
    path.write_text(text)
    assert message in fails(capsys, "train", str(path))
    assert "did you mean 'c.py'" in fails(capsys, "train", str(tmp_path / "d.py"))


def test_config_of_another_version_is_one_line(capsys, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"version": 0, "config": {}}))
    assert "written by another version" in fails(capsys, "train", str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "for tpu the cases are matmul, longattn"),
        (["jax_flsh"], "unknown case 'jax_flsh'; the cases are matmul"),
        (["--target", "gpu"], "for gpu the cases are matmul, jax_mgpu"),
        (["matmul", "--target", "cpu"], "invalid choice 'cpu' for argument '--target'"),
        (["jax_flash", "--target", "gpu"], "unknown case 'jax_flash'; the cases are matmul, jax_mgpu"),
        (["matmul", "--target=gpu", "--archs", "sm_70"], "--archs"),
        (["--target", "gpu", "matmul", "--chips", "v6e"], "Unrecognized options: --chips"),
        (["matmul", "--chips", "v4"], "--chips"),
        (["matmul", "--bT", "1000"], "bT=1000 must divide T=8192"),
    ],
)
def test_mistaken_profiles_are_one_line(capsys, arguments: list[str], message: str) -> None:
    assert message in fails(capsys, "profile", "kernel", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare needs a case; the cases are attention_forward, attention_forward_backward, linear_forward,"),
        (["--json"], "compare needs a case"),
        (["--with", "xla"], "unknown case 'xla'"),
        (["attention_forwards"], "unknown case 'attention_forwards'"),
        (["attention_forward", "--with", "xla,jax_n"], "unknown contestant 'jax_n'"),
        (["attention_forward", "--with"], "--with must name at least one contestant"),
        (["attention_forward", "--with", "--json"], "--with must name at least one contestant"),
        (["attention_forward", "--with=xla,xla"], "must name each contestant once"),
        (["linear_forward", "--with"], "they are pallas_tpu, xla, reference, attention"),
        (["linear_forward", "--kind", "scalr"], "unknown kind 'scalr'; did you mean 'scalar'"),
        (["linear_forward", "--mask", "Full()"], "linear attention has no other"),
        (["attention_forward", "--T", "-3"], "T=-3 must be at least 1"),
        (["attention_forward", "--mask", "Causl()"], "did you mean 'Causal'?"),
    ],
)
def test_mistaken_comparisons_are_one_line(capsys, arguments: list[str], message: str) -> None:
    assert message in fails(capsys, "compare", *arguments)


def test_compare_takes_names_with_commas_or_spaces(monkeypatch) -> None:
    from longattn.bench import compare

    given = []
    monkeypatch.setattr(compare, "run", given.append)
    for names in (
        ["--with", "xla,jax_nn"],
        ["--with", "xla", "jax_nn"],
        ["--with=xla,jax_nn"],
        ["--with", "xla, jax_nn"],
    ):
        assert cli.main(["compare", "attention_forward", *names, "--T", "64"]) == 0
    assert {options.contestants for options in given} == {("xla", "jax_nn")}
    assert {options.T for options in given} == {64}


def test_a_traced_run_takes_no_program_with_other_scopes(monkeypatch) -> None:
    import jax

    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    cli._compilation_cache()
    assert "jax_compilation_cache_include_metadata_in_key" not in changed
    cli._compilation_cache(scopes=True)
    assert changed["jax_compilation_cache_include_metadata_in_key"] is True


def test_profile_of_a_trace_that_is_not_there_is_one_line(capsys, tmp_path: Path) -> None:
    assert "holds no trace" in fails(capsys, "profile", "run", str(tmp_path))
    assert "profile run needs a run, such as" in fails(capsys, "profile", "run")
    assert "it knows kernel, sequence, run" in fails(capsys, "profile")


def test_eval_of_no_run_is_one_line(capsys, tmp_path: Path) -> None:
    assert "is no run" in fails(capsys, "eval", str(tmp_path))
    assert "eval needs a run first" in fails(capsys, "eval", "--json")


def test_interrupt_is_one_line(capsys, monkeypatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load_and_are_documented(path: Path) -> None:
    config = cli.load_config(str(path))
    assert config.run.name == path.stem
    text = path.read_text()
    for header in ("command", "device", "time", "expected"):
        assert f"\n{header} " in text, header
