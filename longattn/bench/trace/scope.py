"""Where in the source an op comes from, as the names that jax and XLA give it tell."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Phase = Literal["forward", "backward", "recompute"]


class Scope(NamedTuple):
    """Where in the source an op comes from."""

    path: tuple[str, ...]  # named scopes and modules, outermost first; () where nothing is known
    phase: Phase

    def __str__(self) -> str:
        return "/".join(self.path) or "(no scope)"


_WRAPPED = re.compile(r"(\w+)\((.*)\)")
# What jax and XLA put between scopes: names of control flow, of calls and of transformations.
_STRUCTURE = frozenset(
    {
        "", "body", "branch", "checkpoint", "closed_call", "cond", "core_call", "custom_jvp_call", "custom_vjp_call",
        "eval_jaxpr", "pjit", "remat", "rematted_computation", "scan", "shard_map", "while",
    }
)  # fmt: skip
_BRANCH = re.compile(r"branch_\d+_fun")


def scope_of(op_name: str) -> Scope:
    """The scope that an instruction's `op_name` tells, such as

        jit(step)/transpose(jvp(Model))/while/body/layer/mlp/dot_general    ->    Model/layer/mlp, backward

    The last part, the operation, is left out, and so are jitted functions, control flow, transformations and, unless
    there is nothing else, einsum equations. An op is of the backward pass where it was transposed or stands in a scope
    "backward"; of the recomputation where a remat policy runs it again. Where XLA joined several (collectives), it
    writes what they share before a list, jit(step)/transpose(jvp(Model))/(embedding/add:mlp/dot): the scope is what
    they share, or the first's if that is nothing.
    """
    shared, several, rest = op_name.partition("/(")
    if several:
        common = scope_of(f"{shared}/")
        return common if common.path else scope_of(f"{shared}/{rest.split(':')[0]}")
    whole = op_name.split(";")[0].removesuffix(":")
    *parts, _ = whole.split("/")
    path: list[str] = []
    equation = ""
    for part in parts:
        while wrapped := _WRAPPED.fullmatch(part):
            part = "" if wrapped[1] in ("jit", "pjit") else wrapped[2]
        if "->" in part:
            equation = part
        elif part not in _STRUCTURE and not _BRANCH.fullmatch(part) and path[-1:] != [part]:
            path.append(part)
    phase: Phase = "backward" if "transpose(" in whole or "backward" in path else "forward"
    if "rematted_computation" in whole:
        phase = "recompute"
    return Scope(tuple(part for part in path if part != "backward") or ((equation,) if equation else ()), phase)
