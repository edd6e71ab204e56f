"""Training: `train(config)`, `evaluate(run_dir)` and `load_params(run_dir)`."""

from longattn.train.evaluate import evaluate, load_params
from longattn.train.run import Summary, train

__all__ = ["Summary", "evaluate", "load_params", "train"]
