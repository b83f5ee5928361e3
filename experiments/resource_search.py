"""Accuracy against FLOPs: a differentiable search within budgets, against random networks and the whole grid.

The space is Conv–ReLU–Pool–Conv–ReLU–Pool–Flatten–Linear on the digits of scikit-learn (8 × 8), with searched widths,
windows and hidden features: 72 networks, so few that all of them are trained, which no search may count on.

    search:   for each budget B, DARTS of first order on the supernet of all sizes, within the budget:
              min_α max_μ f(α) + μ (C(α)/B − 1), where C is the expected FLOPs; then the likeliest sizes within B
              (`nas.within_budget`), trained from scratch.
    random:   as many networks drawn at random, and as many as what the searches cost would have trained.
    grid:     all networks.

Every network is trained from scratch on the same rows with the same recipe. Each method's front is chosen by validation
and judged by test error: the hypervolume of log FLOPs × test error, beneath the dearest network and an error of 20 %.
In search, masks save nothing: a step of the supernet costs what the largest network costs, and that is what is counted.
(The networks of the grid are trained by one program, the supernet at one-hot weights, which is the small network; what
they are said to cost is the small network's.)

    python experiments/resource_search.py            minutes; writes results/resource_search.md and .png
    python experiments/resource_search.py --smoke    seconds; prints only
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script
from sklearn.datasets import load_digits

from metaopt import base, hypergrad, inner, methods, nas, training

IN_SHAPE = (8, 8, 1)
LIMIT = 0.2  # the test error beyond which a network adds nothing to a front


class Config(NamedTuple):
    space: nas.ElasticNetwork = nas.conv_net_space(widths=(4, 8, 16), kernels=(3, 5), depths=(1,), hidden=(32, 128))
    num_budgets: int = 6
    search_steps: int = 300
    train_steps: int = 200
    batch_size: int = 64
    alpha_rate: float = 0.05
    num_draws: int = 2_000  # of random sets of networks


SMOKE = Config(nas.conv_net_space(widths=(2, 4), kernels=(3,), depths=(1,), hidden=(4,)), 2, 4, 4, 16, num_draws=20)


def split(seed: int) -> tuple[base.Task, dict]:
    """600 rows to train, 600 to validate, 597 to test."""
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
    """`(key, weights, scales, task, test) -> (validation error, test error)` of one network, by one-hot weights."""
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
    """By what the supernet's initial weights are too small for a network that has fewer inputs."""
    shapes = lambda net: jax.eval_shape(nas.supernet(net, IN_SHAPE, ops={}).init, jax.random.key(0))
    fan_in = lambda leaf: np.prod(leaf.shape[:-1])  # 1 of biases
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
    genotypes = [nas.from_configuration(config.space, dict(zip(space, each, strict=True))) for each in digits]
    train, errors = make_trainer(config), np.zeros((len(splits), len(genotypes), 2))
    for a, genotype in enumerate(genotypes):
        weights = {name: jnp.asarray(w, jnp.float32) for name, w in nas.one_hot(config.space, genotype).items()}
        scales = initial_scales(config.space, genotype)
        for s, (task, test) in enumerate(splits):
            errors[s, a] = train(jax.random.fold_in(jax.random.key(s), a), weights, scales, task, test)
        if a % 12 == 11:
            print(f"{a + 1} of {len(genotypes)} networks trained", flush=True)
    costs = np.array([nas.cost_of(table, config.space, genotype) for genotype in genotypes])
    return Grid(genotypes, costs, errors)


# ---- Search ---------------------------------------------------------------------------------------------------------


def make_searcher(config: Config, table: nas.CostTable):
    """`(key, task, budget) -> mixing weights`, one program for all budgets."""

    def valid_batch(key, task):
        rows = jax.random.randint(key, (config.batch_size,), 0, len(task.valid["y"]))
        return jax.tree.map(lambda leaf: leaf[rows], task.valid)

    options: dict[str, Any] = {"sampler": inner.minibatch(config.batch_size), "outer_batch": valid_batch, "decay": 0.0}
    free = methods.darts(config.space, IN_SHAPE, ops={}, order="first", optimizer=adam, **options)

    @jax.jit
    def run(key, task, budget):
        search = methods.under_budget(free, table, budget=budget, damping=1.0)
        learner = training.learner(search.estimator, optax.adam(config.alpha_rate, b1=0.5))
        start = learner.init(key, search.hyperparams(key), task)
        state, _ = jax.lax.scan(lambda state, _: learner.step(state), start, length=config.search_steps)
        return search.weights(state.hyperparams)

    return run


