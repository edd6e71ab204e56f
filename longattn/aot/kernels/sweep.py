"""Finds the best block sizes of our TPU attention kernels by static cycles, and writes them into their table.

`python -m longattn.aot.kernels.sweep [--only REGEX] [--candidates N]` takes the keys of `pallas_tpu.tuned` in turn,
compiles the sizes that their case names, and writes the table after each. Answers are cached, so an interrupted sweep
can be resumed. Nothing runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from longattn.aot import compilers
from longattn.aot.kernels.cases import CASES, Shape
from longattn.aot.kernels.tpu import profile
from longattn.cost import hardware
from longattn.display import plain_table
from longattn.mask import Causal, Full, Mask, Window
from longattn.ops.attention.pallas_tpu import Blocks, tuned, tuning

Sizes = tuple[int, int, int, int]
_CASES: dict[tuning.Pass, str] = {"forward": "longattn", "backward": "longattn_backward"}
_LENGTHS = {"8k": 8192, "32k": 32768}
_MOST_BUNDLES = 70_000  # of a kernel: the model has no instruction fetch, and longer programs were never measured
_BFLOAT16 = 2  # bytes
_HEADING = '''"""Sizes (block_q, block_k, tile_q, tile_k): by chip, pass, class of mask, head size, length.

Written by `python -m longattn.aot.kernels.sweep`. SWEPT has the entries that it found, each with the static cycles
of 8 heads (compiled, not run) and of how many sizes these are the least. An entry that it lacks has the sizes of the
other length if those were swept, else a guess.
"""

'''


@dataclass(frozen=True)
class Key:
    """The parsed key of an entry of the table."""

    chip: str
    which: tuning.Pass
    kind: str
    D: int
    length: str

    @classmethod
    def parse(cls, text: str) -> Key:
        """Parses a key; the inverse of `str`. Raises ValueError for anything else."""
        chip, word, kind, head, length = text.split()
        which = next((known for known in tuning.PASSES if known == word), None)
        if chip not in hardware.TENSOR_CORES or which is None or length not in _LENGTHS:
            raise ValueError(f"{text!r} is no key of the table, such as 'v5e forward cut D128 8k'")
        return cls(chip, which, kind, int(head.removeprefix("D")), length)

    def __str__(self) -> str:
        return f"{self.chip} {self.which} {self.kind} D{self.D} {self.length}"

    @property
    def other_length(self) -> Key:
        (other,) = set(_LENGTHS) - {self.length}
        return replace(self, length=other)

    @property
    def shape(self) -> Shape:
        """The shape that represents the class: 8 heads, 16 documents ("numbers"), a window <= T / 4 ("narrow")."""
        T = _LENGTHS[self.length]
        masks: dict[str, Mask] = {"full": Full(), "narrow": Window(min(4096, T // 4) - 1)}
        return Shape(T=T, D=self.D, mask=masks.get(self.kind, Causal()), documents=16 if self.kind == "numbers" else 0)

    def candidates(self) -> list[Shape]:
        """Returns the shape with all block sizes that its case names and that fit in VMEM."""
        capacity = hardware.TENSOR_CORES[self.chip].vmem_bytes * 7 // 8
        return [s for s in CASES[_CASES[self.which]].blocks(self.shape) if memory(self, sizes(s)) <= capacity]


@dataclass(frozen=True)
class Found:
    """The result for one key."""

    sizes: Sizes
    cycles: int  # static cycles of 8 heads
    tried: int  # number of sizes with a result


def sizes(shape: Shape) -> Sizes:
    """Returns (block_q, block_k, tile_q, tile_k) of a candidate."""
    assert shape.bR is not None and shape.bC is not None
    return shape.bT, shape.bS, shape.bR, shape.bC


def memory(key: Key, chosen: Sizes) -> int:
    """Returns the VMEM limit of the kernel at these sizes."""
    return tuning.limit(key.which, Blocks(*chosen), key.D, key.D, _BFLOAT16, int(key.kind == "numbers"))


def bundles(row: Mapping[str, Any]) -> int:
    """Returns the bundles of the longest kernel in a row of the profile."""
    return max(sum(region["bundles"] for region in kernel["regions"]) for kernel in row["kernels"])


def best(rows: Sequence[Mapping[str, Any]]) -> Found | None:
    """Returns the result with the fewest cycles among programs that are not too long, or None."""
    good = [row for row in rows if "reason" not in row and bundles(row) <= _MOST_BUNDLES]
    if not good:
        return None
    least = min(good, key=lambda row: row["compare_cycles"])
    return Found((least["bT"], least["bS"], least["bR"], least["bC"]), round(least["compare_cycles"]), len(good))


def filled(table: Mapping[str, Sizes], swept: Mapping[str, tuple[int, int]]) -> dict[str, Sizes]:
    """Fills the table: a key that was not swept gets the sizes of the other length, if that was swept."""
    other = {text: str(Key.parse(text).other_length) for text in table}
    return {text: table[other[text] if text not in swept and other[text] in swept else text] for text in table}


def write(path: Path, table: Mapping[str, Sizes], swept: Mapping[str, tuple[int, int]], versions: str) -> None:
    """Writes the module of the table, formatted as by `ruff format`."""
    lines = [f'COMPILERS = "{versions}"  # of SWEPT', "", "TUNED: dict[str, tuple[int, int, int, int]] = {"]
    lines += [f'    "{text}": {chosen},' for text, chosen in filled(table, swept).items()]
    lines += ["}", "", "# (static cycles, sizes that gave a number)"]
    if swept:
        lines += ["SWEPT: dict[str, tuple[int, int]] = {"]
        lines += [f'    "{text}": ({swept[text][0]}, {swept[text][1]}),' for text in table if text in swept]
        lines += ["}"]
    else:
        lines += ["SWEPT: dict[str, tuple[int, int]] = {}"]
    path.write_text(_HEADING + "\n".join(lines) + "\n")


def sweep(
    only: str, most: int | None, path: Path, table: dict[str, Sizes], swept: dict[str, tuple[int, int]], timeout: float
) -> list[tuple[str, Found]]:
    """Profiles the keys that match, the first `most` sizes of each, and writes the table after each key."""
    versions = f"jax {jax.__version__}, libtpu {compilers.libtpu_version()}"
    if versions != tuned.COMPILERS:
        swept.clear()  # cycles of different compilers are not comparable
    found = []
    with ThreadPoolExecutor(2) as pool:
        try:
            for text in [text for text in table if re.search(only, text)]:
                key = Key.parse(text)
                tried = key.candidates()[:most]
                answers = [pool.submit(profile, _CASES[key.which], key.chip, shape, timeout) for shape in tried]
                rows = [answer.result() for answer in answers]
                for row in rows:
                    if "reason" in row:
                        print(
                            f"{text} {row['bT']} {row['bS']} {row['bR']} {row['bC']}: {row['reason']}", file=sys.stderr
                        )
                if (answer := best(rows)) is None:
                    print(f"{text}: none of {len(tried)} sizes gave a number", file=sys.stderr)
                    continue
                print(text, *answer.sizes, f"{answer.cycles / 1e6:.3f} M", file=sys.stderr)
                table[text], swept[text] = answer.sizes, (answer.cycles, answer.tried)
                write(path, table, swept, versions)
                found.append((text, answer))
        except BaseException:  # interrupted: end the running compilers too
            compilers.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that keys must match")
    parser.add_argument("--candidates", type=int, help="of each key try only so many sizes, the most promising")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one compilation")
    options = parser.parse_args()
    path = Path(tuned.__file__)
    found = sweep(options.only, options.candidates, path, tuned.TUNED, tuned.SWEPT, options.timeout)
    table = plain_table("static cycles of 8 heads (compiled, not run)")
    for heading in ("key", "block_q", "block_k", "tile_q", "tile_k", "cycles", "sizes tried"):
        table.add_column(heading, justify="left" if heading == "key" else "right")
    for text, answer in found:
        table.add_row(text, *map(str, answer.sizes), f"{answer.cycles / 1e6:.3f} M", str(answer.tried))
    Console(width=120).print(table)


if __name__ == "__main__":
    _main()
