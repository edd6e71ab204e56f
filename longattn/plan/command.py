"""`longattn plan`: its options, the choice of a mesh, the search, and the document it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from longattn import terminal
from longattn.aot import compilers, train_step
from longattn.config import ByteLM, Config, Data, Mesh, Model, Optimiser, to_json
from longattn.config.checks import typed, usable_path
from longattn.cost import flops, step, topology
from longattn.cost.sequence import problem, strategies, timeline
from longattn.cost.topology import Topology
from longattn.environment import commit
from longattn.files import json_text, write_whole
from longattn.parallel.attention import STRATEGIES, strategy_on
from longattn.plan import advice, search, show

VERSION = 1
_WIDTH = 116  # width of the tables: a narrower terminal wraps them


@dataclass(frozen=True)
class PlanOptions:
    """Compiles the training step for a TPU slice or GPU cluster you don't have, and prints memory, collectives and a
    lower bound on the step time.

    Models may use any mixers. --strategies needs layers of softmax attention. --analytic knows models of softmax
    attention, and on TPUs rematerialised models of one kind of linear attention.
    --T, --B, --remat and --dtype are short for --data.T, --data.B, --model.remat and --model.dtype.
    """

    topology: str = "v5e:4x4"  # v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h100:8, h100:8x8 (hosts x GPUs), ...
    search: Literal["max-length", "max-batch", "min-devices"] | None = None  # find what just fits
    strategies: Literal["all"] | None = None  # compile every strategy; compare all strategies and layouts by formula
    html: str = ""  # also write this page
    cache: bool = True  # keep the results of each compilation in the user's cache folder
    timeout: float = 1800.0  # seconds for one compilation
    analytic: bool = False  # estimate by formula, at once, instead of compiling
    json: bool = False  # print one JSON document instead of the tables
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=ByteLM)  # only T and B matter
    mesh: Mesh = field(default_factory=Mesh)  # all 1: rows over fsdp as far as they divide, the sequence over the rest
    optimiser: Optimiser = field(default_factory=Optimiser)

    def __post_init__(self) -> None:
        typed(self)
        usable_path(self, "html")
        where = topology.parse(self.topology)
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout:g} must be positive")
        strategy_on(self.mesh)
        if self.search is not None and self.strategies is not None:
            raise ValueError(f"search={self.search} and strategies={self.strategies}: ask for one of them at a time")
        if self.search == "min-devices" and self.mesh.size > 1:
            raise ValueError(f"search=min-devices chooses the mesh for each machine: leave {self.mesh=} out")
        if self.strategies is not None and not problem.layers_of(self.model, self.data.T, 1):
            mixers = sorted({type(mixer).__name__ for mixer in self.model.layers})
            raise ValueError(
                f"strategies={self.strategies} for {mixers}: strategies spread softmax attention, of which there is "
                "none; linear attention has one way, handing on its state: leave --strategies out"
            )
        if self.analytic:
            step.recurrence(self.model, where)  # raises for models without a formula
        if self.mesh.size not in (1, where.size):
            raise ValueError(
                f"the mesh has {self.mesh.size} devices, {where.name} has {where.size}: change the sizes of the mesh, "
                "or leave them out"
            )

    @property
    def bare(self) -> Config:
        """The config without a mesh."""
        return Config(model=self.model, data=self.data, optimiser=self.optimiser)

    def config(self, where: Topology, **changes: Any) -> Config:
        """Returns the config to compile for `where`, with `changes` to T, B or the strategy.

        Raises ValueError if no mesh of that many devices divides the rows and the sequence.
        """
        data = dataclasses.replace(self.data, **{k: v for k, v in changes.items() if k in ("T", "B")})
        mesh = self.mesh
        if mesh.size == 1 and where.size > 1:
            mesh = _choose_mesh(self.model, data.T, data.B // self.optimiser.accumulate, where, mesh)
        if "strategy" in changes:
            mesh = problem.with_strategy(mesh, changes["strategy"], self.model.K)
        return Config(model=self.model, data=data, mesh=mesh, optimiser=self.optimiser)


def with_mesh(options: PlanOptions, mesh: Mesh) -> PlanOptions:
    """Returns the options with a config file's mesh, unless they have one or its size is not the machine's."""
    if mesh.size == 1 or options.mesh.size > 1 or options.search == "min-devices":
        return options
    where = topology.parse(options.topology)
    if mesh.size != where.size:
        terminal.say(f"longattn: the config's mesh of {mesh.size} devices is not used for {where.size}")
        return options
    return dataclasses.replace(options, mesh=mesh)


def _choose_mesh(model: Model, T: int, rows: int, where: Topology, mesh: Mesh) -> Mesh:
    """Shards rows over fsdp as far as they divide, and the sequence over the remaining devices."""
    n = where.size
    if model.E % n:
        raise ValueError(
            f"{n} devices must divide {model.E=} to share the parameters: say the mesh, such as --mesh.data"
        )
    hosts = where.dims[0] if where.is_gpu else 1  # the sequence stays within a host
    for fsdp in sorted((f for f in range(hosts, n + 1, hosts) if n % f == 0 and rows % f == 0), reverse=True):
        chosen = dataclasses.replace(mesh, fsdp=fsdp, seq=n // fsdp)
        if T % chosen.unit == 0:
            return chosen
    within = f", which {hosts} hosts must divide," if hosts > 1 else ""
    unit = dataclasses.replace(mesh, seq=n).unit
    raise ValueError(
        f"{n} devices cannot share {rows} rows{within} of {T=}: choose multiples of {unit}, or say the mesh"
    )


def run(options: PlanOptions, name: str, console: Console | None = None) -> dict[str, Any]:
    """Compiles, prints tables (or JSON, with `options.json`), and returns the document.

    Args:
      options: what to compile.
      name: the model's name, for titles.
      console: where to print the tables.
    """
    where = topology.parse(options.topology)
    if not options.analytic:
        compilers.environment_of(where)  # raises at once if the compiler is not installed
    document: dict[str, Any] = {
        "version": VERSION,
        "kind": "plan",
        "model": name,
        "parameters": flops.parameters(options.model).total,
        "topology": where.name,
        "options": {
            "search": options.search,
            "strategies": options.strategies,
            "analytic": options.analytic,
            "config": json.loads(to_json(options.config(where) if options.search is None else options.bare))["config"],
        },
        "versions": {"jax": jax.__version__, **({} if options.analytic else _compilers(where))},
        "commit": commit(),
    }
    with _Compiler(options) as compiler:
        if options.search is not None:
            document |= _search(options, where, compiler)
        elif options.strategies is not None:
            document |= _strategies(options, where, compiler)
        else:
            document["rows"] = [compiler(where)]
            document["advice"] = _advice(options, where, document["rows"][0])
    if [("reason" in row) for row in document["rows"]] == [True]:
        raise ValueError(document["rows"][0]["reason"])
    if options.html:  # first, for whoever reads the output may stop reading
        write_whole(Path(options.html), show.page(document))
        terminal.say(f"wrote {options.html}")
    if options.json:
        print(json_text(document))
    else:
        show.tables(console or Console(width=max(_WIDTH, Console().width)), document)
    return document


def _advice(options: PlanOptions, where: Topology, row: dict[str, Any]) -> str | None:
    """Returns `advice.advice` of a row; None where there is no program, or no formula for it."""
    if "fits" not in row:
        return None
    with contextlib.suppress(NotImplementedError):
        return advice.advice(options.config(where), where, row["fits"])
    return None


def _compilers(where: Topology) -> dict[str, str]:
    return compilers.cuda_versions() if where.is_gpu else {"libtpu": compilers.libtpu_version()}


class _Compiler:
    """Makes the rows of the document, and reports progress on stderr."""

    def __init__(self, options: PlanOptions):
        self.options = options
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True),
            transient=True,
        )  # fmt: skip

    def __enter__(self) -> _Compiler:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def __call__(self, where: Topology, **changes: Any) -> dict[str, Any]:
        """Returns one row of the document: the request, and its figures or the `reason` why there are none."""
        o = self.options
        asked = {
            "topology": where.name, "T": o.data.T, "B": o.data.B, "strategy": o.mesh.strategy, "layout": o.mesh.layout,
            **changes,
        }  # fmt: skip
        try:
            config = o.config(where, **changes)
        except ValueError as error:
            return {**asked, "devices": where.size, "reason": str(error)}
        row = {**asked, "layout": config.mesh.layout, "devices": where.size, "mesh": config.mesh.sizes}
        if o.analytic:
            return row | step.estimate(config, where)
        label = f"{where.name}, T {config.data.T:,}, B {config.data.B:,}{show.spread(row)}"
        task = self.progress.add_task(f"compiling for {label}")
        row |= train_step.facts(config, where, o.timeout, train_step.cache_folder() if o.cache else None)
        self.progress.remove_task(task)
        verdict = "no program" if "reason" in row else f"{row['hbm_bytes'] / 2**30:.2f} GiB"
        self.progress.console.print(f"{label}: {verdict}", highlight=False)
        return row


def _search(options: PlanOptions, where: Topology, compiler: _Compiler) -> dict[str, Any]:
    """Returns "rows" (every program tried), "found" (the one searched for or None) and "beyond" (which does not fit).

    Raises ValueError, with the compiler's reason, if a program could not be compiled.
    """
    rows: dict[Any, dict[str, Any]] = {}
    found: int | None
    beyond: int | None
    if options.search == "min-devices":
        machines = [machine for machine in where.smaller() if _shares(options, machine)]
        if not machines:
            options.config(where)  # raises with the reason

        def fits(i: int) -> bool:
            rows[i] = compiler(machines[i])
            return _fits(rows[i], machines[i].name)

        at = search.smallest(fits, len(machines))
        found, beyond = (None, len(machines) - 1) if at is None else (at, at - 1)
    else:
        found, beyond = _largest(options, where, compiler, rows)
    return {"rows": list(rows.values()), "found": rows.get(found), "beyond": rows.get(beyond)}


def _strategies(options: PlanOptions, where: Topology, compiler: _Compiler) -> dict[str, Any]:
    """Returns "rows" (the program of every strategy), "sequence" (every strategy and layout by formula), "recommended".

    With `options.analytic`, `rows` holds the requested config alone.
    """
    model, mesh = options.model, options.config(where).mesh
    rows = options.data.B // (mesh.data * mesh.fsdp * options.optimiser.accumulate)
    predicted: list[dict[str, Any]] = []
    if mesh.P > 1:
        layers = problem.layers_of(model, options.data.T, rows, mesh.tensor)
        predicted = strategies.compare(layers, mesh.P, timeline.machine(where), remat=model.remat)
    by_formula = {"sequence": predicted, "recommended_by_formula": strategies.recommended(predicted)}
    if options.analytic:
        return by_formula | {"rows": [compiler(where)], "recommended": by_formula["recommended_by_formula"]}
    compiled = [compiler(where, strategy=s) for s in STRATEGIES]
    return by_formula | {"rows": compiled, "recommended": _recommended(compiled)}


def _fits(row: dict[str, Any], asked: str) -> bool:
    """Returns whether a row's program fits. Raises ValueError, with the reason, if there is no program."""
    if "reason" in row:
        raise ValueError(f"{asked}: {row['reason']}")
    return row["fits"]


