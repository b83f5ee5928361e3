"""Parts of RealMLP and TabM in AutoML's network: which of them would lower its loss?

Each variant changes one part of `automl.tabular_network`, on tables of the development families of `families.json`, cut
to at most 600 rows and 64 encoded columns. For each of four folds, one network is trained on the other folds. The mean
of their predictions is scored on test rows. Each variant is scored twice: with the hyperparameters of the shipped g,
which has learned for the present network, and after hypergradient steps from there on the validation loss of the folds,
for this variant and this table. These steps do not know of early stopping.

    python experiments/automl/network_parts.py           # an hour on two cores; goes on from `--keep`
    python experiments/automl/network_parts.py --smoke   # a minute; prints only

Sources: RealMLP (robust scaling with smooth clipping, periodic embeddings, front scale), Holzmüller et al., NeurIPS
2024, https://arxiv.org/abs/2407.04491; TabM (batch ensembles), Gorishniy et al., ICLR 2025,
https://arxiv.org/abs/2410.24210; embeddings of numbers, Gorishniy et al., NeurIPS 2022,
https://arxiv.org/abs/2203.05556.

Needs the tables of the folder that the environment variable METAOPT_DATA names.
"""

import argparse
import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import model_selection

from experiments import script
from experiments.automl import pictures, tables
from metaopt import base, hypergrad, inner, spaces, tasks, training
from metaopt.automl import _network, _network_folds
from metaopt.automl._inputs import intervals
from metaopt.training import report_progress

MOST_ROWS, MOST_COLUMNS, MOST_CLASSES, NUM_FOLDS = 600, 64, 12, 4
SHAPES = {"train": 352, "valid": 128, "test": 160}  # rows after padding: all tables share one compiled program
NUM_REFINED = 8  # hypergradient steps
NUM_FREQUENCIES, NUM_EMBEDDED, DEVIATION = 16, 3, 0.1  # of periodic embeddings, as in RealMLP
FRONT_RATE = 6.0  # RealMLP trains its front scale with 6 times the rate


class Parts(NamedTuple):
    """The parts of a variant. The defaults are those of `automl.tabular_network`.

    Attributes:
      scaling: of numeric columns: "quantile", "standard" or "robust".
      additive_hinges: whether the additive part has hinges.
      embedding: what the hidden units read next to the columns: "none", "hinges" or "periodic".
      front_scale: whether the hidden units read each column times a learned number.
      shared: whether the members share their weights up to learned factors (a batch ensemble).
      num_members: M.
      num_steps: the number of training steps.
      stops: whether each fold keeps θ of the step with the smallest validation loss.
    """

    scaling: str = "quantile"
    additive_hinges: bool = True
    embedding: str = "none"
    front_scale: bool = False
    shared: bool = False
    num_members: int = 4
    num_steps: int = 100
    stops: bool = False


SHIPPED = "present network"
VARIANTS = {
    SHIPPED: Parts(),
    "robust scaling": Parts(scaling="robust"),
    "standard scaling": Parts(scaling="standard"),
    "no hinges": Parts(additive_hinges=False),
    "hinges for hidden units, too": Parts(embedding="hinges"),
    "periodic embeddings": Parts(embedding="periodic"),
    "front scale": Parts(front_scale=True),
    "batch ensemble, 4 members": Parts(shared=True),
    "batch ensemble, 16 members": Parts(shared=True, num_members=16),
    "early stopping": Parts(stops=True),
    "50 steps": Parts(num_steps=50),
    "200 steps": Parts(num_steps=200),
    "all four parts, 200 steps": Parts("robust", True, "periodic", True, True, 16, 200, True),
}


# --- the network of a variant ---


@contextlib.contextmanager
def network_of(parts: Parts):
    """Gives the network with these parts. Functions traced inside of the context are those of the variant."""
    changed = {"_init_params": init_params, "_member_log_probabilities": member_log_probabilities}
    with mock.patch.multiple(_network, **{n: functools.partial(f, parts) for n, f in changed.items()}):
        yield _network.tabular_network(num_steps=parts.num_steps, num_members=parts.num_members)


