"""The hypergradient of every estimator, as its kind promises. `tests/estimators.py` has the table, one row per rule."""

from typing import Any, NamedTuple

import estimators
import jax
import numpy as np
import pytest
from estimators import ESTIMATORS, Row
from jax.flatten_util import ravel_pytree

from metaopt import base

pytestmark = pytest.mark.once

NOISE = 0.1
STEP = 1e-4  # of the central differences
MOST = 20  # estimates in a run that does not end by itself
SETTLED = 200  # estimates after which a rule for the inner minimum has converged


class Run(NamedTuple):
    """An estimator at a row's λ and task, over many keys at once: one program for `init`, one for `estimate`.

    Attributes:
      init: `(keys, flat λ) -> states`.
      estimate: `(flat λ, states) -> (estimates with flat hypergradients, states)`.
      flat: λ.
      leaves: for each leaf of λ, its entries in `flat`.
    """

    init: Any
    estimate: Any
    flat: np.ndarray
    leaves: list[np.ndarray]


def run_of(row: Row, estimator: base.Estimator) -> Run:
    hyperparams = estimators.hyperparams_of(row)
    flat, unravel = ravel_pytree(hyperparams)

    def estimate(flat, state):
        out, state = estimator.estimate(unravel(flat), row.task, state)
        return out._replace(hypergrad=ravel_pytree(out.hypergrad)[0], metrics={}), state

    init = lambda key, flat: estimator.init(key, unravel(flat), row.task)
    ends = np.cumsum([np.size(leaf) for leaf in jax.tree.leaves(hyperparams)])
    leaves = np.split(np.arange(flat.size), ends[:-1])
    return Run(jax.jit(jax.vmap(init, (0, None))), jax.jit(jax.vmap(estimate, (None, 0))), np.asarray(flat), leaves)


def central_differences(values, flat):
    """[keys, entries of λ] the derivatives of `values(flat)`, [keys]."""
    slopes = [(values(flat + step) - values(flat - step)) / (2 * STEP) for step in STEP * np.eye(flat.size)]
    return np.stack(slopes, axis=1)


def means_of_whole_runs(run, num_keys):
    """For each key, the mean hypergradient of a run at a constant λ, and the derivative of the run's mean value."""
    keys = jax.random.split(jax.random.key(2), num_keys)

    def means(flat, num_estimates=MOST):
        states, values, hypergrads = run.init(keys, flat), [], []
        for _ in range(num_estimates):
            out, states = run.estimate(flat, states)
            values.append(np.asarray(out.value))
            hypergrads.append(np.asarray(out.hypergrad))
            if np.asarray(out.done).all():
                break
        return np.mean(values, axis=0), np.mean(hypergrads, axis=0)

    return means(run.flat)[1], central_differences(lambda flat: means(flat)[0], run.flat)


def assert_a_slope(expected):
    assert np.abs(expected).max() > 1e-3, "the value does not depend on this leaf, so this row checks nothing"


def check_value(run, *, rtol=1e-6):
    """The hypergradient is the derivative of `value`, in three estimates from the state before each."""
    start = lambda i: run.init(jax.random.split(jax.random.key(i), 2), run.flat)
    states = start(0)
    for i in range(3):
        out, after = run.estimate(run.flat, states)
        expected = central_differences(
            lambda flat, states=states: np.asarray(run.estimate(flat, states)[0].value), run.flat
        )
        for entries in run.leaves:
            assert_a_slope(expected[:, entries])
            np.testing.assert_allclose(out.hypergrad[:, entries], expected[:, entries], rtol=rtol, atol=1e-8)
        states = start(i + 1) if out.done.all() else after


def check_mean(run, *, num_keys=3_000):
    """The mean of the hypergradient over keys is the derivative of the mean value."""
    hypergrads, slopes = means_of_whole_runs(run, num_keys)
    # Both have the same keys, so the standard error is that of their difference.
    error = np.std(hypergrads - slopes, axis=0, ddof=1) / np.sqrt(num_keys)
    expected = slopes.mean(0)
    for entries in run.leaves:
        assert np.linalg.norm(expected[entries]) > 12 * np.linalg.norm(error[entries]), "too few keys"
    np.testing.assert_array_less(np.abs(hypergrads.mean(0) - expected), 4 * error)


def check_cosine(run, *, num_keys=200):
    """In each leaf, the mean hypergradient of a run points uphill on the mean value of the whole run."""
    hypergrads, slopes = (means.mean(0) for means in means_of_whole_runs(run, num_keys))
    for entries in run.leaves:
        assert_a_slope(slopes[entries])
        cosine = hypergrads[entries] @ slopes[entries]
        cosine /= np.linalg.norm(hypergrads[entries]) * np.linalg.norm(slopes[entries])
        assert cosine > 0


def check_optimum(run, row, *, rtol):
    """At a constant λ, the hypergradient converges to that of the inner minimum."""
    states = run.init(jax.random.split(jax.random.key(3), 1), run.flat)
    for _ in range(SETTLED):
        out, states = run.estimate(run.flat, states)
    unravel = ravel_pytree(estimators.hyperparams_of(row))[1]
    expected = np.asarray(jax.grad(lambda flat: estimators.optimum(unravel(flat), row.task))(run.flat))
    for entries in run.leaves:
        assert_a_slope(expected[entries])
        np.testing.assert_allclose(out.hypergrad[0, entries], expected[entries], rtol=rtol)


CHECKS = {"exact": check_value, "unbiased": check_mean, "biased": check_cosine, "pseudo": lambda run: None}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_hypergradient_is_what_the_kind_promises(name):
    row = ESTIMATORS[name]
    estimator = row.make(estimators.problem_of(noise=NOISE))
    CHECKS[estimator.kind](run_of(row, estimator))


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.limit])
def test_a_biased_rule_is_exact_in_its_limit(name):
    row = ESTIMATORS[name]
    assert row.limit_answer in ("value", "mean", "optimum")
    estimator = row.limit(estimators.problem_of(noise=0.0 if row.limit_answer == "optimum" else NOISE))
    run = run_of(row, estimator)
    if row.limit_answer == "optimum":
        check_optimum(run, row, rtol=row.rtol)
    elif row.limit_answer == "mean":
        check_mean(run)
    else:
        check_value(run, rtol=row.rtol)
