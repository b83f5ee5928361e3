"""Who runs it: the outer step and the outer loop around it, checkpoints, progress, several devices."""

from metaopt.training._fit import FitResult, fit
from metaopt.training._learner import Learner, LearnerState, learner
from metaopt.training._shard import shard

__all__ = ["FitResult", "Learner", "LearnerState", "fit", "learner", "shard"]
