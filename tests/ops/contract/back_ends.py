"""What the contracts say of a back end, whichever operation it serves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of Pallas kernels for TPUs, in `BackEnd.refuses`.
NO_TPU_DTYPE = (
    ("float16", "float16 products are not what TPUs have; cast to bfloat16 or float32", "bfloat16"),
    ("float64", "float64 products are not what TPUs have; cast to bfloat16 or float32", "float32"),
)


@dataclass(frozen=True)
class BackEnd:
    name: str
    names_residuals: bool = True  # its custom_vjp names what it keeps for the backward pass
    device: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # where it is accepted
    refuses: tuple[tuple[str, str, str], ...] = ()  # (a value of a case, the reason, what to ask for instead)

    interpreted: bool = False  # a case takes tens of seconds, so few are compared by default

    def __str__(self) -> str:
        return self.name

    def refusal(self, case: Any) -> str | None:
        """The reason why it does not serve a case."""
        return next((why for value, why, _ in self.refuses if value in dataclasses.astuple(case)), None)

    def nearest(self, case: Any) -> Any:
        """The case, or one that it serves in the place of it."""
        instead = {value: other for value, _, other in self.refuses}
        return type(case)(*(instead.get(x, x) if isinstance(x, str) else x for x in dataclasses.astuple(case)))
