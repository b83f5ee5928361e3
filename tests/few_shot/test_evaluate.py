"""Scores that can be worked out by hand; the data that methods may see; statistics of scores."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from experiments.data import from_image_sets, omniglot_split
from metaopt import evaluation, few_shot, tasks


def make_episodes(ways, num=64):
    """Points near corners of a square; padded by ways and two query examples."""
    rng = np.random.default_rng(ways)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])

    def part(real, padded):
        y = np.tile(np.arange(padded) % ways, (num, 1))
        mask = np.tile(np.arange(padded) < real, (num, 1))
        x = corners[y] + 0.5 * rng.normal(size=(num, padded, 2))
        class_mask = np.tile(np.arange(4) < ways, (num, 1)) * 1.0
        return {"x": mask[..., None] * x, "y": np.where(mask, y, 0), "mask": 1.0 * mask, "class_mask": class_mask}

    return tasks.Episode(part(6, 6), part(9, 11))


EPISODES = {3: make_episodes(3), 2: make_episodes(2)}


def episode_index(key):
    return jax.random.randint(key, (), 0, 64)


def sample(key, ways=3):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[episode_index(key)], EPISODES[ways])


def centers(support):
    one_hot = jax.nn.one_hot(support["y"], 4) * support["mask"][:, None]
    return (one_hot.T @ support["x"]) / jnp.maximum(one_hot.sum(axis=0), 1)[:, None]


def distances(x, center):
    return -((x[:, None] - center[None]) ** 2).sum(axis=-1)


def prototypes(key, support, query):
    assert "y" not in query
    return distances(query["x"], centers(support))[None]


def steps(key, support, query):
    """From one corner for all classes to the prototypes, in four steps."""
    return jnp.stack([distances(query["x"], t / 4 * centers(support)) for t in range(5)])


def centered(key, support, query):
    """Uses the mean of the query set."""
    mean = query["x"].mean(axis=0, keepdims=True)
    return distances(query["x"] - 0.2 * mean, centers(support))[None]


METHODS = {"prototypes": prototypes, "steps": steps, "centered": centered}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def three_methods():
    samplers = {"three": sample, "two": lambda key: sample(key, 2)}
    return few_shot.evaluate_episodes(METHODS, samplers, KEY, num_episodes=50, chunk_size=16)


@pytest.mark.once
def test_the_scores_are_those_of_each_episode(three_methods):
    for source, ways in zip(three_methods.sources, (3, 2), strict=True):
        keys = jax.random.split(jax.random.split(jax.random.fold_in(KEY, zlib.crc32(source.encode())), 3)[0], 50)
        for i, place in enumerate(np.asarray(jax.vmap(episode_index)(keys))):
            support, query = (jax.tree.map(lambda leaf, rows=place: leaf[rows], part) for part in EPISODES[ways][:2])
            center = np.stack([support["x"][support["y"] == k].mean(axis=0) for k in range(ways)])
            nearest = ((query["x"][:9, None] - center[None]) ** 2).sum(-1).argmin(1)
            right = (nearest == query["y"][:9]).mean()
            assert three_methods.scores["prototypes"][source][i] == pytest.approx([right])
        np.testing.assert_array_equal(three_methods.num_ways[source], np.full(50, ways))
        np.testing.assert_array_equal(three_methods.num_shots[source], np.full(50, 6 / ways))
    assert three_methods.scores["steps"]["two"].shape == (50, 5)
    np.testing.assert_allclose(three_methods.scores["steps"]["two"][:, -1:], three_methods.scores["prototypes"]["two"])
    np.testing.assert_allclose(
        three_methods.scores["steps"]["three"][:, 0], 1 / 3
    )  # all centers at one place: the first
    assert three_methods.transductive == {"prototypes": False, "steps": False, "centered": True}


@pytest.mark.once
def test_places_of_rows_and_keys_do_not_reveal_labels():
    by_class = {"x": jnp.zeros((12, 1)), "y": jnp.arange(12) // 4, "mask": jnp.ones(12), "class_mask": jnp.ones(3)}

    def with_its_number(key):
        number = jax.random.uniform(key, ())
        return tasks.Episode({**by_class, "x": jnp.full((12, 1), number)}, by_class)

    def by_place(key, support, query):
        return jax.nn.one_hot(jnp.arange(12) // 4, 3)[None]

    def by_key(key, support, query):
        guesses = jnp.stack([jax.random.uniform(k, ()) for k in (key, *jax.random.split(key, 3))])
        is_guessed = jnp.abs(guesses - support["x"][0, 0]).min() < 1e-6
        return jnp.where(is_guessed, 1.0, 0.0) * jnp.ones((1, 12, 3))

    evaluated = few_shot.evaluate_episodes(
        {"place": by_place, "key": by_key},
        {"all": with_its_number},
        KEY,
        num_episodes=100,
        score_fn=lambda outputs, query: jnp.where(outputs[:, 0].min() == 1, 2.0, few_shot.accuracy(outputs, query)),
        higher_is_better=True,
    )
    assert abs(evaluated.scores["place"]["all"].mean() - 1 / 3) < 4 * (2 / 9 / 1200) ** 0.5
    assert (evaluated.scores["key"]["all"] < 2).all()


@pytest.mark.once
def test_use_of_the_query_set_is_detected_in_any_source_and_behind_any_offset():
    def one_example(key):
        support, query, *_ = sample(key)
        return tasks.Episode(support, {k: v if k == "class_mask" else v[:1] for k, v in query.items()})

    def far(key, support, query):
        """Outputs with a common offset, moved by the mean of the query set."""
        return 1e4 + query["x"].mean() + prototypes(key, support, query)

    evaluated = few_shot.evaluate_episodes(
        {"centered": centered, "far": far, "prototypes": prototypes, "offset": lambda *args: 1e4 + prototypes(*args)},
        {"one": one_example, "nine": sample},  # of one example, the mean says nothing of others
        jax.random.key(0),
        num_episodes=8,
        chunk_size=4,
    )
    assert evaluated.transductive == {"centered": True, "far": True, "prototypes": False, "offset": False}


@pytest.mark.once
def test_use_of_the_query_set_is_detected_behind_values_for_absent_classes():
    """And behind examples, or whole episodes, that are far off."""

    def filled(method, value):
        return lambda key, s, q: jnp.where(s["class_mask"][None, None] > 0, method(key, s, q), value)

    def with_some_far_off(key, support, query):
        far = query["x"][:, :1] > 1.5  # whose outputs do not depend on the others
        return jnp.where(far, 1e6 * prototypes(key, support, query), centered(key, support, query))

    def in_some_episodes(key, support, query):
        far = support["x"][0, 0] > 0
        return jnp.where(far, 1e6 * prototypes(key, support, query), centered(key, support, query))

    fills = (-1e4, -1e9, -jnp.inf, jnp.nan)
    evaluated = few_shot.evaluate_episodes(
        {f"{f.__name__} {value}": filled(f, value) for f in (centered, prototypes) for value in fills}
        | {"centered far": with_some_far_off, "centered in some": in_some_episodes},
        sample,
        KEY,
        num_episodes=8,
    )
    assert evaluated.transductive == {name: name.startswith("centered") for name in evaluated.scores}


@pytest.mark.once
def test_another_source_changes_no_episode():
    one, two = {"two": lambda key: sample(key, 2)}, {"three": sample, "two": lambda key: sample(key, 2)}
    alone, both = (
        few_shot.evaluate_episodes({"p": prototypes}, s, KEY, num_episodes=20).scores["p"] for s in (one, two)
    )
    np.testing.assert_array_equal(alone["two"], both["two"])


def test_values_of_classes_have_a_leading_axis():
    one = {"x": jnp.eye(4), "y": jnp.arange(4), "mask": jnp.ones(4), "class_mask": jnp.ones(4)}
    table = jnp.arange(16.0).reshape(4, 4)

    def nearest(key, support, query):
        return -jnp.square(query["x"][:, None] - query["of_class"]).sum(-1)[None]

    def sampler_of(leaf):
        return lambda key: tasks.Episode(one, {**one, "x": table, "of_class": leaf})

    evaluated = few_shot.evaluate_episodes({"m": nearest}, sampler_of(table[None]), KEY, num_episodes=2)
    assert (evaluated.scores["m"]["episodes"] == 1).all() and not evaluated.transductive["m"]


@pytest.mark.once
def test_all_leaves_of_an_example_are_permuted_together():
    def richer(key):
        support, query, *_ = sample(key)
        pytree = lambda part: {"points": part["x"], "times": jnp.arange(len(part["y"]))}
        return tasks.Episode({**support, "x": pytree(support)}, {**query, "x": pytree(query), "again": query["x"]})

    def by_points(key, support, query):
        return prototypes(key, {**support, "x": support["x"]["points"]}, {"x": query["x"]["points"]})

    def by_again(key, support, query):
        return prototypes(key, {**support, "x": support["x"]["points"]}, {"x": query["again"]})

    def by_others(key, support, query):
        mean = query["again"].mean(axis=0, keepdims=True)
        return by_again(key, support, {"again": query["again"] - 0.2 * mean})

    evaluate_with = lambda named, sampler: few_shot.evaluate_episodes(
        named, sampler, jax.random.key(0), num_episodes=16
    )
    plain = evaluate_with({"plain": prototypes}, sample).scores["plain"]
    evaluated = evaluate_with({"points": by_points, "again": by_again, "others": by_others}, richer)
    for name in ("points", "again"):
        np.testing.assert_array_equal(next(iter(evaluated.scores[name].values())), next(iter(plain.values())))
    assert evaluated.transductive == {"points": False, "again": False, "others": True}


@pytest.mark.once
def test_every_user_is_judged_once():
    table = tasks.from_user_records(
        np.arange(12.0)[:, None], np.arange(12.0), np.repeat([0, 1, 2], 4), time=np.arange(12)
    )
    sample = tasks.user_episodes(table, num_support=2)
    last = lambda key, support, query: jnp.broadcast_to(support["y"][-1], (1, *query["mask"].shape))
    options = {"score_fn": few_shot.mean_absolute_error, "higher_is_better": False}
    evaluated = few_shot.evaluate_episodes({"last": last}, sample, KEY, each=3, chunk_size=2, **options)
    np.testing.assert_allclose(evaluated.scores["last"]["episodes"], np.full((3, 1), 1.5))
    mean_error = {"score_fn": few_shot.mean_absolute_error}
    assert not few_shot.evaluate_episodes({"last": last}, sample, KEY, each=3, **mean_error).higher_is_better


@pytest.mark.once
def test_outputs_with_an_axis_of_steps():
    """With as many query examples as classes or targets. Outputs without the axis are in the table of refusals."""
    side = {"x": jnp.eye(4), "y": jnp.arange(4), "mask": jnp.ones(4), "class_mask": jnp.ones(4)}
    square = {"x": jnp.eye(4), "y": jnp.eye(4), "mask": jnp.ones(4)}
    any_score = {"score_fn": lambda outputs, query: outputs.mean(), "higher_is_better": True}
    evaluate_side = lambda side, method, **options: few_shot.evaluate_episodes(
        {"m": method}, lambda key: tasks.Episode(side, side), KEY, num_episodes=2, **options
    )
    for part, options in ((side, {}), (side, any_score), (square, any_score)):
        evaluated = evaluate_side(part, lambda key, support, query: query["x"][None], **options)
        assert evaluated.scores["m"]["episodes"].shape == (2, 1)


class Unhashable:
    """A score that is compared by its value."""

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, outputs, query):
        return few_shot.accuracy(outputs, query)


def one_episode(key):
    side = {"x": jnp.eye(4), "y": jnp.arange(4), "mask": jnp.ones(4), "class_mask": jnp.ones(4)}
    return tasks.Episode(side, side)


def pixels(key, support, query):
    return query["x"][None]


def test_a_score_may_have_no_hash():
    evaluated = few_shot.evaluate_episodes(
        {"p": pixels}, one_episode, KEY, num_episodes=1, score_fn=Unhashable(), higher_is_better=False
    )
    assert evaluated.higher_is_better is False and evaluated.scores["p"]["episodes"] == [[1.0]]
    assert evaluated.score == "Unhashable"


def test_progress_counts_episodes(capsys):
    """Names of methods may equal names of the episodes' fields."""
    named, samplers = {"marks": pixels, "MAML [/bn]": pixels}, {"one": one_episode, "two": one_episode}
    run = lambda **shown: few_shot.evaluate_episodes(named, samplers, KEY, num_episodes=5, chunk_size=2, **shown)
    scores = run(progress=True).scores
    assert "episode 10/10, two: MAML [/bn]" in capsys.readouterr().err
    assert {x.shape for by_source in scores.values() for x in by_source.values()} == {(5, 1)}
    run()
    assert capsys.readouterr().err == ""  # no terminal


