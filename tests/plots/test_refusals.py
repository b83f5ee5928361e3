"""What `plots` cannot draw."""

import sys
from functools import partial

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from metaopt import base, evaluation, nas, plots

SCORES = {"a": {"u": np.array([[0.0, 0.4], [0.2, 0.8]])}}
EVALUATION = evaluation.Evaluation(SCORES, {"u": np.array([5, 7])}, {"u": np.array([1, 1])}, {"a": False})
NETWORK = nas.darts_space(num_cells=3)
PLANE = base.Estimator(
    lambda key, x, task: (),
    lambda x, task, state: (base.Estimate(x.sum(), jnp.ones(2), jnp.array(True), {}), ()),
    "exact",
)
trace, diagram = plots.hyperparameter_trace, plots.critical_difference
REFUSALS = [
    (lambda: trace({"a": np.ones(2), "b": np.ones(3)}), ValueError, "leading axis; got"),
    (lambda: trace([]), ValueError, "`trace` is empty: .* Collect them by a callback"),
    (lambda: trace({}), ValueError, "`trace` is empty: .* Collect them by a callback"),
    (lambda: trace([{"op": "skip_connect"}]), ValueError, "`trace` is empty: it has no numbers"),
    (lambda: trace({"a": 1.0}), ValueError, "leading axis; got"),
    (lambda: plots.pareto({"a": np.ones((2, 3))}), ValueError, r"must be \[n, 2\]; 'a' has the shape \(2, 3\)"),
    (
        lambda: plots.regret({"a": [base.Record("s", {}, 1.0)], "b": [base.Record("t", {}, 1.0)]}),
        ValueError,
        r"'a' has no records of \['t'\]",
    ),
    (lambda: plots.regret({"a": []}), ValueError, "`runs` has no record"),
    (lambda: plots.hyperparameters_by_feature(lambda f: f, np.ones(3), 0), ValueError, r"\[n, d\].* got shape \(3,\)"),
    (
        lambda: plots.hyperparameters_by_feature(lambda f: f, np.array([[np.nan, 1.0], [np.nan, 2.0]]), 0),
        ValueError,
        "no finite value in column 0",
    ),
    (
        lambda: plots.hyperparameters_by_feature(lambda f: {"a": f.sum()}, np.array([[1.0, np.nan], [2.0, np.nan]]), 0),
        ValueError,
        r"no finite number for any point\. Columns \[1\] of `features` have no finite value\.",
    ),
    (lambda: plots.slices(PLANE, jnp.ones(2), None, axes=[]), ValueError, "one for each of 2 slices; got 0"),
    (lambda: plots.adaptation_curves(EVALUATION, source="w"), KeyError, "'w'"),
    (lambda: plots.ranking(EVALUATION, source="w"), KeyError, "'w'"),
    (
        lambda: plots.scores_by_number(EVALUATION, "ways", [50, 60]),
        ValueError,
        r"`edges` must enclose the ways .* \[50, 60\]",
    ),
    (lambda: plots.comparison({"a": [1.0]}, highlight=["b"]), ValueError, r"\['b'\] are not in \['a'\]"),
    (
        lambda: plots.comparison({"a": np.ones((10, 5))}),  # ten tasks, five seeds
        ValueError,
        r"'a' must be \[tasks\], .* Got the shape \(10, 5\)",
    ),
    (lambda: plots.genotype(NETWORK, {"normal": ((0, 2, "mlp"),), "reduce": ()}), ValueError, "no op 'mlp'"),
    (lambda: diagram({"a": [1.0, 2.0]}), ValueError, "two methods"),
    (
        lambda: plots.regret({"a": [base.Record("t", {}, 1.0)]}, bounds={"t": (10.0, 0.0)}),
        ValueError,
        r"`bounds` of task 't' must be \(best, worst\), finite and ascending; got \(10.0, 0.0\)",
    ),
    (lambda: diagram({"a": [1.0, 2.0], "b": [1.0]}), ValueError, "same T"),
    (lambda: diagram({"a": [1.0, 2.0], "b": [1.0, np.nan]}), ValueError, "finite"),
    (partial(plots.learning_curve, {"value": [1.0]}), ImportError, r"metaopt-jax\[examples\]"),  # without matplotlib
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call, error, message, monkeypatch):
    if error is ImportError:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(error, match=message):
        call()
    pyplot.close("all")
