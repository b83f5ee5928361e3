"""Episodes against a slow NumPy version of Meta-Dataset's sampler, and against what must hold in every single one.

Statistical tests have fixed keys; a p-value below 0.001, or 3.5 standard errors, fails.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from metaopt import hypergrad, inner, tasks
from metaopt.inner import _samplers

P = 1e-3


def source(sizes, name="a", group=None, **kwargs):
    """Classes of these sizes; an example is its own row's number."""
    y = np.repeat(np.arange(len(sizes)), sizes)
    shuffled = np.random.default_rng(0).permutation(len(y))
    group = None if group is None else np.asarray(group)[shuffled]
    x = np.arange(len(y), dtype=np.float32)[:, None]
    names = [f"c{k}" for k in range(len(sizes))]
    return tasks.from_arrays(x, y[shuffled], name=name, group=group, class_names=names, **kwargs)


# --- the slow version ------------------------------------------------------------------------------------------------


def slow_classes(rng, kind, num_classes, superclass, nodes):
    if kind == "ontology":
        leaves = nodes[rng.integers(len(nodes))]
        return rng.permutation(leaves)[:50]
    if kind == "superclasses":
        members = np.flatnonzero(superclass == rng.integers(superclass.max() + 1))
    else:
        members = np.arange(num_classes)
    return rng.choice(members, rng.integers(5, min(50, len(members)) + 1), replace=False)


def slow_counts(rng, sizes):
    query = min(10, int(min(sizes)) // 2)
    beta = 1 - rng.random()  # in (0, 1]
    support = min(500, sum(int(np.ceil(beta * min(100, n - query))) for n in sizes))
    share = [n * np.exp(rng.uniform(np.log(0.5), np.log(2))) for n in sizes]
    shots = [
        min(int(s / sum(share) * (support - len(sizes))) + 1, n - query) for s, n in zip(share, sizes, strict=True)
    ]
    return query, support, shots


FLAT = source(np.round(np.geomspace(4, 400, 30)).astype(int), "flat")
SUPERCLASS = np.repeat(np.arange(5), [5, 6, 20, 33, 60])
DRAWN = source([20] * 124, "superclasses", group=np.tile(np.arange(20), 124), superclass=SUPERCLASS)
GRAPH = {  # three nodes with 5 to 392 classes below them: "root", "left" and "right", which share c6 and c7
    "root": ["chain", "right"],
    "chain": ["left"],
    "left": [f"c{k}" for k in range(8)],
    "right": ["pair", "many"],
    "pair": ["c6", "c7"],
    "many": [f"c{k}" for k in range(8, 60)],
}
SPANS = [list(range(60)), list(range(8)), list(range(6, 60)), list(range(8, 60))]
DAG = source(np.tile([9, 30, 150], 20), "ontology", ontology=GRAPH)
# Six speakers who said each word a different number of times.
SAID = np.random.default_rng(3).integers(2, 12, size=(7, 6))
SPOKEN = source(SAID.sum(1), "spoken", group=np.concatenate([np.repeat(np.arange(6), row) for row in SAID]))
SOURCES = [FLAT, DRAWN, DAG, SPOKEN]
KEYS = jax.random.split(jax.random.key(0), 3600)


@pytest.fixture(scope="module")
def varied():
    """Many episodes of Meta-Dataset's sampler."""
    sample = tasks.meta_dataset_episodes(SOURCES, weights=[4, 4, 3, 1])
    draw = jax.jit(jax.vmap(sample))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *[draw(KEYS[i : i + 400]) for i in range(0, 3600, 400)])


@pytest.fixture(scope="module")
def drawn(varied):
    """For each source, the draws of the sampler and those of a slow version."""
    meta = varied.meta
    rng = np.random.default_rng(1)
    episodes = {}
    for number, data_set in enumerate(SOURCES[:3]):
        sizes, mine = np.bincount(data_set.y), meta.source == number
        fast = [
            (classes[:ways], shots[:ways], int(query))
            for classes, shots, query, ways in zip(
                meta.classes[mine], meta.num_shots[mine], meta.num_query[mine], meta.num_ways[mine], strict=True
            )
        ]
        slow = []
        for _ in range(2000):
            classes = slow_classes(rng, data_set.name, len(sizes), data_set.superclass, SPANS)
            query, _, shots = slow_counts(rng, sizes[classes])
            slow.append((classes, np.array(shots), query))
        episodes[data_set.name] = (fast, slow)
    return meta, episodes


