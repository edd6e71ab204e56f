"""The sizes of a study: what each part measures, and its time budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longattn import config
from longattn.config import MQAR, ByteLM, Needle
from longattn.models import MIXERS


@dataclass(frozen=True)
class CostPlan:
    """Part 1. Exponents are fitted to the three largest lengths of each way."""

    seconds: float = 600  # time budget of the part, some five times what two quiet cores take
    H: int = 4  # heads of the timed layer
    D: int = 64  # head size
    dtype: Literal["float32", "bfloat16"] = "float32"
    windows: tuple[int, ...] = (32,)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    dense_limit: int = 4096  # longest T of dense attention, which stores every score
    repeats: int = 6  # timings of each program; the range of six covers the median with 97%
    tokens: int = 0  # tokens per batch of the throughput measurement; 0: it is left out
    share_lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144, 1048576)
    every: bool = False  # measure every way at every point; else only softmax attention, and the others at one
    without: tuple[str, ...] = ()  # mixers to leave out, for lack of time


@dataclass(frozen=True)
class MemoryPlan:
    """Part 2. What fits each chip, by formula: it takes seconds."""

    seconds: float = 120
    model: config.Model = config.Model(N=12, E=768, F=2048, H=12, K=12, D=64, W=257)  # 85 million parameters
    windows: tuple[int, ...] = (32,)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)  # of the figure
    held_at: int = 65536  # the T at which the step's memory is shown by kind
    remats: tuple[str, ...] = ("attention", "none")
    batch_at: int = 8192  # the T of the largest batch
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecallPlan:
    """Part 3a. Small models on MQAR and needle: two layers, the first a window of two tokens."""

    seconds: float = 1500
    model: config.Model = config.Model(N=2, E=64, F=128, H=4, K=4, D=16, W=257, tie=False, dtype="float32", scan=False)
    windows: tuple[int, ...] = (32,)
    mqar: tuple[MQAR, ...] = (MQAR(T=64, B=32, pairs=8, vocabulary=64),)
    mqar_steps: int = 450
    recurrent_steps: int = 1200  # of ways without softmax attention, which learn MQAR more slowly
    needle: tuple[Needle, ...] = (Needle(T=144, B=32, digits=4),)
    needle_steps: int = 500
    lr: float = 4e-3
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of MQAR
    needle_seeds: tuple[int, ...] = (0,)
    questions: int = 1024  # held-out rows
    every: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContextPlan:
    """Part 3b. A byte language model on real text at several context lengths, and its loss without distant context."""

    recorded: bool = False  # show a model that was trained earlier, and train none
    seconds: float = 110
    model: config.Model = config.Model(N=2, E=96, F=256, H=2, K=2, D=48, W=257, dtype="float32")
    windows: tuple[int, ...] = (32,)
    data: ByteLM = ByteLM()
    lengths: tuple[int, ...] = (128, 512, 1024)
    tokens: int = 2048  # tokens per step
    steps: int = 100
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0,)
    eval_tokens: int = 131072  # held-out tokens for the loss by position
    tail: int = 512  # bytes whose loss the control measures
    keep: tuple[int, ...] = (0, 8, 32, 128, 512)  # bytes before the tail that the control keeps
    documents: int = 32  # documents of the control
    every: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class SequencePlan:
    """Part 4. One layer's attention, sharded along the sequence over all devices of each machine, by formula."""

    seconds: float = 20
    T: int = 131_072
    H: int = 32  # Llama 3 8B's attention
    K: int = 8
    D: int = 128
    machines: tuple[str, ...] = ("v5e:2x4", "h100:8")


@dataclass(frozen=True)
class PodPlan:
    """Part 5. Public models on machines that the reader does not have."""

    seconds: float = 60  # time to compile; the remaining cases take figures compiled earlier
    cases: int = 6  # number of cases, from the first on


