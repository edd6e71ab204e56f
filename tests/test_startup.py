"""Before a command begins, Ctrl-C, closed or lost streams and JAX's variables are met without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longattn import cli


def test_an_interrupt_while_jax_is_imported_is_one_line() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "longattn", "train", "c.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # of every module, once it is imported
            if line.endswith(" jax.version\n"):
                break
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, rest) == (130, ["longattn: train was interrupted before it began\n"])


def test_a_library_s_lines_never_end_up_in_a_file_where_stderr_is_closed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from longattn import terminal; terminal.open_closed_streams(); file = open(sys.argv[1], 'w'); "
        "os.write(2, b'of a library'); terminal.say('a line'); print(file.fileno() > 2)"
    )
    run = f'"{sys.executable}" -c "{code}" "{tmp_path}/data" 2>&-'
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert (tmp_path / "data").read_text() == ""


def test_a_process_outlives_the_reader_of_its_progress() -> None:
    code = (
        "import os, sys; from longattn import terminal; terminal.outlive_stderr(); "
        "[terminal.say('x' * 1000) for _ in range(100)]; os.write(2, b'of a library'); print('alive')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_a_variable_that_jax_cannot_read_is_one_line() -> None:
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "many"}
    done = subprocess.run([sys.executable, "-m", "longattn", "study"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "jax_num_cpu_devices: correct that environment variable, or unset it" in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'nonsense'"), AssertionError()])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, capsys, error: Exception) -> None:
    """JAX raises the one for a name that it does not know, the other for a plugin that is not installed."""
    import jax

    def missing(*_: object) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "study", missing)
    with pytest.raises(type(error)):
        cli.main(["study"])  # the devices are there: an error of this program keeps its traceback
    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    assert cli.main(["study"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("longattn: JAX finds no device (") and said.count("\n") == 1
    assert "JAX_PLATFORMS=nonsense" in said


def test_a_package_that_is_missing_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(cli.COMMANDS, "study", lambda _: __import__("matplotlib"))
    assert cli.main(["study"]) == 2
    assert "study needs matplotlib, which is not installed: pip install" in capsys.readouterr().err
