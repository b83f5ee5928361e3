"""How dF/dλ is estimated: one rule a file, and what carries a rule over seeds and tasks."""

from metaopt.hypergrad._batching import over_seeds, over_tasks
from metaopt.hypergrad._forward import forward
from metaopt.hypergrad._implicit import WarmImplicitState, refuse_unanswerable, used_leaves, warm_implicit
from metaopt.hypergrad._lookahead import LookaheadState, lookahead
from metaopt.hypergrad._partition import PartitionState, partition
from metaopt.hypergrad._trace import Contributions, trace
from metaopt.hypergrad._truncated import TruncatedState, t1t2, truncated
from metaopt.hypergrad._unroll import checkpointed_scan, unroll, unrolled

__all__ = [
    "Contributions",
    "LookaheadState",
    "PartitionState",
    "TruncatedState",
    "WarmImplicitState",
    "checkpointed_scan",
    "forward",
    "lookahead",
    "over_seeds",
    "over_tasks",
    "partition",
    "refuse_unanswerable",
    "t1t2",
    "trace",
    "truncated",
    "unroll",
    "unrolled",
    "used_leaves",
    "warm_implicit",
]
