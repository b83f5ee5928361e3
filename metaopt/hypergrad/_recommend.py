"""What each rule costs on a problem at hand, counted without running it, and which one to take."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from metaopt import base, inner
from metaopt.hypergrad import _check, _flops, _forward, _implicit, _lookahead, _truncated, _unroll


class Cost(NamedTuple):
    """One rule on the problem at hand.

    Attributes:
      name: the rule.
      kind: the estimator's.
      memory: MiB of temporary memory of one compiled estimate, as the compiler states it; NaN where refused.
      flops: of one estimate, relative to plain training of `num_steps` with one evaluation of the outer loss; a lower
        bound where a solver iterates until it has converged (`cg`), since one iteration is counted.
      refused: why the rule cannot answer, or "".
    """

    name: str
    kind: str
    memory: float
    flops: float
    refused: str = ""


class Recommendation(NamedTuple):
    """What `recommend` returns; printed, it is a table.

    Attributes:
      costs: one `Cost` per rule.
      take: the name of the rule to take.
      why: one sentence.
    """

    costs: list[Cost]
    take: str
    why: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("rule", "kind", "MiB", "FLOPs / training")]
        for c in self.costs:
            figures = (f"{c.memory:.2f}", f"{c.flops:.2f}") if not c.refused else ("refused", "")
            rows.append((("* " if c.name == self.take else "  ") + c.name, c.kind, *figures))
        notes = [f"{c.name}: {c.refused}" for c in self.costs if c.refused]
        return "\n".join([_check.aligned(rows), f"Take {self.take}: {self.why}", *notes])


def candidates(problem: base.Problem, hyperparams: base.HyperParams, num_steps: int) -> dict[str, base.Estimator]:
    """The rules that `recommend` compares by default, each for T inner steps."""
    num_hyperparams = sum(np.size(leaf) for leaf in jax.tree.leaves(hyperparams))
    # The largest divisor of T that is at most √T; a prime has none but 1.
    window = max(k for k in range(1, math.isqrt(num_steps) + 1) if num_steps % k == 0)
    rules = {
        **{f'unrolled, remat="{r}"': _unroll.unrolled(problem, num_steps=num_steps, remat=r) for r in _unroll.REMAT},
        f"truncated, {window} steps": _truncated.truncated(problem, num_steps=num_steps, truncation_length=window),
        "lookahead, 1 step": _lookahead.lookahead(problem, horizon=num_steps),
        "implicit": _implicit.implicit(problem, num_steps=num_steps),
    }
    if num_hyperparams <= 100:
        rules["forward"] = _forward.forward(problem, num_steps=num_steps)
    return rules


def recommend(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    num_steps: int,
    rules: Mapping[str, base.Estimator] | None = None,
    max_memory: float | None = None,
) -> Recommendation:
    """Memory and operations of every rule on this problem, and the rule to take.

    Each rule is compiled for the backend at hand (seconds each; nothing is run), so that memory is the compiler's own
    figure; operations are counted by `flops`. Among the rules that fit, exact ones come before others, then the one
    with the fewest operations is taken.

    Args:
      problem: what is to be tuned.
      hyperparams: λ; only its shapes matter.
      task: one task; likewise.
      num_steps: T, at least 1.
      rules: name -> estimator; by default `unrolled` with every `remat`, `truncated`, `lookahead`, `implicit`, and
        up to 100 hyperparameters `forward`.
      max_memory: MiB of temporary memory that one estimate may take; by default there is no limit.

    Returns:
      A `Recommendation`; print it.

    Raises:
      ValueError: no rule can answer within `max_memory`.
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
    key = jax.random.key(0)
    loop = problem.loop

    def plain(hyperparams, task):
        # As a scan, so that its length is in the program.
        state, _ = inner.run(loop, num_steps, trace_fn=lambda state: ())(key, hyperparams, task.train)
        batch = problem.outer_batch(key, task)
        return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

    training = _flops.flops(plain, hyperparams, task)
    costs = []
    for name, rule in (candidates(problem, hyperparams, num_steps) if rules is None else rules).items():
        try:
            state = jax.eval_shape(functools.partial(rule.init, key), hyperparams, task)
            compiled = jax.jit(rule.estimate).lower(hyperparams, task, state).compile()
        except (ValueError, TypeError, NotImplementedError) as error:
            costs.append(Cost(name, rule.kind, math.nan, math.nan, str(error)))
            continue
        stats = compiled.memory_analysis()
        memory = stats.temp_size_in_bytes / 2**20 if stats else math.nan  # not every backend says
        costs.append(Cost(name, rule.kind, memory, _flops.flops(rule.estimate, hyperparams, task, state) / training))
    fitting = [c for c in costs if not c.refused and (max_memory is None or not c.memory > max_memory)]
    if not fitting:
        raise ValueError(
            f"No rule answers within `max_memory` = {max_memory} MiB:\n{Recommendation(costs, 'none', 'none fits.')}"
        )
    order = {"exact": 0, "unbiased": 1, "biased": 2, "pseudo": 3}
    best = min(fitting, key=lambda c: (order[c.kind], c.flops, c.memory))
    why = f"of the rules that {'fit' if max_memory is not None else 'answer'}, "
    why += f"it is the cheapest {best.kind} one."
    if best.kind != "exact":
        why += " No exact rule fits: allow more memory to have one."
    return Recommendation(costs, best.name, why)
