"""The command line: `longattn train|eval|bench|compare|study|plan|profile|bringup`. The one place that knows tyro.

Results go to stdout, progress and errors to stderr. Exit codes: 0 finished, 1 a kernel is wrong (bringup, and train
before step 0), 2 the caller's mistake (one line, with the remedy), 75 another process was lost, or never came (the
same command goes on), 130 interrupted, 143 stopped by SIGTERM after saving. `train` and `eval` run on several
processes where the environment says so: launch.py. What is heavy is imported by the command that needs it.
LONGATTN_TRACEBACK=1 shows where a refusal came from.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longattn import launch
from longattn.config import Config, Mesh, from_json

USAGE = """usage: longattn COMMAND ...

  train CONFIG [--model.D 128 ...]   train as a config file says, or go on with the run where it stopped (--json)
  eval RUN [--T 2048 ...]            loss, bits per byte and loss by position of a trained run
  bench attention [...]              time the back ends of attention against each other
  compare CASE [--with a,b ...]      kernels, of linear attention too, under one profiler trace: by op, scope, roofline
  study [--preset quick ...]         measure cost and recall side by side; writes a page
  plan MODEL --topology v5e:16x16    does it fit, and what bounds its step: compiled for machines that are not there
  profile --static tpu CASE [...]    cycles of a kernel on TPUs that are not there, by their compiler's schedule
  profile --static gpu CASE [...]    registers, spills, instructions of a kernel on GPUs that are not there
  profile --sequence [STRATEGY]      load, bytes and time lines of attention spread along the sequence, by formula
  profile --trace RUN                device time of a run's steps by op and by scope, from the trace it recorded
  bringup [...]                      try every kernel on this machine's chip; writes a report to send back
  COMMAND --help                     the options of a command

CONFIG is a Python file that defines `config = longattn.config.Config(...)`, such as configs/bytelm_small.py.
RUN is the folder that `train` wrote, such as runs/bytelm_small.

