"""The formulas of the medical experiments, and that no unlabelled outcome reaches a prediction."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.medical import parkinsons, scores
from experiments.medical.hospitals import baselines, learning, main, model, tables, worlds
from metaopt import spaces

pytestmark = pytest.mark.once  # an experiment
ROOT = Path(__file__).parents[1]


def patients(seed=0):
    """Made-up patients of four sites; the last column is a code of the second measurement, with gaps."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(4), 50).astype(np.int32)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    x[rng.random(200) < 0.3 * (site > 0), 1] = np.nan
    x[:, 3] = np.where(np.isnan(x[:, 1]), np.nan, x[:, 1] > 0)
    logits = x[:, 0] + np.nan_to_num(x[:, 1]) + site - 1.5
    y = (rng.random(200) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return tables.Patients(x, np.array([0, 1, 2, 1]), y, site, ("a", "b", "c", "d"), 60 + 10 * x[:, 0], None, 0)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float) if leaf.dtype.kind == "f" else leaf, tree)


def check_slopes(loss, coordinates):
    """Compares the gradient with central differences, in float64."""
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(coordinates))
    leaves, structure = jax.tree.flatten(coordinates)
    loss = jax.jit(loss)
    for i, grad in enumerate(grads):
        moved = [structure.unflatten([*leaves[:i], leaves[i] + h, *leaves[i + 1 :]]) for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(grad, (loss(moved[0]) - loss(moved[1])) / 2e-5, rtol=1e-5, atol=1e-9)
    assert min(map(abs, grads)) > 0


def test_hypergradients_of_a_site_equal_finite_differences():
    world = in_float64(worlds.make_world(patients(), [0, 1, 2], by_site=True))
    task = worlds.resampled_task(world, jax.random.key(0), 20)
    start = spaces.to_unconstrained(model.SPACE, spaces.default(model.SPACE))
    coordinates = jax.tree.map(lambda z: z + 0.3, start)
    loss = lambda z: model.outer_loss(z, task, jax.random.key(0))
    check_slopes(loss, coordinates)
    hp = spaces.to_constrained(model.SPACE, coordinates)
    params = model.fit_site(hp, task.train)
    np.testing.assert_allclose(jax.grad(model.site_loss)(params, hp, task.train), 0, atol=1e-9)


def test_pooled_models_and_platt_scaling_equal_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), (rng.random(60) < 0.4).astype(float)
    used = (np.arange(60) < 50).astype(float)
    weights = worlds.pooled_fit(x, y, used, np.ones((60, 1)), jnp.array(4.0))
    expected = linear_model.LogisticRegression(C=0.25, tol=1e-10, max_iter=1000).fit(x[:50], y[:50])
    np.testing.assert_allclose(weights, [*expected.intercept_, *expected.coef_[0]], rtol=1e-3, atol=1e-4)

    # A fit of shares is a fit of both outcomes with weights.
    score, sick = x[:, 0], y.sum()
    target = np.where(y > 0, (sick + 1) / (sick + 2), 1 / (62 - sick))
    both = linear_model.LogisticRegression(C=1e3, tol=1e-10, max_iter=1000).fit(
        np.tile(score, 2)[:, None], np.repeat([1, 0], 60), sample_weight=np.concatenate([target, 1 - target])
    )
    found = worlds.platt(jnp.asarray(score), jnp.asarray(y), jnp.ones(60))
    np.testing.assert_allclose(found, [both.intercept_[0], both.coef_[0, 0]], rtol=1e-3, atol=1e-5)


def test_pooled_models_see_only_other_training_sites():
    table = patients()
    world = worlds.make_world(table, [0, 1, 2], by_site=False)
    other = worlds.make_world(turned(table, 3), [0, 1, 2], by_site=False)
    np.testing.assert_array_equal(world.weights, other.weights)
    shifted = table._replace(x=np.where((table.site == 3)[:, None], 5, table.x))
    np.testing.assert_array_equal(world.weights, worlds.make_world(shifted, [0, 1, 2], by_site=False).weights)
    of_site = lambda patients: worlds._pooled_by_site(
        np.concatenate([world.values, world.marks], axis=1),
        patients.y,
        patients.site,
        np.ones((200, 1)),
        np.array([1.0, 1, 1, 0]),
        1.0,
    )
    before, after = of_site(table), of_site(turned(table, 1))
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0] - after[0]).max() > 1e-3 and np.abs(before[3] - after[3]).max() > 1e-3


def turned(table, *sites):
    """The table with the other outcome for all patients of some sites."""
    return table._replace(y=np.where(np.isin(table.site, sites), 1 - table.y, table.y))