def budgets_of(grid: Grid, num: int) -> np.ndarray:
    """From twice the cheapest network to the dearest, in equal ratios."""
    return np.geomspace(min(2 * grid.costs.min(), grid.costs.max()), grid.costs.max(), num)


# ---- Fronts ---------------------------------------------------------------------------------------------------------


def volume(grid: Grid, seed: int, rows) -> float:
    """The hypervolume, by test, of the front that validation chooses."""
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


def draw(grid: Grid, chosen: np.ndarray, options) -> None:
    from matplotlib import pyplot

    from metaopt import plots

    test = 100 * grid.errors[..., 1].mean(0)
    rows = np.unique(chosen)
    sets = {
        "all networks": np.stack([grid.costs, test], 1),
        f"searched ({chosen.size} searches)": np.stack([grid.costs[rows], test[rows]], 1),
    }
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    labels = {"xlabel": "FLOPs of one image", "ylabel": "test error, %, mean of seeds"}
    plots.pareto_front(sets, axes=axes, log=True, **labels)
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
    run = make_searcher(config, table)
    for b, budget in enumerate(budgets):
        for s, (task, _) in enumerate(splits):
            weights = jax.device_get(run(jax.random.fold_in(jax.random.key(100 + s), b), task, budget))
            mixed[s, b] = nas.expected_cost(table, weights)
            chosen[s, b] = grid.genotypes.index(nas.within_budget(config.space, weights, table, budget))
        print(f"budget {budget:,.0f}: {[f'{grid.costs[a]:,.0f}' for a in chosen[:, b]]} FLOPs", flush=True)

    # A first-order alternation is two gradients of the largest network; a step of training is one, of an average one.
    search_cost = 2 * config.search_steps * grid.costs.max() / (config.train_steps * grid.costs.mean())
    equal = config.num_budgets + round(config.num_budgets * search_cost)
    seeds = range(num_seeds)
    volumes = {
        f"searched within {len(budgets)} budgets": [volume(grid, s, chosen[s]) for s in seeds],
        f"random, {len(budgets)} networks": [random_volume(grid, s, len(budgets), config.num_draws) for s in seeds],
        f"random, {equal} networks (the searches' cost)": [
            random_volume(grid, s, equal, config.num_draws) for s in seeds
        ],
        f"grid, all {len(grid.costs)} networks": [volume(grid, s, np.arange(len(grid.costs))) for s in seeds],
    }
    rows = [[name, script.spread(values)] for name, values in volumes.items()]
    text = script.table(["front", "hypervolume, share of the box"], rows)
    test, valid = grid.errors[..., 1], grid.errors[..., 0]
    lines = []
    for b, budget in enumerate(budgets):
        within = np.flatnonzero(grid.costs <= budget)
        best = [test[s, within[valid[s, within].argmin()]] for s in seeds]
        lines.append(
            [
                f"{budget:,.0f}",
                f"{mixed[:, b].mean():,.0f}",
                f"{grid.costs[chosen[:, b]].mean():,.0f}",
                script.spread(100 * test[seeds, chosen[:, b]], 2),
                script.spread(100 * test[:, within].mean(1), 2),
                script.spread(100 * np.array(best), 2),
            ]
        )
    header = ["budget, FLOPs", "expected of the mixture", "of what was chosen", "test error, %"]
    text += "\n\n" + script.table([*header, "of a random one within", "of the best within, by validation"], lines)
    text += f"\n\nOne search costs {search_cost:.1f} trainings of an average network; {num_seeds} seeds, each with "
    text += "its own split, initial weights and order; ± is the standard deviation over seeds."
    script.publish(__file__, "Searching within a budget of FLOPs", text, options)
    if not options.smoke:
        draw(grid, chosen, options)


if __name__ == "__main__":
    main()
