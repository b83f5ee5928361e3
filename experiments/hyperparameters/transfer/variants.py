"""Variants of the shipped g: a learned spread of the draws, and a set network over the rows next to the features.

Each variant continues the training of one member of the shipped g, with the same tasks, keys and number of steps. The
variant "longer" has nothing new: it is the control of the other two. No choice is made on the development families, on
which the variants are compared after the last step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import metaopt
from experiments import script
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer import pool
from experiments.hyperparameters.transfer.config import FEATURES, Config
from experiments.hyperparameters.transfer.families import is_development
from experiments.hyperparameters.transfer.learning import decayed, make_estimator
from experiments.hyperparameters.transfer.natural import natural_development
from experiments.hyperparameters.transfer.rates import with_interval
from experiments.hyperparameters.transfer.report import family_means
from experiments.hyperparameters.transfer.runs import Part, Recorded, hyperparams_of, unravel_in
from experiments.hyperparameters.transfer.ten_runs import natural_parts
from metaopt import automl, base, hypergrad, predictors, training

VARIANTS = ("spread", "rows", "longer")
CHUNK = 5  # candidates of `best_of` that train at the same time
SPREAD_RATE = 3.0  # of the spread's weights, relative to the rate of the others
KEY, NOISE_SEED = 9753, 17


def shipped_member(seed: int) -> predictors.TrainedPredictor:
    """Returns the member of the shipped g that was trained with this seed."""
    shipped = automl.shipped_predictor()
    member = predictors.mlp(shipped.space, len(FEATURES), limit=shipped.predictor.config["member"]["limit"])
    return predictors.TrainedPredictor(member, jax.tree.map(lambda x: x[seed], shipped.meta_params), shipped.scaling)


def start_of(variant: str, config: Config, seed: int) -> predictors.TrainedPredictor:
    """Returns the predictor of a variant with weights for which it predicts as the shipped member does."""
    shipped, num = shipped_member(seed), len(FEATURES)
    key = jax.random.fold_in(jax.random.key(seed), 3)
    if variant == "rows":
        g = predictors.dataset_embedding(shipped.space, num_features=num, limit=config.limit)
        fresh = g.init(key)
        inputs = {
            name: fresh["head"][name].at[:-num].set(0).at[-num:].set(shipped.meta_params[name])
            for name in ("linear", "hidden")
        }
        return predictors.TrainedPredictor(g, fresh | {"head": shipped.meta_params | inputs}, shipped.scaling)
    if variant == "spread":
        g = predictors.mlp(shipped.space, num, limit=config.limit, spread=config.spread)
        return predictors.TrainedPredictor(g, g.init(key) | shipped.meta_params, shipped.scaling)
    return shipped


def of_spread(meta_params: base.PyTree) -> base.PyTree:
    """Returns True for the weights of the spread."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "log_spread", meta_params)


def learn_variant(variant: str, config: Config, folder: Path, seed: int) -> predictors.TrainedPredictor:
    """Trains a variant, or loads it from `folder`. Continues after a kill."""
    path = folder / f"{variant}_{seed}.npz"
    if path.is_file():
        return metaopt.load(path)
    start, estimator = start_of(variant, config, seed), make_estimator(config)
    if variant == "spread":
        rule = predictors.best_of(estimator, start.predictor, num_proposals=config.proposals, chunk=CHUNK)
    else:
        rule = predictors.amortize(estimator, start.predictor)
    adamw = optax.adamw(
        optax.cosine_decay_schedule(config.meta_rate, config.variant_steps),
        weight_decay=config.meta_decay,
        mask=decayed,
    )
    result = training.fit(
        training.learner(hypergrad.over_tasks(rule, task_chunk=1), optax.chain(optax.clip_by_global_norm(1.0), adamw)),
        pool.make_sampler(pool.load_pools(config, folder), start.scaling, config),
        hyperparams=start.meta_params,
        num_steps=config.variant_steps,
        key=jax.random.fold_in(jax.random.key(seed), 4),
        checkpoint_dir=folder / "checkpoints" / f"{variant}_{seed}",
        checkpoint_every=25,
    )
    trained = start._replace(meta_params=result.hyperparams)
    metaopt.save(path, trained)
    print(f"{variant}, seed {seed}: trained", flush=True)
    return trained


def development_parts(config: Config, folder: Path) -> list[Part]:
    """Returns the development tasks of the corpus. One half of their validation rows stands in for test rows."""
    parts, rng = [], np.random.default_rng(0)
    for own in pool.load_pools(config, folder):
        rows = np.flatnonzero([is_development(family) for family in own.family])
        if not len(rows):
            continue
        task = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], own.tasks)
        num_rows = (task.train["mask"].sum(1) + task.valid["mask"].sum(1)).astype(int)
        half = rng.random(task.valid["mask"].shape) < 0.5
        chooses, judges = ({**task.valid, "mask": task.valid["mask"] * part} for part in (half, ~half))
        task = task._replace(valid=chooses)
        parts.append(Part(task, judges, own.raw_features[rows], own.family[rows], own.kind[rows], num_rows))
    return parts


class Predicted(NamedTuple):
    """The predictions of all tasks, in unconstrained coordinates.

    Attributes:
      z: [tasks, L] centers.
      spread: [tasks, L] standard deviations; None if the predictor has none.
    """

    z: np.ndarray
    spread: np.ndarray | None