def init_params(parts: Parts, key: jax.Array, data: dict[str, Any], num_members: int, num_hidden: int) -> base.Params:
    """The library's initialization. The parts of the variant add entries and inputs of hidden units."""
    params = _library_init(key, data, num_members, num_hidden)
    num_columns = data["x"].shape[1]
    if not parts.additive_hinges:
        params["linear"] = params["linear"][:num_columns]
    wide_key, member_key, frequency_key, phase_key, mix_key = jax.random.split(jax.random.fold_in(key, 1), 5)
    copies = {"none": 1, "hinges": 1 + len(_network.HINGES), "periodic": 1 + NUM_EMBEDDED}[parts.embedding]
    if copies > 1 or parts.shared:
        width = num_hidden if parts.shared else num_members * num_hidden
        fan_in = copies * data["num_features"]
        params["hidden"] = jax.random.normal(wide_key, (copies * num_columns, width)) / jnp.sqrt(fan_in)
    if parts.embedding == "periodic":
        shape = num_columns, NUM_FREQUENCIES
        params["frequency"] = DEVIATION * jax.random.normal(frequency_key, shape)
        params["phase"] = jax.random.uniform(phase_key, shape, minval=-jnp.pi, maxval=jnp.pi)
        mix = jax.random.normal(mix_key, (*shape, NUM_EMBEDDED)) / NUM_FREQUENCIES**0.5
        params["mix"], params["mix_bias"] = mix, jnp.zeros((num_columns, NUM_EMBEDDED))
    if parts.front_scale:
        params["front"] = jnp.zeros(num_columns)
    if parts.shared:
        params["input_factor"] = jax.random.rademacher(member_key, (num_members, copies * num_columns), jnp.float32)
        params["hidden_factor"] = jnp.ones((num_members, num_hidden))
    return params


def member_log_probabilities(parts: Parts, params, hyperparams, batch, key: jax.Array | None = None) -> jax.Array:
    """Returns [M, N, C], with noise if there is a key."""
    x, mask, (members, hidden, _) = batch["x"], batch["feature_mask"][None], params["output"].shape
    if key is not None:
        input_key, hidden_key = jax.random.split(key)
        noise = jax.random.uniform(input_key, x.shape, minval=-(3**0.5), maxval=3**0.5)
        x = x + hyperparams["input_noise"] * noise * mask
    hinges = [hyperparams["hinge_scale"] * jax.nn.relu(x - c) * mask for c in _network.HINGES]
    additive = jnp.concatenate([x, *(hinges if parts.additive_hinges else [])], axis=1)
    inputs = [x * (1 + FRONT_RATE * params["front"][None]) if parts.front_scale else x]
    if parts.embedding == "hinges":
        inputs += hinges
    if parts.embedding == "periodic":
        waves = jnp.cos(2 * jnp.pi * x[..., None] * params["frequency"][None] + params["phase"][None])
        embedded = jnp.einsum("ndk,dkq->qnd", waves, params["mix"]) + params["mix_bias"].T[:, None]
        inputs += list(embedded * mask[None])
    u = jnp.concatenate(inputs, axis=1)
    if parts.shared:
        z = jnp.einsum("nk,mk,kh->nmh", u, params["input_factor"], params["hidden"]) * params["hidden_factor"][None]
        z = z.reshape(len(x), members * hidden)
    else:
        z = u @ params["hidden"]
    activations = jax.nn.relu(hyperparams["hidden_scale"] * z + params["bias"][None])
    if key is not None:
        signs = _network._random_signs(hidden_key, activations.shape)
        activations = activations * (1 + hyperparams["hidden_noise"] * signs)
    activations = activations.reshape(-1, members, hidden)
    logits = hyperparams["output_scale"] * jnp.einsum("bmh,mhc->mbc", activations, params["output"])
    logits = logits + params["output_bias"][:, None] + hyperparams["linear_scale"] * (additive @ params["linear"])[None]
    return jax.nn.log_softmax(jnp.where(batch["class_mask"] > 0, logits, -1e9))


