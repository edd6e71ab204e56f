"""What a training step needs and takes on a machine that need not be there: its program is compiled, not run."""

from longattn.analysis.plan.command import PlanOptions, run, with_mesh
from longattn.analysis.plan.presets import MODELS

__all__ = ["MODELS", "PlanOptions", "run", "with_mesh"]