@pytest.mark.once
def test_evaluations_of_two_calls_join_to_that_of_one_call(three_methods, tmp_path):
    samplers = {"two": lambda key: sample(key, 2), "three": sample}
    evaluate = lambda names, key=KEY, num=50: few_shot.evaluate_episodes(
        {name: METHODS[name] for name in names}, samplers, key, num_episodes=num, chunk_size=25
    )
    metaopt.save(tmp_path / "one", evaluate(["prototypes", "steps"]))
    joined = evaluation.join_evaluations(metaopt.load(tmp_path / "one"), evaluate(["centered"]))
    assert joined.transductive == three_methods.transductive and list(joined.scores) == list(three_methods.scores)
    assert joined.score == three_methods.score == "accuracy"
    jax.tree.map(np.testing.assert_array_equal, joined.scores, three_methods.scores)
    jax.tree.map(np.testing.assert_array_equal, joined[1:3], three_methods[1:3])
    jax.tree.map(np.testing.assert_allclose, joined.marks, three_methods.marks)
    assert len(np.unique(joined.marks["two"])) > 25  # of 64 different ones, 50 are drawn
    for key, num, field in ((jax.random.key(1), 50, "marks"), (KEY, 40, "num_ways")):
        with pytest.raises(ValueError, match=f"source 'three' are not the same .their `{field}` differ"):
            evaluation.join_evaluations(three_methods, evaluate(["steps"], key, num)._replace(scores={}))


