"""The passkey of configs/needle.py with its rows divided over eight devices: `Mesh(seq=8)`, 64 bytes on each.

command   JAX_NUM_CPU_DEVICES=8 longattn train configs/needle_ring8.py      (a CPU that passes for eight devices)
          on two processes, each with four: the two lines below, in two terminals or with & between them
              export JAX_NUM_CPU_DEVICES=4 LONGATTN_COORDINATOR=127.0.0.1:8476 LONGATTN_PROCESSES=2
              LONGATTN_PROCESS=0 longattn train configs/needle_ring8.py & LONGATTN_PROCESS=1 longattn train \\
                  configs/needle_ring8.py
          on eight chips without JAX_NUM_CPU_DEVICES, and on several hosts as configs/launch says
device    2 CPU cores, float32
time      TIME
expected  EXPECTED
"""

from longattn.config import Config, Mesh, Model, Needle, Optimiser, RoPE, Run, Softmax
from longattn.mask import Causal

config = Config(
    model=Model(
        N=2,  # layers
        E=64,  # model width; the eight devices on seq each hold an eighth of every matrix along it
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
        strategy="all_gather",  # how queries meet the keys of other devices
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