_library_init = _network._init_params


# --- tables ---


class Folds(NamedTuple):
    """The stacked padded rows of the folds of a table.

    Attributes:
      parts: "train", "valid" and "test" rows, each with a leading axis of folds.
      centers: [folds, C] mean targets of the intervals, or None for classification.
      split: the table, with its test rows.
      hyperparams: λ of the shipped g.
    """

    parts: dict[str, dict[str, np.ndarray]]
    centers: np.ndarray | None
    split: tables.Split
    hyperparams: base.HyperParams


def load(seed: int) -> list[tables.Split]:
    """The development tables, cut to 600 rows, with 25 % test rows."""
    options = argparse.Namespace(
        development=True,
        seed=seed,
        instant=False,
        smoke=False,
        ablations=False,
        fifteen=False,
        long=False,
        tables=None,
    )
    return [_cut(split, seed) for split in tables.load(options)]


def _cut(split: tables.Split, seed: int) -> tables.Split:
    rng = np.random.default_rng((seed, len(split.table.y)))
    sizes = round(0.75 * MOST_ROWS), round(0.25 * MOST_ROWS)
    train, test = (rng.permutation(rows)[:n] for rows, n in zip((split.train, split.test), sizes, strict=True))
    if split.is_class:  # four folds need four rows of a class
        counts = np.bincount(split.table.y[train], minlength=int(split.table.y.max()) + 1)
        train, test = (rows[counts[split.table.y[rows]] >= NUM_FOLDS] for rows in (train, test))
    return split._replace(train=train, test=test)


def folds_of(split: tables.Split, scaling: str, seed: int) -> Folds:
    """Encodes a table by the training rows of each fold."""
    x, y, categorical = split.table.x[split.train], split.table.y[split.train], split.table.categorical
    labels = np.unique(y, return_inverse=True)[1] if split.is_class else intervals(y)
    num_classes, weight = int(labels.max()) + 1, np.ones(len(y))
    kind = model_selection.StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    columns = x, y if not split.is_class else labels, categorical, weight
    hyperparams = _network_folds.predicted_hyperparams(*columns, num_classes if split.is_class else 0, seed)
    padded: dict[str, list] = {name: [] for name in SHAPES}
    centers = []
    for train, valid in kind.split(x, labels):
        own = x[train] if scaling != "robust" else robust(x[train], x[train], categorical)
        options = {"y": labels[train], "max_features": MOST_COLUMNS}
        fitted = tasks.fit_columns(own, categorical, scaling=scaling.replace("robust", "standard"), **options)
        for name, raw, targets in (
            ("train", x[train], labels[train]),
            ("valid", x[valid], labels[valid]),
            ("test", split.table.x[split.test], np.zeros(len(split.test), int)),
        ):
            raw = raw if scaling != "robust" else robust(x[train], raw, categorical)
            padded[name].append(_padded(fitted.transform(raw), targets, SHAPES[name], num_classes))
        rows = _network_folds.FoldRows(x[train], y[train], weight[train])
        centers.append(None if split.is_class else _network_folds._centers(rows, labels[train], num_classes))
    parts = {name: {k: np.stack([fold[k] for fold in own]) for k in own[0]} for name, own in padded.items()}
    return Folds(parts, None if split.is_class else np.stack(centers), split, hyperparams)


