"""Formulas of `experiments/recommend`, that it sees no later rating, and its smoke run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from experiments.recommend import baselines, fold, learned, per_user, ratings, report, scores
from experiments.recommend.ordinary import ITEM_MEANS, PLAIN, fit_ordinary, simple_matrices
from metaopt import base, hypergrad, predictors, spaces

pytestmark = pytest.mark.once  # an experiment
ROOT = Path(__file__).parents[1]
SIZES = {"offset": 1, "slope": 1, "factors": 3}


def lstsq_ridge(x, e, ridge, center, weight=1.0):
    """The ridge solution by least squares with further rows √ridge, which ask for the center."""
    root = np.sqrt(np.broadcast_to(weight, len(e)))
    rows = np.concatenate([root[:, None] * x, np.diag(np.sqrt(ridge))])
    return np.linalg.lstsq(rows, np.concatenate([root * e, np.sqrt(ridge) * center]), rcond=None)[0]


def test_the_fold_in_is_ridge_regression():
    rng = np.random.default_rng(0)
    design, residual = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5))
    ridge, center = np.array([0.5, 2.0, 3.0]), np.array([0.3, 0.0, -0.2])
    for num in (5, 2):  # more ratings than columns, and fewer
        weights = baselines.fold_in(design[:, :num], residual[:, :num], np.diag(ridge), center)
        pairs = zip(design[:, :num], residual[:, :num], strict=True)
        np.testing.assert_allclose(weights, [lstsq_ridge(x, e, ridge, center) for x, e in pairs], rtol=1e-10)
    linear = baselines.Linear(rng.normal(size=7), weights, rng.normal(size=(7, 3)))
    items = rng.integers(0, 7, (4, 6))
    np.testing.assert_allclose(linear.of_items(items), np.take_along_axis(linear.matrix(), items, axis=1))


def one_user():
    rng = np.random.default_rng(1)
    design = np.concatenate([np.ones((9, 1)), rng.normal(size=(9, 4))], axis=1)
    rating, item = rng.uniform(2, 9, 9), rng.uniform(5, 7, 9)
    train = {"design": design[:4], "residual": (rating - item)[:4], "age": rng.uniform(0, 3, 4)}
    valid = {"design": design[4:], "base": item[4:], "rating": rating[4:], "mask": np.array([1.0, 1, 1, 1, 0])}
    features = rng.normal(size=6)
    return jax.tree.map(jnp.asarray, base.Task(train, valid, features))


LAM = {"ridge of offset": 2.0, "ridge of slope": 3.0, "ridge of factors": 0.7, "decay": 0.4, "center": 0.3}


def test_the_closed_form_of_a_user_is_weighted_ridge_regression():
    task = one_user()
    weights = per_user.adapted_weights(jax.tree.map(jnp.asarray, LAM), task.train, SIZES)
    center = np.array([0.3, 0, 0, 0, 0])
    ridge = np.array([2.0, 3.0, 0.7, 0.7, 0.7])
    x, e, age = (np.asarray(task.train[name]) for name in ("design", "residual", "age"))
    np.testing.assert_allclose(weights, lstsq_ridge(x, e, ridge, center, np.exp(-0.4 * age)), rtol=1e-9)
    # A group without a ridge is not used.
    few = {name: value for name, value in LAM.items() if name not in ("ridge of slope", "ridge of factors")}
    only = per_user.adapted_weights(few, task.train, SIZES)
    expected = lstsq_ridge(x[:, :1], e, ridge[:1], center[:1], np.exp(-0.4 * age))
    np.testing.assert_allclose(only, [*expected, 0, 0, 0, 0], rtol=1e-9)


def test_hypergradients_of_a_user_agree_with_finite_differences_and_with_the_implicit_rule():
    task, hyperparams = one_user(), jax.tree.map(jnp.asarray, LAM)
    loss = lambda hp: per_user.outer_loss(hp, task, SIZES, 0.0, 10.0)
    hypergradient = jax.jit(jax.grad(loss))(hyperparams)
    for name in LAM:
        up, down = (loss({**hyperparams, name: hyperparams[name] + h}) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(hypergradient[name], (up - down) / 2e-6, rtol=1e-5, err_msg=name)
        assert abs(hypergradient[name]) > 1e-4

    def inner_loss(w, hp, train):
        ridge = jnp.concatenate([jnp.full(n, hp[f"ridge of {name}"]) for name, n in SIZES.items()])
        errors = train["residual"] - train["design"] @ w
        center = jnp.zeros(5).at[0].set(hp["center"])
        return (jnp.exp(-hp["decay"] * train["age"]) * errors**2).sum() + (ridge * (w - center) ** 2).sum()

    solve = hypergrad.argmin(inner_loss, tol=1e-10)

    def implicit(hp):
        w = solve(jnp.zeros(5), hp, task.train)
        prediction = jnp.clip(task.valid["base"] + task.valid["design"] @ w, 0, 10)
        return per_user.root_mean_square(task.valid["rating"] - prediction, task.valid["mask"])

    other = jax.jit(jax.grad(implicit))(hyperparams)
    for name in LAM:
        np.testing.assert_allclose(hypergradient[name], other[name], rtol=1e-5, err_msg=name)


def test_weights_of_g_get_the_gradient_of_the_error():
    task = one_user()
    settings = per_user.Settings(groups=tuple(SIZES), num_hidden=2)
    space = per_user.make_space(settings)
    g = predictors.mlp(space, 6, num_hidden=2)
    weights = jax.tree.map(lambda x: x + 0.1, g.init(jax.random.key(0)))
    loss = lambda z, task, key: per_user.outer_loss(spaces.to_constrained(space, z), task, SIZES, 0.0, 10.0)
    estimator = predictors.amortize(hypergrad.direct(loss), g)
    state = estimator.init(jax.random.key(0), weights, task)
    estimate, _ = jax.jit(estimator.estimate)(weights, task, state)
    value = jax.jit(lambda weights: loss(g.apply(weights, task), task, None))
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), weights)
    moved = lambda h: value(jax.tree.map(lambda x, d: x + h * d, weights, direction))
    products = jax.tree.map(lambda a, b: (a * b).sum(), estimate.hypergrad, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5)


def few_ratings():
    user, item = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 2, 0])
    rating, day = np.array([8.0, 4, 6, 9, 7]), np.arange(5.0)
    return ratings.Ratings(user, item, rating, day, np.full(4, np.nan), np.zeros((4, 0)), (), 0.0, 10.0, "few")


def test_offsets_are_shrunken_means():
    offsets = baselines.fit_offsets(few_ratings(), item_ridge=2.0)
    assert offsets.mean == pytest.approx(6.8)
    np.testing.assert_allclose(offsets.item, [0.6 / 5, -2.8 / 3, 2.2 / 3, 0], atol=1e-12)
    new = ratings.NewUsers(*(np.array([row]) for row in ([0, 2], [9.0, 8.0], [0.0, 1.0], [1], [5.0], [1.0])))
    expected = (9 - 6.92 + 8 - 6.8 - 2.2 / 3 + 3 * 0.5) / 5
    assert baselines.user_offsets(offsets, new, 3.0, 0.5) == pytest.approx(expected)
    # Offsets of users and items that minimize the penalized squared error, by least squares
    both = baselines.fit_offsets(few_ratings(), item_ridge=2.0, user_ridge=3.0, sweeps=200)
    rows = np.zeros((5, 7))
    rows[np.arange(5), few_ratings().user] = rows[np.arange(5), 3 + few_ratings().item] = 1
    expected = lstsq_ridge(rows, few_ratings().rating - 6.8, np.repeat([3.0, 2.0], [3, 4]), np.zeros(7))
    np.testing.assert_allclose(np.r_[both.user, both.item], expected, atol=1e-9)


def test_neighbours_are_weighted_by_shrunken_cosines():
    dense = np.array([[1.0, 2.0, 0], [2.0, 1.0, 0], [0, 3.0, 1.0]])
    neighbours = baselines.fit_neighbours(scipy.sparse.csr_array(dense))
    new = ratings.NewUsers(*(np.array([row]) for row in ([0, 2], [1.0, 1.0], [0.0, 1.0], [1], [5.0], [1.0])))
    similar = baselines.similar_items(neighbours, new).to_items(np.array([[1]]))
    correction = baselines.neighbour_correction(similar, np.array([[1.5, -1.0]]), 3.0, 0.5)
    first = 4 / np.sqrt(5 * 14) * 2 / 5
    second = 3 / np.sqrt(1 * 14) * 1 / 4
    np.testing.assert_allclose(correction, [[(1.5 * first - second) / (first + second + 0.5)]], rtol=1e-5)


def test_alternating_least_squares_reaches_a_stationary_point():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 9)) * (rng.random((12, 9)) < 0.7)
    item = baselines.factorize(scipy.sparse.csr_array(dense), 2, 0.5, sweeps=400)
    seen = dense != 0
    solve = lambda x, e: lstsq_ridge(x, e, np.full(2, 0.5), np.zeros(2))
    user = np.array([solve(item[row], values[row]) for row, values in zip(seen, dense, strict=True)])
    again = np.array([solve(user[row], values[row]) for row, values in zip(seen.T, dense.T, strict=True)])
    np.testing.assert_allclose(item, again, atol=1e-6)
    assert np.abs(item).max() > 0.1


def test_gibbs_sampling_has_the_moments_of_the_posterior():
    """With known prior, items and noise, the posterior of users is normal. Rows have 1, 4 or no entries."""
    rng = np.random.default_rng(0)
    item, mean = rng.normal(size=(5, 3)), np.array([0.5, -1.0, 2.0])
    root = rng.normal(size=(3, 3))
    precision = root @ root.T + np.eye(3)
    ratings_of = np.array([[1.0, 0, 0, 0, 0], [1.0, 3.0, 0, -2.0, 0.5], [0.0, 0, 0, 0, 0]])
    groups = baselines.rows_by_length(scipy.sparse.csr_array(np.repeat(ratings_of, 20_000, axis=0)))
    draws = baselines.sample_factors(rng, groups, 60_000, item, (mean, precision), 0.8).reshape(3, 20_000, 3)
    for values, own in zip(ratings_of, draws, strict=True):
        x = item[values != 0]
        posterior = precision + 0.8 * x.T @ x
        expected = np.linalg.solve(posterior, precision @ mean + 0.8 * x.T @ values[values != 0])
        np.testing.assert_allclose(own.mean(0), expected, atol=0.03)
        np.testing.assert_allclose(np.cov(own.T), np.linalg.inv(posterior), atol=0.03)
    # With many factors, the posterior of their mean and precision is narrow around those of the factors.
    factors = rng.normal(size=(50_000, 2)) @ np.array([[1.0, 0.5], [0, 0.7]]) + np.array([1.0, -2.0])
    mean, precision = baselines.sample_prior(rng, factors)
    np.testing.assert_allclose(mean, factors.mean(0), atol=0.03)
    np.testing.assert_allclose(np.linalg.inv(precision), np.cov(factors.T), atol=0.04)


def test_new_users_of_gibbs_samples_get_their_posterior_mean():
    sample = baselines.GibbsSample(np.array([[1.0], [2.0], [-1.0]]), np.array([0.5]), np.array([[2.0]]), 0.8)
    new = ratings.NewUsers(*(np.array([row]) for row in ([0, 1], [7.0, 9.0], [0.0, 1.0], [2], [5.0], [1.0])))
    factor = (1 + 0.8 * (1 + 6)) / (2 + 0.8 * 5)
    matrix = baselines.gibbs_scores([sample, sample], np.array([6.0, 6.0, 5.0]), new).matrix()
    np.testing.assert_allclose(matrix, [[6 + factor, 6 + 2 * factor, 5 - factor]])


def test_ndcg_of_a_hand_example():
    new = ratings.NewUsers(
        *(np.array([r]) for r in ([0], [9.0], [0.0], [1, 3, 4, 0, 5], [8.0, 5.0, 2.0, 9.0, 7.0], [1, 1, 1, 1, 0]))
    )
    # Item 0 is rated first and again later, and item 5 is padding.
    predictions = np.array([[10.0, 1.0, 9.0, 7.0, 0.0, 3.0]])  # order without the first rating: 2, 3, 5, 1, 4
    value = scores.ndcg(predictions, new, num=3)
    assert value == pytest.approx([(5 / np.log2(3)) / (8 + 5 / np.log2(3) + 2 / 2)])
    ideal = 8 + 5 / np.log2(3) + 2 / 2
    assert scores.ndcg(predictions, new, num=4) == pytest.approx([(5 / np.log2(3) + 8 / np.log2(5)) / ideal])
    assert scores.ndcg(np.array([[0.0, 9, 1, 8, 7, 2]]), new, num=3) == pytest.approx([1.0])


def test_users_of_the_first_fold_are_found_in_joined_scores():
    users = [np.array([7, 1, 4]), np.array([0, 9]), np.array([3])]
    for count in (1, 2, 3):
        folds = [{"users": own, "5|rmse|g": 10.0 * own[None]} for own in users[:count]]
        values = report.join_folds(folds)["5|rmse|g"][0, report.first_fold(folds)]
        assert values.tolist() == [10, 40, 70]


def test_rankings_are_compared_with_the_best_method_without_learning():
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(0, 0.1, 40) for name in (fold.POPULAR, *report.NAMES)}
    values["global mean"] += 0.2
    values[fold.G] = values["global mean"] + rng.normal(0.05, 0.1, 40)
    both = ("ndcg", "ndcg by rating")
    table = report.ranking_table({f"5|{kind}|{name}": value for kind in both for name, value in values.items()})
    cells = {line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")[2] for line in table.splitlines()}
    assert cells["global mean"] == "best baseline"
    for name in (fold.POPULAR, fold.G):
        difference = values[name] - values["global mean"]
        half = 1.96 * difference.std(ddof=1) / 40**0.5
        assert [float(part) for part in cells[name].split(" ± ")] == pytest.approx([difference.mean(), half], abs=6e-5)


def test_a_conformal_quantile_counts_users_and_not_ratings():
    values = np.array([[1.0, 2.0, 3.0, 4.0], [10.0, 0, 0, 0], [20.0, 0, 0, 0]])
    mask = np.array([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    quantile = lambda coverage: scores.conformal_quantile(values, mask, coverage)
    assert (quantile(0.25), quantile(0.26), quantile(0.5), quantile(0.75), quantile(0.76)) == (4, 10, 10, 20, np.inf)
    rng = np.random.default_rng(0)
    drawn = np.abs(rng.normal(size=(400, 3)) * rng.uniform(1, 3, (400, 1)))
    inside = [
        (drawn[order[20:]] <= scores.conformal_quantile(drawn[order[:20]], np.ones((20, 3)), 0.9)).mean()
        for order in (rng.permutation(400) for _ in range(200))
    ]
    assert 0.89 < np.mean(inside) < 0.95


def small_fold():
    data = ratings.make_data(ratings.synthetic(), (5,))
    split = ratings.make_split(len(data.users), 0)
    return data, split, fit_ordinary(data, split, fold.SMOKE.grids, fold.SMOKE.gibbs_sweeps)


def test_no_later_rating_of_a_test_user_changes_a_prediction():
    data, split, ordinary = small_fold()
    chosen = split.test[:2]
    new = data.first[5]
    changed = new.later_rating.copy()
    changed[chosen] = 10 - changed[chosen]
    rows = np.isin(data.ratings.user, data.users[chosen])
    rank = np.array([(data.ratings.user[:i] == u).sum() for i, u in enumerate(data.ratings.user)])
    rating = np.where(rows & (rank >= 5), 10 - data.ratings.rating, data.ratings.rating)
    other = ratings.make_data(data.ratings._replace(rating=rating), (5,))
    np.testing.assert_array_equal(other.first[5].later_rating, np.where(new.mask > 0, changed, new.later_rating))
    np.testing.assert_array_equal(other.first[5].rating, new.rating)
    again = fit_ordinary(other, split, fold.SMOKE.grids, fold.SMOKE.gibbs_sweeps)
    for name, matrix in ordinary.test[5].items():
        np.testing.assert_array_equal(matrix, again.test[5][name], err_msg=name)
    learnings = [learned.make_learning(d, split, o, 5) for d, o in ((data, ordinary), (other, again))]
    by_g = [learned.train_ridge(learning, fold.SMOKE.ridge, 0)(split.test)[1] for learning in learnings]
    np.testing.assert_array_equal(*by_g)
    by_network = [learned.train_network(one, "CAVIA", fold.SMOKE.network["CAVIA"], 0)(split.test) for one in learnings]
    np.testing.assert_array_equal(*by_network)
    # The first ratings of these users change their predictions.
    first = data.ratings._replace(rating=np.where(rows & (rank < 5), 10 - data.ratings.rating, data.ratings.rating))
    moved = simple_matrices(
        data.ratings.without(data.users[split.test]), ratings.make_data(first, (5,)).first[5].select(chosen)
    )
    assert np.abs(moved[PLAIN] - ordinary.test[5][PLAIN][:2]).min() > 1e-3


def test_networks_correct_the_offset_of_the_ratings_that_they_adapt_to(monkeypatch):
    """In training these are a window of a user's ratings, and in the test the first ones."""
    data, split, ordinary = small_fold()
    learning = learned.make_learning(data, split, ordinary, 5)
    made = []

    def network_tasks(new, stage, tables, features, offset):
        made.append((new, stage, offset))
        return make(new, stage, tables, features, offset)

    make = learned.stages.network_tasks
    monkeypatch.setattr(learned.stages, "network_tasks", network_tasks)
    learned.train_network(learning, "MeLU", fold.SMOKE.network["MeLU"], 0)(split.test)
    windows = [entry for entry in made if not (entry[0].item == data.first[5].item[: len(entry[0].item)]).all()]
    assert len(windows) >= fold.SMOKE.network["MeLU"].num_steps
    for new, stage, offset in made:
        assert (new.item.shape, offset.shape) == ((len(stage), 5), (len(stage),))
        for items, given, number, value in zip(new.item, new.rating, stage, offset, strict=True):
            ridge, center = ordinary.choices[ordinary.base]["new users"][5]
            residual = given - ordinary.stages[number].offsets[ordinary.base].base[items]
            assert value == pytest.approx((residual.sum() + ridge * center) / (5 + ridge), abs=1e-5)


