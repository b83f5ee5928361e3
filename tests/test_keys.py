"""Keys: every use has its own, every step has new ones, and all of them follow from the seed.

The functions of a problem report the keys that they get: `init`, the sampler ("batch"), the two losses ("context") and
`outer_batch` ("outer"). The battery runs every estimator of the table in `estimators.py`, and compares the bits. It
also derives keys from each of them, as the functions of users do, since a key that another use derives is a key that it
shares.
"""

import collections
import functools
import inspect
from collections.abc import Callable

import estimators
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from estimators import ESTIMATORS

from metaopt import base, few_shot, hypergrad, inner, tasks, training

REPORTED = collections.defaultdict(list)  # use -> what its functions got, as bits


def report(use, key, *numbers):
    """Adds the bits of a key, and some numbers, once for each member of a vmap."""
    append = lambda bits, *numbers: REPORTED[use].append((tuple(np.ravel(bits).tolist()), *map(float, numbers)))
    jax.debug.callback(append, jax.random.key_data(key), *numbers)


def reports(function, *args):
    """The outputs of a function, and the reports during its run: use -> set of reports."""
    jax.effects_barrier()
    REPORTED.clear()
    outputs = jax.block_until_ready(function(*args))
    jax.effects_barrier()
    return outputs, {use: set(used) for use, used in REPORTED.items()}


# ---- Estimators -----------------------------------------------------------------------------------------------------

PROBLEM = estimators.problem_of(report=report)
NUMBERS = [name for name in estimators.LEAVES for _ in jnp.ravel(estimators.LEAVES[name])]  # the leaves of reported λ


@functools.cache
def programs(make):
    """`init` and `estimate` of an estimator, compiled once for all tests of its row."""
    estimator = make(PROBLEM)
    return jax.jit(estimator.init), jax.jit(estimator.estimate)


def reports_of(row, seed, num_estimates=3):
    """What `init` and each estimate reported, twice for one seed and once for another."""
    (start, estimate), hyperparams = programs(row.make), estimators.hyperparams_of(row)
    runs = []
    for own_seed in (seed, seed, seed + 1):
        state, at_start = reports(start, jax.random.key(own_seed), hyperparams, row.task)
        runs.append([at_start])
        for _ in range(num_estimates):
            (_, state), in_estimate = reports(estimate, hyperparams, row.task, state)
            runs[-1].append(in_estimate)
    return runs


def bits(reported, use):
    """The distinct keys in the reports of one use."""
    return {key for key, *_ in reported.get(use, ())}


@jax.jit
def children(data):
    """[..., 11, 2] the keys that are first derived from keys: by `split` into 2 and 3, and by `fold_in` of 0 to 5."""
    key = jax.random.wrap_key_data(data)
    split = [jax.random.split(key, num) for num in (2, 3)]
    folded = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(6))
    return jax.random.key_data(jnp.concatenate([*split, folded]))


@jax.jit
def descendants(data):
    """The keys that are derived from each key in one step, and in two steps."""
    once = jax.vmap(children)(data)
    return once, jax.vmap(jax.vmap(children))(once)


def derived(keys):
    """The keys that are derived from any of the keys in one or two steps."""
    if not keys:
        return set()
    keys = sorted(keys)
    keys += keys[:1] * (-len(keys) % 32)  # few shapes, so few programs
    levels = descendants(np.array(keys, np.uint32))
    return {tuple(row) for level in levels for row in np.reshape(level, (-1, 2)).tolist()}


def assert_unrelated(reported, uses):
    """No two uses share a key, and no key is derived from another one."""
    keys = {use: bits(reported, use) for use in uses}
    everything = set().union(*keys.values())
    assert len(everything) == sum(map(len, keys.values())), "two uses share a key"
    for use, own in keys.items():
        assert not derived(own) & everything, f"a key is derived from one of {use!r}"


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.once
def test_estimators(name):
    row = ESTIMATORS[name]
    first, repeated, other = reports_of(row, seed=3)
    assert first == repeated, "keys follow from the seed"
    total = {
        use: set().union(*(part.get(use, set()) for part in first)) for use in ("init", "batch", "context", "outer")
    }
    for use in total:
        assert not bits(total, use) & set().union(*(bits(part, use) for part in other)), f"{use}: one key, two seeds"

    # Training runs: one key each for `init` and for the sampler, and for the losses one at each step.
    num_runs = row.runs * (len(first) - 1 if row.fresh else 1)
    assert len(bits(total, "init")) == len(bits(total, "batch")) == num_runs
    steps = {step for _, step in total["context"]}
    assert len(total["context"]) == len(bits(total, "context")) == num_runs * len(steps)
    assert not row.runs or len(steps) >= estimators.NUM_STEPS

    # Outer batches: new ones in every estimate.
    assert [len(bits(part, "outer")) for part in first[1:]] == [row.outer] * (len(first) - 1)
    assert len(bits(total, "outer")) == row.outer * (len(first) - 1)

    assert_unrelated(total, total)

    lams = {tuple(lam) for part in first for _, *lam in part.get("λ", ())}
    assert row.perturbs or len(lams) <= 1, "the rule perturbs λ: set `perturbs` in its row (see `Row`)"


