"""Who is not timed, and why."""

from __future__ import annotations

import json
import os

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from longattn.bench import attention, compare
from longattn.bench.compare import admission, measurement
from longattn.mask import Full
from longattn.ops.linear import linear_attention
from tests.bench.compare.tiny import SHARED, TINY, quiet
from tests.slow import but_few


def fails(_: attention.AttentionOptions) -> attention.Attend:
    raise TypeError("no such argument\nsecond line")


@pytest.mark.slow
def test_rivals_that_disagree_or_fail_are_rows_of_one_document_about_a_trace_of_its_own(
    monkeypatch, capsys, tmp_path
) -> None:
    another = tmp_path / "plugins" / "profile" / "another" / "host.xplane.pb"
    another.parent.mkdir(parents=True)
    another.touch()
    os.utime(another, (2**32, 2**32))  # newer than anything that is recorded here
    load = [1.0]
    monkeypatch.setattr(measurement.os, "getloadavg", lambda: (load[-1], 0.0, 0.0))
    monkeypatch.setattr(measurement, "admit", lambda options: (load.append(9.0), admission.admit(options))[1])
    wrong = compare.Contestant("wrong", lambda o: attention.jax_nn(Full()))
    monkeypatch.setitem(compare.CONTESTANTS, "wrong", wrong)
    monkeypatch.setitem(compare.CONTESTANTS, "rival", compare.Contestant("rival", fails))
    names = ("wrong", "rival", "xla")
    options = compare.CompareOptions("attention_forward", contestants=names, json=True, out=str(tmp_path), **TINY)
    document = compare.run(options)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert set(document) == SHARED | {"rows", "differences", "plot"}
    assert (document["version"], document["kind"], document["differences"]) == (2, "compare", [])
    assert document["load"] == 1.0  # of before
    disagrees, failed, ran = document["rows"]
    assert disagrees["reason"].startswith("it disagrees with reference in float32: relative error")
    assert failed["reason"] == "TypeError: no such argument second line"
    assert "samples" not in disagrees and "samples" not in failed
    assert len(ran["samples"]) == TINY["rounds"]
    assert ran["ratio"]["value"] == 1  # the first that ran


def test_what_cannot_be_checked_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(admission, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"T=300 is too long to be checked.*it needs .* free; choose a shorter one"):
        admission.admit(compare.CompareOptions("attention_forward", dtype="float32", **TINY))


@pytest.mark.parametrize("kind", but_few(["none", "none_delta", "vector_delta"]))
def test_linear_attention_of_every_kind_is_admitted(kind) -> None:
    """And the yardstick, whose problem is another."""
    options = compare.CompareOptions("linear_forward", ("xla", "attention"), kind=kind, T=40, H=2, K=1, D=8)
    against, fns, known = admission.admit(options.resolved())
    assert (against, list(fns)) == ("reference", ["xla", "attention"])
    assert all(x["error"] < attention.AGREE["float32"] for x in known.values())


@pytest.mark.slow
def test_gradients_of_linear_attention_are_checked(monkeypatch) -> None:
    @jax.custom_vjp
    def heavier(x):
        return x

    heavier.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))

    def steep(q, k, v, log_decay):
        return linear_attention(q, k, v, log_decay=heavier(log_decay), implementation="xla")[0]

    monkeypatch.setitem(compare.LINEAR, "steep", compare.Contestant("steep", lambda o: steep))
    options = compare.CompareOptions("linear_forward_backward", ("steep", "xla", "pallas_tpu"), T=40, H=2, D=8)
    _, fns, known = admission.admit(options.resolved())
    assert list(fns) == ["xla"]
    assert known["steep"]["reason"].startswith("it disagrees with reference in float32: relative error 1.0e-03")
    assert "the kernels are for TPUs" in known["pallas_tpu"]["reason"]


def test_linear_kernels_for_tpus_take_part() -> None:
    """Under the interpreter of TPU kernels."""
    options = compare.CompareOptions("linear_forward", ("pallas_tpu",), T=70, H=2, D=16, kind="scalar_delta")
    with pltpu.force_tpu_interpret_mode():
        _, fns, known = admission.admit(options.resolved())
    assert list(fns) == ["pallas_tpu"], known


@pytest.mark.slow
def test_ours_that_fails_is_an_error(monkeypatch, tmp_path) -> None:
    options = compare.CompareOptions("attention_forward", contestants=("xla",), out=str(tmp_path), **TINY)
    monkeypatch.setitem(compare.CONTESTANTS, "xla", compare.Contestant("ours", fails))
    with pytest.raises(TypeError, match="no such argument"):
        compare.run(options, quiet())
