"""Feature weights and kernel width of soft k-means by hypergradient, with stability under resampling as outer loss.

**Inner problem.** Centers c_1, ..., c_k of rows x minimize the free energy of soft k-means,

    ℓ(c, λ) = −T mean_i log Σ_j exp(−d(x_i, c_j) / T),    d(x, c) = Σ_l p_l (x_l − c_l)²,

by steps of expectation-maximization from hard k-means. λ has the feature weights p (they sum to 1) and the kernel
width T. With a small T the clusters are hard, and with a large one the centers coincide.

**Outer loss.** Each of R resamples (80 % of the rows) has its own centers, which assign all rows softly: P_r [n, k].
Two resamples agree by the adjusted Rand index of soft clusters. With the table M = P_rᵀP_q, its sums a and b over
columns and rows, and A = Σ a², B = Σ b², it is

    ARI = (Σ M² − A B / n²) / (½ (A + B) − A B / n²).

The stability s is the mean over pairs. It is 1 only if the clusters are hard. The outer loss is r − s, where r is the
stability of normal rows with the same covariance. It is differentiated through the steps, and λ is tuned for each k.

**The number of clusters** is the k with the largest s − r after tuning ("by stability"), or the one with the largest
silhouette on the weighted columns. Weights q over the list of k would relax this choice, with the outer loss
Σ_k q_k (r_k − s_k). It is linear in q, so a single k minimizes it. The search over the list finds this k exactly.

The labels are those of k-means with k clusters on the weighted columns. The control "before tuning" has equal weights,
and the k with the largest s − r at the default width. The three rules share one tuning, whose time is in the row
"before tuning". The protocol, the tables and the baselines are those of `clusters.py`.

    python experiments/automl/soft_clusters.py --full           minutes; writes results/soft_clusters.md
    python experiments/automl/soft_clusters.py                  one seed
    python experiments/automl/soft_clusters.py --development    the tables on which the variants were compared
    python experiments/automl/soft_clusters.py --smoke          seconds, on two of those tables; prints only

Source: Rose, Gurewitz & Fox, Pattern Recognition Letters 1990, for the free energy; Ben-Hur et al., PSB 2002, for the
stability. Needs the folder that the environment variable METAOPT_DATA names.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from experiments import script
from experiments.automl import clusters
from experiments.data import from_data_folder
from metaopt import base, hypergrad, spaces, training
from metaopt.training import report_progress

MAX_CLUSTERS = clusters.MAX_CLUSTERS
COUNTS = tuple(range(2, MAX_CLUSTERS + 1))
SHARE = 0.8
WIDTHS = (8, 16, 32, 64, 128, 256, 512)  # columns are padded, so that tables share programs


class Settings(NamedTuple):
    resamples: int = 4
    em_steps: int = 10
    outer_steps: int = 15
    rate: float = 0.15


SMOKE = Settings(resamples=2, em_steps=3, outer_steps=2)


def space(num_columns: int) -> base.PyTree:
    return {"weights": spaces.simplex(num_columns), "width": spaces.interval(5e-3, 0.5, log=True, default=0.05)}


# ---- The inner problem: x [n, D], centers [K, D], clusters [K] is 1 for those in use ---------------------------------


def energies(centers: jax.Array, hp: base.HyperParams, x: jax.Array, used: jax.Array) -> jax.Array:
    """Returns [n, K], −d / T; clusters that are not in use have a very low one."""
    weights = hp["weights"]
    scale = jnp.where(weights > 0, jnp.sqrt(jnp.where(weights > 0, weights, 1.0)), 0.0)  # no infinite slope at 0
    x, centers = x * scale[None], centers * scale[None]
    distance = (x**2).sum(1)[:, None] + (centers**2).sum(1)[None] - 2 * x @ centers.T
    return jnp.where(used[None] > 0, -distance / hp["width"], -1e9)


def free_energy(centers: jax.Array, hp: base.HyperParams, x: jax.Array, used: jax.Array) -> jax.Array:
    """ℓ(c, λ)."""
    return -hp["width"] * jax.nn.logsumexp(energies(centers, hp, x, used), axis=1).mean()


def fit(start: jax.Array, hp: base.HyperParams, x: jax.Array, used: jax.Array, num_steps: int) -> jax.Array:
    """Returns the centers after steps of expectation-maximization, none of which increases ℓ."""

    def step(centers, _):
        share = jax.nn.softmax(energies(centers, hp, x, used), axis=1)
        weight = share.sum(0)[:, None]
        return jnp.where(weight > 1e-6, share.T @ x / jnp.maximum(weight, 1e-6), centers), None

    return jax.lax.scan(step, start, length=num_steps)[0]


def soft_agreement(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the adjusted Rand index of two soft assignments [n, K]; 0 if both have one cluster."""
    num = first.shape[0]
    shared = first.T @ second
    a, b = (first.sum(0) ** 2).sum(), (second.sum(0) ** 2).sum()
    expected = a * b / num**2
    return ((shared**2).sum() - expected) / ((a + b) / 2 - expected + 1e-3 * num**2)