train and eval run on several processes, each started with the same command and with LONGATTN_COORDINATOR=host:port of
process 0, LONGATTN_PROCESSES and LONGATTN_PROCESS (from 0) in its environment; by srun, in a JobSet and on a Cloud TPU
they find these out: configs/launch. A CPU passes for N devices with JAX_NUM_CPU_DEVICES=N.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
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
        print(f"longattn: {name} was interrupted; what was saved stays", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it exits
        return 0
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if os.environ.get("LONGATTN_TRACEBACK"):
            raise
        return _fail(str(error))


def _on_every_process(command: list[str], goes_on: Callable[[], str], work: Callable[[], int]) -> int:
    """Do a command's work: here, or where the environment speaks of several processes in one that JAX may abort.

    goes_on: what happens when the same command is started again, for the line about a process that was lost.
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
    print(f"longattn: {' '.join(message.split())}", file=sys.stderr)
    return code


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- the commands


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            _parse(Config, ["--help"], "train CONFIG", default=Config())
        return _fail("train needs a config file first, such as: longattn train configs/bytelm_small.py")
    path, *overrides = arguments
    as_json = "--json" in overrides
    overrides = [a for a in overrides if a != "--json"]
    # The shorter name that the documentation uses.
    overrides = [
        "--run.init_from" + a[len("--init-from") :] if a.split("=")[0] == "--init-from" else a for a in overrides
    ]
    config = _parse(Config, overrides, f"train {path}", default=load_config(path))

    def goes_on() -> str:
        from longattn.train import checkpoint

        return checkpoint.goes_on(Path(config.run.dir, config.run.name, "checkpoints"))

    return _on_every_process(["train", *arguments], goes_on, lambda: _train_here(config, as_json))


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
            print(
                f"longattn: stopped by SIGTERM after saving step {summary.steps} of {summary.run_dir}", file=sys.stderr
            )
        return launch.STOPPED
    if not distributed.first():
        return 0
    if as_json:
        print(json.dumps({"version": 1, "kind": "train", **vars(summary), "run_dir": str(summary.run_dir)}))
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
    T: int | None = None  # another length than the run was trained with
    B: int | None = None  # another batch size
    glob: str | None = None  # other files (ByteLM, Needle)
    overlap: int | None = None  # bytes of context that a piece of a long file reads again, without loss (ByteLM)
    batches: int = 0  # how many batches; 0: the whole held-out set
    newest: bool = False  # the newest checkpoint instead of the best
    mesh: Mesh = Mesh()  # all devices, of all processes; all 1: one device
    json: bool = False  # print one JSON document


def _eval(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    options = _parse(EvalOptions, arguments, "eval")
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
        print(json.dumps(result))
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


def _bench(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        arguments = ["attention", *arguments]
    if not arguments or arguments[0] != "attention":
        given = f"{arguments[0]!r}" if arguments else "nothing"
        return _fail(f"bench needs what to measure, given {given}; it knows: attention")
    from longattn.bench import attention

    options = _parse(attention.AttentionOptions, arguments[1:], "bench attention")
    attention.attention(options)
    return 0


def _compare(arguments: list[str]) -> int:
    from longattn.bench import compare

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--case", *arguments]
    elif not {"-h", "--help"} & set(arguments):
        return _fail(f"compare needs a case; the cases are {', '.join(compare.CASES)}")
    # "with" is a word of Python's, so no name of a field; and names may have commas between them.
    words = [word for a in arguments for word in (a.split("=", 1) if a.startswith("--with=") else [a])]
    if "--with" in words:
        at = words.index("--with") + 1
        end = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
        names = " ".join(words[at:end]).replace(",", " ").split()
        if not names:
            return _fail(f"--with must name at least one contestant; they are {', '.join(compare.known(arguments[1]))}")
        words = [*words[: at - 1], "--contestants", *names, *words[end:]]
    compare.run(_parse(compare.CompareOptions, words, "compare CASE"))
    return 0


def _study(arguments: list[str]) -> int:
    from longattn import study

    options = _parse(study.StudyOptions, arguments, "study")
    _compilation_cache()
    study.run(options)
    return 0


def _plan(arguments: list[str]) -> int:
    from longattn import plan

    known = ", ".join(plan.MODELS)
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            _parse(plan.PlanOptions, ["--help"], "plan MODEL", default=plan.PlanOptions())
        return _fail(f"plan needs a model first: {known}, or a config file")
    name, *rest = arguments
    if name in plan.MODELS:
        default, mesh = plan.PlanOptions(model=plan.MODELS[name]), None
    elif name.endswith((".py", ".json")):
        c = load_config(name)
        default, mesh = plan.PlanOptions(model=c.model, data=c.data, optimiser=c.optimiser), c.mesh
        name = Path(name).stem
    else:
        return _fail(f"unknown model {name!r}{_suggest(name, plan.MODELS)}; there are {known}, and config files")
    # Shorter names of what is changed most, and flags that take no value.
    for short, long in (("T", "data.T"), ("B", "data.B"), ("remat", "model.remat"), ("dtype", "model.dtype")):
        rest = [f"--{long}{a[len(short) + 2 :]}" if a.split("=")[0] == f"--{short}" else a for a in rest]
    flags = {"--json": "--json=True", "--analytic": "--analytic=True", "--no-cache": "--cache=False"}
    rest = [flags.get(a, a) for a in rest]
    options = _parse(plan.PlanOptions, rest, f"plan {name}", default=default)
    plan.run(options if mesh is None else plan.with_mesh(options, mesh), name)
    return 0


def _profile(arguments: list[str]) -> int:
    if any(a.split("=")[0] == "--trace" for a in arguments):
        from longattn.bench import run_profile

        run_profile.run(_parse(run_profile.TraceOptions, arguments, "profile --trace RUN"))
        return 0
    if arguments and arguments[0].split("=")[0] == "--sequence":
        from longattn.plan import sequence

        named = len(arguments) > 1 and not arguments[1].startswith("-")
        words = arguments if named or "=" in arguments[0] else ["--sequence", "all", *arguments[1:]]
        sequence.run(_parse(sequence.SequenceOptions, words, "profile --sequence [STRATEGY]"))
        return 0
    if arguments[:2] == ["--static", "gpu"]:
        from longattn.aot.kernels import gpu_command
        from longattn.aot.kernels.cases import gpu

        return _static("gpu", arguments, gpu_command.ProfileOptions, gpu_command.run, gpu.CASES)
    from longattn.aot import kernels
    from longattn.aot.kernels import cases

    return _static("tpu", arguments, kernels.ProfileOptions, kernels.run, cases.CASES)


def _bringup(arguments: list[str]) -> int:
    from longattn.bench import bringup

    options = _parse(bringup.BringupOptions, arguments, "bringup")
    _compilation_cache()
    return 1 if bringup.run(options)["verdict"] == "failed" else 0


def _static(kind: str, arguments: list[str], options: Any, run: Callable[[Any], Any], cases: Any) -> int:
    if arguments[:1] == ["--static"] and len(arguments) > 2 and not arguments[2].startswith("-"):
        arguments = [*arguments[:2], "--cases", *arguments[2:]]
    elif not {"-h", "--help", "--cases"} & set(arguments):
        names = ", ".join(cases)
        return _fail(
            f"profile needs --static tpu or gpu and a case, --sequence, or --trace and a run; for {kind} the cases are "
            f"{names}"
        )
    run(_parse(options, arguments, f"profile --static {kind}"))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "bench": _bench,
    "compare": _compare,
    "study": _study,
    "plan": _plan,
    "profile": _profile,
    "bringup": _bringup,
}


# ---- how arguments become values


def _parse(kind: Any, arguments: list[str], command: str, default: Any = None) -> Any:
    """A dataclass from command-line arguments; a mistake exits with 2 and says which name was meant."""
    import tyro

    from longattn import mask, parallel
    from longattn.config.mesh import StrategyName

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def mask_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if not (isinstance(info.type, type) and issubclass(info.type, mask.Mask)):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="MASK",
            instance_from_str=lambda words: mask.parse(words[0]),
            is_instance=lambda value: isinstance(value, mask.Mask),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def strategy_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type is not StrategyName:
            return None
        names = tuple(parallel.STRATEGIES)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(names)}}}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
            choices=names,
        )

    settings = {} if default is None else {"default": default}
    flags = tyro.conf.FlagCreatePairsOff if default is None else tyro.conf.FlagConversionOff
    said = io.StringIO()
    try:
        with registry, contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=arguments,
                prog=f"longattn {command}",
                config=(tyro.conf.AvoidSubcommands, flags),
                use_underscores=True,
                **settings,
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from error


def _one_line(box: str) -> str:
    """What tyro says in a box: its first paragraph and the first name that it proposes."""
    rows = [row.strip("│ ") for row in box.splitlines()]
    rows = [row for row in rows if row and row[0] not in "╭╰"]
    rule = next((i for i, row in enumerate(rows) if row.startswith("─")), len(rows))
    proposed = next((rows[i + 1] for i, row in enumerate(rows[:-1]) if row.startswith("Perhaps you meant")), None)
    return " ".join(rows[:rule]) + (
        f"; did you mean {proposed.split()[0]}?" if proposed else "; --help lists the options"
    )


def load_config(path: str) -> Config:
    """The `config` of a Python file, or the one that a run's config.json holds. Raises ValueError for anything else."""
    import runpy

    if not Path(path).is_file():
        folder = Path(path).parent
        close = _suggest(Path(path).name, [p.name for p in folder.glob("*.py")]) if folder.is_dir() else ""
        raise ValueError(f"config {path} does not exist{close}")
    if path.endswith(".json"):
        return from_json(Path(path).read_text())
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config = Config(...)`, it defines config={config!r}")
    return config


def _compilation_cache(*, scopes: bool = False) -> None:
    """Keep compiled programs between processes: in JAX_COMPILATION_CACHE_DIR, else in the user's cache folder.

    With `scopes` a program is found only if its named scopes are the same too: a trace tells them.
    """
    import jax

    from longattn import cache

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder("jax")))
    if scopes:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed. XLA's CPU programs take their scratch from malloc anew at every call; where it is
    given back to the system each time, page faults cost a training step of a small model 3 to 5% of its time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's alone has these parameters
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    sys.exit(main())