def test_users_of_a_part_are_new_to_their_stage():
    data = ratings.make_data(ratings.synthetic(), (5,))
    split = ratings.make_split(len(data.users), 1)
    assert not set(split.test) & set(split.parts.ravel()) and (split.stage[split.test] == ratings.NUM_PARTS).all()
    assert all((split.stage[part] == number).all() for number, part in enumerate(split.parts))
    tested = np.concatenate([ratings.make_split(len(data.users), fold).test for fold in range(ratings.NUM_FOLDS)])
    np.testing.assert_array_equal(np.sort(tested), np.arange(len(data.users)))
    times = [data.ratings.day[data.ratings.user == user] for user in data.users]
    np.testing.assert_allclose(data.first[5].day, [sorted(t)[:5] for t in times], rtol=1e-6)


def write_movielens(folder, release, table):
    """Writes ratings in the format of a release of MovieLens: 100K, 1M or latest."""
    seconds = 874_724_710 + 86_400 * table.day
    rows = list(zip(table.user + 1, 3 * table.item + 1, table.rating, seconds.round().astype(int), strict=True))
    rows = rows[::2] + rows[1::2]  # the files are not in order of time
    genres = [[name for name, has in zip(table.genre_names, row, strict=True) if has] for row in table.genres]
    films = [
        (3 * item + 1, "Café, 2001 & co" if item else "Cyclo", "" if np.isnan(year) else f"{year:.0f}", names)
        for item, (year, names) in enumerate(zip(table.year, genres, strict=True))
    ]
    title = lambda name, year: f"{name} ({year})" if year else name
    if release == "100K":
        ratings_text = "".join(f"{u}\t{i}\t{r:.0f}\t{s}\n" for u, i, r, s in rows)
        flags = lambda names: "|".join(str(int(f"genre {n:02}" in names)) for n in range(19))
        films_text = "".join(
            f"{i}|{title(name, year)}|{year and f'01-Jan-{year}'}||{year and 'http://us.imdb.com/M?1999'}|{flags(names)}\n"
            for i, name, year, names in films
        )
        (folder / "u.data").write_text(ratings_text)
        (folder / "u.item").write_text(films_text, encoding="latin-1")
    elif release == "1M":
        (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:.0f}::{s}\n" for u, i, r, s in rows))
        lines = [f"{i}::{title(name, year)}::{'|'.join(names)}\n" for i, name, year, names in films]
        (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    else:
        lines = [f"{u},{i},{r},{s}\n" for u, i, r, s in rows]
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
        lines = [
            f'{i},"{title(name, year)}",{"|".join(names) or "(no genres listed)"}\n' for i, name, year, names in films
        ]
        (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(lines), encoding="utf-8")


def movielens_like(names):
    """Draws ratings with the scale of MovieLens, at whole seconds."""
    table = ratings.synthetic()
    day = np.arange(len(table.day)) / 24
    year = np.where(np.arange(table.num_items) == 5, np.nan, table.year)
    rating = np.clip(np.round(table.rating / 2), 1, 5)
    return table._replace(rating=rating, day=day, year=year, genre_names=names, low=1.0, high=5.0, name="MovieLens")


RELEASES = {
    "100K": ("genre 01", "genre 05", "genre 18"),
    "1M": ("Children's", "Drama", "Sci-Fi"),
    "latest": ("Children", "Drama", "Film-Noir"),
}


@pytest.mark.parametrize("release", RELEASES)
def test_movielens_is_read_in_the_formats_of_its_releases(release, tmp_path):
    expected = movielens_like(RELEASES[release])
    if release == "latest":
        expected = expected._replace(rating=np.where(expected.rating > 1, expected.rating - 0.5, 1), high=4.5)
    write_movielens(tmp_path, release, expected)
    (file,) = (path for path in tmp_path.iterdir() if path.name in ("u.data", "ratings.dat", "ratings.csv"))
    for path in (tmp_path, file):
        for name, leaf, other in zip(expected._fields, expected, ratings.from_movielens(path), strict=True):
            np.testing.assert_array_equal(other, leaf, err_msg=name)
    for path in tmp_path.iterdir():
        if path != file:
            path.unlink()
    table = ratings.from_movielens(tmp_path)  # without the file of films
    assert np.isnan(table.year).all() and table.genres.shape == (60, 0)
    np.testing.assert_array_equal(table.item, expected.item)


def test_the_figures_of_shrunken_offsets_that_come_with_the_data():
    file = Path(os.environ.get("METAOPT_DATA", "")) / "movietweetings_100k.npz"
    if not file.is_file():
        pytest.skip("METAOPT_DATA names no folder with movietweetings_100k.npz")
    table = ratings.from_movietweetings(file)
    data = ratings.make_data(table, (5, 10))
    assert len(data.users) == 1154
    errors = {}
    for number in range(ratings.NUM_FOLDS):
        test = ratings.make_split(1154, number).test
        for k, first in data.first.items():
            new = first.select(test)
            for name, matrix in simple_matrices(table.without(data.users[test]), new).items():
                later = scores.later_errors(matrix, new, 0.0, 10.0)
                errors.setdefault((k, name), []).append(scores.user_rmse(later, new.mask))
    means = {key: np.concatenate(values).mean() for key, values in errors.items()}
    expected = {
        "global mean": (1.740, 1.738),
        ITEM_MEANS: (1.551, 1.547),
        "user offset, ridge 3": (1.633, 1.606),
        PLAIN: (1.434, 1.399),
    }
    for name, values in expected.items():  # the folds differ from those of the figures
        np.testing.assert_allclose([means[k, name] for k in (5, 10)], values, atol=2e-3, err_msg=name)


def smoke_rows(tmp_path, *arguments):
    """Returns the first row of each method in the tables that a smoke run prints."""
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "experiments/recommend", "--smoke", "--out", str(out), *arguments]
    environment = {**os.environ, "METAOPT_DATA": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"JAX_ENABLE_X64": "0"}, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "nan" not in done.stdout and not out.exists()
    rows = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split(" | ")
            rows.setdefault(name, cells)
    return rows


def test_smoke_without_the_data_folder(tmp_path):
    rows = smoke_rows(tmp_path)
    error = lambda name: float(rows[name][0].split(" ± ")[0])
    assert 0.5 < error("matrix factorization, tuned") < error(PLAIN) + 0.3 < error("global mean") + 0.3 < 4
    assert error(fold.G) < error("global mean") and error("MeLU") < error("global mean")
    coverage = float(rows["offsets, one width"][0].split(" ± ")[0])
    assert 70 < coverage <= 100


def test_smoke_on_files_of_movielens(tmp_path):
    write_movielens(tmp_path, "1M", movielens_like(RELEASES["1M"]))
    rows = smoke_rows(tmp_path, "--movielens", str(tmp_path))
    error = lambda name: float(rows[name][0].split(" ± ")[0])
    assert 0.3 < error(fold.G) < error("global mean") < 1.5
