"""Tasks that models are trained and tested on: pure functions of (config, seed, index), without I/O.

Every task is next-token prediction. A row is `tokens [T]` int32 and `weights [T]` float32, where `weights[t]` is the
loss weight of *predicting* token t from the tokens before it.
"""

from longattn.tasks import bytelm, mqar, needle

__all__ = ["bytelm", "mqar", "needle"]
