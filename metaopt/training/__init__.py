"""The outer loop: outer steps, the loop around them, checkpoints, progress reports, and several devices."""

from metaopt._progress import report_progress
from metaopt.training._fine_tune import fine_tune
from metaopt.training._fit import FitResult, fit
from metaopt.training._learner import Learner, learner
from metaopt.training._log_to import log_to
from metaopt.training._propose import propose
from metaopt.training._shard import shard

__all__ = [
    "FitResult",
    "Learner",
    "fine_tune",
    "fit",
    "learner",
    "log_to",
    "propose",
    "report_progress",
    "shard",
]
