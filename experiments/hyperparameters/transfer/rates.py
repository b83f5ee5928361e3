"""Compares rates of `training.fine_tune` on development tables with their own targets."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.hyperparameters.auto_tune.network import make_network
from experiments.hyperparameters.transfer.config import Config
from experiments.hyperparameters.transfer.natural import natural_development
from experiments.hyperparameters.transfer.pool import scale_features
from experiments.hyperparameters.transfer.report import family_means, interval
from experiments.hyperparameters.transfer.runs import CHUNK, Part, Recorded, hyperparams_of, unravel_in
from experiments.hyperparameters.transfer.ten_runs import digest_of_runs, natural_parts
from metaopt import automl, base, hypergrad, spaces, training

RATES = (0.03, 0.1, 0.3, 1.0)  # of Adam
DEFAULT_RATE = 0.1
KEY = 8642


class Tuned(NamedTuple):
    """Test losses [tasks] of the start, and [rates, tasks] after the steps."""

    start: np.ndarray
    after: np.ndarray


def shipped_starts(parts: list[Part], space) -> dict[str, np.ndarray]:
    """Returns [tasks, L] coordinates of the predictions of the shipped g, and of its one λ for all."""
    trained = automl.shipped_predictor()
    flat = lambda z: jax.flatten_util.ravel_pytree(z)[0]
    apply = jax.jit(jax.vmap(lambda f: flat(trained.predictor.apply(trained.meta_params, base.Task(None, None, f)))))
    features = scale_features(trained.scaling, np.concatenate([part.raw_features for part in parts]))
    g = np.asarray(apply(jnp.asarray(features, jnp.float32)))
    center = np.asarray(trained.meta_params["center"]).mean(0)  # over seeds
    assert center.shape == flat(spaces.to_unconstrained(space, spaces.default(space))).shape
    return {"g": g, "one λ": np.broadcast_to(center, g.shape)}


def make_tune(network: automl.TabularNetwork, num_steps: int):
    """Returns `(key, z [n, L], task, rate) -> λ` [n] of `training.fine_tune` with Adam."""
    constrained = spaces.constrain(network.problem, network.space)
    estimator = hypergrad.unrolled(constrained, num_steps=network.num_steps, remat="step")
    unravel = unravel_in(network.space)

    @jax.jit
    def tuned(key, z, task, rate):
        tune = training.fine_tune(estimator, num_steps=num_steps, optimizer=optax.adam(rate))

        def one(args):
            key, z, task = args
            return jax.flatten_util.ravel_pytree(tune(key, unravel(z), task).hyperparams)[0]

        return jax.lax.map(one, (jax.random.split(key, len(z)), z, task), batch_size=CHUNK)

    return tuned


def tune_all(
    network: automl.TabularNetwork,
    num_steps: int,
    parts: list[Part],
    z: np.ndarray,
    rates=RATES,
    keep: Callable[[str, Callable[[], dict]], dict] = lambda name, make: make(),
) -> Tuned:
    """Fine-tunes every task with every rate. The last training run of each λ has a different key from the steps.

    `keep(name, make)` returns the losses that `make()` computes, or those that it computed in an earlier run.
    """
    recorded, tune = Recorded(network, parts), make_tune(network, num_steps)
    step_key, run_key = jax.random.split(jax.random.key(KEY))
    sizes = np.cumsum([len(part.family) for part in parts])[:-1]

    def test_loss(rate):
        moved = z
        if rate is not None:
            moved = np.concatenate(
                [
                    np.asarray(tune(jax.random.fold_in(step_key, k), jnp.asarray(own, jnp.float32), part.task, rate))
                    for k, (own, part) in enumerate(zip(np.split(z, sizes), parts, strict=True))
                ]
            )
        return {"loss": recorded(run_key, hyperparams_of(network.space, moved))[:, 1]}

    after = [keep(str(rate), lambda rate=rate: test_loss(rate))["loss"] for rate in rates]
    return Tuned(keep("start", lambda: test_loss(None))["loss"], np.stack(after))


def rates_table(tuned: dict[str, Tuned], family: np.ndarray, small: np.ndarray, rates=RATES) -> str:
    """Returns the table of mean test losses over families.

    It also has the differences to the start, before any step, and to the default rate, with intervals.
    """
    header = ["start", "rate", "test log loss", "below 500 rows", "difference to the start", "to the rate 0.1"]
    compared = lambda a, b: with_interval(family_means(a - b, family))
    lines = []
    for label, losses in tuned.items():
        reference = losses.after[rates.index(DEFAULT_RATE)]
        for rate, values in [("no step", losses.start), *zip(map(str, rates), losses.after, strict=True)]:
            to_start = "" if rate == "no step" else compared(values, losses.start)
            to_default = "" if rate == str(DEFAULT_RATE) else compared(values, reference)
            means = [family_means(x, f).mean() for x, f in ((values, family), (values[small], family[small]))]
            lines.append([label, rate, *(f"{mean:.4f}" for mean in means), to_start, to_default])
    return script.table(header, lines)


def with_interval(difference: np.ndarray) -> str:
    """Returns a mean over families with its 95 % interval."""
    low, high = interval(difference)
    return f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def compare_rates(config: Config, folder: Path, num_splits: int) -> None:
    """Prints the comparison. Finished rates are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = natural_parts(config, natural_development(script.RESULTS / "transfer_corpus.csv"), folder, num_splits)
    network, num_steps = make_network(config.run), config.fine_tune_steps
    starts = shipped_starts(parts, network.space)
    family, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ("family", "rows"))
    for label, z in starts.items():
        mark = f"rates_{label}_{KEY}_{digest_of_runs(config, parts, {label: z})}"
        keep = lambda name, make, mark=mark: script.kept(folder / "rates", f"{mark}_{name}", make)
        tuned = tune_all(network, num_steps, parts, z, keep=keep)
        print(rates_table({label: tuned}, family, rows < 500), flush=True)