def robust(train: np.ndarray, x: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    """Numeric columns minus the median, over the distance of the quartiles, then clipped softly to (-3, 3).

    If the quartiles are equal, half of the range replaces their distance.
    """
    x = x.astype(np.float64)
    for j in np.flatnonzero(~categorical & ~np.isnan(train).all(axis=0)):
        low, median, high = np.nanquantile(train[:, j], [0.25, 0.5, 0.75])
        scale = high - low or np.ptp(train[~np.isnan(train[:, j]), j]) / 2 or 1.0
        z = (x[:, j] - median) / scale
        x[:, j] = z / np.sqrt(1 + (z / 3) ** 2)
    return x


def _padded(x: np.ndarray, labels: np.ndarray, num_rows: int, num_classes: int) -> dict[str, Any]:
    padded, y = np.zeros((num_rows, MOST_COLUMNS), np.float32), np.zeros(num_rows, np.int32)
    padded[: len(x), : x.shape[1]], y[: len(x)] = x, labels
    return {
        "x": padded,
        "y": y,
        "mask": (np.arange(num_rows) < len(x)).astype(np.float32),
        "feature_mask": (np.arange(MOST_COLUMNS) < x.shape[1]).astype(np.float32),
        "class_mask": (np.arange(MOST_CLASSES) < num_classes).astype(np.float32),
        "num_features": np.float32(max(1, x.shape[1])),
        "num_rows": np.int32(len(x)),
    }


# --- training ---


def trainer(network: _network.TabularNetwork, stops: bool):
    """`(key, λ, parts) -> log-probabilities [folds, test rows, C]`, compiled."""

    def train(key, hyperparams, train_rows, valid_rows, test_rows):
        loop = network.problem.loop
        if not stops:
            params = loop.params(inner.run(loop, network.num_steps)(key, hyperparams, train_rows))
        else:

            def trace(state):
                params = loop.params(state)
                log_p = network.log_probabilities(params, hyperparams, valid_rows)
                nll = -jnp.take_along_axis(log_p, valid_rows["y"][:, None], axis=1)[:, 0]
                return params, jnp.sum(nll * valid_rows["mask"])

            _, (visited, losses) = inner.run(loop, network.num_steps, trace_fn=trace)(key, hyperparams, train_rows)
            params = jax.tree.map(lambda leaf: leaf[jnp.argmin(losses)], visited)
        return network.log_probabilities(params, hyperparams, test_rows)

    return jax.jit(jax.vmap(train, in_axes=(0, None, 0, 0, 0)))


def refiner(network: _network.TabularNetwork, num_steps: int):
    """`(key, λ, task) -> λ` after hypergradient steps on the mean validation loss of the folds, compiled."""
    problem = spaces.constrain(network.problem, network.space)
    estimator = hypergrad.over_tasks(hypergrad.unrolled(problem, num_steps=network.num_steps))
    options = {"num_steps": num_steps, "optimizer": optax.adam(0.1), "space": network.space, "same_key": True}
    return jax.jit(training.fine_tune(estimator, **options))


def losses_of(folds: Folds, train, refine, seed: int) -> dict[str, np.ndarray]:
    """Test losses with g's hyperparameters ("predicted") and after hypergradient steps ("refined")."""
    rows, key = folds.parts, jax.random.key(seed)
    task = base.Task(rows["train"], rows["valid"])
    chosen = {"predicted": folds.hyperparams, "refined": refine(key, folds.hyperparams, task).hyperparams}
    losses: dict[str, np.ndarray] = {}
    for name, hyperparams in chosen.items():
        keys = jax.random.split(key, NUM_FOLDS)
        log_p = np.asarray(train(keys, hyperparams, rows["train"], rows["valid"], rows["test"]), np.float64)
        p = np.exp(log_p[:, : len(folds.split.test)])
        losses[name] = np.array(tables.loss(_prediction(p, folds), folds.split)[0])
    return losses


def _prediction(p: np.ndarray, folds: Folds) -> np.ndarray:
    """The mean over folds: [n, C] probabilities of all classes, or [n] numbers."""
    if folds.centers is not None:
        return np.einsum("fnc,fc->n", p[..., : folds.centers.shape[1]], folds.centers) / len(p)
    y = folds.split.table.y
    classes = np.unique(y[folds.split.train])
    full = np.zeros((p.shape[1], int(y.max()) + 1))
    full[:, classes] = p.mean(axis=0)[:, : len(classes)]
    return full


# --- the page ---


def report(splits: list[tables.Split], losses: dict[str, dict[str, np.ndarray]], unit: str) -> str:
    """Mean losses over tables of one problem, with paired differences to the present network."""
    header = [f"{len(splits)} tables", f"test {unit}, λ of g", "difference [95 %]"]
    header += [f"test {unit}, λ refined", "difference [95 %]"]
    rows = []
    for name, values in losses.items():
        cells = []
        for kind in ("predicted", "refined"):
            difference = tables._interval(values[kind] - losses[SHIPPED][kind])
            cells += [f"{values[kind].mean():.4f}", difference] if np.isfinite(values[kind]).all() else ["", ""]
        rows.append([name, *cells])
    return script.table(header, rows)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument(
        "--keep", type=Path, default=Path("results_local/network_parts"), help="folder of finished work"
    )
    args = parser.parse_args()
    variants, num_refined, seeds = VARIANTS, NUM_REFINED, range(args.seeds)
    if args.smoke:  # two variants that share a program
        variants = {name: VARIANTS[name]._replace(num_steps=5) for name in (SHIPPED, "robust scaling")}
        num_refined, seeds = 1, range(1)
    folder = None if args.smoke else script.work_folder(args.keep, __file__)
    splits = {seed: load(seed)[:: 6 if args.smoke else 1] for seed in seeds}
    num_tables = len(splits[0])
    results = {name: np.full((len(seeds), num_tables, 2), np.nan) for name in variants}
    total = len(variants) * len(seeds) * num_tables
    tables_of = functools.cache(lambda seed, i, scaling: folds_of(splits[seed][i], scaling, seed))
    programs: dict[Parts, tuple] = {}  # the scaling of a table does not change a program
    with report_progress(total, None, "{variant}, {table}", unit="run", variant="", table="") as progress:
        for count, (name, seed, i) in enumerate(itertools.product(variants, seeds, range(num_tables))):
            parts, table = variants[name], splits[seed][i].table.name
            with network_of(parts) as network:
                program = parts._replace(scaling="quantile")
                if program not in programs:
                    programs = {program: (trainer(network, parts.stops), refiner(network, num_refined))}

                def make(seed=seed, i=i, parts=parts, functions=programs[program]):
                    return losses_of(tables_of(seed, i, parts.scaling), *functions, seed)

                kept = script.kept(folder, f"{name}, {table}, {seed}", make)
            results[name][seed, i] = float(kept["predicted"]), float(kept["refined"])
            progress(count + 1, variant=name, table=table)
    publish(splits[0], results, args)


def publish(splits: list[tables.Split], results: dict[str, np.ndarray], args) -> None:
    """Writes the page and the picture of the losses after hypergradient steps."""
    text = []
    for is_class, unit in ((True, "log loss"), (False, "RMSE / deviation")):
        own = [i for i, split in enumerate(splits) if split.is_class == is_class]
        means = {name: values.mean(axis=0)[own] for name, values in results.items()}
        losses = {name: {"predicted": m[:, 0], "refined": m[:, 1]} for name, m in means.items()}
        problem = "Classification" if is_class else "Regression"
        text.append(f"{problem}\n\n{report([splits[i] for i in own], losses, unit)}")
    script.publish(
        __file__, "Parts of other networks in AutoML's network", "\n\n".join(text), args, name="automl_network"
    )
    if not args.smoke:
        points = {name: [{"loss": loss} for loss in v.mean(axis=0)[:, 1]] for name, v in results.items()}
        pictures.plot_differences(splits, points, SHIPPED, args.out / "automl_network.png")


if __name__ == "__main__":
    script.run(main)
