"""Multi-query associative recall (arXiv:2312.04927) with exact attention, which solves it.

command   longattn train configs/mqar.py
device    2 CPU cores, float32
time      about 10 minutes by estimate
expected  not yet run to its end; exact attention should pass 99 % of the held-out answers, guessing among the row's
          values gives 6 %
"""

from longattn.config import MQAR, Config, Model, Optimiser, RoPE, Run, Softmax
from longattn.mask import Causal

config = Config(
    model=Model(
        N=2,  # two layers: the first looks one token back, the second finds the key's earlier mention
        E=64,  # model width, Zoology's smallest
        F=128,  # MLP width
        H=2,  # query heads
        K=2,  # key/value heads
        D=32,  # size of a head
        W=256,  # vocabulary; keys are the lower half, values the upper
        mixers=(Softmax(mask=Causal(), rope=RoPE(base=10_000.0)),),  # every layer attends to all that came before
        dtype="float32",  # CPUs have no fast bfloat16 products
    ),
    data=MQAR(
        T=128,  # tokens per row
        B=64,  # rows per step
        pairs=16,  # key-value pairs to remember
        vocabulary=256,
        alpha=0.01,  # Zoology's power law of the gaps
    ),
    optimiser=Optimiser(
        lr=3e-3,  # recall appears at once or not at all; lower rates wait longer for it
        warmup=100,  # steps
        weight_decay=0.1,  # on matrices
        loss_chunk=8192,  # all logits at once
    ),
    run=Run(
        name="mqar",
        steps=3000,
        log_every=50,
        eval_every=500,
        eval_batches=8,  # 512 held-out rows, 8192 answers
        save_every=500,
    ),
)
