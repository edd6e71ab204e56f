"""The tasks that a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from longattn.config.checks import fraction, positive, typed


@dataclass(frozen=True)
class ByteLM:
    """Byte-level language modelling of local files, packed to length T."""

    glob: str = ""  # files to read ("**" recurses); "" is the Python standard library's own sources
    T: int = 1024  # tokens per row
    B: int = 8  # rows per step, over all devices
    overlap: int = 1  # bytes a piece of a long file repeats from the piece before, without loss
    valid: float = 0.05  # share of the documents held out (by a hash of the path, so it never moves)
    max_bytes: int | None = None  # stop after this many bytes of corpus
    balance: bool = False  # share out a step's rows so that all devices have equally many visible pairs

    def __post_init__(self) -> None:
        typed(self, wide=("max_bytes",))
        positive(self, "T", "B", "overlap", "max_bytes")
        fraction(self, "valid")
        if self.overlap >= self.T:
            raise ValueError(f"ByteLM.overlap={self.overlap} must be less than T={self.T}")


@dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall (Zoology, arXiv:2312.04927): key-value pairs, then queries at power-law gaps."""

    T: int = 256  # tokens per row
    B: int = 64  # rows per step
    pairs: int = 16  # key-value pairs per row
    vocabulary: int = 256  # keys are 1 .. vocabulary/2 - 1, values vocabulary/2 .. vocabulary - 1
    alpha: float = 0.01  # exponent of the power law of the gaps

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "T", "B", "pairs")
        if 4 * self.pairs > self.T:
            raise ValueError(
                f"MQAR.pairs={self.pairs} must be at most T/4={self.T // 4}: pairs and queries take two tokens each"
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"MQAR.pairs={self.pairs} must be at most {self.vocabulary // 2 - 1}, the number of distinct keys"
            )


@dataclass(frozen=True)
class Needle:
    """A passkey hidden in real text, asked for at the end."""

    glob: str = ""  # the haystack's files; "" is the Python standard library's own sources
    T: int = 512  # tokens per row
    B: int = 32  # rows per step
    digits: int = 4  # length of the passkey
    depth: float | None = None  # where the needle stands: 0 start, 1 end, None uniform

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "T", "B", "digits")
        if self.depth is not None:
            fraction(self, "depth")


Data = ByteLM | MQAR | Needle
