"""How dF/dλ is estimated: one rule a file, and what carries a rule over seeds and tasks."""

from metaopt.hypergrad._batching import over_seeds, over_tasks
from metaopt.hypergrad._direct import direct
from metaopt.hypergrad._evolution import ParticlesState, es_single, evolution, persistent_es, truncated_es
from metaopt.hypergrad._implicit import WarmImplicitState, refuse_unanswerable, used_leaves, warm_implicit
from metaopt.hypergrad._lookahead import LookaheadState, lookahead
from metaopt.hypergrad._mix_with_es import MixState, mix_with_es
from metaopt.hypergrad._unroll import checkpointed_scan, unroll, unrolled

__all__ = [
    "LookaheadState",
    "MixState",
    "ParticlesState",
    "WarmImplicitState",
    "checkpointed_scan",
    "direct",
    "es_single",
    "evolution",
    "lookahead",
    "mix_with_es",
    "over_seeds",
    "over_tasks",
    "persistent_es",
    "refuse_unanswerable",
    "truncated_es",
    "unroll",
    "unrolled",
    "used_leaves",
    "warm_implicit",
]
