"""Counts the cost of each rule on a given problem without running it, and recommends a rule."""

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import _checks, _explained, base, inner
from metaopt._progress import report_progress
from metaopt.hypergrad import (
    _check,
    _check_report,
    _evolution,
    _finite_difference,
    _first_order,
    _flops,
    _forward,
    _hypergradient_descent,
    _implicit,
    _lookahead,
    _mix_with_es,
    _sama,
    _truncated,
    _unroll,
)


class Cost(NamedTuple):
    """The cost of one rule on the given problem.

    Attributes:
      name: the rule.
      kind: the kind of the estimator.
      memory: MiB of temporary memory of one compiled estimate, as the compiler reports it; NaN if the rule is refused
        or the backend reports no figure.
      flops: operations of one estimate, divided by those of plain training for `num_steps` with one evaluation of the
        outer loss. It is a lower bound if a solver iterates until convergence (`cg`), since one iteration is counted.
      refused: why the rule cannot handle this problem, or "".
      stochastic: whether the rule perturbs λ at random. Its estimates then have a variance, which is not measured here.
    """

    name: str
    kind: str
    memory: float
    flops: float
    refused: str = ""
    stochastic: bool = False


class Recommendation(NamedTuple):
    """The result of `recommend`; it prints as a table.

    Attributes:
      costs: one `Cost` per rule.
      take: the name of the recommended rule.
      why: one sentence with the reason.
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
        stochastic = [c.name for c in self.costs if c.stochastic]
        if stochastic:
            notes.append(f"Stochastic rules, whose variance was not measured: {'; '.join(stochastic)}.")
        return "\n".join([_check_report.aligned(rows), f"Take {self.take}: {self.why}", *notes])


def candidates(problem: base.Problem, hyperparams: base.HyperParams, num_steps: int) -> dict[str, base.Estimator]:
    """The rules that `recommend` compares by default, each for T inner steps; biased rules start with the least biased.

    Some arguments do not affect the cost, such as the adjoint rate, the multiplier and σ. Their values here are
    arbitrary; choose your own when you use the rule.
    """
    num_hyperparams = sum(np.size(leaf) for leaf in jax.tree.leaves(hyperparams))
    # The largest divisor of T that is at most √T; for a prime T it is 1.
    window = max(k for k in range(1, math.isqrt(num_steps) + 1) if num_steps % k == 0)
    whole: dict[str, Any] = {"num_steps": num_steps}
    windows: dict[str, Any] = {**whole, "truncation_length": window}
    pairs: dict[str, Any] = {"sigma": 0.1, "num_pairs": 3}
    remats = ["none", "step", "grads", "sqrt", *([3] if num_steps >= 64 else [])]
    rules = {f"unrolled, remat={r!r}".replace("'", '"'): _unroll.unrolled(problem, **whole, remat=r) for r in remats}
    if num_hyperparams <= 100:
        rules["forward"] = _forward.forward(problem, **whole)
    # Exact in a limit: converged training, a large multiplier, or small steps.
    rules["implicit"] = _implicit.implicit(problem, **whole)
    rules['implicit, condition="step"'] = _implicit.implicit(problem, **whole, condition="step")
    rules["warm_implicit"] = _implicit.warm_implicit(problem, **whole, adjoint_rate=0.1)
    rules["f2sa"] = _first_order.f2sa(problem, **whole, multiplier=10.0)
    rules["bome"] = _first_order.bome(problem, **whole)
    # Short-sighted rules.
    if window > 1:
        rules[f"truncated, {window} steps"] = _truncated.truncated(problem, **windows)
    rules["lookahead, 1 step"] = _lookahead.lookahead(problem, horizon=num_steps)
    rules["darts_fd"] = _finite_difference.darts_fd(problem, horizon=num_steps)
    rules["truncated, 1 step"] = _truncated.truncated(problem, **whole, truncation_length=1)
    rules["sama"] = _sama.sama(problem, horizon=num_steps)
    rules["hypergradient_descent"] = _hypergradient_descent.hypergradient_descent(problem, horizon=num_steps)
    # Rules that use values of F.
    rules["evolution, 3 pairs"] = _evolution.evolution(problem, **whole, **pairs)
    for name in ("persistent_es", "es_single", "truncated_es"):
        rules[f"{name}, 3 pairs, {window} steps"] = getattr(_evolution, name)(problem, **windows, **pairs)
    exact = _unroll.unrolled(problem, **whole, remat="step")
    rules["mix_with_es, 3 pairs"] = _mix_with_es.mix_with_es(exact, **pairs)
    return rules


def _measured(rules: Mapping[str, base.Estimator], args: tuple, training: float) -> dict[str, Cost]:
    """Memory and operations of each rule; `training` is the number of operations of plain training."""
    key = jax.random.key(0)
    costs, lowered = {}, {}
    # The rules take very different times to compile.
    with report_progress(len(rules), None, "{rule}", unit="rule", time_left=False, rule="") as report:
        for name, rule in rules.items():
            try:
                with report.during(f"tracing {name}", compiles=True):
                    state = jax.eval_shape(functools.partial(rule.init, key), *args)
                    traced = jax.jit(rule.estimate).trace(*args, state)
                    lowered[name] = traced.lower()
            except (ValueError, TypeError, NotImplementedError) as error:
                costs[name] = Cost(name, rule.kind, math.nan, math.nan, str(error))
                continue
            stochastic = _check.is_random(rule.kind, traced.out_info[0].metrics)
            operations = _flops.of_jaxpr(traced.jaxpr.jaxpr)
            costs[name] = Cost(name, rule.kind, math.nan, operations / training, stochastic=stochastic)
        refused = len(rules) - len(lowered)
        with ThreadPoolExecutor() as pool:  # the compiler releases Python's lock
            programs = {name: pool.submit(low.compile) for name, low in lowered.items()}
            for number, (name, program) in enumerate(programs.items(), start=1):
                with report.during(f"compiling {name}", compiles=True):
                    stats = program.result().memory_analysis()
                if stats:  # some backends report none
                    costs[name] = costs[name]._replace(memory=stats.temp_size_in_bytes / 2**20)
                cost = costs[name]
                report(refused + number, rule=f"{name}: {cost.memory:.2f} MiB, {cost.flops:.2f} FLOPs / training")
    return costs


def recommend(
    problem: base.Problem,
    hyperparams: base.HyperParams,
    task: base.Task,
    *,
    num_steps: int,
    rules: Mapping[str, base.Estimator] | None = None,
    max_memory: float | None = None,
) -> Recommendation:
    """Reports memory and operations of every rule on this problem, and recommends a rule.

    Each applicable rule is compiled for the current backend, several at a time, and nothing is run. One compilation
    takes seconds. The memory is the compiler's own figure; `flops` counts the operations.

    Among the rules that fit, the function recommends the exact rule with the fewest operations. Without `max_memory`,
    this is often the rule that stores the most, since others recompute values to save memory. `why` states its memory.
    If no exact rule fits, it recommends the first biased rule in the order of `rules`, since the size of a bias cannot
    be counted. Unbiased rules come after the biased ones, since their variance is not measured.

    Args:
      problem: the problem to tune.
      hyperparams: λ; only its shapes matter.
      task: one task; only its shapes matter.
      num_steps: T, at least 1.
      rules: name -> estimator. By default, the rules of `metaopt.hypergrad` for one task, except `partition`, `direct`
        and `reptile`; `forward` only up to 100 hyperparameters. Rules that are exact in a limit come before
        short-sighted ones.
      max_memory: the limit on the temporary memory of one estimate, in MiB. None, the default, ignores the memory.

    Returns:
      A `Recommendation`. `print` shows it as a table. `take` is the name of the recommended rule, `why` the reason in
      one sentence, and `costs` has, for every rule, the `memory` in MiB and the `flops` in multiples of plain training.

    Raises:
      ValueError: if `problem` is not a `base.Problem`, a leaf of λ is not floating-point, or no rule can handle
        the problem within `max_memory`.
    """
    _checks.check_problem(problem)
    _checks.check_hyperparams(hyperparams)
    key = jax.random.key(0)
    loop = problem.loop

    def plain(hyperparams, task):
        # With `trace_fn`, `inner.run` is a scan. Its length is in the program, so that `flops` counts all steps.
        state, _ = inner.run(loop, num_steps, trace_fn=lambda state: ())(key, hyperparams, task.train)
        batch = problem.outer_batch(key, task)
        return problem.outer_loss(loop.params(state), hyperparams, batch, loop.context(state))

    with _explained.tasks(task):
        training = _flops.flops(plain, hyperparams, task)
    rules = candidates(problem, hyperparams, num_steps) if rules is None else rules
    costs = list(_measured(rules, (hyperparams, task), training).values())
    fitting = [c for c in costs if not c.refused and (max_memory is None or not c.memory > max_memory)]
    if not fitting:
        limit = "" if max_memory is None else f" within `max_memory` = {max_memory} MiB"
        table = Recommendation(costs, "none", f"no rule {'can handle this problem' if max_memory is None else 'fits'}.")
        raise ValueError(f"No rule can handle this problem{limit}:\n{table}")
    order = {"exact": 0, "biased": 1, "unbiased": 2, "pseudo": 3}
    # `min` keeps the first of several equal rules.
    best = min(fitting, key=lambda c: (order[c.kind], *((c.flops, c.memory) if c.kind == "exact" else ())))
    why = f"of the rules that {'fit' if max_memory is not None else 'can handle this problem'}, "
    why += f"it is the {'cheapest' if best.kind == 'exact' else 'first'} {best.kind} one."
    if best.kind != "exact":
        why += " No exact rule can." if max_memory is None else " No exact rule fits: allow more memory to have one."
    elif max_memory is None and any(cost.memory < best.memory for cost in fitting):
        why += f" It takes {best.memory:.3g} MiB of temporary memory. For a rule that takes less, pass `max_memory`."
    return Recommendation(costs, best.name, why)