@pytest.mark.once
def test_scores_with_other_arguments_are_other_scores():
    def error(outputs, query, power):
        return (abs(outputs) ** power).mean()

    zero = lambda key, support, query: jnp.zeros((1, *query["x"].shape))
    judge = lambda name, power: few_shot.evaluate_episodes(
        {name: zero},
        tasks.sinusoids(),
        KEY,
        num_episodes=2,
        score_fn=functools.partial(error, power=power),
        higher_is_better=False,
    )
    assert sorted(evaluation.join_evaluations(judge("a", 1), judge("b", 1)).scores) == ["a", "b"]
    with pytest.raises(ValueError, match=r"their scores are 'error\(power=1\)' and 'error\(power=4\)'"):
        evaluation.join_evaluations(judge("a", 1), judge("b", 4))


@pytest.mark.once
def test_episodes_with_infinite_or_very_large_data_have_marks():
    def marks(extra):
        def with_extra(key):
            support, query, *_ = one_episode(key)
            return tasks.Episode({**support, "extra": jnp.array(extra)}, query)

        evaluated = few_shot.evaluate_episodes({"p": pixels}, with_extra, KEY, num_episodes=1)
        return evaluated.marks["episodes"][0]

    extra = [jnp.inf, 3e38, -jnp.inf, jnp.nan] * 5
    assert np.isfinite(marks(extra)) and marks(extra) != marks(extra[::-1])
    large = 3e38 * np.sign(np.cos(4 + np.arange(20)))  # all weights' signs: the sum is as large as it can be
    assert np.isfinite(marks(large)) and marks(large) != marks(-large)