def stability(hp: base.HyperParams, rows: base.Data, used: jax.Array, num_steps: int) -> jax.Array:
    """Returns s of rows {"x" [n, D], "parts" [R, m], "start" [R, K, D]}."""
    of_part = lambda part, start: jax.nn.softmax(
        energies(fit(start, hp, rows["x"][part], used, num_steps), hp, rows["x"], used), axis=1
    )
    shares = jax.vmap(of_part)(rows["parts"], rows["start"])
    i, j = np.triu_indices(len(rows["parts"]), 1)
    return jax.vmap(soft_agreement)(shares[i], shares[j]).mean()


# ---- λ for each k ----------------------------------------------------------------------------------------------------


def natural(coordinates, columns: jax.Array) -> base.HyperParams:
    """Returns λ; the weights of padded columns are 0."""
    hp = spaces.to_constrained(space(len(columns)), coordinates)
    weights = hp["weights"] * columns
    return {**hp, "weights": weights / weights.sum()}


def outer_loss(coordinates, task: base.Task, key: jax.Array, num_steps: int) -> jax.Array:
    """F(λ) = r − s for one k."""
    del key
    hp = natural(coordinates, task.train["columns"])
    used = task.train["clusters"]
    return stability(hp, task.valid, used, num_steps) - stability(hp, task.train, used, num_steps)


@functools.cache
def _tuner(settings: Settings):
    """Returns `tasks -> (λ, F at the start, F at the end)`, each with an axis of tasks, one for each k."""
    loss = functools.partial(outer_loss, num_steps=settings.em_steps)
    learner = training.learner(hypergrad.direct(loss), optax.adam(settings.rate))

    @jax.jit
    def tune(tasks):
        def one(task):
            own = space(task.train["x"].shape[1])
            start = spaces.to_unconstrained(own, spaces.default(own))
            state = learner.init(jax.random.key(0), start, task)
            state, metrics = jax.lax.scan(lambda s, _: learner.step(s), state, length=settings.outer_steps)
            hp = natural(state.hyperparams, task.train["columns"])
            return hp, metrics["value"][0], loss(state.hyperparams, task, None)

        return jax.lax.map(one, tasks)

    return tune


def task_of(x: np.ndarray, k: int, seed: int, settings: Settings, width: int) -> base.Task:
    """Returns the rows with their resamples, and as `valid` normal rows with the same covariance."""
    rng = np.random.default_rng(seed)
    num = len(x)
    normal = rng.multivariate_normal(x.mean(0), np.cov(x.T).reshape(x.shape[1], -1), num)
    parts = np.stack([rng.permutation(num)[: int(SHARE * num)] for _ in range(settings.resamples)])

    def rows(table):
        starts = [
            KMeans(k, n_init=1, random_state=seed + i).fit(table[p]).cluster_centers_ for i, p in enumerate(parts)
        ]
        starts = [np.pad(s, ((0, MAX_CLUSTERS - k), (0, width - x.shape[1]))) for s in starts]
        table = np.pad(table, ((0, 0), (0, width - x.shape[1])))
        return {
            "x": jnp.asarray(table, float),
            "parts": jnp.asarray(parts),
            "start": jnp.asarray(np.stack(starts), float),
        }

    real = {
        "columns": jnp.asarray(np.arange(width) < x.shape[1], float),
        "clusters": jnp.asarray(np.arange(MAX_CLUSTERS) < k, float),
    }
    return base.Task(rows(x) | real, rows(normal))