def same_histogram(a, b, bins):
    """The p-value of both being one distribution, bins with few left out together."""
    table = np.stack([np.histogram(v, bins)[0] for v in (a, b)])
    few = table.sum(axis=0) < 20
    table = np.concatenate([table[:, ~few], table[:, few].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    return 1.0 if table.shape[1] < 2 else stats.chi2_contingency(table).pvalue


def close_means(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return abs(a.mean() - b.mean()) <= 3.5 * error + 1e-12


@pytest.mark.parametrize("name", ["flat", "superclasses", "ontology"])
@pytest.mark.once
def test_meta_dataset_draws_as_the_slow_version_does(drawn, name):
    fast, slow = drawn[1][name]
    sizes = np.bincount({s.name: s for s in SOURCES}[name].y)
    most = np.arange(-0.5, len(sizes) + 1)
    ways = [[len(c) for c, _, _ in some] for some in (fast, slow)]
    assert same_histogram(*ways, most) > P
    assert same_histogram(*[np.concatenate([c for c, _, _ in some]) for some in (fast, slow)], most) > P
    assert same_histogram(*[[q for _, _, q in some] for some in (fast, slow)], np.arange(12) - 0.5) > P
    totals = [[s.sum() for _, s, _ in some] for some in (fast, slow)]
    assert same_histogram(*totals, np.linspace(0, 501, 26)) > P
    assert stats.ks_2samp(*totals).pvalue > P
    for moment in (
        lambda c, s: s.sum(),
        lambda c, s: (s**2).sum(),
        lambda c, s: s.max(),
        lambda c, s: s.std(),  # of imbalance
        lambda c, s: (s * sizes[c]).sum() / s.sum(),  # shots follow the sizes
        lambda c, s: (s == 1).sum(),
    ):
        assert close_means(*[[moment(c, s) for c, s, _ in some] for some in (fast, slow)])
    large, small = sizes.argmax(), sizes.argmin()
    for one in (large, small):
        shots = [[s[c == one][0] for c, s, _ in some if one in c] for some in (fast, slow)]
        assert same_histogram(*shots, np.r_[np.arange(0.5, 30), np.linspace(30, 400, 20)]) > P


@pytest.mark.once
def test_sources_are_drawn_by_their_weights_and_superclasses_uniformly(drawn):
    meta, episodes = drawn
    assert stats.chisquare(np.bincount(meta.source), [1200, 1200, 900, 300]).pvalue > P
    alphabets = np.bincount([SUPERCLASS[c[0]] for c, _, _ in episodes["superclasses"][0]])
    assert stats.chisquare(alphabets).pvalue > P
    for classes, _, _ in episodes["superclasses"][0]:
        assert len(set(SUPERCLASS[classes])) == 1
    for classes, _, _ in episodes["ontology"][0]:  # all below a node, or 50 of them
        assert len(classes) == 50 or sorted(classes.tolist()) in SPANS


def check_episode(episode, data_set, *, disjoint):
    """What holds in every episode: rows once, labels right, padding zero and last, groups on one side."""
    ways, meta = int(episode.meta.num_ways), episode.meta
    classes = np.asarray(meta.classes)
    assert len(set(classes[:ways].tolist())) == ways and (classes[ways:] == -1).all()
    drawn_rows = []
    for part, rows in ((episode.support, meta.support_rows), (episode.query, meta.query_rows)):
        mask, rows, y = np.asarray(part["mask"]), np.asarray(rows), np.asarray(part["y"])
        num = int(part["num_rows"])
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < num)
        np.testing.assert_array_equal(part["class_mask"], np.arange(len(classes)) < ways)
        assert (rows[num:] == -1).all() and not np.asarray(part["x"])[num:].any() and not y[num:].any()
        np.testing.assert_array_equal(np.asarray(part["x"])[:num, 0], data_set.x[rows[:num], 0])
        np.testing.assert_array_equal(classes[y[:num]], data_set.y[rows[:num]])
        assert part["x"].dtype == part["mask"].dtype == jnp.float32 and part["y"].dtype == jnp.int32
        drawn_rows.append(rows[:num])
    support, query = drawn_rows
    np.testing.assert_array_equal(
        np.bincount(episode.support["y"][: len(support)], minlength=len(classes)), meta.num_shots
    )
    assert (np.bincount(episode.query["y"][: len(query)], minlength=ways) == int(meta.num_query)).all()
    both = np.concatenate(drawn_rows)
    assert len(set(both.tolist())) == len(both)
    if disjoint:
        assert not set(data_set.group[support].tolist()) & set(data_set.group[query].tolist())


SAMPLE_FIXED = tasks.episodes([SPOKEN, DRAWN, DAG], num_ways=4, num_shots=3, num_query=2)


@pytest.fixture(scope="module")
def draw_fixed():
    return jax.jit(jax.vmap(SAMPLE_FIXED))


@pytest.fixture(scope="module")
def fixed(draw_fixed):
    return jax.tree.map(np.asarray, draw_fixed(KEYS[:2000]))


def check_all(batch, sources, num, disjoint=True):
    for i in range(num):
        episode = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        data_set = sources[int(episode.meta.source)]
        check_episode(episode, data_set, disjoint=disjoint and data_set.group is not None)
    assert set(batch.meta.source[:num].tolist()) == set(range(len(sources)))


@pytest.mark.once
def test_every_episode_has_disjoint_rows_of_its_classes(fixed):
    check_all(fixed, [SPOKEN, DRAWN, DAG], 100)
    assert (fixed.meta.num_shots == 3).all() and (fixed.meta.num_query == 2).all()
    assert fixed.support["x"].shape == (2000, 12, 1) and fixed.query["y"].shape == (2000, 8)


def test_every_episode_of_meta_dataset_has_disjoint_rows_of_its_classes(varied):
    check_all(varied, SOURCES, 150)
    assert varied.support["x"].shape == (3600, 500, 1) and varied.query["x"].shape == (3600, 500, 1)
    assert varied.meta.num_ways.max() == 50


@pytest.mark.slow
def test_all_rows_of_a_class_groups_on_both_sides_and_your_own_inputs():
    """5 + 15 of 20 examples, in which a permutation that misses one would repeat another."""
    sample = tasks.episodes(DRAWN, num_shots=5, num_query=15, disjoint_groups=False, preprocess=lambda x: x[:, 0] + 1)
    batch = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample))(KEYS[:20]))
    inputs = {"support": batch.support["x"][..., None] - 1, "query": batch.query["x"][..., None] - 1}
    batch = batch._replace(**{part: {**getattr(batch, part), "x": x} for part, x in inputs.items()})
    check_all(batch, [DRAWN], 20, disjoint=False)
    sides = [DRAWN.group[rows] for rows in (batch.meta.support_rows[0], batch.meta.query_rows[0])]
    assert set(sides[0].tolist()) & set(sides[1].tolist())