def test_shrunken_platt_scaling_goes_from_regression_to_its_center():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    score = rng.normal(size=30)
    y = (rng.random(30) < 1 / (1 + np.exp(-score))).astype(float)
    found = lambda *shrinkage: baselines.shrunken_platt(jnp.asarray(score), jnp.asarray(y), jnp.array(shrinkage))
    free = linear_model.LogisticRegression(C=1e6, tol=1e-10).fit(score[:, None], y)
    np.testing.assert_allclose(found(0.5, 1e-6, 1e-6), [free.intercept_[0], free.coef_[0, 0]], rtol=1e-3, atol=1e-4)
    intercept, slope = found(0.5, 1e6, 1e-6)
    assert slope == pytest.approx(0.5, abs=1e-4)
    assert (1 / (1 + np.exp(-intercept - slope * score))).sum() == pytest.approx(y.sum(), abs=1e-3)
    # With both penalties, the gradient of the penalized loss is zero.
    intercept, slope = found(0.75, 3.0, 0.3)
    residual = 1 / (1 + np.exp(-intercept - slope * score)) - y
    np.testing.assert_allclose([residual.sum() + 0.3 * intercept, residual @ score + 3 * (slope - 0.75)], 0, atol=1e-5)


def test_shrinkage_is_chosen_without_the_left_out_site():
    table = patients()
    chosen = lambda table: baselines.shrinkages(worlds.make_world(table, [0, 1, 2], by_site=False))
    before = chosen(table)
    for old, new in zip(before.values(), chosen(turned(table, 3)).values(), strict=True):
        np.testing.assert_array_equal(old, new)
    # Outcomes without a relation to the scores ask for another slope than outcomes that follow them.
    noise = table._replace(y=np.random.default_rng(1).permutation(table.y))
    assert any(np.any(new != old) for old, new in zip(before.values(), chosen(noise).values(), strict=True))


def test_a_choice_uses_only_entries_of_its_site():
    losses = {"g": np.full((2, 4, 4), np.nan)}
    losses["g"][:, 0, 1:] = [[1.0, 2, 3], [1, 1, 3]]
    losses["g"][:, 1] = [[0.0], [9.0]]
    assert main.choice(losses, 0) == {"g": True} and main.choice(losses, 1) == {"g": False}


def test_outcomes_of_the_left_out_site_do_not_change_its_choice(monkeypatch):
    """Entries for pairs of training sites change, so the test can fail."""
    monkeypatch.setattr(main, "BY_SITE", (True,))
    monkeypatch.setattr(main, "METHODS", {"g": False})
    settings = learning.Settings(steps=1, tasks=2, query=20, choice_resamples=2)
    before, after = (main.choices(table, settings)["g"] for table in (patients(), turned(patients(), 3)))
    np.testing.assert_array_equal(before[:, 3], after[:, 3])
    assert np.isfinite(before[:, 3, :3]).all() and np.isnan(before[:, 3, 3]).all()
    assert np.abs(before[:, :3, 3] - after[:, :3, 3]).min() > 1e-4  # judged on the turned outcomes
    assert np.abs(before[:, 0, 1] - after[:, 0, 1]).min() > 1e-6  # learned from them


def test_an_outcome_that_is_not_labelled_changes_no_prediction():
    table = patients()
    rows, labelled = worlds.draws(table, 3, 2, 0)
    hidden = np.setdiff1d(rows, labelled)
    assert len(hidden) and labelled.shape == (2, 20) and len(set(labelled[0])) == 20

    def predictions(table):
        world = worlds.make_world(table, [0, 1, 2], by_site=True)
        trained = learning.learn(world, False, 0, learning.SMOKE)
        call = (trained, world, 3, rows, labelled)
        p, _ = learning.predict(*call)
        others = baselines.predict(world, 3, rows, labelled), baselines.transferred(world, 3, rows)
        return [p, learning.leave_one_out(*call), learning.split(*call), *jax.tree.leaves(others)]

    y = table.y.copy()
    before = predictions(table)
    y[hidden] = 1 - y[hidden]
    for old, new in zip(before, predictions(table._replace(y=y)), strict=True):
        np.testing.assert_array_equal(old, new)
    y[labelled[0, :5]] = 1 - y[labelled[0, :5]]
    changed = predictions(table._replace(y=y))
    assert all(np.abs(before[i] - changed[i]).max() > 1e-4 for i in range(3))


def test_a_patient_with_mask_zero_has_no_effect():
    table = patients()
    world = worlds.make_world(table, [0, 1, 2], by_site=True)
    rows, labelled = worlds.draws(table, 3, 1, 0)
    task = worlds.new_site(world, 3, rows, labelled[0])
    dropped = jnp.eye(20)[4]
    hp = spaces.default(model.SPACE)

    def fitted(train):
        train = learning.without(train, dropped)
        return jnp.concatenate([model.fit_site(hp, train), model.features(train)])

    other = {name: leaf.at[4].set(1 - leaf[4]) for name, leaf in task.train.items() if name != "mask"}
    np.testing.assert_allclose(fitted(task.train), fitted({**other, "mask": task.train["mask"]}), rtol=1e-6, atol=1e-7)


