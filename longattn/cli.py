"""The command line: `longattn train|eval|compare|study|plan|profile|bringup`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 finished, 1 a kernel is wrong (bringup, and train
before step 0), 2 the caller's mistake (one line, with the remedy), 75 another process was lost, or never came (the
same command resumes), 130 interrupted, 143 stopped by SIGTERM after saving. `train` and `eval` run on several processes
if the environment says so: launch.py. Each command imports what it needs, so that the help is quick.
LONGATTN_TRACEBACK=1 shows where an error came from.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from longattn import launch, terminal
from longattn.config import Config, Mesh, from_json
from longattn.config.checks import not_negative, positive, typed, usable_path
from longattn.files import json_text, read_text

PROFILE = """\
  profile kernel CASE... [...]       cycles of a kernel on TPUs you don't have, by their compiler's schedule
                                     --target gpu: registers, spills and instructions on GPUs
  profile sequence [STRATEGY]        load, traffic and time of attention sharded along the sequence, by formula
  profile run RUN                    device time of a run's steps by op and scope, from the trace it recorded
"""
USAGE = f"""usage: longattn COMMAND ...

  train CONFIG [--model.D 128 ...]   train as a config file says, or resume the run where it stopped
  eval RUN [--T 2048 ...]            loss, bits per byte and loss by position of a trained run
  compare attention [...]            wall-clock time of attention and its rivals, over several lengths
  compare CASE [--with a,b ...]      attention kernels under one profiler trace: time by op and scope, roofline
  study [--preset quick ...]         measure cost and recall side by side; writes a page
  plan MODEL --topology v5e:16x16    does it fit, and what bounds its step? compiled for hardware you don't have
{PROFILE}  bringup [...]                      check and time every kernel on this machine's chip; writes a report
  COMMAND --help                     the options of a command

CONFIG is a Python file that defines `config = longattn.config.Config(...)`, such as configs/bytelm_small.py.
RUN is the folder that `train` wrote, such as runs/bytelm_small.

To run train or eval on several processes, start the same command on each with three environment variables:
LONGATTN_COORDINATOR=host:port of process 0, LONGATTN_PROCESSES, and LONGATTN_PROCESS, which counts from 0.
srun, a JobSet and a Cloud TPU need none of them: see configs/launch. JAX_NUM_CPU_DEVICES=N splits a CPU into N devices.
"""
_HELP = ("-h", "--help")
_LONGEST = 1200  # characters of an error's line


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    terminal.write_in_any_encoding()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in (*_HELP, "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if now := renamed(arguments):
        return _fail(f"this command has a new name: longattn {now}")
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}{_suggest(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
    if not launch.supervised():
        return _run(name, rest)
    launch.die_with_the_supervisor()
    from longattn.train import distributed

    try:
        code = _run(name, rest)
    except Exception:
        traceback.print_exc()
        code = 1
    return distributed.leave(code)


def _run(name: str, rest: list[str]) -> int:
    try:
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        return launch.interrupted(name)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # a test's stream has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the pipe as it exits
        return 0
    except Exception as error:
        reason = _reason(name, error)
        if reason is None or os.environ.get("LONGATTN_TRACEBACK"):
            raise
        return _fail(reason)


def _reason(name: str, error: Exception) -> str | None:
    """Returns the caller's mistake that an error reports; None for one of this program's, which needs its traceback."""
    if isinstance(error, ValueError | NotImplementedError | OSError | FloatingPointError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("longattn"):
        return f'{name} needs {error.name}, which is not installed: pip install "longattn[study]"'
    if isinstance(error, RuntimeError | AssertionError):
        return _no_device()
    return None


def _no_device() -> str | None:
    """Returns why JAX finds no device by the environment's variables; None if it finds one."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        reason = str(error) or "it knows no such platform"
        return (
            f"JAX finds no device ({given or 'no variable chooses one'}): {reason}; correct the variable, or unset it"
        )
    return None


def _on_every_process(command: list[str], goes_on: Callable[[], str], work: Callable[[], int]) -> int:
    """Runs `work` here; with several processes, in a child process, which JAX may abort.

    goes_on: returns what happens when the same command is started again, for the error line about a lost process.
    """
    found = launch.detect(os.environ)
    if found is None:
        return work()
    if not launch.supervised():
        return launch.supervise(command, found, goes_on)
    from longattn.train import distributed

    distributed.initialize(found)
    try:
        return work()
    except distributed.Lost as error:
        return _fail(str(error), launch.LOST)


def _fail(message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    if len(line) > _LONGEST:  # it quotes what was given
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 4 :]}"
    terminal.say(f"longattn: {line}")
    return code


def renamed(arguments: list[str]) -> str:
    """Returns today's spelling of a command that has been renamed, "" for any other."""
    match [arguments[0], *(word for a in arguments[1:] for word in a.split("=", 1 if a.startswith("--") else 0))]:
        case ["bench", *rest]:
            words = ["compare", "attention", *rest[1:]]
        case ["profile", "--static", target, *cases]:
            words = ["profile", "kernel", *cases, "--target", target]
        case ["profile", "--sequence" | "--trace" as option, *rest]:
            words = ["profile", "run" if option == "--trace" else "sequence", *rest]
        case _:
            return ""
    return shlex.join(words)


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- the commands


