"""The passkey of configs/needle.py with each row sharded over eight devices: `Mesh(seq=8)`, 64 bytes on each.

command   JAX_NUM_CPU_DEVICES=8 longattn train configs/needle_ring8.py      (one CPU makes up eight devices)
          or on two processes with four devices each:
              export JAX_NUM_CPU_DEVICES=4 LONGATTN_COORDINATOR=127.0.0.1:8476 LONGATTN_PROCESSES=2
              LONGATTN_PROCESS=1 longattn train configs/needle_ring8.py &
              LONGATTN_PROCESS=0 longattn train configs/needle_ring8.py
          or on eight chips, without JAX_NUM_CPU_DEVICES; configs/launch shows how to start several hosts
device    2 CPU cores, float32
time      20 s, on two processes 45 s: 0.1 s and 0.45 s a step
expected  held-out loss 2.480 (seed 0), on one process and on two: near ln 10 = 2.303. Fifty steps teach that the
          answer is digits; 10 % of them are right, as by guessing
"""

from longattn.config import Config, Mesh, Model, Needle, Optimiser, RoPE, Run, Softmax
from longattn.mask import Causal

config = Config(
    model=Model(
        N=2,  # layers
        E=64,  # model width; each of the eight devices holds an eighth of every matrix along it
        F=128,  # MLP width
        H=2,  # query heads
        K=2,  # key/value heads
        D=32,  # size of a head
        W=257,  # bytes and the token that begins a document
        mixers=(Softmax(mask=Causal(), rope=RoPE(base=10_000.0), qk_norm=True),),  # the needle may be anywhere before
        dtype="float32",  # CPUs have no fast bfloat16 products
    ),
    data=Needle(
        glob="",  # the haystack: the standard library's sources
        T=512,  # bytes per row, 64 of them on each device
        B=8,  # rows per step
        digits=4,  # of the passkey
        depth=None,  # the needle stands anywhere
    ),
    mesh=Mesh(
        seq=8,  # devices along the row; all other axes are 1
        strategy="ring",  # keys and values travel from device to device
        layout="zigzag",  # each device holds an early and a late piece of a row, so the load is balanced
    ),
    optimiser=Optimiser(
        lr=2e-3,  # peak learning rate
        warmup=10,  # steps
        loss_chunk=8192,  # all logits at once
    ),
    run=Run(
        name="needle_ring8",
        steps=50,  # shows that training runs and falls; recall takes thousands, as in configs/needle.py
        log_every=5,
        eval_every=25,
        eval_batches=4,  # 32 held-out rows
        save_every=25,
    ),
)
