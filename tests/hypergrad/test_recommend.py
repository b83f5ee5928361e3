"""A recommendation follows from counts of memory and operations."""

import io
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from estimators import ESTIMATORS

from metaopt import hypergrad, inner
from metaopt.hypergrad import _recommend


def network():
    """Matrix products dominate; λ is a penalty and a rate."""

    def loss(params, hp, batch):
        return (jnp.tanh(batch @ params) ** 2).mean() + hp["penalty"] * (params**2).sum()

    loop = inner.loop(loss, lambda hp: optax.sgd(hp["rate"]), init=lambda key, hp, data: jnp.eye(64))
    return inner.problem(loop, lambda params, hp, batch: (jnp.tanh(batch @ params) ** 2).mean())


@pytest.mark.once
def test_the_costs_of_exact_reverse_equal_counts_by_hand():
    problem, task = network(), problems.TASK._replace(train=jnp.ones((256, 64)), valid=jnp.ones((1, 64)))
    hp = {"penalty": jnp.array(0.1), "rate": jnp.array(0.1)}
    rules = {
        "kept": hypergrad.unrolled(problem, num_steps=20),
        "recomputed": hypergrad.unrolled(problem, num_steps=20, remat="step", grad=jax.grad),
    }
    costs = {c.name: c for c in hypergrad.recommend(problem, hp, task, num_steps=20, rules=rules).costs}
    # Plain: 2 products a step (x W, and xᵀδ). Reverse: those; then x V, and two products for its tangents.
    np.testing.assert_allclose(costs["kept"].flops, (2 + 1 + 2 + 1) / 2, rtol=0.35)
    assert costs["recomputed"].flops > costs["kept"].flops


@pytest.mark.once
def test_the_recommended_rule_depends_on_the_memory():
    problem, task = network(), problems.TASK._replace(train=jnp.ones((256, 64)), valid=jnp.ones((9, 64)))
    hp = {"penalty": jnp.array(0.1), "rate": jnp.array(0.1)}
    rules = {
        "large": hypergrad.unrolled(problem, num_steps=100, grad=jax.grad),
        "small": hypergrad.unrolled(problem, num_steps=100, remat="sqrt"),
        "biased": hypergrad.lookahead(problem),
        "implicit": hypergrad.warm_implicit(problem, num_steps=1, adjoint_rate=0.1),
    }
    free = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules)
    memory = {c.name: c.memory for c in free.costs}
    assert free.take in ("large", "small") and memory["small"] < 0.2 * memory["large"]
    # The rate is a leaf that an implicit rule refuses.
    assert "['rate']" in {c.name: c.refused for c in free.costs}["implicit"] and math.isnan(memory["implicit"])
    assert f"* {free.take}" in str(free) and "refused" in str(free)
    assert f"takes {memory[free.take]:.3g} MiB of temporary memory" in free.why and "pass `max_memory`" in free.why
    bounded = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules, max_memory=memory["small"])
    assert bounded.take == "small" and "MiB" not in bounded.why
    least = hypergrad.recommend(problem, hp, task, num_steps=100, rules=rules, max_memory=memory["biased"])
    assert least.take == "biased" and "No exact rule fits" in least.why
    with pytest.raises(ValueError, match="No rule can handle this problem within `max_memory` = 1e-09 MiB"):
        hypergrad.recommend(problem, hp, task, num_steps=100, rules={"biased": rules["biased"]}, max_memory=1e-9)
    with pytest.raises(ValueError, match="No rule can handle this problem:\n"):
        hypergrad.recommend(problem, hp, task, num_steps=100, rules={"implicit": rules["implicit"]})


def multilayer(part):
    """λ enters at one place: "start", "penalty" or "rate"."""
    scale = {"start": 1.0, "penalty": 0.01, "rate": 0.1}

    def loss(params, hp, batch):
        hidden = jnp.tanh(batch["x"] @ params["in"])
        penalty = {**scale, **hp}["penalty"] * sum((w**2).sum() for w in jax.tree.leaves(params))
        return ((hidden @ params["out"] - batch["y"]) ** 2).mean() + penalty

    def init(key, hp, data):
        start = {**scale, **hp}["start"]
        return {"in": start * jax.random.normal(key, (problems.NUM_FEATURES, 32)) / 2, "out": jnp.ones(32) / 32}

    loop = inner.loop(loss, lambda hp: optax.adam({**scale, **hp}["rate"]), init=init)
    return inner.problem(loop, lambda params, hp, batch: loss(params, {"penalty": 0.0}, batch)), {
        part: jnp.array(scale[part])
    }


REFUSED = {  # for an initialization
    *("implicit", 'implicit, condition="step"', "warm_implicit", "f2sa", "bome"),
    *("lookahead, 1 step", "darts_fd", "sama", "hypergradient_descent"),
}


