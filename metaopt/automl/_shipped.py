"""The trained predictors g that come with the package, one for each kind of problem."""

import functools
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import _saving, base, tasks
from metaopt.predictors import TrainedPredictor

FILES = {"classification": "tabular_predictor.npz", "regression": "regression_predictor.npz"}
GROUPS = ("simple", "statistical", "information_theoretic", "landmarking", "log_loss")  # of the meta-features


@functools.cache
def shipped_predictor(problem: str = "classification") -> TrainedPredictor:
    """Returns the trained g of `tabular_network`.

    It is the mean of three predictors, trained with different seeds. `predict_hyperparams` and `AutoClassifier` use it.
    Use it directly to fine-tune λ (`training.fine_tune`), to draw around it (`training.propose`), or to train it
    further. Its `trained_on` lists the tasks of its corpus, with hashes of their rows. It learned from 85 % of their
    families, and the losses on the others chose the number of steps. Sources, and the licences of most R packages, are
    in `experiments/results/transfer_corpus.csv`.

    Args:
      problem: "classification", or "regression" for the g of `AutoRegressor`. The network of `AutoRegressor` predicts
        the probabilities of up to ten intervals of the target, and so this g has learned from such tasks. They are in
        `experiments/results/transfer_corpus_regression.csv`.

    Returns:
      The predictor with its weights, the scaling of its meta-features, and the space of λ.

    Raises:
      ValueError: if `problem` is neither of the two.
    """
    if problem not in FILES:
        raise ValueError(f"`problem` must be one of {', '.join(FILES)}; got {problem!r}.")
    file = resources.files("metaopt.automl") / FILES[problem]
    # The first call may be inside a traced function: its tracers must not stay in the cache.
    with resources.as_file(file) as path, jax.ensure_compile_time_eval():
        return _saving.load(path)


def predict_hyperparams(table: Any, target: Any = None, *, seed: int = 0) -> base.HyperParams:
    """Predicts the hyperparameters of `tabular_network` for a new table t', without a trial: λ = g(t').

    It computes 31 meta-features of the table, which takes about .1 s to .3 s, and evaluates g. If features lie outside
    the range of g's training, the prediction shrinks towards one λ for all tables.

    Args:
      table: a `tasks.PreparedTable`, of which only the training rows are used; a `tasks.Table`; or (x [n, d], y [n],
        categorical [d]). With `target`, a frame of any type that `tasks.fit_encoder` takes. All rows of a `Table`, of
        arrays or of a frame are used: pass only training rows.
      target: the name or the position of a column of the frame, which is not used as a feature, or one label per row
        of the frame. Rows without a label are dropped. None: `table` has the labels.
      seed: the seed of subsamples and folds of the meta-features.

    Returns:
      λ in natural units: a dict of fourteen numbers.

    Raises:
      ValueError: if `tasks.metafeatures` rejects the table, `tasks.fit_encoder` the frame, or `tasks.fit_labels` the
        target. Also if there is not one label for each row.
      ImportError: if scikit-learn is not installed, which computes some meta-features.

    Example:
      >>> import jax
      >>> from metaopt import automl, tasks
      >>> table = tasks.from_sklearn()[1]
      >>> prepared = tasks.prepare(table)
      >>> hyperparams = automl.predict_hyperparams(prepared)
      >>> network, task = automl.tabular_network(), automl.tabular_task(prepared)
      >>> params = automl.train(network, jax.random.key(0), hyperparams, task)
      >>> test = {**task.valid, "x": prepared.test.x}
      >>> predicted = network.log_probabilities(params, hyperparams, test).argmax(axis=1)
      >>> bool((predicted == prepared.test.y).mean() > 0.9)
      True

      From a frame and the name of its target, here a dict of columns:

      >>> frame = {
      ...     "size": [1.5, 2.5, 3.5] * 20,
      ...     "color": ["red", "blue"] * 30,
      ...     "sold": ["no", "no", "yes", None] * 15,
      ... }
      >>> hyperparams = automl.predict_hyperparams(frame, "sold")
      >>> sorted(hyperparams) == sorted(automl.tabular_network().space)
      True
    """
    return predicted("classification", tasks.metafeatures(table, target, groups=GROUPS, seed=seed))


def predicted(problem: str, metafeatures: dict[str, float]) -> base.HyperParams:
    """λ = g(t') from the meta-features of a table t'."""
    return _predict(jnp.asarray(shipped_predictor(problem).scaled_features(metafeatures)), problem)


@functools.partial(jax.jit, static_argnames="problem")
def _predict(features: jax.Array, problem: str) -> base.HyperParams:
    return shipped_predictor(problem).predict(base.Task(None, None, features))