def _shares(options: PlanOptions, where: Topology) -> bool:
    """Returns whether a mesh of the machine's devices divides the work."""
    try:
        options.config(where)
    except ValueError:
        return False
    return True


def _largest(
    options: PlanOptions, where: Topology, compiler: _Compiler, rows: dict[Any, dict[str, Any]]
) -> tuple[int | None, int | None]:
    """Returns `search.largest` of T or B, and puts each program into `rows` by that number."""
    key, data, mesh = "T" if options.search == "max-length" else "B", options.data, options.mesh
    pieces = options.optimiser.accumulate
    if mesh.size == 1 and where.size > 1:  # the mesh stays while T or B grows
        T = where.size * search.TILE if key == "T" else data.T
        mesh = _choose_mesh(options.model, T, data.B // pieces, where, mesh)
        compiler.options = dataclasses.replace(options, mesh=mesh)

    def fits(n: int) -> bool:
        rows[n] = compiler(where, **{key: n})
        return _fits(rows[n], f"{key} = {n:,} on {where.name}")

    unit = mesh.P * search.TILE if key == "T" else mesh.data * mesh.fsdp * pieces
    limit = max(unit, search.LONGEST if key == "T" else search.LONGEST // data.T * where.size)
    guess: int | None = getattr(data, key)
    if not options.analytic:
        with contextlib.suppress(NotImplementedError):  # without a formula the search starts from the requested number
            config = lambda n: compiler.options.config(where, **{key: n})
            guess = search.by_formula(config, where, getattr(data, key), unit, limit)
    return search.largest(fits, guess or unit, unit, limit, exact=options.analytic)


def _recommended(rows: list[dict[str, Any]]) -> str:
    """Returns a sentence that recommends a strategy and says why."""
    fit = [row for row in rows if row.get("fits")]
    if not fit:
        least = min((row for row in rows if "hbm_bytes" in row), key=lambda row: row["hbm_bytes"], default=None)
        if least is None:
            return "None: no strategy accepts this model on this mesh."
        over = (least["hbm_bytes"] - least["hbm_limit"]) / 2**30
        return f"None fits: {least['strategy']} needs the least, which is {over:.2f} GiB too much."
    best = min(fit, key=lambda row: row["seconds"]["bound"])
    bound = f"{best['seconds']['bound']:.3g} s a step"
    lowest = f"its bound of {bound} is the lowest of {len(fit)} that fit"
    why = lowest if len(fit) > 1 else f"it fits, and no other ({bound})"
    waits = best["seconds"]["exposed"] / best["seconds"]["bound"]
    return f"{best['strategy']}: {why}; at published rates devices spend {waits:.0%} of it waiting for each other."