@dataclass(frozen=True)
class TrainOptions:
    """Train as a config file says, or resume the run where it stopped. The options change the file's values."""

    path: str  # a Python file that defines `config = Config(...)`, or a run's config.json
    json: bool = False  # print one JSON document
    config: Config = field(default_factory=Config)


def _train(arguments: list[str]) -> int:
    options = train_options(arguments)
    run = options.config.run

    def goes_on() -> str:
        from longattn.train import checkpoint

        return checkpoint.goes_on(Path(run.dir, run.name, "checkpoints"))

    return _on_every_process(["train", *arguments], goes_on, lambda: _train_here(options.config, options.json))


def train_options(arguments: list[str]) -> TrainOptions:
    """Parses the arguments of `train`. The config file that the first one names gives the defaults of the others."""
    from longattn.arguments import MISSING

    path = _first(arguments, "train needs a config file first, such as: longattn train configs/bytelm_small.py")
    config = load_config(path) if path else Config()
    return _parse(TrainOptions, arguments, "train", default=TrainOptions(MISSING, config=config))


def _train_here(config: Config, as_json: bool) -> int:
    _compilation_cache(scopes=config.run.profile is not None)
    _keep_freed_memory()
    from longattn.train import distributed
    from longattn.train.kernel_check import Disagreement
    from longattn.train.run import train

    try:
        summary = train(config)
    except Disagreement as error:
        return _fail(str(error), 1)
    if summary.status == "stopped":
        if distributed.first():
            terminal.say(f"longattn: stopped by SIGTERM after saving step {summary.steps} of {summary.run_dir}")
        return launch.STOPPED
    if not distributed.first():
        return 0
    if as_json:
        print(json_text({"version": 1, "kind": "train", **vars(summary), "run_dir": str(summary.run_dir)}))
        return 0
    print(f"{summary.run_dir}: {summary.status}, {summary.steps} steps")
    if summary.nll is not None:
        unit = "bits per byte" if type(config.data).__name__ == "ByteLM" else "bits per answer token"
        print(f"held-out loss {summary.nll:.4f} nats, {summary.bits:.4f} {unit}, accuracy {summary.accuracy:.2%}")
    return 0


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate the best checkpoint of a run on its held-out data."""

    run: str  # the folder that `longattn train` wrote
    T: int | None = None  # another length than in training
    B: int | None = None  # another batch size
    glob: str | None = None  # other files (ByteLM, Needle)
    overlap: int | None = None  # bytes of context, without loss, with which each piece of a long file begins (ByteLM)
    batches: int = 0  # number of batches; 0: the whole held-out set
    newest: bool = False  # evaluate the newest checkpoint instead of the best
    json: bool = False  # print one JSON document
    mesh: Mesh = Mesh()  # sizes of the mesh over all devices of all processes; all 1: one device

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "T", "B", "overlap")
        not_negative(self, "batches")
        usable_path(self, "run")


def _eval(arguments: list[str]) -> int:
    options = _parse(EvalOptions, arguments, "eval", "eval needs a run first, such as: longattn eval runs/bytelm_small")
    again = "start again with the same command"
    return _on_every_process(["eval", *arguments], lambda: again, lambda: _eval_here(options))


def _eval_here(options: EvalOptions) -> int:
    _compilation_cache()
    from longattn.train import distributed
    from longattn.train.evaluate import evaluate

    result = evaluate(
        options.run,
        T=options.T,
        B=options.B,
        glob=options.glob,
        overlap=options.overlap,
        batches=options.batches,
        newest=options.newest,
        mesh=options.mesh,
    )
    if not distributed.first():
        return 0
    if options.json:
        print(json_text(result))
        return 0
    print(f"{options.run}  step {result['step']}  T {result['T']}  {result['tokens']:,.0f} predictions")
    print(f"loss            {result['nll']:.4f} nats   accuracy {result['accuracy']:.2%}")
    if "bits_per_byte" in result:
        print(f"bits per byte   {result['bits_per_byte']:.4f}")
    if "xz" in result:
        each, together = result["xz"]["per_file"], result["xz"]["concatenated"]
        print(f"xz -9           {each:.4f} each file by itself   {together:.4f} concatenated")
    print("loss by number of tokens read")
    for group in result["by_position"]:
        print(f"  {group['from']:>7} - {group['to']:<7} {group['nll']:.4f}   ({group['weight']:,.0f})")
    return 0


def _compare(arguments: list[str]) -> int:
    if arguments[:1] == ["attention"]:
        from longattn.bench import attention

        attention.attention(_parse(attention.AttentionOptions, arguments[1:], "compare attention"))
        return 0
    from longattn.bench import compare

    needs = f"compare needs a case; the cases are {', '.join(compare.CASES)}, and attention"
    compare.run(_parse(compare.CompareOptions, arguments, "compare", needs))
    return 0


def _study(arguments: list[str]) -> int:
    from longattn import study

    options = _parse(study.StudyOptions, arguments, "study")
    _compilation_cache()
    study.run(options)
    return 0


def _plan(arguments: list[str]) -> int:
    from longattn import plan
    from longattn.arguments import MISSING, positional

    known = ", ".join(plan.MODELS)
    name = _first(arguments, f"plan needs a model first: {known}, or a config file")
    default, mesh = plan.PlanOptions(), None
    if name in plan.MODELS:
        default = plan.PlanOptions(model=plan.MODELS[name])
    elif name.endswith((".py", ".json")):
        c = load_config(name)
        default, mesh = plan.PlanOptions(model=c.model, data=c.data, optimiser=c.optimiser), c.mesh
    elif name:
        return _fail(f"unknown model {name!r}{_suggest(name, plan.MODELS)}; there are {known}, and config files")
    named = dataclasses.make_dataclass(
        "PlanArguments",
        [
            ("name", Annotated[str, *positional("MODEL", help=f"{known}, or a config file")]),
            ("options", plan.PlanOptions),
        ],
        namespace={"__doc__": plan.PlanOptions.__doc__},
    )
    options = _parse(named, arguments, "plan", default=named(MISSING, default)).options
    plan.run(options if mesh is None else plan.with_mesh(options, mesh), Path(name).stem if mesh else name)
    return 0


def _profile(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name in _HELP:
        print(f"usage: longattn profile kernel|sequence|run ...\n\n{PROFILE}", end="")
        return 0
    if name not in PROFILES:
        given = f"{name!r}{_suggest(name, PROFILES)}" if name else "nothing"
        return _fail(f"profile needs what to profile, given {given}; it knows {', '.join(PROFILES)}")
    return PROFILES[name](rest)


@dataclass(frozen=True)
class _Target:
    """The one option of `profile kernel` that says which others there are."""

    target: Literal["tpu", "gpu"] = "tpu"


def _profile_kernel(arguments: list[str]) -> int:
    chosen, _ = _parse(_Target, arguments, "profile kernel", add_help=False, return_unknown_args=True)
    if chosen.target == "gpu":
        from longattn.aot.kernels import gpu_command as command
    else:
        from longattn.aot.kernels import command  # type: ignore[no-redef]
    command.run(_parse(command.ProfileOptions, arguments, "profile kernel"))
    return 0


def _profile_sequence(arguments: list[str]) -> int:
    from longattn.plan import sequence

    sequence.run(_parse(sequence.SequenceOptions, arguments, "profile sequence"))
    return 0


def _profile_run(arguments: list[str]) -> int:
    from longattn.bench import run_profile

    needs = "profile run needs a run, such as: longattn profile run runs/bytelm_small"
    run_profile.run(_parse(run_profile.RunProfileOptions, arguments, "profile run", needs))
    return 0


def _bringup(arguments: list[str]) -> int:
    from longattn.bench import bringup

    options = _parse(bringup.BringupOptions, arguments, "bringup")
    _compilation_cache()
    return 1 if bringup.run(options)["verdict"] == "failed" else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "study": _study,
    "plan": _plan,
    "profile": _profile,
    "bringup": _bringup,
}
PROFILES: dict[str, Callable[[list[str]], int]] = {
    "kernel": _profile_kernel,
    "sequence": _profile_sequence,
    "run": _profile_run,
}


# ---- what the arguments name


def _parse(kind: Any, arguments: list[str], command: str, needs: str = "", **options: Any) -> Any:
    from longattn.arguments import parse  # here: the help needs no tyro

    return parse(kind, arguments, command, needs, **options)


def _first(arguments: list[str], needs: str) -> str:
    """Returns the first argument, which names where the defaults come from; "" if help is asked for instead."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    if not set(_HELP) & set(arguments):
        raise ValueError(needs)
    return ""


def load_config(path: str) -> Config:
    """Returns the `config` of a Python file or of a run's config.json. Raises ValueError for anything else."""
    import runpy

    if not Path(path).is_file():
        folder = Path(path).parent
        close = _suggest(Path(path).name, [p.name for p in folder.glob("*.py")]) if folder.is_dir() else ""
        raise ValueError(f"config {path} does not exist{close}")
    if path.endswith(".json"):
        return from_json(read_text(Path(path), "give another"))
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config = Config(...)`, it defines config={config!r}")
    return config


# ---- this process


def _compilation_cache(*, scopes: bool = False) -> None:
    """Keeps compiled programs on disk: in JAX_COMPILATION_CACHE_DIR, else in the user's cache folder.

    With `scopes` a kept program is used only if its named scopes are the same, since a trace shows them.
    """
    import jax

    from longattn import cache

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder("jax")))
    if scopes:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def _keep_freed_memory() -> None:
    """Lets glibc keep freed memory instead of returning it to the system.

    XLA's CPU programs allocate their scratch memory at every call. Page faults of memory that was returned in between
    cost 3 to 5% of a small model's training step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    sys.exit(main())
