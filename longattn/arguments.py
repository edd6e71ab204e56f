"""How command-line arguments become frozen dataclasses. The one place that knows tyro.

A field is written `--FIELD VALUE`, a switch `--FIELD`; `_spelling` lists the fields that are written otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Annotated, Any, get_args

import tyro
from tyro import conf, constructors

from longattn import mask, parallel
from longattn.config import Data
from longattn.config.mesh import StrategyName

MISSING: Any = tyro.MISSING  # the default of an argument that must be given


def positional(metavar: str, **more: Any) -> tuple[Any, ...]:
    """Returns the markers of an argument that is given by its position. more: tyro.conf.arg's."""
    return conf.Positional, conf.arg(metavar=metavar, **more)


def _spelling() -> dict[tuple[str, str], tuple[Any, ...]]:
    """Returns tyro's markers by (class, field), for the fields that are not written `--FIELD VALUE`."""

    def short(name: str) -> tuple[Any, ...]:
        return (conf.arg(aliases=(f"--{name}",)),)

    names = constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="A,B",
        instance_from_str=lambda words: tuple(" ".join(words).replace(",", " ").split()),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value or ())],
    )
    typed = conf.FlagConversionOff  # a config file may set a switch: `--model.tie False` takes it back
    return {
        ("TrainOptions", "path"): positional("CONFIG"),
        ("TrainOptions", "config"): (typed, conf.arg(name="")),
        ("EvalOptions", "run"): positional("RUN"),
        ("CompareOptions", "case"): positional("CASE"),
        ("CompareOptions", "contestants"): (  # "with" is a Python keyword
            names,
            conf.arg(name="with", help_behavior_hint="(default: all but reference)"),
        ),
        ("PlanArguments", "options"): (conf.arg(name=""),),
        **{("PlanOptions", part): (typed,) for part in ("model", "data", "mesh", "optimiser")},
        ("PlanOptions", "cache"): (conf.arg(help="compile everything anew", help_behavior_hint="(default: False)"),),
        ("ProfileOptions", "cases"): positional("CASE...", help_behavior_hint="(required)"),
        ("ProfileOptions", "target"): (conf.arg(metavar="{tpu,gpu}"),),
        ("SequenceOptions", "strategy"): positional("[STRATEGY]"),
        ("RunProfileOptions", "run"): positional("RUN"),
        **{(kind.__name__, size): short(size) for kind in get_args(Data) for size in "TB"},
        ("Model", "remat"): short("remat"),
        ("Model", "dtype"): short("dtype"),
        ("Run", "init_from"): short("init_from"),
    }


def _registry(mistakes: list[ValueError]) -> Any:
    """Returns tyro's rules for masks, strategies and `_spelling`. ValueErrors of options classes go into `mistakes`."""
    registry, spelling, inside = constructors.ConstructorRegistry(), _spelling(), False

    @registry.primitive_rule
    def mask_rule(info: constructors.PrimitiveTypeInfo) -> Any:
        if not (isinstance(info.type, type) and issubclass(info.type, mask.Mask)):
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="MASK",
            instance_from_str=lambda words: mask.parse(words[0]),
            is_instance=lambda value: isinstance(value, mask.Mask),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def strategy_rule(info: constructors.PrimitiveTypeInfo) -> Any:
        if info.type is not StrategyName:
            return None
        names = tuple(parallel.STRATEGIES)
        return constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{{','.join(names)}}}",
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
            choices=names,
        )

    @registry.struct_rule
    def dataclass_rule(info: constructors.StructTypeInfo) -> Any:
        nonlocal inside
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside = True  # tyro's own rule, not this one again
        try:
            spec = constructors.ConstructorRegistry.get_struct_spec(info)
        finally:
            inside = False
        if not isinstance(spec, constructors.StructConstructorSpec):
            return spec

        def instantiate(**values: Any) -> Any:
            try:
                return spec.instantiate(**values)
            except ValueError as error:
                mistakes.append(error)
                raise

        instantiate.__doc__ = info.type.__doc__  # the help begins with it

        def marked(field: constructors.StructFieldSpec) -> constructors.StructFieldSpec:
            name = info.type.__name__, field.name
            if name not in spelling:
                return field
            kind: Any = Annotated[field.type, *spelling[name]]
            return dataclasses.replace(field, type=kind)

        return dataclasses.replace(spec, instantiate=instantiate, fields=tuple(map(marked, spec.fields)))

    return registry


def parse(kind: Any, arguments: list[str], command: str, needs: str = "", default: Any = None, **options: Any) -> Any:
    """Returns the dataclass `kind` that the arguments describe.

    needs: the error message where a positional argument is missing. options: tyro.cli's.

    Raises:
      ValueError: for a mistake in them; the message says which name was meant.
    """
    mistakes: list[ValueError] = []
    if default is not None:
        options["default"] = default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=arguments,
                prog=f"longattn {command}",
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
                use_underscores=True,
                registry=_registry(mistakes),
                **options,
            )
    except SystemExit as error:
        if not error.code:
            raise
        message = str(mistakes[-1]) if mistakes else _one_line(said.getvalue())
        raise ValueError(needs if needs and message.startswith("Missing from") else message) from error


def _one_line(box: str) -> str:
    """Returns the first paragraph of tyro's message, which stands in a box, and the first name that it proposes."""
    rows = [row.strip("│ ") for row in box.splitlines()]
    rows = [row for row in rows if row and row[0] not in "╭╰"]
    if len(rows) > 2 and not rows[1].strip("-"):
        rows = rows[2:]  # without UTF-8 there is no box, and its title has a line of its own
    rule = next((i for i, row in enumerate(rows) if not row.strip("─-")), len(rows))
    proposed = next((rows[i + 1] for i, row in enumerate(rows[:-1]) if row.startswith("Perhaps you meant")), None)
    return " ".join(rows[:rule]).replace(" .", ".") + (
        f"; did you mean {proposed.split()[0].rstrip(',')}?" if proposed else "; --help lists the options"
    )
