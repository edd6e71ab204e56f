"""`configs/needle_ring8.py` trains over eight devices as one device does, up to the order of sums."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from longattn import cli
from longattn.config import Config, Mesh
from longattn.train.run import train

CONFIG = cli.load_config(str(Path(__file__).parents[2] / "configs" / "needle_ring8.py"))


@pytest.mark.slow
def test_fifty_losses_differ_as_by_another_order_of_sums(tmp_path, optimised):
    run = dataclasses.replace(CONFIG.run, dir=str(tmp_path), log_every=1, eval_every=0, eval_batches=1, save_every=50)

    def losses(name: str, mesh: Mesh, **optimiser: int) -> np.ndarray:
        config: Config = dataclasses.replace(
            CONFIG,
            run=dataclasses.replace(run, name=name),
            mesh=mesh,
            optimiser=dataclasses.replace(CONFIG.optimiser, **optimiser),
        )
        found = [record["loss"] for record in train(config, quiet=True).history if "loss" in record]
        assert len(found) == 50
        return np.array(found)

    one = losses("one", Mesh())
    spread = np.abs(losses("accumulate", Mesh(), accumulate=2) - one).max()
    assert 0 < spread < 1e-4 and one[-1] < one[0] - 3
    assert np.abs(losses("ring", CONFIG.mesh) - one).max() <= 2 * spread
