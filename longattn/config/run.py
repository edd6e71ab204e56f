"""The configs of the optimiser and of the run, and the whole config that `longattn train` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from longattn.config.checks import folder_name, fraction, not_negative, positive, typed, usable_path
from longattn.config.data import MQAR, ByteLM, Data
from longattn.config.mesh import Mesh
from longattn.config.model import Model


@dataclass(frozen=True)
class Optimiser:
    """AdamW with linear warm-up and cosine decay, after clipping by global norm."""

    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear warm-up from 0
    final: float = 0.1  # learning rate at the last step, as a share of lr
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, on matrices only
    clip: float = 1.0  # global gradient norm is clipped to this; 0 turns clipping off
    accumulate: int = 1  # micro-batches per step; must divide data.B
    z_loss: float = 0.0  # weight of the mean squared log-partition
    loss_chunk: int = 512  # number of tokens whose logits exist at once

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "accumulate", "loss_chunk")
        fraction(self, "final", "b1", "b2")
        if self.lr <= 0:
            raise ValueError(f"Optimiser.lr={self.lr} must be positive")
        not_negative(self, "warmup", "eps", "weight_decay", "clip", "z_loss")


@dataclass(frozen=True)
class Run:
    """How long a training runs, what it writes when, and where."""

    name: str = "run"  # the folder under `dir`
    dir: str = "runs"  # parent of the run's folder
    steps: int = 1000  # optimiser steps
    seed: int = 0  # draws the parameters and the data order
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 250  # steps between evaluations; 0: only at the end
    eval_batches: int = 16  # batches of an evaluation; 0: the whole held-out set
    save_every: int = 250  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, besides the best
    profile: tuple[int, int] | None = None  # (first step, number of steps) of a trace, for `longattn profile run`
    tensorboard: bool = False  # also write TensorBoard scalars
    init_from: str = ""  # start from the parameters of this run's best checkpoint

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "steps", "log_every", "save_every", "keep")
        not_negative(self, "eval_every", "eval_batches")
        folder_name(self, "name")
        usable_path(self, "dir", "init_from")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"Run.seed={self.seed} must lie in [0, 2**31)")
        if self.profile is not None and min(self.profile) < 1:
            raise ValueError(f"Run.profile={self.profile} must be (first step, number of steps), both at least 1")


@dataclass(frozen=True)
class Config:
    """Everything that determines a training run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=ByteLM)
    mesh: Mesh = field(default_factory=Mesh)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        typed(self)
        if self.data.B % self.optimiser.accumulate:
            raise ValueError(
                f"optimiser.accumulate={self.optimiser.accumulate} must divide data.B={self.data.B}: "
                f"set B to a multiple of {self.optimiser.accumulate}"
            )
        rows = self.data.B // self.optimiser.accumulate
        if rows % (self.mesh.data * self.mesh.fsdp):
            raise ValueError(
                f"mesh.data={self.mesh.data} * mesh.fsdp={self.mesh.fsdp} must divide {rows}, the rows of a micro-batch"
                f": set data.B to a multiple of {self.mesh.data * self.mesh.fsdp * self.optimiser.accumulate}, or put "
                "devices along mesh.seq or mesh.tensor instead"
            )
        along = (
            f"mesh.ring={self.mesh.ring} * mesh.seq={self.mesh.seq}"
            if self.mesh.ring > 1
            else f"mesh.seq={self.mesh.seq}"
        )
        if short := -self.data.T % self.mesh.unit:
            unit = f"{self.mesh.unit} for mesh.layout={self.mesh.layout!r}" if self.mesh.unit > self.mesh.P else "it"
            raise ValueError(
                f"{along} must divide data.T={self.data.T}: set T to a multiple of {unit}, next {self.data.T + short}"
            )
        if self.mesh.size > 1 and self.model.E % (self.mesh.fsdp * self.mesh.P):
            raise ValueError(
                f"mesh.fsdp={self.mesh.fsdp} * {along} must divide model.E={self.model.E}, since they slice matrices: "
                f"put at most {math.gcd(self.mesh.fsdp * self.mesh.P, self.model.E)} devices along them and the others "
                "along mesh.data, or change E"
            )
        if self.model.K % self.mesh.tensor or self.model.F % self.mesh.tensor:
            raise ValueError(
                f"mesh.tensor={self.mesh.tensor} must divide model.K={self.model.K} and model.F={self.model.F}: at "
                f"most {math.gcd(self.mesh.tensor, self.model.K, self.model.F)} devices can share heads and the MLP's "
                "width; put the others along mesh.seq, mesh.fsdp or mesh.data"
            )
        if self.run.profile is not None and sum(self.run.profile) - 1 > self.run.steps:
            first, count = self.run.profile
            raise ValueError(
                f"run.profile={self.run.profile} ends with step {first + count - 1}, after run.steps={self.run.steps}: "
                "trace earlier steps"
            )
        vocabulary = self.data.vocabulary if isinstance(self.data, MQAR) else 257
        if vocabulary > self.model.W:
            raise ValueError(
                f"model.W={self.model.W} must be at least {vocabulary}, the vocabulary of {type(self.data).__name__}"
            )