@dataclass(frozen=True)
class Preset:
    """A whole study."""

    cost: CostPlan = CostPlan()
    memory: MemoryPlan = MemoryPlan()
    recall: RecallPlan = RecallPlan()
    context: ContextPlan = ContextPlan()
    sequence: SequencePlan = SequencePlan()
    pod: PodPlan = PodPlan()


_FAMILY = tuple(name for name in MIXERS if name != "Softmax")


def _but(*names: str) -> tuple[str, ...]:
    """Returns the mixers of the linear family without these."""
    return tuple(name for name in _FAMILY if name not in names)


QUICK = Preset(
    CostPlan(without=_but("RetNet", "GatedDeltaNet")),
    MemoryPlan(),
    RecallPlan(without=_but("GatedDeltaNet")),
    ContextPlan(recorded=True),  # a minute of training resolves nothing on real text
)

_SMALL = config.Model(N=4, E=256, F=704, H=4, K=4, D=64, W=257, dtype="float32", scan=False)
_HOUR = 3600.0

FULL = Preset(
    CostPlan(
        seconds=2 * _HOUR,
        H=8,
        windows=(64, 256),
        lengths=(1024, 2048, 4096, 8192, 16384, 32768),
        dense_limit=8192,
        repeats=12,
        tokens=32768,
        every=True,
    ),
    MemoryPlan(
        windows=(64, 256),
        remats=("attention", "none", "full", "dots"),
    ),
    RecallPlan(
        seconds=4 * _HOUR,
        windows=(64, 256),
        mqar=tuple(MQAR(T=T, B=64, pairs=pairs, vocabulary=256) for T, pairs in ((256, 16), (128, 8), (512, 32))),
        mqar_steps=2000,
        recurrent_steps=4000,
        needle=tuple(Needle(T=T, B=32, digits=4) for T in (256, 512)),
        needle_steps=2000,
        seeds=(0, 1, 2, 3, 4),
        needle_seeds=(0, 1, 2),
        questions=3000,
        every=True,
    ),
    ContextPlan(
        seconds=5 * _HOUR,
        model=_SMALL,
        windows=(64, 256),
        lengths=(256, 1024, 4096),
        tokens=8192,
        steps=3000,
        seeds=(0, 1, 2),
        eval_tokens=2**21,
        keep=(0, 8, 32, 128, 512, 1024, 2048),
        documents=100,
        every=True,
    ),
    pod=PodPlan(seconds=_HOUR),
)

_TINY = config.Model(N=2, E=16, F=32, H=2, K=2, D=8, W=257, dtype="float32")

SMOKE = Preset(  # takes seconds: tests that every part runs; its numbers mean nothing
    CostPlan(
        H=1,
        D=8,
        windows=(4,),
        lengths=(32, 64, 128),
        dense_limit=128,
        repeats=2,
        share_lengths=(1024, 4096),
        without=_but("RetNet"),
    ),
    MemoryPlan(
        model=_TINY,
        windows=(4,),
        lengths=(256, 512),
        held_at=512,
        remats=("attention",),
        batch_at=512,
        without=_FAMILY,
    ),
    RecallPlan(
        model=config.Model(N=2, E=16, F=32, H=1, K=1, D=16, tie=False, dtype="float32", scan=False),
        windows=(4,),
        mqar=(MQAR(T=16, B=4, pairs=2, vocabulary=16),),
        mqar_steps=2,
        recurrent_steps=2,
        needle=(Needle(T=128, B=4, digits=2),),
        needle_steps=2,
        seeds=(0, 1),
        needle_seeds=(0, 1),
        questions=8,
        without=_FAMILY,
    ),
    ContextPlan(
        model=_TINY,
        windows=(4,),
        data=ByteLM(max_bytes=2_000_000),
        lengths=(32, 64),
        tokens=128,
        steps=2,
        eval_tokens=256,
        tail=16,
        keep=(0, 8),
        documents=4,
        without=_FAMILY,
    ),
    SequencePlan(T=1024, H=2, K=1, D=8),
    PodPlan(seconds=0, cases=2),
)

PRESETS = {"quick": QUICK, "full": FULL, "smoke": SMOKE}
