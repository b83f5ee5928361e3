"""The outer loop: outer steps, the loop around them, checkpoints, progress reports, and several devices."""

from metaopt.training._fit import FitResult, fit
from metaopt.training._learner import Learner, LearnerState, learner
from metaopt.training._shard import shard

__all__ = ["FitResult", "Learner", "LearnerState", "fit", "learner", "shard"]
