"""How dF/dλ is estimated: one rule a file, and what carries a rule over seeds and tasks."""

from metaopt.hypergrad._batching import over_seeds, over_tasks
from metaopt.hypergrad._implicit import (
    ImplicitState,
    implicit,
    implicit_solve,
    refuse_unanswerable,
    used_leaves,
    warm_implicit,
)
from metaopt.hypergrad._lookahead import LookaheadState, lookahead
from metaopt.hypergrad._solvers import Matvec, Solver, bicgstab, cg, dense, gmres, lineax, neumann, normal_cg, nystrom
from metaopt.hypergrad._unroll import checkpointed_scan, unroll, unrolled

__all__ = [
    "ImplicitState",
    "LookaheadState",
    "Matvec",
    "Solver",
    "bicgstab",
    "cg",
    "checkpointed_scan",
    "dense",
    "gmres",
    "implicit",
    "implicit_solve",
    "lineax",
    "lookahead",
    "neumann",
    "normal_cg",
    "nystrom",
    "over_seeds",
    "over_tasks",
    "refuse_unanswerable",
    "unroll",
    "unrolled",
    "used_leaves",
    "warm_implicit",
]
