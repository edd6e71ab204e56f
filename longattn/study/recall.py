"""Part 3a, recall: trains small models on MQAR and a passkey, and reports the state and reads of their mixers.

As in Zoology (arXiv:2312.04927) the model has two layers. Zoology puts a short convolution before every mixer. Here the
first layer is softmax attention over two tokens, the same for every way; the second is the way under test, without
rotary positions. So two points differ in the second layer alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from longattn import config
from longattn.mask import Causal, Window
from longattn.models import bytes_read_per_token, state_elements
from longattn.study.learn import learn, score
from longattn.study.presets import RecallPlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit, share_interval
from longattn.study.ways import READ, Way, trained, without_positions
from longattn.tasks import mqar, needle

Task = config.MQAR | config.Needle


def units(plan: RecallPlan, store: Store) -> list[Unit]:
    """Returns a unit per task and way, the hardest setting of each task first.

    Ways that are not measured everywhere get a single training: MQAR's hardest setting, with one seed.
    """
    made = []
    for task, steps in [(t, plan.mqar_steps) for t in plan.mqar] + [(t, plan.needle_steps) for t in plan.needle]:
        hardest = (plan.mqar + plan.needle).index(task) == 0
        for way in trained(plan.windows, plan.without):
            whole = plan.every or way.everywhere
            taken = plan.recurrent_steps if isinstance(task, config.MQAR) and not way.everywhere else steps
            seeds = (plan.seeds if isinstance(task, config.MQAR) else plan.needle_seeds)[: None if whole else 1]
            if whole or hardest:
                key = f"recall/{way.name}/{_name(task)}"
                made.append(
                    Unit(
                        key,
                        lambda clock, t=task, w=way, n=taken, s=seeds: _recall(plan, w, t, n, s, clock),
                        weight=taken * task.B * task.T * len(seeds),
                    )
                )
    return made


def _name(task: Task) -> str:
    if isinstance(task, config.MQAR):
        return f"mqar/T={task.T}/pairs={task.pairs}"
    return f"needle/T={task.T}/digits={task.digits}"


def _config(plan: RecallPlan, way: Way, task: Task, steps: int) -> config.Config:
    local = config.Softmax(mask=Causal() & Window(1))
    model = dataclasses.replace(
        plan.model,
        mixers=(local, without_positions(way)),
        W=task.vocabulary if isinstance(task, config.MQAR) else 257,
    )
    optimiser = config.Optimiser(lr=plan.lr, warmup=max(1, steps // 10))
    return config.Config(model=model, data=task, optimiser=optimiser, run=config.Run(steps=steps))


def _recall(
    plan: RecallPlan, way: Way, task: Task, steps: int, seeds: tuple[int, ...], clock: Clock
) -> Iterable[Number]:
    cfg = _config(plan, way, task, steps)
    model = learn(cfg, seeds, clock)
    sums = score(model, -(-plan.questions // task.B))
    hits, n = sums["correct_sum"], float(sums["weight_sum"][0])
    # The digits of a key are right or wrong together: they count as one question.
    tokens_per_question = task.digits if isinstance(task, config.Needle) else 1
    low, high = share_interval((hits / tokens_per_question).tolist(), n / tokens_per_question)
    at = (
        {"task": "mqar", "T": task.T, "pairs": task.pairs}
        if isinstance(task, config.MQAR)
        else {"task": "needle", "T": task.T, "digits": task.digits}
    )
    value = float(hits.mean() / n)
    number = lambda quantity, value, unit, badge, **more: Number(
        "recall", quantity, way.name, float(value), unit, badge, at=at, **more
    )
    yield number(
        "accuracy",
        value,
        "",
        "measured",
        low=low,
        high=high,
        samples=tuple((hits / n).tolist()),
        seeds=seeds,
        note=model.note,
    )
    mixer = cfg.model.layers[-1]
    yield number("state_elements", state_elements(mixer, cfg.model, task.T), "elements", "predicted")
    yield number("bytes_read", bytes_read_per_token(mixer, cfg.model, task.T), "B", "predicted", note=READ)
    module = mqar if isinstance(task, config.MQAR) else needle
    yield number("chance", module.chance(task), "", "predicted")
    if isinstance(task, config.MQAR):
        yield number("guess", mqar.guess(task), "", "predicted", note="knows the values of the row, not their keys")
    yield number("train_loss", sum(model.loss) / len(model.loss), "nats", "measured", seeds=seeds, note=model.note)
