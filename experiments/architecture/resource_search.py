"""Accuracy against FLOPs: a differentiable search within budgets, against random networks and the whole grid.

The space is Conv–ReLU–Pool–Conv–ReLU–Pool–Flatten–Linear on the digits of scikit-learn (8 × 8), with searched widths,
windows and hidden features. It has only 72 networks, so all of them can be trained. A search cannot rely on that.

    search:   for each budget B, first-order DARTS on the supernet of all sizes solves
              min_α max_μ f(α) + μ (C(α)/B − 1), where C is the expected FLOPs. It gives the most probable sizes within
              B (`nas.within_budget`).
    one-shot: the supernet is trained once, with random sizes in every step. For each budget, it gives the network
              within the budget with the smallest validation loss under the shared weights.
    random:   as many random networks as budgets, and as many as can be trained at the cost of a search.
    grid:     all networks.

Every network is trained from scratch on the same rows with the same recipe. Each method's front is chosen by validation
and scored by test error. The score is the hypervolume of log FLOPs × test error, below the most expensive network and
an error of 20 %. Masks save no computation during a search: a step of the supernet costs as much as a step of the
largest network, and this cost is counted. One program trains all networks of the grid, as the supernet at one-hot
weights. Their reported cost is that of the small networks.

    python experiments/architecture/resource_search.py            minutes; writes results/resource_search.md and .png
    python experiments/architecture/resource_search.py --smoke    seconds; prints only
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from experiments import script
from metaopt import base, hypergrad, inner, nas, training

IN_SHAPE = (8, 8, 1)
LIMIT = 0.2  # networks with a larger test error do not count in a front


class Config(NamedTuple):
    space: nas.ElasticNetwork = nas.conv_net_space(widths=(4, 8, 16), kernels=(3, 5), depths=(1,), hidden=(32, 128))
    num_budgets: int = 6
    search_steps: int = 300
    one_shot_steps: int = 600
    train_steps: int = 200
    batch_size: int = 64
    alpha_rate: float = 0.05
    num_draws: int = 500  # of random sets of networks


SMOKE = Config(nas.conv_net_space(widths=(2, 4), kernels=(3,), depths=(1,), hidden=(4,)), 2, 4, 4, 4, 16, num_draws=20)


def split(seed: int) -> tuple[base.Task, dict]:
    """Returns 600 rows for training, 600 for validation, 597 for test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    part = lambda rows: {
        "x": jnp.asarray(images[rows].reshape(-1, *IN_SHAPE) / 16, jnp.float32),
        "y": jnp.asarray(labels[rows], jnp.int32),
    }
    return base.Task(part(order[:600]), part(order[600:1200])), part(order[1200:])


def adam(hyperparams):
    return optax.adam(3e-3)


# ---- Networks from scratch ------------------------------------------------------------------------------------------


def make_trainer(config: Config):
    """Returns `(key, weights, scales, task, test) -> (validation error, test error)` of one network.

    `weights` are one-hot.
    """
    net = nas.supernet(config.space, IN_SHAPE, ops={})

    def logits(params, hyperparams, batch):
        return net.apply(params, hyperparams["weights"], batch["x"])

    def loss(params, hyperparams, batch):
        outputs = logits(params, hyperparams, batch)
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()

    def init(key, hyperparams, data):
        return jax.tree.map(lambda leaf, scale: leaf * scale, net.init(key), hyperparams["scales"])

    loop = inner.loop(loss, adam, init=init, sampler=inner.minibatch(config.batch_size))
    run = inner.run(loop, config.train_steps)

    @jax.jit
    def train(key, weights, scales, task, test):
        hyperparams = {"weights": weights, "scales": scales}
        params = run(key, hyperparams, task.train).params
        error = lambda batch: (logits(params, hyperparams, batch).argmax(-1) != batch["y"]).mean()
        return error(task.valid), error(test)

    return train


