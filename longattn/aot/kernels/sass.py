"""Parses ptxas's report about a kernel and the instructions in nvdisasm's listing.

An instruction counts once, however often it runs. The body of an unrolled loop counts several times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

# First part of the mnemonic: HGMMA is Hopper's asynchronous product, HMMA one warp's, UTC*MMA Blackwell's.
TENSOR_CORE = re.compile(r"[A-Z]?GMMA|[A-Z]?MMA|UTC[A-Z]*MMA")
# Device memory to and from shared memory (UTMA*: whole tensors, UBLK*: bytes, LDGSTS: per thread) or registers (LDG,
# STG); shared memory to and from registers as matrices (LDSM, STSM) or plainly (LDS, STS); tensor memory (LDTM, STTM,
# UTCCP); generic addresses (LD, ST).
COPIES = re.compile(r"UTMA(LDG|STG|REDG)|UBLKCP|UBLKRED|LDGSTS|LDSM|STSM|LDTM|STTM|UTCCP|LDG|STG|LDS|STS|LD|ST")
SETS_REGISTERS = "USETMAXREG"


@dataclass(frozen=True)
class Assembled:
    """One kernel as ptxas reports it."""

    arch: str
    registers: int  # per thread
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int  # static; the launch's dynamic shared memory comes on top
    warnings: tuple[str, ...]  # warnings, and remarks about lost performance


_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>\w+)'")
_FRAME = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
_WARNING = re.compile(r"^ptxas (?:warning\s*: |info\s*: \(C\d+\) )(?P<what>.*)$", re.MULTILINE)


def assembled(report: str) -> dict[str, Assembled]:
    """Parses the report of `ptxas -v` into kernels by name.

    Raises ValueError if a kernel's registers or stack frame are missing.
    """
    entries = list(_ENTRY.finditer(report))
    kernels = {}
    for entry, following in zip(entries, [*(e.start() for e in entries[1:]), len(report)]):
        text, name = report[entry.end() : following], entry["name"]
        used = re.search(r"Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?", text)
        frame = re.search(rf"Function properties for {re.escape(name)}\n\s*{_FRAME}", text)
        if used is None or frame is None:
            raise ValueError(
                f"{name}: ptxas reports no registers or no stack frame, in: {' '.join(text.split())[:200]}"
            )
        warnings = dict.fromkeys(m["what"] for m in _WARNING.finditer(report) if f"'{name}'" in m["what"])
        stack, stores, loads = map(int, frame.groups())
        kernels[name] = Assembled(
            entry["arch"], int(used[1]), stores, loads, stack, int(used[2] or 0), tuple(warnings)
        )  # fmt: skip
    return kernels


_SECTION = re.compile(r"^\s*\.section\s+\.text\.(?P<name>[\w$.]+)")
# Skips instructions under the predicate "never", which ptxas inserts as padding.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?!!U?PT\b)!?U?P[T\d]\s+)?(?P<mnemonic>[A-Z][A-Z0-9_]*)")


def instructions(listing: str) -> dict[str, Counter[str]]:
    """Counts the instructions of each kernel in the listing of `nvdisasm -c` by mnemonic, without modifiers."""
    counts: dict[str, Counter[str]] = {}
    kernel = None
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            kernel = counts.setdefault(section["name"], Counter())
        elif kernel is not None and (instruction := _INSTRUCTION.match(line)):
            kernel[instruction["mnemonic"]] += 1
    return counts


def of_kind(kind: re.Pattern[str], counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts whose mnemonic matches `kind`, by name."""
    return {name: counts[name] for name in sorted(counts) if kind.fullmatch(name)}
