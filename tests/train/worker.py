"""One of several processes that tests/train/test_processes.py starts: python -m tests.train.worker JOB.json.

The environment says which process it is. Its answers go into a file beside the job, JOB.PROCESS.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from longattn import launch
from longattn.config import Config, Mesh, from_json
from longattn.train import Summary, data, distributed, evaluate, train
from longattn.train.step import batch_sharding, context_of


def digest(batch: data.Batch) -> str:
    """Hashes the whole batch, wherever its shards are."""
    found = hashlib.sha256()
    for x in batch:
        whole = multihost_utils.process_allgather(x, tiled=True) if isinstance(x, jax.Array) else x
        found.update(f"{whole.dtype}{whole.shape}".encode() + np.ascontiguousarray(whole).tobytes())
    return found.hexdigest()


def batches(config: Config, steps: list[int]) -> dict[str, Any]:
    """Reads the batches of these steps as a run that starts there; returns their hashes and the rows that were read."""
    source, rows = data.source(config.data, seed=config.run.seed, split="train"), set()

    class Noting:
        def batch(self, step: int, wanted: slice | None = None) -> data.Batch:
            rows.update(range(*wanted.indices(config.data.B)))
            return source.batch(step, wanted)

    spread = data.Spread(Noting(), (config.data.B, config.data.T), batch_sharding(config, context_of(config)))
    return {"hashes": [digest(next(data.loader(spread, step))[1]) for step in steps], "rows": sorted(rows)}


def refusal(body: Any) -> str:
    try:
        with distributed.consensus() as facts:
            body(facts)
    except ValueError as error:
        return str(error)
    return ""


def stopped_by_a_signal_to_one(config: Config) -> Summary:
    """Trains until process 1 is sent a SIGTERM, as its loader reads the third batch."""
    loader = data.loader

    def signalling(*arguments: Any) -> Iterator[Any]:
        for step, batch in loader(*arguments):
            if step == 2 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step, batch

    data.loader = signalling
    try:
        return train(config, quiet=True)
    finally:
        data.loader = loader


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    config = from_json(json.dumps(job["config"]))
    distributed.initialize(launch.detect(os.environ))
    me, seen = jax.process_index(), {}

    def fails(facts: dict[str, Any]) -> None:
        if me == 1:
            raise ValueError("no files here")

    seen["refused"] = refusal(fails)
    seen["differs"] = refusal(lambda facts: facts.update(corpus={"hash": min(me, 1)}))
    for sizes in job["meshes"]:
        c = dataclasses.replace(config, mesh=Mesh(**sizes))
        seen[str(sizes)] = batches(c, job["steps"])
    if job["trains"]:
        stopped = stopped_by_a_signal_to_one(config)
        seen["stopped"] = stopped.status, stopped.steps
        summary = train(config, quiet=True)
        seen["history"] = summary.history
        seen["eval"] = evaluate(summary.run_dir, mesh=config.mesh, newest=True)
    path.with_name(f"{path.stem}.{me}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