def initial_scales(space: nas.ElasticNetwork, genotype: nas.Genotype):
    """Returns factors that scale the supernet's initial weights for a smaller network.

    A layer with fewer inputs needs larger initial weights.
    """
    shapes = lambda net: jax.eval_shape(nas.supernet(net, IN_SHAPE, ops={}).init, jax.random.key(0))
    fan_in = lambda leaf: np.prod(leaf.shape[:-1])  # 1 for biases
    return jax.tree.map(
        lambda large, small: jnp.float32(np.sqrt(fan_in(large) / fan_in(small))),
        shapes(space),
        shapes(nas.discrete(space, genotype)),
    )


class Grid(NamedTuple):
    """All networks, trained.

    Attributes:
      genotypes: [A].
      costs: [A] FLOPs of one image.
      errors: [seeds, A, 2] of validation and test.
    """

    genotypes: list[nas.Genotype]
    costs: np.ndarray
    errors: np.ndarray


def train_grid(config: Config, table: nas.CostTable, splits) -> Grid:
    space = nas.configuration_space(config.space)
    digits = np.ndindex(*(leaf.high + 1 for leaf in space.values()))
    genotypes = [nas.genotype_from_configuration(config.space, dict(zip(space, each, strict=True))) for each in digits]
    train, errors = make_trainer(config), np.zeros((len(splits), len(genotypes), 2))
    for a, genotype in enumerate(genotypes):
        weights = {name: jnp.asarray(w, jnp.float32) for name, w in nas.one_hot(config.space, genotype).items()}
        scales = initial_scales(config.space, genotype)
        for s, (task, test) in enumerate(splits):
            errors[s, a] = train(jax.random.fold_in(jax.random.key(s), a), weights, scales, task, test)
        if a % 12 == 11:
            print(f"{a + 1} of {len(genotypes)} networks trained", flush=True)
    costs = np.array([table.cost_of(config.space, genotype) for genotype in genotypes])
    return Grid(genotypes, costs, errors)


# ---- Search ---------------------------------------------------------------------------------------------------------


def make_searcher(config: Config, table: nas.CostTable):
    """Returns `(key, task, budget) -> (mixing weights, supernet's parameters)`. One program serves all budgets."""

    def valid_batch(key, task):
        rows = jax.random.randint(key, (config.batch_size,), 0, len(task.valid["y"]))
        return jax.tree.map(lambda leaf: leaf[rows], task.valid)

    options: dict[str, Any] = {"sampler": inner.minibatch(config.batch_size), "outer_batch": valid_batch, "decay": 0.0}
    free = nas.darts(config.space, IN_SHAPE, ops={}, order="first", optimizer=adam, **options)

    @jax.jit
    def run(key, task, budget):
        search = nas.under_budget(free, table, budget=budget, damping=1.0)
        learner = training.learner(search.estimator, optax.adam(config.alpha_rate, b1=0.5))
        start = learner.init(key, search.hyperparams(key), task)
        state, _ = jax.lax.scan(lambda state, _: learner.step(state), start, length=config.search_steps)
        return search.weights(state.hyperparams), free.problem.loop.params(state.estimator_state.inner)

    return run


def gap(config: Config, grid: Grid, searched: list, one_shot: np.ndarray, splits) -> str:
    """Describes how accuracy differs between supernet, discrete network and retrained network, on validation rows."""
    net, scores = nas.supernet(config.space, IN_SHAPE, ops={}), []
    judge = jax.jit(
        lambda params, weights, rows: (net.apply(params, weights, rows["x"]).argmax(-1) == rows["y"]).mean()
    )
    for s, a, weights, params in searched:
        accuracy = lambda w, s=s, params=params: float(judge(params, w, splits[s][0].valid))
        each = accuracy(nas.one_hot(config.space, grid.genotypes[a])), (1 - grid.errors[s, a, 0],), accuracy(weights)
        scores.append(nas.ArchitectureScores(f"{a}", *each))
    report = nas.search_report(scores)
    # Only ranks are compared. The likelihood exp(−loss) ranks the networks as the negative loss does.
    ranks = []
    for s in range(len(splits)):
        each = zip(np.exp(-one_shot[s]), 1 - grid.errors[s, :, 0], strict=True)
        ranks.append(nas.search_report([nas.ArchitectureScores("", p, (alone,)) for p, alone in each]).correlation)
    return (
        f"**The gap between supernet, discrete and retrained** (validation accuracy, mean over {len(scores)} searches):"
        f"\n\n- At one-hot weights, the chosen network is {100 * report.discretization_gap:.1f} points worse than the "
        "mixture.\n- Trained from scratch, its accuracy changes by "
        f"{100 * report.evaluation_gap:+.1f} points from there.\n- One-shot: Spearman's rank correlation between the "
        "order by its loss and the order by the accuracy of separately trained networks is "
        f"{script.spread(ranks, 2)}, over {len(grid.genotypes)} networks a seed (1 would be perfect)."
    )


