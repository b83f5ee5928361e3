"""The corrupted windows, the weights and the hypergradients of the experiment on data weighting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.hyperparameters import transformer
from experiments.hyperparameters.data_weighting import main, methods, scorer, windows
from metaopt import hypergrad, inner, predictors

pytestmark = pytest.mark.once  # an experiment
SETTINGS = methods.Settings(
    context=7, width=4, num_windows=12, num_valid=6, num_test=6, batch=4, num_steps=3, outer_steps=2
)


def test_half_of_the_windows_is_corrupted_in_three_ways():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 60, (60, 25)).astype(np.int32)
    other = np.full((40, 25), 64, np.int32)
    pool = windows.corrupted(rng, clean, other)
    assert np.bincount(pool.kind).tolist() == [30, 10, 10, 10]
    for window, kind, original in zip(pool.windows, pool.kind, clean, strict=True):
        same_characters = np.array_equal(np.sort(window), np.sort(original))
        periods = [lag for lag in range(2, 7) if np.array_equal(window[lag:], window[:-lag])]
        assert np.array_equal(window, original) == (kind == 0) and same_characters == (kind < 2)
        assert bool(periods) == (kind > 1) and np.all(window == 64) == (kind == 3)
        if kind == 2:
            np.testing.assert_array_equal(window[: periods[0]], original[: periods[0]])


def test_texts_do_not_overlap(monkeypatch):
    """The characters of the text are numbered by their places, and those of the messages are negative."""
    monkeypatch.setattr(transformer, "read_text", lambda file: (np.arange(256), np.arange(100_000)))
    messages = [np.full(50, -1 - i) for i in range(20)]
    monkeypatch.setattr(windows, "read_messages", lambda folder, alphabet: messages)
    settings = SETTINGS._replace(num_windows=120)  # their messages would coincide
    texts = windows.load(3, settings)
    parts = [texts.pool.windows, texts.unseen.windows, texts.valid, texts.test]
    places = [set(part.ravel().tolist()) for part in parts]
    assert all(not a & b for i, a in enumerate(places) for b in places[:i])
    assert min(texts.pool.windows.min(), texts.unseen.windows.min()) < 0 <= min(texts.valid.min(), texts.test.min())
    assert not np.array_equal(windows.load(4, settings).test, texts.test)


def made_up_texts(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda num: rng.integers(0, 65, (num, SETTINGS.context + 1)).astype(np.int32)
    pools = [windows.Pool(draw(12), np.arange(12) % 4) for _ in range(2)]
    return windows.Texts(*pools, draw(6), draw(6))


def test_a_weight_per_window_and_the_scorer_have_the_hypergradients_of_finite_differences():
    texts, key = made_up_texts(), jax.random.key(1)
    task, problem = methods.make_task(texts), methods.by_index(SETTINGS, SETTINGS.num_steps)
    rule = hypergrad.unrolled(problem, num_steps=SETTINGS.num_steps, remat="step")
    weight = jnp.linspace(0.3, 0.9, 12)
    estimate = jax.jit(rule.estimate)({"weight": weight}, task, key)[0]
    train = inner.run(problem.loop, SETTINGS.num_steps)
    train_key = jax.random.split(jax.random.split(key)[0])[0]  # as in `unrolled`

    @jax.jit
    def loss(weight):
        return transformer.row_losses(train(train_key, {"weight": weight}, task.train).params, task.valid).mean()

    differences = [(loss(weight + h) - loss(weight - h)) / 2e-5 for h in 1e-5 * jnp.eye(12)]
    np.testing.assert_allclose(estimate.value, loss(weight), rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergrad["weight"], jnp.stack(differences), rtol=1e-4, atol=1e-8)
    assert np.abs(differences).max() > 1e-4

    predictor = scorer.predictor()
    params = jax.tree.map(lambda leaf: leaf + 0.1, predictor.init(jax.random.key(2)))
    amortized = jax.jit(predictors.amortize(rule, predictor).estimate)(params, task, key)[0]
    for step, slope in zip(1e-5 * jnp.eye(3), amortized.hypergrad["out"][:3], strict=True):
        values = [
            loss(scorer.weight(params | {"out": params["out"].at[:3].add(sign * step)}, task.train)) for sign in (1, -1)
        ]
        np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-8)
        assert abs(slope) > 1e-7  # neither zero nor NaN


def test_masked_windows_are_not_trained_on():
    texts, key = made_up_texts(), jax.random.key(0)
    train = methods.plain_training(SETTINGS, SETTINGS.num_steps)
    mask = np.arange(12) % 2
    other = np.where(mask[:, None] > 0, texts.pool.windows, 0)
    first, second = (train(key, {}, methods.marked(rows, texts.valid, mask)) for rows in (texts.pool.windows, other))
    whole = train(key, {}, methods.marked(other, texts.valid, np.ones(12)))
    difference = lambda a, b: max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))
    assert difference(first, second) == 0 < difference(first, whole)


def test_scores_of_a_window_do_not_depend_on_others_and_begin_equal():
    rows = jnp.asarray(made_up_texts().pool.windows)
    params = scorer.init(jax.random.key(0))
    np.testing.assert_array_equal(scorer.weight(params, {"windows": rows}), 0.5)
    params["out"] = jnp.arange(float(len(params["out"])))
    together = scorer.score(params, rows)
    np.testing.assert_allclose(together, [scorer.score(params, row[None])[0] for row in rows], rtol=1e-12)
    periodic = jnp.array([[1, 2] * 4, range(8)])
    only = params | {"out": jnp.zeros(len(params["out"])).at[scorer.NUM_UNITS + 1].set(1.0)}  # of lag 2
    np.testing.assert_allclose(scorer.score(only, periodic), [len(only["out"]) ** 0.5, 0])


def test_the_half_with_the_highest_scores_is_kept_and_found():
    score = np.array([0.1, 0.9, 0.4, 0.8])
    np.testing.assert_array_equal(main.half(score), [0, 1, 0, 1])
    pytest.importorskip("sklearn")
    assert main.detection(np.array([0.1, 0.2, 0.3, 0.4]), np.array([1, 0, 3, 2]))[:3] == [1.0, 0.0, 0.0]