def predict(trained: predictors.TrainedPredictor, parts: list[Part]) -> Predicted:
    """Returns the predictions for the tasks of all parts, one part after another."""

    def one(train, features):
        prediction = trained.predictor.apply(trained.meta_params, base.Task(train, None, features))
        has_spread = hasattr(prediction, "spread")
        z, spread = prediction if has_spread else (prediction, None)
        flat = lambda tree: jax.flatten_util.ravel_pytree(tree)[0]
        return flat(z), flat(spread) if has_spread else None

    apply = jax.jit(jax.vmap(one))
    each = [
        apply(part.task.train, jnp.asarray(pool.scale_features(trained.scaling, part.raw_features), jnp.float32))
        for part in parts
    ]
    z, spread = zip(*each, strict=True)
    return Predicted(np.concatenate(z), None if spread[0] is None else np.concatenate(spread))


def uses(g: Predicted, variants: dict[str, Predicted], spread: float) -> dict[str, tuple[np.ndarray, Any]]:
    """Returns the centers [tasks, L] of each method, and the spread of its draws: a number or [tasks, L]."""
    methods: dict[str, tuple[np.ndarray, Any]] = {label: (p.z, spread) for label, p in {"g": g, **variants}.items()}
    if learned := variants.get("spread"):
        methods["spread, learned"] = learned.z, learned.spread
        methods["g, the learned spread"] = g.z, learned.spread
    return methods


def best_of_draws(recorded: Recorded, space, z: np.ndarray, spread, num: int) -> dict[str, np.ndarray]:
    """Returns the test losses [tasks] of the center, and of the best of `num` runs by the validation rows.

    All methods have the same keys and the same noise.
    """
    noise = np.random.default_rng(NOISE_SEED).normal(size=(num, *z.shape))
    noise[0] = 0
    losses = np.stack([recorded(jax.random.key(KEY), hyperparams_of(space, z + spread * e))[:, :2] for e in noise])
    recorded.take()  # the probabilities of the rows are not needed
    chosen = losses[..., 0].argmin(0)
    return {"center": losses[0, :, 1], "best": losses[chosen, np.arange(len(chosen)), 1]}


def table(losses: dict[str, dict[str, np.ndarray]], family: np.ndarray, num: int) -> str:
    """Returns mean losses over families: of the center and of the best draw, with differences to those of g.

    Args:
      losses: method -> {"center", "best"}: [seeds, tasks].
      family: [tasks].
      num: training runs of "best".
    """
    header = ["method", "1 run", "difference to g", f"{num} runs", "difference to g"]
    lines = []
    for label, values in losses.items():
        cells = [label]
        for name in ("center", "best"):
            mean = values[name].mean(0)
            difference = mean - losses["g"][name].mean(0)
            cells += [f"{family_means(mean, family).mean():.4f}", with_interval(family_means(difference, family))]
        lines.append(cells if label != "g" else [cells[0], cells[1], "", cells[3], ""])
    return script.table(header, lines)


def compare_variants(config: Config, folder: Path, seeds: list[int], variants: Sequence[str] = VARIANTS) -> None:
    """Trains the variants and prints their losses on the development families. Finished work is kept in `folder`."""
    trained = {seed: {v: learn_variant(v, config, folder, seed) for v in variants} for seed in seeds}
    network = make_network(config.run)
    sets = {
        "development tasks of the corpus": development_parts(config, folder),
        "development tables with their own targets": natural_parts(
            config, natural_development(script.RESULTS / "transfer_corpus.csv"), folder
        ),
    }
    for text, parts in sets.items():
        recorded, of_seeds = Recorded(network, parts), []
        for seed in seeds:
            predicted = {label: predict(own, parts) for label, own in trained[seed].items()}
            methods = uses(predict(shipped_member(seed), parts), predicted, config.spread)
            of_seeds.append(
                {
                    label: script.kept(
                        folder / "variants",
                        f"{text.replace(' ', '_')}_{seed}_{label.replace(' ', '_')}",
                        lambda z=z, s=s, r=recorded: best_of_draws(r, network.space, z, s, config.proposals),
                    )
                    for label, (z, s) in methods.items()
                }
            )
        stack = lambda label, name, rows=of_seeds: np.stack([own[label][name] for own in rows])
        losses = {label: {name: stack(label, name) for name in ("center", "best")} for label in of_seeds[0]}
        family = np.concatenate([part.family for part in parts])
        print(f"{text}: {len(family)} tasks, {len(np.unique(family))} families, seeds {seeds}\n")
        print(table(losses, family, config.proposals) + "\n", flush=True)
    if "spread" in variants:
        print_spreads(trained, network.space)


def print_spreads(trained: dict[int, dict[str, predictors.TrainedPredictor]], space) -> None:
    """Prints the learned spread of each hyperparameter at average features, as the mean over seeds."""
    mean = np.mean([np.exp(own["spread"].meta_params["log_spread"]["center"]) for own in trained.values()], axis=0)
    for name, value in unravel_in(space)(jnp.asarray(mean)).coordinates.items():
        print(f"learned spread of {name}: {float(value):.2f}")
