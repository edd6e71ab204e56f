"""`longattn plan`: compiles a training step for a machine you don't have, and reports memory, messages and time."""

from longattn.plan.command import PlanOptions, run, with_mesh
from longattn.plan.models import MODELS

__all__ = ["MODELS", "PlanOptions", "run", "with_mesh"]
