"""A byte-level language model of the Python standard library's own sources, below `xz -9`.

command   longattn train configs/bytelm_small.py
device    2 CPU cores, float32
time      40 to 60 minutes: 0.12 s a step on quiet cores, 0.18 s on busy ones
expected  1.08 bits per byte on the held-out files (seed 0); `xz -9` takes 1.75 for each of them by itself and 1.40
          for all concatenated, with the sources of Python 3.12.1: experiments/2026-11-bytelm_small
"""

from longattn.config import ByteLM, Config, Model, Optimiser, RoPE, Run, Softmax
from longattn.mask import Causal, Window

rope = RoPE(base=10_000.0)  # periods reach well beyond T
near = Softmax(mask=Causal() & Window(256), rope=rope, qk_norm=True)  # spelling and syntax: little context, cheap
far = Softmax(mask=Causal(), rope=rope, qk_norm=True)  # copies names and idioms from anywhere in the row

config = Config(
    model=Model(
        N=4,  # layers
        E=160,  # model width; an hour reads about fifteen bytes per parameter, too few for a larger model
        F=432,  # MLP width, about 8/3 E
        H=5,  # query heads; many small ones, since copying needs several
        K=5,  # key/value heads
        D=32,  # size of a head
        W=257,  # 256 bytes and the token that begins a document
        mixers=(near, far),  # layers alternate
        tie=True,  # bytes are few, so the head is small either way
        dtype="float32",  # CPUs have no fast bfloat16 products
    ),
    data=ByteLM(
        glob="",  # the standard library's sources, which every machine has: about 30 MB
        T=1024,  # bytes of context
        B=1,  # rows per step: small steps learn more per byte, and an hour limits the bytes
        valid=0.05,  # share of the documents held out
    ),
    optimiser=Optimiser(
        lr=2e-3,  # high; QK-norm keeps small models stable at it
        warmup=500,  # steps
        final=0.01,  # decays almost to 0, so that the last steps settle
        b2=0.99,  # a longer memory for small batches
        weight_decay=0.1,
        clip=1.0,
        loss_chunk=4096,  # all logits at once: 257 per token are few
    ),
    run=Run(
        name="bytelm_small",
        steps=19000,  # about 19 million bytes, two thirds of the corpus
        log_every=100,
        eval_every=2000,
        eval_batches=96,  # about 100,000 held-out bytes; `longattn eval` reads them all
        save_every=1000,
    ),
)
