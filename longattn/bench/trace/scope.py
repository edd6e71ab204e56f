"""The named scope of an op, from the name that JAX and XLA give it."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Phase = Literal["forward", "backward", "recompute"]


class Scope(NamedTuple):
    """The named scope that an op comes from."""

    path: tuple[str, ...]  # named scopes and modules, outermost first; () if unknown
    phase: Phase

    def __str__(self) -> str:
        return "/".join(self.path) or "(no scope)"


_WRAPPED = re.compile(r"(\w+)\((.*)\)")
# Names that JAX and XLA put between scopes: control flow, calls and transformations.
_STRUCTURE = frozenset(
    {
        "", "body", "branch", "checkpoint", "closed_call", "cond", "core_call", "custom_jvp_call", "custom_vjp_call",
        "eval_jaxpr", "pjit", "remat", "rematted_computation", "scan", "shard_map", "while",
    }
)  # fmt: skip
_BRANCH = re.compile(r"branch_\d+_fun")


def scope_of(op_name: str) -> Scope:
    """Returns the scope in an instruction's `op_name`, such as

        jit(step)/transpose(jvp(Model))/while/body/layer/mlp/dot_general    ->    Model/layer/mlp, backward

    The scope leaves out the operation (the last part), jitted functions, control flow and transformations. Einsum
    equations count only if there is nothing else. An op belongs to the backward pass if it was transposed or stands in
    a scope "backward", and to the recomputation if a remat policy runs it again. XLA names joined collectives by their
    common prefix and a list, such as jit(step)/transpose(jvp(Model))/(embedding/add:mlp/dot): their scope is the common
    prefix, or the first one's scope if that is empty.
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
