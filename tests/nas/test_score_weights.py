"""The expected scores on a new task: closed forms of the shrinkage, and weights where the best ones are known."""

import numpy as np

from metaopt.nas.search._score_weights import HeldOut, ScoreWeights, choose_weights, expected_scores

RNG = np.random.default_rng(0)


def test_the_expected_scores_are_averages_shrunk_by_the_number_of_tasks():
    scores = RNG.normal(size=(7, 4))
    scores[0, 1:], scores[1], scores[2, 0] = np.nan, np.nan, np.nan
    fitted, encoder = RNG.normal(size=(7, 4)), RNG.normal(size=7)
    times, average = (
        np.array([1, 0, 3, 4, 4, 4, 4]),
        np.array([0.0 if a == 1 else np.nanmean(scores[a]) for a in range(7)]),
    )
    plain, _ = expected_scores(scores, fitted, encoder, ScoreWeights(0.0, 0.0, 0.0))
    tried = times > 0
    np.testing.assert_allclose(plain[3:], average[3:])
    np.testing.assert_allclose(plain[1], fitted[1].mean())  # no task tried it
    # Tasks that lack it count as the linear model expects.
    filled = np.where(np.isfinite(scores), scores - fitted, np.nan)[[0, 2]]
    np.testing.assert_allclose(plain[[0, 2]], fitted[[0, 2]].mean(1) + np.nanmean(filled, 1))
    linear, _ = expected_scores(scores, fitted, encoder, ScoreWeights(1.0, 0.0, 0.0))
    np.testing.assert_allclose(linear, fitted.mean(1))
    learned, slope = expected_scores(scores, fitted, encoder, ScoreWeights(1.0, 1.0, 0.0))
    line = np.polyfit(encoder[tried], average[tried], 1)
    np.testing.assert_allclose(learned, np.polyval(line, encoder))
    np.testing.assert_allclose(slope, line[0])
    # In between, an architecture keeps n / (n + κ) of what the model misses of its average.
    w, v = 0.25, 0.5
    trust = times / (times + 4 * w / (1 - w))
    own_tasks = np.array([0.0 if a == 1 else fitted[a][np.isfinite(scores[a])].mean() for a in range(7)])
    missed = average - (1 - v) * own_tasks - v * learned
    mean, _ = expected_scores(scores, fitted, encoder, ScoreWeights(w, v, 0.0))
    np.testing.assert_allclose(mean, (1 - v) * linear + v * learned + trust * missed)


def held_out(num=1_000, num_tasks=6, *, noise=0.0, linear=1.0, encoder=0.0, shift=0.0):
    """Tasks share `truth` and differ in `own`; each part of the knowledge is right to the share that its name gives."""
    normal = lambda *shape: RNG.normal(size=shape)
    mixed = lambda share, truth: share * truth + (1 - share) * normal(*truth.shape)
    truth, own = normal(num, 1), normal(num, num_tasks) * (shift > 0)
    judged = truth + own
    scores = judged + noise * normal(num, num_tasks)
    return HeldOut(
        scores,
        judged,
        mixed(linear, np.repeat(truth, num_tasks, 1)),
        mixed(encoder, np.repeat(truth, num_tasks, 1)),
        shift * own if shift > 0 else normal(num, num_tasks),
    )


def test_a_correction_without_a_gain_has_weight_zero():
    assert choose_weights(held_out(linear=0.0)) == (0.0, 0.0, 0.0)


def test_a_correction_that_helps_on_tasks_that_are_left_out_has_weight():
    noisy = choose_weights(held_out(noise=3.0))
    assert noisy.models >= 0.9 and noisy.encoder == 0 and noisy.features == 0
    by_encoder = choose_weights(held_out(noise=3.0, linear=0.1, encoder=1.0))
    assert by_encoder.models > 0 and by_encoder.encoder > 0
    assert choose_weights(held_out(shift=1.0)).features >= 0.5


def test_an_architecture_without_a_judgment_is_not_counted():
    data = held_out(noise=3.0)
    hidden = np.where(RNG.uniform(size=data.judged.shape) < 0.3, np.nan, data.judged)
    hidden[:, 0] = np.nan
    assert choose_weights(data._replace(judged=hidden)).models >= 0.9
