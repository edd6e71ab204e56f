"""The oracle's own gradients against differences of its results."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops import linear_oracle


@pytest.mark.parametrize("axes", ["", "H", "BTH", "BTHD"])
@pytest.mark.parametrize("delta", [False, True])
def test_gradients_are_differences(axes, delta):
    rng = np.random.default_rng(0)
    B, T, H, D, V = 2, 6, 4, 3, 5
    arrays = {
        "q": rng.standard_normal((B, T, 1, D)),
        "k": rng.standard_normal((B, T, 2, D)),
        "v": rng.standard_normal((B, T, 4, V)),
        "initial_state": rng.standard_normal((B, H, D, V)),
    }
    if axes:
        arrays["log_decay"] = -rng.exponential(size=[{"B": B, "T": T, "H": H, "D": D}[axis] for axis in axes])
    if delta:
        arrays["beta"] = rng.random((B, T, H))
    ids = np.array([[0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 2]])
    do, dS = rng.standard_normal((B, T, H, V)), rng.standard_normal((B, H, D, V))

    def results(arrays):
        return linear_oracle.linear_attention(**arrays, segment_ids=ids, scale=0.7, do=do, dS=dS)

    def loss(arrays):
        r = results(arrays)
        return (r["out"] * do).sum() + (r["final_state"] * dS).sum()

    gradients, step = results(arrays), 1e-6
    for name, x in arrays.items():
        along = rng.standard_normal(x.shape)
        up, down = (loss(arrays | {name: x + sign * step * along}) for sign in (1, -1))
        np.testing.assert_allclose((gradients[f"d{name}"] * along).sum(), (up - down) / (2 * step), rtol=1e-6)