PERTURBING = [name for name, row in ESTIMATORS.items() if row.perturbs in ("estimate", "run")]


@pytest.mark.parametrize("name", PERTURBING)
@pytest.mark.once
def test_perturbations(name):
    row = ESTIMATORS[name]
    first, _, other = reports_of(row, seed=5)
    perturbed = np.array([leaf in row.leaves.split() for leaf in NUMBERS])
    means = np.concatenate([np.ravel(x) for x in estimators.LEAVES.values()])
    estimates = [
        {tuple((np.array(lam) - means)[perturbed].round(9)) for _, *lam in part["λ"]}
        for part in (*first[1:], *other[1:])
    ]
    num_entries = perturbed.sum()
    for perturbations in estimates:
        # 3 pairs, both members of each, and another number for each entry of λ.
        assert len(perturbations) == 6
        assert len({abs(x) for perturbation in perturbations for x in perturbation}) == 3 * num_entries
        assert {tuple(-x for x in perturbation) for perturbation in perturbations} == perturbations
    # New ones in every estimate, or in every training run, and with every seed.
    num_draws = 2 if row.perturbs == "run" else len(estimates)
    assert len(set().union(*estimates)) == 6 * num_draws
    assert len({frozenset(perturbations) for perturbations in estimates}) == num_draws


@pytest.mark.once
def test_proposals_share_their_keys():
    first, _, other = reports_of(ESTIMATORS["best_of"], seed=5)
    drawn = [collections.defaultdict(set) for _ in range(6)]
    for lams, part in zip(drawn, (*first[1:], *other[1:]), strict=True):
        for key, *lam in part["λ"]:
            lams[key].add(tuple(lam))
    assert [len(lams) for lams in drawn] == [1] * 6  # one key in each estimate, for the hypergradient too
    candidates = [next(iter(lams.values())) for lams in drawn]
    assert {len(lams) for lams in candidates} == {4} and len(set.intersection(*candidates)) == 1  # the center
    assert len(set().union(*candidates)) == 6 * 3 + 1


def test_both_members_of_a_pair_share_their_keys():
    first, *_ = reports_of(ESTIMATORS["evolution"], seed=5)
    for part in first[1:]:
        pairs = collections.Counter(key for key, *_ in part["λ"])
        assert set(pairs.values()) == {2} and len(pairs) == 3


# ---- Keys that functions outside of a problem get --------------------------------------------------------------------


@pytest.mark.once
def test_the_functions_of_an_implicit_rule():
    def batch(key, data):
        report("rows", key)
        return data

    def solver(matvec, b, initial, *, key):
        report("solver", key)
        return hypergrad.cg()(matvec, b, initial, key=key)

    rule = lambda problem: hypergrad.implicit(problem, num_steps=2, batch=batch, solver=solver)
    first, repeated, _ = reports_of(ESTIMATORS["implicit"]._replace(make=rule), seed=3)
    assert first == repeated
    uses = ("init", "batch", "context", "outer", "rows", "solver")
    total = {use: set().union(*(part.get(use, set()) for part in first)) for use in uses}
    assert len(bits(total, "rows")) == len(bits(total, "solver")) == 3  # one an estimate
    assert_unrelated(total, uses)


@pytest.mark.once
def test_fit_and_the_slots_of_a_learner():
    def sample_tasks(key):
        report("tasks", key)
        return np.array([1.0, 2.0, 3.0])

    def evaluate(key, hyperparams):
        report("evaluate", key)
        return jnp.zeros([])

    def start(key, hyperparams, task):
        report("slot", key)
        return key

    def estimate(hyperparams, task, state):
        loss_key, key = jax.random.split(state)
        report("estimate", loss_key)
        return base.Estimate(hyperparams, 0 * hyperparams, jnp.array(True), {}), key

    learner = training.learner(hypergrad.over_tasks(base.Estimator(start, estimate, kind="exact")), optax.sgd(0.1))

    def fit(seed):
        options = {"hyperparams": 1.0, "num_steps": 4, "evaluate": evaluate, "eval_every": 1}
        return reports(lambda: training.fit(learner, sample_tasks, key=jax.random.key(seed), **options).hyperparams)[1]

    first, repeated, other = fit(0), fit(0), fit(1)
    assert first == repeated
    # The first step has the slots of `init`; the tasks of step 0 are drawn twice, for `init` and for it.
    assert {use: len(keys) for use, keys in first.items()} == {"tasks": 4, "evaluate": 1, "slot": 12, "estimate": 12}
    assert_unrelated(first, ("tasks", "evaluate", "slot"))
    assert all(not first[use] & other[use] for use in first)