def test_padding_of_a_query_set_stays_last():
    """A method sees the real rows in random order, and padding behind them."""

    def is_sorted(key, support, query):
        return jnp.all(jnp.diff(query["mask"]) <= 0) * jnp.ones((1, 11, 4))

    score = lambda outputs, query: outputs.min()
    evaluated = few_shot.evaluate_episodes(
        {"sorted": is_sorted}, {"s": sample}, KEY, num_episodes=8, score_fn=score, higher_is_better=True
    )
    assert (evaluated.scores["sorted"]["s"] == 1).all()


def test_scores_of_masked_rows():
    query = {
        "y": jnp.array([0, 1, 1, 0]),
        "mask": jnp.array([1.0, 1, 1, 0]),
        "class_mask": jnp.array([1.0, 1, 0]),
    }
    outputs = jnp.array([[1.0, 0, 9], [0, 1, 9], [1, 0, 9], [9, 0, 0]])
    assert float(few_shot.accuracy(outputs, query)) == pytest.approx(2 / 3)  # the episode has no third class
    assert float(few_shot.accuracy(outputs.at[1, 0].set(jnp.nan), query)) == pytest.approx(1 / 3)  # diverged
    assert float(few_shot.accuracy(outputs.at[:, 2].set(-jnp.inf), query)) == pytest.approx(2 / 3)
    part = {"y": jnp.array([[1.0], [2.0], [50.0]]), "mask": jnp.array([1.0, 1.0, 0.0])}
    outputs = jnp.array([[2.0], [5.0], [jnp.nan]])
    assert (
        float(few_shot.mean_squared_error(outputs, part)) == 5
        and float(few_shot.mean_absolute_error(outputs, part)) == 2
    )


PIXELS = {(5, 1): 0.472, (5, 5): 0.674, (20, 1): 0.289, (20, 5): 0.462}


@pytest.mark.slow
@pytest.mark.parametrize("setting", PIXELS)
def test_pixel_prototypes_on_omniglot_have_their_known_accuracy(setting):
    """By other code, with cosine similarities: 47.2, 67.4, 28.9 and 46.2 % on the official evaluation characters."""
    try:
        source = from_image_sets(["omniglot"])
    except FileNotFoundError:
        pytest.skip("METAOPT_DATA names no folder with omniglot.npz")
    ways, shots = setting
    test = tasks.select(source, omniglot_split(), "test")
    sample = tasks.episodes(
        test, num_ways=ways, num_shots=shots, preprocess=lambda x: x.reshape(len(x), -1).astype(jnp.float32) / 255
    )

    def pixels(key, support, query):
        one_hot = jax.nn.one_hot(support["y"], ways) / shots
        center = one_hot.T @ support["x"]
        return (query["x"] @ center.T / jnp.linalg.norm(center, axis=1)[None])[None]

    three_methods = few_shot.evaluate_episodes({"pixels": pixels}, sample, KEY, num_episodes=600, chunk_size=50)
    mean, half = evaluation.mean_scores(three_methods)["pixels"]["episodes"]
    assert abs(mean - PIXELS[setting]) < 0.016 and half < 0.011