def test_scores_on_an_example_by_hand():
    y = np.array([1.0, 0, 1, 1, 0])
    p = np.array([[0.95, 0.92, 0.31, 0.39, 1.0]])
    judged = np.array([[1.0, 1, 1, 1, 0]])
    # The last tenth has 1.87 for one sick patient, and the fourth one .70 for two.
    np.testing.assert_allclose(scores.ece(p, y, judged), [(0.87 + 1.30) / 4])
    np.testing.assert_allclose(scores.brier(p, y, judged), [(0.05**2 + 0.92**2 + 0.69**2 + 0.61**2) / 4])
    np.testing.assert_allclose(scores.log_loss(p, y, judged), [-np.log([0.95, 0.08, 0.31, 0.39]).mean()])
    assert scores.bins(np.array([0.0, 0.1, 1.0])).tolist() == [0, 1, 9]
    assert scores.area(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])) == (1 + 1 + 0.5 + 1) / 4
    counts = np.array([[2.0, 0, 1, 0, 3]])
    found = scores.bootstrapped(p, y, judged, counts)
    np.testing.assert_allclose(found["Brier"], scores.brier(p, y, counts * judged)[None])
    np.testing.assert_allclose(found["ECE"], scores.ece(p, y, counts * judged)[None])


def test_the_sick_have_the_class_weight_of_the_healthy_times_lambda():
    data = {"y": jnp.array([1.0, 0.0, 1.0]), "mask": jnp.array([1.0, 1.0, 0.0])}
    np.testing.assert_allclose(model.patient_weights({"class_weight": 4.0}, data), [2.0, 0.5, 0.0])


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.25])
def test_p_values_give_the_sets_of_the_conformal_quantile(alpha):
    rng = np.random.default_rng(0)
    for num in (3, 9, 10, 19, 20):
        known = rng.random(num)
        at_most = [(known <= s).sum() / (num + 1) for s in np.sort(known)]
        enough = [s for s, share in zip(np.sort(known), at_most, strict=True) if share >= 1 - alpha - 1e-12]
        quantile = enough[0] if enough else np.inf
        new = np.append(rng.random(200), known)
        p_values = (1 + (known[None] >= new[:, None]).sum(1)) / (num + 1)
        assert (scores.prediction_sets(p_values, alpha) == (new <= quantile)).all()


def test_split_conformal_sets_cover_exchangeable_patients():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(4000):
        known, new = rng.normal(size=10), rng.normal()
        covered.append(scores.prediction_sets((1 + (known >= new).sum()) / 11, 0.1))
    assert np.mean(covered) == pytest.approx(10 / 11, abs=0.015)


def test_abstention_on_an_example_by_hand():
    y, judged = np.array([1.0, 0, 0, 1]), np.array([[1.0, 1, 1, 1]])
    p_values = np.array([[[0.05, 0.9], [0.05, 0.9], [0.5, 0.5], [0.05, 0.05]]])  # sets {1}, {1}, {0, 1}, {}
    result = scores.Abstention(p_values, y, judged, 0.1)
    assert (result.coverage, result.answered, result.wrong, result.risk) == (0.5, 0.5, 0.25, 0.5)
    assert (result.sick, result.healthy) == (0.5, 0.5)
    risk = scores.selective_risk(np.array([[0.9, 0.2, 0.6, 0.4]]), y, judged, np.array([0.5, 1.0]))
    np.testing.assert_allclose(risk, [0, 0.5])


# ---- Parkinson's -----------------------------------------------------------------------------------------------------


def courses():
    rng = np.random.default_rng(0)
    day = np.sort(rng.uniform(0, 180, (8, 30)), axis=1)
    score = 20 + 0.05 * day + rng.normal(size=(8, 1))
    ages, sexes = rng.uniform(50, 80, 8), rng.integers(0, 2, 8).astype(float)
    number, starts = np.full(8, 30), np.full(8, 6)
    return parkinsons.Courses(*map(jnp.asarray, (day, score, number, starts, ages, sexes)))


def test_recordings_become_the_courses_of_patients():
    days = {"b": [1, 2, 65, 70, 80, 90, 95, 99], "a": [0, 5, 10, 20, 30, 40]}
    rows = [(name, day, 10.0 * day, {"a": 60, "b": 70}[name], name == "b") for name, own in days.items() for day in own]
    columns = np.array(rows, object)[np.random.default_rng(0).permutation(len(rows))].T
    made = parkinsons.courses_of(*columns)
    np.testing.assert_array_equal(made.day, [[0, 5, 10, 20, 30, 40, 40, 40], days["b"]])
    np.testing.assert_array_equal(made.score, 10 * made.day)
    assert made.number.tolist() == [6, 8] and made.starts.tolist() == [1, 2]  # day 65 is too late for a window
    assert made.age.tolist() == [60, 70] and made.sex.tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least 6 recordings; one has 5"):
        parkinsons.courses_of(*columns[:, columns[1] != 40])


