"""Lines on stderr, and characters that the encodings of stdout and stderr lack."""

from __future__ import annotations

import codecs
import io
import sys

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