@pytest.mark.once
def test_examples_and_classes_are_drawn_uniformly(fixed):
    """In the source without groups: the classes, the examples of a class, and their order."""
    mine = fixed.meta.source == 2
    classes, support, query = (getattr(fixed.meta, name)[mine] for name in ("classes", "support_rows", "query_rows"))
    assert stats.chisquare(np.bincount(classes.ravel(), minlength=60)).pvalue > P
    assert stats.chisquare(np.bincount(classes[:, 0] // 10)).pvalue > P
    rank = np.empty(len(DAG.y), int)  # the position of an example in its class
    for k in range(60):
        rank[DAG.y == k] = np.arange((DAG.y == k).sum())
    for kind, size in enumerate([9, 30, 150]):
        of_kind = classes % 3 == kind
        drawn = [rank[rows.reshape(len(classes), 4, -1)[of_kind]] for rows in (support, query)]
        for ranks in drawn:
            num = ranks.shape[1]
            counts, share = np.bincount(ranks.ravel(), minlength=size), num / size
            # Without repetition, counts of one class are correlated: hence (n - 1) / n.
            spread = len(ranks) * share * (1 - share) * size / (size - 1)
            statistic = ((counts - len(ranks) * share) ** 2).sum() / spread
            assert P < stats.chi2.sf(statistic, size - 1) < 1 - P
        if size < 100:  # one of the support set and one of the query set, as a pair
            pairs = np.bincount(drawn[0][:, 1] * size + drawn[1][:, 0], minlength=size**2).reshape(size, size)
            assert not np.diag(pairs).any()
            off = pairs[~np.eye(size, dtype=bool)].reshape(-1, size - 1 if size == 9 else 29 * 5)
            assert stats.chisquare(off.sum(axis=0)).pvalue > P and stats.chisquare(off.sum(axis=1)).pvalue > P


def test_groups_are_drawn_uniformly(fixed):
    """Of 6 speakers 2 are sure to have said 3 examples of each word, and 1 to have said 2; the other 3 are shared."""
    rows = fixed.meta.support_rows[fixed.meta.source == 0]
    heard = np.array([np.bincount(SPOKEN.group[r], minlength=6) > 0 for r in rows])
    assert heard.sum(axis=1).max() == 4  # 2 + round(3 · 3 / 5)
    # Somebody is drawn as often as another, but is heard less if he said less: compare with drawing four by hand.
    rng, slow = np.random.default_rng(4), []
    for _ in range(2000):
        four, words = rng.permutation(6)[:4], rng.permutation(7)[:4]
        speakers = [rng.permutation(np.repeat(four, SAID[word][four]))[:3] for word in words]
        slow.append(np.bincount(np.concatenate(speakers), minlength=6) > 0)
    table = np.stack([heard.sum(axis=0), np.sum(slow, axis=0)])
    assert stats.chi2_contingency(table).pvalue > P
    assert close_means(heard.sum(axis=1), np.sum(slow, axis=1))


@pytest.mark.once
def test_within_a_superclass():
    sample = tasks.episodes(DRAWN, num_ways=20, within_superclass=True, num_query=5)
    classes = np.asarray(jax.jit(jax.vmap(lambda key: sample(key).meta.classes))(KEYS[:200]))
    above = SUPERCLASS[classes]
    assert (above == above[:, :1]).all() and set(above[:, 0].tolist()) == {2, 3, 4}


def test_an_episode_depends_only_on_its_key(draw_fixed, fixed):
    backwards = draw_fixed(KEYS[:2000][::-1])
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[::-1], fixed), jax.tree.map(np.asarray, backwards))
    for part in (fixed.support, fixed.query):
        assert _samplers.num_rows(part, shared=("class_mask",)).shape == (2000,)


