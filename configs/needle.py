"""A passkey hidden in real text and asked for at the end: does the model retrieve across the whole row?

command   longattn train configs/needle.py
device    2 CPU cores, float32
time      about 15 minutes by estimate
expected  not yet run to its end; should pass 95 % per digit, guessing gives 10 %
"""

from longattn.config import Config, Model, Needle, Optimiser, RoPE, Run, Softmax
from longattn.mask import Causal

config = Config(
    model=Model(
        N=2,  # layers
        E=128,  # model width
        F=256,  # MLP width
        H=4,  # query heads
        K=4,  # key/value heads
        D=32,  # size of a head
        W=257,  # bytes and the token that begins a document
        mixers=(Softmax(mask=Causal(), rope=RoPE(base=10_000.0), qk_norm=True),),  # the needle may be anywhere before
        dtype="float32",  # CPUs have no fast bfloat16 products
    ),
    data=Needle(
        glob="",  # the haystack: the standard library's sources
        T=256,  # bytes per row
        B=32,  # rows per step
        digits=4,  # of the passkey
        depth=None,  # the needle stands anywhere
    ),
    optimiser=Optimiser(
        lr=2e-3,  # peak learning rate
        warmup=100,  # steps
        loss_chunk=8192,  # all logits at once
    ),
    run=Run(
        name="needle",
        steps=2000,
        log_every=50,
        eval_every=500,
        eval_batches=16,  # 512 held-out rows
        save_every=500,
    ),
)
