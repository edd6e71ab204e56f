"""The block sizes of this library's TPU attention kernels: profiled, and the fastest written into their table.

`python -m longattn.aot.kernels.sweep [--only REGEX] [--candidates N]` takes the keys of `pallas_tpu.tuned` one by
one, compiles the sizes that their case names, and writes the table after each. What was compiled before is remembered,
so a sweep that was stopped goes on where it was. Nothing runs: the figures are static cycles.
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

from longattn.aot import compilers as aot
from longattn.aot.kernels.cases import CASES, Shape
from longattn.aot.kernels.tpu import profile
from longattn.cost import hardware
from longattn.display import plain_table
from longattn.mask import Causal, Full, Mask, Window
from longattn.ops.attention.pallas_tpu import Blocks, tuned, tuning

Sizes = tuple[int, int, int, int]
_CASES: dict[tuning.Pass, str] = {"forward": "longattn", "backward": "longattn_backward"}
_LENGTHS = {"8k": 8192, "32k": 32768}
_MOST_BUNDLES = (
    70_000  # of a kernel: fetching instructions is not in the model, and longer programs were never measured
)
_BFLOAT16 = 2  # bytes
_HEADING = '''"""Sizes (block_q, block_k, tile_q, tile_k): by chip, pass, class of mask, head size, length.

Written by `python -m longattn.aot.kernels.sweep`. SWEPT has the entries that it found, each with the static cycles
of 8 heads (compiled, not run) and of how many sizes these are the least. An entry that it lacks has the sizes of the
other length if those were swept, else a guess.
"""

'''


@dataclass(frozen=True)
class Key:
    """An entry of the table, taken apart."""

    chip: str
    which: tuning.Pass
    kind: str
    D: int
    length: str

    @classmethod
    def parse(cls, text: str) -> Key:
        """The inverse of `str`.

        Raises:
          ValueError: for a text that is no key.
        """
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
        """What stands for the class: 8 heads; "numbers" are 16 documents, "narrow" a window of at most a quarter."""
        T = _LENGTHS[self.length]
        masks: dict[str, Mask] = {"full": Full(), "narrow": Window(min(4096, T // 4) - 1)}
        return Shape(T=T, D=self.D, mask=masks.get(self.kind, Causal()), documents=16 if self.kind == "numbers" else 0)

    def candidates(self) -> list[Shape]:
        """The shape at all sizes that its case names and that fit the chip's fast memory."""
        capacity = hardware.TENSOR_CORES[self.chip].vmem_bytes * 7 // 8
        return [s for s in CASES[_CASES[self.which]].blocks(self.shape) if memory(self, sizes(s)) <= capacity]


@dataclass(frozen=True)
class Found:
    """What a sweep of one key says."""

    sizes: Sizes
    cycles: int  # static, 8 heads
    tried: int  # sizes that gave a number


def sizes(shape: Shape) -> Sizes:
    """(block_q, block_k, tile_q, tile_k) of a candidate."""
    assert shape.bR is not None and shape.bC is not None
    return shape.bT, shape.bS, shape.bR, shape.bC


def memory(key: Key, chosen: Sizes) -> int:
    """Bytes of fast memory that these sizes are allowed."""
    return tuning.limit(key.which, Blocks(*chosen), key.D, key.D, _BFLOAT16, int(key.kind == "numbers"))


def bundles(row: Mapping[str, Any]) -> int:
    """Length of the longest kernel's program in a row of the profile."""
    return max(sum(region["bundles"] for region in kernel["regions"]) for kernel in row["kernels"])


def best(rows: Sequence[Mapping[str, Any]]) -> Found | None:
    """The row of the fewest cycles among those whose programs are not too long, or None."""
    good = [row for row in rows if "reason" not in row and bundles(row) <= _MOST_BUNDLES]
    if not good:
        return None
    least = min(good, key=lambda row: row["compare_cycles"])
    return Found((least["bT"], least["bS"], least["bR"], least["bC"]), round(least["compare_cycles"]), len(good))


def filled(table: Mapping[str, Sizes], swept: Mapping[str, tuple[int, int]]) -> dict[str, Sizes]:
    """The table, in which keys that were not swept have the sizes of the other length if those were."""
    others = {text: str(Key.parse(text).other_length) for text in table}
    return {text: table[others[text] if text not in swept and others[text] in swept else text] for text in table}


def write(path: Path, table: Mapping[str, Sizes], swept: Mapping[str, tuple[int, int]], compilers: str) -> None:
    """The module of the table, as `ruff format` would have it."""
    lines = [f'COMPILERS = "{compilers}"  # of SWEPT', "", "TUNED: dict[str, tuple[int, int, int, int]] = {"]
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
    compilers = f"jax {jax.__version__}, libtpu {aot.libtpu_version()}"
    if compilers != tuned.COMPILERS:
        swept.clear()  # cycles of other compilers say nothing beside these
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
                write(path, table, swept, compilers)
                found.append((text, answer))
        except BaseException:  # interrupted: nobody waits for the compilers
            aot.stop()
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