@pytest.mark.parametrize("sample", [tasks.sinusoids(), SAMPLE_FIXED])
def test_batches_are_tasks_of_the_contract(sample):
    """MAML's composition takes them, minibatches included."""
    sampler = inner.minibatch(4, shared=() if sample is not SAMPLE_FIXED else ("class_mask",))

    def loss(params, hyperparams, batch):
        return (batch["mask"] * (batch["x"] @ params - batch["y"].reshape(-1, 1))[:, 0] ** 2).sum() / batch[
            "mask"
        ].sum()

    loop = inner.loop(loss, lambda hp: optax.sgd(0.02), init=lambda key, hp, data: hp, sampler=sampler)
    estimator = hypergrad.over_tasks(hypergrad.unrolled(inner.problem(loop, loss), num_steps=2))

    def estimate(key, start):
        batch = tasks.episode_batches(sample, 3)(key)
        return estimator.estimate(start, batch, estimator.init(key, start, batch))[0]

    assert jax.eval_shape(estimate, KEYS[0], jnp.zeros((1, 1))).hypergrad.shape == (1, 1)


@pytest.mark.once
def test_programs_hold_no_copy_of_the_data():
    images = tasks.from_arrays(np.zeros((600, 20, 20), np.uint8), np.arange(600) // 20)
    key = jax.random.key(0)
    batches = tasks.episode_batches(tasks.episodes(images, num_query=1), 2)
    rows = tasks.labelled_batches(images, 3)
    for sample in (batches, rows):
        assert 600 * 400 in [leaf.size for leaf in jax.tree.leaves(sample)]
        assert len(jax.jit(lambda sample, key: sample(key)).lower(sample, key).as_text()) < 150_000  # two digits a byte
    task = rows(key)
    assert task.train["x"].shape == (3, 20, 20) and task.train["x"].dtype == jnp.float32
    assert task.valid["class_mask"].shape == (30,) and (task.valid["y"] < 30).all()
    two = [images, images._replace(name="other", x=images.x + 1)]
    drawn = tasks.labelled_batches(two, 400, weights=[1.0, 3.0])(key).train
    assert ((drawn["y"] >= 30) == (drawn["x"][:, 0, 0] > 0)).all() and (drawn["y"] < 60).all()
    assert abs((drawn["y"] >= 30).mean() - 0.75) < 0.08
    assert len(np.unique(drawn["y"][drawn["y"] >= 30])) > 25
    for weights, second in (([0, 0.1], True), ([0.1, 0], False)):
        drawn = tasks.labelled_batches(two, 400, weights=weights)(key).train
        assert ((drawn["y"] >= 30) == second).all()


def test_warns_of_images_that_nobody_scales():
    pixels = np.arange(96.0).reshape(24, 2, 2)
    source = lambda x: tasks.from_arrays(x, np.arange(24) // 8, name="birds")
    samplers = [
        functools.partial(tasks.episodes, num_ways=2, num_query=2),
        functools.partial(tasks.meta_dataset_episodes, min_ways=2, max_ways=3),
        functools.partial(tasks.labelled_batches, batch_size=2),
    ]
    for make in samplers:
        for x in (pixels, pixels.astype(int)):
            with pytest.warns(UserWarning, match="Source 'birds': `x` has values from 0 to 95.* such as 255"):
                make(source(x))
        for x in (pixels.astype(np.uint8), pixels / 95, pixels - 48, pixels.reshape(24, 4)):  # the last is a table
            make(source(x))
        make(source(pixels), preprocess=lambda x: x / 95)
