"""Estimators of dF/dλ: one rule per file, and wrappers that run a rule over seeds and tasks."""

from metaopt.hypergrad._argmin import argmin
from metaopt.hypergrad._batching import over_seeds, over_tasks
from metaopt.hypergrad._check import check
from metaopt.hypergrad._diagnose import diagnose
from metaopt.hypergrad._direct import direct
from metaopt.hypergrad._evolution import es_single, evolution, persistent_es, truncated_es
from metaopt.hypergrad._finite_difference import darts_fd
from metaopt.hypergrad._first_order import bome, f2sa
from metaopt.hypergrad._flops import flops
from metaopt.hypergrad._forward import forward
from metaopt.hypergrad._hypergradient_descent import hypergradient_descent
from metaopt.hypergrad._implicit import implicit, warm_implicit
from metaopt.hypergrad._implicit_solve import implicit_solve
from metaopt.hypergrad._lookahead import lookahead
from metaopt.hypergrad._mix_with_es import mix_with_es
from metaopt.hypergrad._mixed import mixed_grad
from metaopt.hypergrad._partition import partition
from metaopt.hypergrad._recommend import recommend
from metaopt.hypergrad._reptile import reptile
from metaopt.hypergrad._sama import sama
from metaopt.hypergrad._solvers import Solver, bicgstab, cg, dense, gmres, lineax, neumann, nystrom
from metaopt.hypergrad._trace import trace
from metaopt.hypergrad._truncated import truncated
from metaopt.hypergrad._unroll import unroll, unrolled

__all__ = [
    "Solver",
    "argmin",
    "bicgstab",
    "bome",
    "cg",
    "check",
    "darts_fd",
    "dense",
    "diagnose",
    "direct",
    "es_single",
    "evolution",
    "f2sa",
    "flops",
    "forward",
    "gmres",
    "hypergradient_descent",
    "implicit",
    "implicit_solve",
    "lineax",
    "lookahead",
    "mix_with_es",
    "mixed_grad",
    "neumann",
    "nystrom",
    "over_seeds",
    "over_tasks",
    "partition",
    "persistent_es",
    "recommend",
    "reptile",
    "sama",
    "trace",
    "truncated",
    "truncated_es",
    "unroll",
    "unrolled",
    "warm_implicit",
]