def one_shot_scores(config: Config, genotypes, splits) -> np.ndarray:
    """Returns [seeds, A] validation losses with the weights of one supernet per seed."""
    options: dict[str, Any] = {"optimizer": adam, "sampler": inner.minibatch(config.batch_size), "decay": 0.0}
    one_shot = nas.single_path_one_shot(config.space, IN_SHAPE, ops={}, num_steps=config.one_shot_steps, **options)
    train, scores = jax.jit(one_shot.train), np.zeros((len(splits), len(genotypes)))
    for s, (task, _) in enumerate(splits):
        params = train(jax.random.key(200 + s), task.train)
        scores[s] = [one_shot.score(params, genotype, task.valid) for genotype in genotypes]
    return scores


def budgets_of(grid: Grid, num: int) -> np.ndarray:
    """Returns budgets from twice the cheapest network to the most expensive one, in equal ratios."""
    return np.geomspace(min(2 * grid.costs.min(), grid.costs.max()), grid.costs.max(), num)


# ---- Fronts ---------------------------------------------------------------------------------------------------------


def volume(grid: Grid, seed: int, rows) -> float:
    """Returns the test hypervolume of the front that validation chooses."""
    rows = np.unique(rows)
    front = rows[nas.pareto_front(np.stack([grid.costs[rows], grid.errors[seed, rows, 0]], 1))]
    points = np.stack([np.log10(grid.costs[front]), grid.errors[seed, front, 1]], 1)
    widest = np.log10(grid.costs.max() / grid.costs.min())
    return nas.hypervolume(points, [np.log10(grid.costs.max()) + 1e-9, LIMIT]) / (widest * LIMIT)


def random_volume(grid: Grid, seed: int, num: int, num_draws: int) -> float:
    rng = np.random.default_rng(seed)
    num = min(num, len(grid.costs))
    draws = [rng.choice(len(grid.costs), num, replace=False) for _ in range(num_draws)]
    return float(np.mean([volume(grid, seed, rows) for rows in draws]))


