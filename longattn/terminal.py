"""Lines on stderr, streams that are closed or lost, and characters that the encodings of stdout and stderr lack."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import TextIO

# Characters of tables, bars and sentences, for terminals that have ASCII alone. Others are escaped, as in "\\xe9".
_ASCII = str.maketrans(
    {**dict.fromkeys("─━╌╸╺–—‐‑−", "-"), **dict.fromkeys("│┃╎", "|"), **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼╞╡╪", "+"),
     **dict.fromkeys("█▉▊▋▌▍▎▏▓▒░■", "#"), "•": "*", "·": ".", "×": "x", "≥": ">=", "≤": "<=", "≈": "~",
     "…": "...", "→": "->", "←": "<-", "µ": "u", "μ": "u", "±": "+-", "’": "'", "‘": "'", "“": '"', "”": '"',
     **{chr(frame): "*" for frame in range(0x2800, 0x2900)}}
)  # fmt: skip


def say(message: str) -> None:
    """Writes a line to stderr at once: what other threads and processes write there cannot end up within it."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def open_closed_streams() -> None:
    """Opens standard streams that the caller closed, as in `2>&-`, on the null device.

    Otherwise the next file that is opened would have the stream's number, and what a library writes to stderr would end
    up in it.
    """
    for number in range(3):  # os.open takes the lowest number that is free
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (streams stay open)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class _Progress(io.FileIO):
    """A stream of progress, whose reader may be gone: what cannot be written is left out."""

    def write(self, data: object) -> int:
        try:
            return super().write(data) or 0  # type: ignore[arg-type]
        except BrokenPipeError:
            # Libraries write there too, and so do child processes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError:  # a full disk, a terminal that hung up: the next line may succeed
            pass
        return memoryview(data).nbytes  # type: ignore[arg-type]


def outlive_stderr() -> None:
    """Lets the process go on where stderr is a pipe whose reader ends, as in `2>&1 | head`."""
    stream: TextIO = sys.stderr
    with contextlib.suppress(AttributeError, OSError):  # a notebook's or a test's stream has no number, or another
        if stream.fileno() == 2:
            stream.flush()
            raw = io.BufferedWriter(_Progress(2, "w", closefd=False))
            sys.stderr = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


def write_in_any_encoding() -> None:
    """Makes stdout and stderr replace characters that their encoding lacks, instead of raising UnicodeEncodeError."""

    def replace(error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end]
        if all("\udc80" <= c <= "\udcff" for c in text):  # bytes of a file's name that no encoding explains
            return text.encode("ascii", "surrogateescape"), error.end
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode(), error.end

    codecs.register_error("longattn", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's stream is none
            stream.reconfigure(errors="longattn")
