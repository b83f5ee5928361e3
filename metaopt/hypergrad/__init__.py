"""How dF/dλ is estimated: one rule a file, and what carries a rule over seeds and tasks."""

from metaopt.hypergrad._batching import over_seeds, over_tasks
from metaopt.hypergrad._check import Check, LeafCheck, check
from metaopt.hypergrad._diagnose import Diagnosis, Finding, diagnose
from metaopt.hypergrad._flops import flops
from metaopt.hypergrad._implicit import WarmImplicitState, refuse_unanswerable, used_leaves, warm_implicit
from metaopt.hypergrad._lookahead import LookaheadState, lookahead
from metaopt.hypergrad._mixed import mixed_grad
from metaopt.hypergrad._unroll import checkpointed_scan, unroll, unrolled

__all__ = [
    "Check",
    "Diagnosis",
    "Finding",
    "LeafCheck",
    "LookaheadState",
    "WarmImplicitState",
    "check",
    "checkpointed_scan",
    "diagnose",
    "flops",
    "lookahead",
    "mixed_grad",
    "over_seeds",
    "over_tasks",
    "refuse_unanswerable",
    "unroll",
    "unrolled",
    "used_leaves",
    "warm_implicit",
]