def draw(grid: Grid, chosen: np.ndarray, shared: np.ndarray, options) -> None:
    from matplotlib import pyplot

    from metaopt import plots

    test = 100 * grid.errors[..., 1].mean(0)
    points = lambda rows: np.stack([grid.costs[rows], test[rows]], 1)
    sets = {
        "all networks": points(np.arange(len(test))),
        "found by search, any seed": points(np.unique(chosen)),
        "found by one-shot, any seed": points(np.unique(shared)),
    }
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    labels = {"xlabel": "FLOPs of one image", "ylabel": "test error, %, mean of seeds"}
    plots.pareto(sets, axes=axes, log=True, **labels)
    figure.savefig(options.out / "resource_search.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    options = script.parser(__doc__).parse_args()
    config, num_seeds = (SMOKE, 1) if options.smoke else (Config(), options.seeds)
    flops = functools.partial(hypergrad.flops, products_only=True)
    table = nas.cost_table(config.space, IN_SHAPE, flops, ops={}, unit="FLOPs")
    splits = [split(seed) for seed in range(num_seeds)]
    grid = train_grid(config, table, splits)
    budgets = budgets_of(grid, config.num_budgets)
    chosen = np.zeros((num_seeds, len(budgets)), int)
    mixed = np.zeros((num_seeds, len(budgets)))
    run, results = make_searcher(config, table), []
    for b, budget in enumerate(budgets):
        for s, (task, _) in enumerate(splits):
            key = jax.random.fold_in(jax.random.key(100 + s), b)
            weights, params = jax.device_get(run(key, task, budget))
            mixed[s, b] = table.expected_cost(weights)
            chosen[s, b] = grid.genotypes.index(nas.within_budget(config.space, weights, table, budget))
            results.append((s, chosen[s, b], weights, params))
        print(f"budget {budget:,.0f}: {[f'{grid.costs[a]:,.0f}' for a in chosen[:, b]]} FLOPs", flush=True)

    scores = one_shot_scores(config, grid.genotypes, splits)
    inside = [np.flatnonzero(grid.costs <= budget) for budget in budgets]
    seeds = range(num_seeds)
    shared = np.array([[rows[scores[s, rows].argmin()] for rows in inside] for s in seeds])

    # A first-order alternation takes two gradients of the largest network, and a one-shot step takes one. A training
    # step takes one gradient of an average network.
    step = grid.costs.max() / (config.train_steps * grid.costs.mean())
    search_cost, one_shot_cost = 2 * config.search_steps * step, config.one_shot_steps * step
    num, total = len(budgets), len(grid.costs)
    equal, equal_shared = (min(total, num + round(cost)) for cost in (num * search_cost, one_shot_cost))
    of_random = lambda size: [random_volume(grid, s, size, config.num_draws) for s in seeds]
    volumes = {
        f"search, {num} budgets": [volume(grid, s, chosen[s]) for s in seeds],
        f"one-shot, {num} budgets": [volume(grid, s, shared[s]) for s in seeds],
        f"random, {num} networks": of_random(num),
        f"random, {equal_shared} networks (what one-shot costs)": of_random(equal_shared),
        f"random, {equal} networks (what the searches cost, or all)": of_random(equal),
        f"grid, all {total} networks": [volume(grid, s, np.arange(total)) for s in seeds],
    }
    text = script.table(
        ["front", "hypervolume, share of the box"], [[name, script.spread(values)] for name, values in volumes.items()]
    )
    searched, shot, few, as_shot, as_searched, _ = (np.mean(values) for values in volumes.values())
    against = lambda mine, theirs: "ahead of" if mine > theirs else "behind"
    text += "\n\n" + " ".join(
        f"{name} is {against(mine, few)} the same number of random networks, and {against(mine, at_cost)} the random "
        "networks that its cost could train."
        for name, mine, at_cost in (("The search", searched, as_searched), ("One-shot", shot, as_shot))
    )
    test, valid = 100 * grid.errors[..., 1], grid.errors[..., 0]
    lines = []
    for b, rows in enumerate(inside):
        flops = [budgets[b], mixed[:, b].mean(), grid.costs[chosen[:, b]].mean(), grid.costs[shared[:, b]].mean()]
        best = [test[s, rows[valid[s, rows].argmin()]] for s in seeds]
        errors = [test[seeds, chosen[:, b]], test[seeds, shared[:, b]], test[:, rows].mean(1), best]
        lines.append([*(f"{x:,.0f}" for x in flops), *(script.spread(x, 2) for x in errors)])
    header = ["budget, FLOPs", "the mixture's", "of search", "of one-shot", "test error, %, of search", "of one-shot"]
    text += "\n\n" + script.table([*header, "of random ones within", "of the best within, by validation"], lines)
    text += (
        f"\n\n- One search is for one budget and costs {search_cost:.1f} trainings of an average network. "
        f"One-shot costs {one_shot_cost:.1f} for all budgets.\n- Each chosen network is trained again from scratch.\n"
        f"- There are {num_seeds} seeds, each with its own split, initial weights and order of the rows. "
        "± is the standard deviation over seeds.\n\n"
    )
    text += gap(config, grid, results, scores, splits)
    script.publish(
        __file__, "Searching within a budget of FLOPs", text, options, picture="Test errors against operations"
    )
    if not options.smoke:
        draw(grid, chosen, shared, options)


if __name__ == "__main__":
    script.run(main)