def test_hypergradients_of_a_patient_equal_finite_differences():
    tasks = parkinsons.window_tasks(courses(), jnp.arange(8), jax.random.key(0), 1, 6)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    start = spaces.to_unconstrained(parkinsons.SPACE, spaces.default(parkinsons.SPACE))
    loss = lambda z: parkinsons.outer_loss(z, task, jax.random.key(0))
    check_slopes(loss, jax.tree.map(lambda z: z + 0.3, start))


def test_a_course_without_penalties_is_least_squares_and_with_them_the_last_value():
    day, score = jnp.array([0.0, 3, 7, 11, 20]), jnp.array([20.0, 21, 20.5, 23, 22])
    later = jnp.array([30.0, 100.0])
    hp = {"level_penalty": 1e-9, "slope_penalty": 1e-9, "slope": 3.0, "days": 1e9}
    as_arrays = lambda hp: {name: jnp.asarray(value) for name, value in hp.items()}
    expected = np.polyval(np.polyfit(day, score, 1), later)
    np.testing.assert_allclose(parkinsons.course(as_arrays(hp), day, score, later), expected, rtol=1e-5)
    fixed = as_arrays({**hp, "level_penalty": 1e9, "slope_penalty": 1e9})
    np.testing.assert_allclose(parkinsons.course(fixed, day, score, later), 22 + 0.03 * (later - 20), rtol=1e-5)
    short = as_arrays({**hp, "level_penalty": 1e9, "slope_penalty": 1e9, "days": 10.0})
    saturated = 22 + 0.03 * 10 * (1 - np.exp(-(later - 20) / 10))
    np.testing.assert_allclose(parkinsons.course(short, day, score, later), saturated, rtol=1e-5)


def test_later_scores_of_a_new_patient_change_no_prediction():
    before = courses()
    hidden = before._replace(score=before.score.at[:2, 5:].set(0.0))
    new, others = np.arange(2), np.arange(2, 8)

    def predictions(courses):
        trained = parkinsons.learn(courses, others, (2, 0.01), False, 0, parkinsons.SMOKE)
        p, _ = parkinsons.predict(trained, 2, False, courses, new)
        mixed = parkinsons.mixed_model(courses, others, new, (0.1, 0.1))
        return p, mixed, parkinsons.ridge(courses, others, new, 0.1)

    for old, other in zip(predictions(before), predictions(hidden), strict=True):
        np.testing.assert_array_equal(old, other)
    changed = predictions(before._replace(score=before.score.at[:2, :5].add(1.0)))
    np.testing.assert_allclose(changed[1] - predictions(before)[1], 1, atol=0.5)


# ---- The scripts -----------------------------------------------------------------------------------------------------


def smoke(path, tmp_path):
    """The rows of the tables that a script prints, by their first two cells."""
    if not (Path(os.environ.get("METAOPT_DATA", "")) / "heart_by_hospital.csv.gz").is_file():
        pytest.skip("METAOPT_DATA names no folder with heart_by_hospital.csv.gz")
    environment = {**os.environ, "JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-W", "ignore", path, "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not list(tmp_path.iterdir()) and "Research, not a medical device." in done.stdout
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return lines


@pytest.mark.slow
def test_smoke_of_hospitals(tmp_path):
    rows = smoke("experiments/medical/hospitals", tmp_path)
    levels = {row[1]: [float(cell) for cell in row[2:6]] for row in rows if len(row) == 6 and row[2][:2] == "0."}
    own = {"g", "one λ", "class share", "site-wise", "site-wise + Platt", "site-wise + shrunken Platt"}
    assert set(levels) == own | {name for name in levels if name.startswith("pooled")}
    assert "pooled + shrunken Platt" in levels
    brier, ece, log_loss, area = levels["pooled + Platt"]
    assert 0.05 < brier < 0.25 and 0 < ece < 0.3 and 0.2 < log_loss < 0.75 and area > 0.75
    assert all(float(cell) <= 100 for row in rows if row[1] == "split" for cell in row[3:])


@pytest.mark.slow
def test_smoke_of_parkinsons(tmp_path):
    rows = {row[0]: row[1:] for row in smoke("experiments/medical/parkinsons.py", tmp_path)}
    assert all(0.5 < float(rows[name][0].split(" ± ")[0]) < 20 for name in ("g", "one λ", "last value", "ridge"))