@pytest.mark.once
def test_episodes_and_the_methods_that_are_judged_on_them():
    sinusoids = tasks.sinusoids(num_shots=2, num_query=2)

    def sample(key):
        report("episode", key)
        return sinusoids(key)

    def method(key, support, query):
        report("method", key)
        return jnp.zeros((1, *query["x"].shape))

    def judge(seed):
        score = {"score_fn": few_shot.mean_squared_error, "num_episodes": 5}
        run = lambda: few_shot.evaluate_episodes({"m": method}, {"s": sample}, jax.random.key(seed), **score).scores
        return reports(run)[1]

    first, repeated, other = judge(0), judge(0), judge(1)
    assert first == repeated
    assert {use: len(keys) for use, keys in first.items()} == {"episode": 5, "method": 5}
    assert_unrelated(first, first)
    assert all(not first[use] & other[use] for use in first)


# ---- Samplers --------------------------------------------------------------------------------------------------------

ROWS = {"x": jnp.arange(20.0)}
BATCHES = {
    "without replacement": inner.minibatch(5),
    "with replacement": inner.minibatch(5, replace=True),
    "across epochs": inner.minibatch(13),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.once
def test_samplers_of_rows(name):
    loop = inner.loop(
        lambda params, hp, batch: params.sum(), lambda hp: optax.sgd(0.1), init=init_of_zeros, sampler=BATCHES[name]
    )

    @jax.jit
    def batches(seed):
        state = loop.init(jax.random.key(seed), None, ROWS)
        return jax.vmap(lambda step: loop.batch(state._replace(step=step), ROWS)["x"])(jnp.arange(8))

    drawn = [np.asarray(batches(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    rows = [tuple(batch) for draw in (drawn[0], drawn[2]) for batch in draw.tolist()]
    assert len(set(rows)) == 16  # another batch in every step, and with every key


def init_of_zeros(key, hyperparams, data):
    return jnp.zeros(2)


SOURCE = tasks.from_arrays(np.arange(60, dtype=np.float32)[:, None], np.repeat(np.arange(6), 10), name="a")
NUMBERED = np.arange(600.0)
USERS = tasks.from_user_records(NUMBERED[:, None], NUMBERED, np.repeat(np.arange(6), 100), time=NUMBERED)
PART = {"x": jnp.arange(20.0)[:, None], "y": jnp.arange(20) % 2, "mask": jnp.ones(20)}
TASK_SAMPLERS: dict[str, Callable] = {
    "function_episodes": tasks.function_episodes(jax.random.normal, lambda c, x: c * x, noise=0.1),
    "sinusoids": tasks.sinusoids(noise=0.1),
    "mixed_functions": tasks.mixed_functions(noise=0.1),
    "episodes": tasks.episodes(SOURCE, num_ways=2, num_shots=2, num_query=2),
    "meta_dataset_episodes": tasks.meta_dataset_episodes([SOURCE]),
    "labelled_batches": tasks.labelled_batches([SOURCE, SOURCE._replace(name="b")], 6),
    "user_episodes, random": tasks.user_episodes(USERS, num_support=3, order="random"),
    "user_episodes, window": tasks.user_episodes(USERS, num_support=3, order="window"),
    "resplit": lambda key: tasks.resplit(key, base.Task(PART, {**PART, "x": 20 + PART["x"]})),
}


def test_every_sampler_of_tasks_has_a_row():
    functions = {name: getattr(tasks, name) for name in tasks.__all__ if inspect.isfunction(getattr(tasks, name))}
    returned = {name: str(inspect.signature(function).return_annotation) for name, function in functions.items()}
    samplers = {name for name, text in returned.items() if "Episode" in text or "Callable" in text}
    assert samplers | {"resplit"} == {name.split(", ")[0] for name in TASK_SAMPLERS} | {"episode_batches"}


@pytest.mark.parametrize("name", TASK_SAMPLERS)
@pytest.mark.once
def test_samplers_of_tasks(name):
    numbers = lambda drawn: tuple(float(x) for leaf in jax.tree.leaves(drawn) for x in np.ravel(leaf))
    sample = jax.jit(TASK_SAMPLERS[name])
    with jax.debug_key_reuse(True):  # raises where two draws have one key
        drawn = [numbers(sample(jax.random.key(seed))) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


def test_batches_of_tasks_have_a_key_for_each_task():
    def sample(key):
        report("task", key)
        return estimators.TASK

    batch = tasks.episode_batches(sample, 3)
    keys = [reports(batch, jax.random.key(seed))[1]["task"] for seed in (0, 0, 1)]
    assert keys[0] == keys[1] and len(keys[0] | keys[2]) == 6
