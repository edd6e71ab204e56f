"""What a training step needs and takes on a machine that need not be there: its program is compiled, not run."""

from longattn.plan.command import PlanOptions, run, with_mesh
from longattn.plan.models import MODELS

__all__ = ["MODELS", "PlanOptions", "run", "with_mesh"]
