"""Shapes of public models by name. Llama 3: table 3 of arXiv:2407.21783; the 1B of Llama 3.2: its model card."""

from __future__ import annotations

from longattn.config import Model, RoPE, Softmax

_LLAMA = (Softmax(rope=RoPE(base=500_000.0)),)

MODELS: dict[str, Model] = {
    "llama3_1b": Model(
        N=16, E=2048, F=8192, H=32, K=8, D=64, W=128_256, mixers=_LLAMA, tie=True, norm_eps=1e-5, remat="attention"
    ),
    "llama3_8b": Model(
        N=32, E=4096, F=14_336, H=32, K=8, D=128, W=128_256, mixers=_LLAMA, tie=False, norm_eps=1e-5, remat="attention"
    ),
    "llama3_70b": Model(
        N=80, E=8192, F=28_672, H=64, K=8, D=128, W=128_256, mixers=_LLAMA, tie=False, norm_eps=1e-5, remat="attention"
    ),
}
