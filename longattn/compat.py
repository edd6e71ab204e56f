"""The places where jax's versions differ, or where jax has no public name for what this package needs.

Supported are jax >= 0.10.2 for `ops` and `parallel`, and jax >= 0.11.1 for training. A name here says which versions it
bridges and when it can go. Nothing else in the package may read a private module of jax or ask for its version.
"""

from __future__ import annotations

from typing import Any

from jax._src import config as _config
from jax._src import distributed as _distributed


def interpreted_as_tpu() -> bool:
    """Returns whether Pallas kernels for TPUs are interpreted on this host (`pltpu.force_tpu_interpret_mode`).

    Private in jax 0.10.2 to 0.12.0.1: the mode can be set but not read. It can go when jax has a public reader.
    """
    return bool(_config.pallas_tpu_interpret_mode_context_manager.value)


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service; None before `jax.distributed.initialize`.

    Private in jax 0.10.2 to 0.12.0.1, which have no public barrier with a time-out and no public key-value store. orbax
    uses this client too.
    """
    return _distributed.global_state.client