def check_figures(report, problem, hp, num_steps, names):
    """Each figure equals that of a separate call; training is counted step by step."""
    rules = _recommend.candidates(problem, hp, num_steps)

    def training(hp, task):
        state = problem.loop.init(jax.random.key(0), hp, task.train)
        for _ in range(num_steps):
            state = inner.step(problem.loop, state, hp, task.train)
        return problem.outer_loss(problem.loop.params(state), hp, task.valid, problem.loop.context(state))

    plain = hypergrad.flops(training, hp, problems.TASK)
    costs = {c.name: c for c in report.costs}
    for name in names:
        state = rules[name].init(jax.random.key(1), hp, problems.TASK)
        compiled = jax.jit(rules[name].estimate).lower(hp, problems.TASK, state).compile()
        assert costs[name].memory == compiled.memory_analysis().temp_size_in_bytes / 2**20 > 1e-4
        operations = hypergrad.flops(rules[name].estimate, hp, problems.TASK, state)
        np.testing.assert_allclose(costs[name].flops, operations / plain, rtol=0.02)


@pytest.mark.once
def test_the_figures_of_rules_on_a_network():
    problem, hp = multilayer("start")
    names = {'unrolled, remat="none"', "es_single, 3 pairs, 2 steps"}
    rules = {k: rule for k, rule in _recommend.candidates(problem, hp, 4).items() if k in names | REFUSED}
    report = hypergrad.recommend(problem, hp, problems.TASK, num_steps=4, rules=rules)
    check_figures(report, problem, hp, 4, names)
    # Nobody but a rule that sees where training began answers for the initialization; each other one says why.
    refused = {c.name: c.refused for c in report.costs if c.refused}
    assert set(refused) == REFUSED
    assert all("['start']" in why and "hypergrad.unrolled" in why for why in refused.values())
    assert [c.stochastic for c in report.costs if not c.refused] == [False, True]
    assert "Stochastic rules, whose variance was not measured: es_single, 3 pairs, 2 steps." in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["start", "penalty", "rate"])
def test_the_figures_of_every_default_rule(part):
    problem, hp = multilayer(part)
    report = hypergrad.recommend(problem, hp, problems.TASK, num_steps=64)
    refused = {c.name for c in report.costs if c.refused}
    assert (
        refused
        == {
            "start": REFUSED,
            "penalty": {"hypergradient_descent"},
            "rate": {"implicit", "warm_implicit", "f2sa", "bome"},
        }[part]
    )
    stochastic = {c.name.split(",")[0] for c in report.costs if c.stochastic}
    assert stochastic == {"evolution", "persistent_es", "es_single", "truncated_es", "mix_with_es"}
    # Memory falls from policy to policy, and the number of operations rises.
    policies = [c for c in report.costs if c.name.startswith("unrolled")]
    assert policies[-1].name == "unrolled, remat=3"
    flops = [c.flops for c in policies]
    assert flops == sorted(flops) and policies[0].memory > policies[1].memory > policies[2].memory
    assert all(c.flops > 1 for c in report.costs if c.name in ("implicit", "f2sa", "bome", "forward") and not c.refused)
    check_figures(report, problem, hp, 64, [c.name for c in report.costs if not c.refused])


def test_every_default_rule_is_marked_in_the_table():
    defaults = _recommend.candidates(problems.RIDGE, problems.LAM, 4)
    rules = {name.split(", ")[0] for name, row in ESTIMATORS.items() if row.recommended}
    assert {name.split(",")[0] for name in defaults} == rules


@pytest.mark.once
def test_biased_rules_are_recommended_in_their_order_and_before_stochastic_ones():
    rules = {
        "stochastic": hypergrad.evolution(problems.RIDGE, num_steps=1, sigma=0.1, num_pairs=1),
        "refused": hypergrad.hypergradient_descent(problems.RIDGE),
        "dear": hypergrad.lookahead(problems.RIDGE, num_steps=3),
        "cheap": hypergrad.lookahead(problems.RIDGE, num_steps=1),
        "windows of one pair": hypergrad.truncated_es(
            problems.RIDGE, num_steps=4, truncation_length=2, sigma=0.1, num_pairs=1
        ),
    }
    report = hypergrad.recommend(problems.RIDGE, problems.LAM, problems.TASK, num_steps=4, rules=rules)
    costs = {c.name: c for c in report.costs}
    assert costs["cheap"].flops < costs["dear"].flops and costs["refused"].refused
    assert {c.name for c in report.costs if c.stochastic} == {"stochastic", "windows of one pair"}
    assert report.take == "dear" and report.why.endswith("first biased one. No exact rule can.")


@pytest.mark.parametrize(("num_steps", "window"), [(10, 2), (7, 1), (16, 4)])
def test_the_default_window_divides_the_horizon(num_steps, window):
    assert (f"truncated, {window} steps" if window > 1 else "truncated, 1 step") in _recommend.candidates(
        problems.RIDGE, problems.LAM, num_steps
    )


def test_a_terminal_names_the_rule_that_is_traced(monkeypatch):
    """Next to a bar, which a thread draws again and again."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    rule, latest = hypergrad.unrolled(problems.RIDGE, num_steps=1), time.monotonic() + 20.0

    def estimate(*args):
        while "tracing first, " not in terminal.getvalue():
            assert time.monotonic() < latest, terminal.getvalue()
            time.sleep(0.01)
        return rule.estimate(*args)

    rules = {"first": rule._replace(estimate=estimate)}
    hypergrad.recommend(problems.RIDGE, problems.LAM, problems.TASK, num_steps=1, rules=rules)
    assert "1/1" in terminal.getvalue() and "FLOPs / training" in terminal.getvalue()
    assert not re.search(r"\d:\d\d|-:--", terminal.getvalue())  # the time left cannot be known