class Tuned(NamedTuple):
    """Results for each k: the weighted columns, s − r at the start and after tuning, the width, and the weights."""

    inputs: list[np.ndarray]
    before: np.ndarray
    after: np.ndarray
    width: np.ndarray
    weights: np.ndarray


def tuned(x: np.ndarray, seed: int, settings: Settings, counts=COUNTS) -> Tuned:
    width = next(w for w in WIDTHS if w >= x.shape[1])
    all_tasks = [task_of(x, k, seed, settings, width) for k in counts]
    hp, first, last = _tuner(settings)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_tasks))
    weights = np.asarray(hp["weights"], float)[:, : x.shape[1]]
    inputs = [x * np.sqrt(w / w.mean()) for w in weights]
    return Tuned(inputs, -np.asarray(first), -np.asarray(last), np.asarray(hp["width"]), weights)


# ---- Methods: `(frame, y, seed) -> (labels, description)`, as in `clusters.py` ---------------------------------------


def soft_kmeans(rule: str, settings: Settings, counts=COUNTS):
    """k-means on the weighted columns. `rule` is "before", "stability" or "silhouette"; "before" has equal weights."""

    def method(frame, y, seed):
        x = clusters.same_inputs(frame)
        result = tuned_once(x.tobytes(), x.shape, seed, settings, counts)
        if rule == "before":
            k = counts[int(result.before.argmax())]
            return clusters.kmeans(x, k, seed), f"{k}"
        labels = [clusters.kmeans(inputs, k, seed) for inputs, k in zip(result.inputs, counts, strict=True)]
        scores = result.after
        if rule == "silhouette":
            scores = [silhouette_score(z, part) for z, part in zip(result.inputs, labels, strict=True)]
        best = int(np.argmax(scores))
        return labels[best], f"{counts[best]}"

    return method


@functools.lru_cache(maxsize=4)
def tuned_once(data: bytes, shape: tuple[int, int], seed: int, settings: Settings, counts) -> Tuned:
    """`tuned`, whose result methods share."""
    return tuned(np.frombuffer(data).reshape(shape), seed, settings, counts)


def methods(settings: Settings, counts=COUNTS) -> dict:
    return {
        clusters.BAR: clusters.by_silhouette(clusters.usual_inputs),
        "k-means, k by silhouette, same columns": clusters.by_silhouette(clusters.same_inputs),
        "before tuning, k by stability": soft_kmeans("before", settings, counts),
        "tuned, k by stability": soft_kmeans("stability", settings, counts),
        "tuned, k by silhouette": soft_kmeans("silhouette", settings, counts),
    }


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="all seeds")
    parser.add_argument("--development", action="store_true", help="other tables than those for judging")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the results of finished tables")
    options = parser.parse_args()
    small = options.smoke
    part = "development" if options.development or small else "judging"
    names = json.loads(clusters.TABLES.read_text())[part]
    tables = [table for table in from_data_folder() if table.name in names]
    seeds, max_rows = options.seeds if options.full else 1, clusters.MAX_ROWS
    chosen = methods(Settings())
    if small:
        tables, seeds, max_rows, chosen = tables[:2], 1, 60, methods(SMOKE, (2, 3))
    folder = None if options.keep is None or small else script.work_folder(options.keep, __file__, clusters.__file__)
    results: dict[str, list[dict]] = {name: [] for name in chosen}
    with report_progress(seeds * len(tables), None, "{table}", table="", unit="table") as progress:
        for number, (seed, table) in enumerate(itertools.product(range(seeds), tables)):
            for name, method in chosen.items():
                make = functools.partial(clusters.score, method, table, seed, max_rows)
                results[name].append(script.kept(folder, f"{table.name}, {name}, {seed}", make))
            progress(number + 1, table=table.name)
    by_table = {name: [rows[i :: len(tables)] for i in range(len(tables))] for name, rows in results.items()}
    text = clusters.report(tables, by_table) + f"\n\nSeeds 0 to {seeds - 1}, for the rows and the methods. "
    text += 'The three rules of soft k-means share one tuning, whose time is in the row "before tuning".'
    name = "soft_clusters_development" if options.development else "soft_clusters"
    script.publish(__file__, "Clusters by a differentiable relaxation", text, options, name=name)


if __name__ == "__main__":
    script.run(main)
