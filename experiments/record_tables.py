"""Three tables of real records: how much earlier tasks help on a new one, after 1, 5 and 20 trials.

A table holds the outcome of every configuration on every task (balanced error, one run each). The first two tables are
a random forest on 164 tables of PMLB × 56 configurations, and six algorithms on the same × 381. The third one is 418
tables of OpenML × 219 pipelines (OBOE). All near-duplicates of a table are in the same one of five folds. Each fold is
left out in turn, and methods learn only on the other four. The normalized regret of a task is 0 at its best and 1 at
its worst configuration.

`metaopt` is `blackbox.train_meta_searcher`, with a task's features. Its searcher begins with its prediction and
continues by expected improvement. Every eighth trial is instead the configuration farthest from all earlier ones. The
method was developed on the regrets in folds 0–2. The regrets of folds 3 and 4 were not looked at before the first whole
run, and are also reported separately.

Deep kernels (FSBO: meta-learned by marginal likelihood, adapted to the task's trials by ten steps) are mixed with its
Gaussian processes, or used on their own. The same holds for transformers over the trials. Both were also developed on
folds 0–2.

The baselines:

- random search;
- TPE (Optuna): numbers are given by their rank, and a configuration that is not in the table, or was already tried,
  becomes the nearest one;
- the 1-nearest neighbor in features: its best configurations in order;
- the best configurations on average, in order;
- a greedy portfolio;
- a Gaussian process with expected improvement and without other tasks, from a random start; its kernel's length is set
  by maximum likelihood at every step.

No method may choose a configuration that failed on the new task. TPE and SMAC3 run separately (`--baselines`), and
their curves are kept next to the results. BOHB is not included: a table has one fidelity, so BOHB would be the same as
TPE.

    python experiments/record_tables.py             writes experiments/results/record_tables.md and .png
    python experiments/record_tables.py --baselines TPE SMAC     more of SMAC3 (extra `smac`; 20 minutes a seed)
    python experiments/record_tables.py --train-seeds 20 --store FOLDER      metaopt trained with 20 keys
    python experiments/record_tables.py --extra-trees     prints only: forests choose the first trial by features
    python experiments/record_tables.py --smoke     seconds; prints only

The tables are read from the folder that METAOPT_DATA names. With --store, the learned result of each fold and key is
saved as soon as it is finished. A run that was killed continues from there. Several processes that run the same command
share the work.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import script
from scipy.spatial.distance import cdist

from metaopt import base, blackbox, spaces

# This experiment studies pieces of the learned optimizers, which are private: no user needs them.
from metaopt.blackbox import _acquisition, _posterior, _surrogates, _transformer

NUM_TRIALS = 20
FARTHEST_EVERY = 8  # the same as in the searcher
CURVES = Path(__file__).parent / "results" / "record_tables.npz"  # curves of the baselines that run separately
AT = (1, 5, 20)
NUM_DEEP = 2  # deep kernels
DEEP = {"metaopt with deep kernels": 0.5, "deep kernels alone (FSBO)": 1.0}  # their share of the mixture
NUM_TRANSFORMERS = 4
TRANSFORMERS = {"metaopt with transformers": 0.5, "transformers alone": 1.0}  # their share of the expected outcome
NOT_ADAPTED = "deep kernels alone, not adapted"
LEARNED = ("metaopt", *DEEP, *TRANSFORMERS)
PLAIN = "GP, no other task"
PLAIN_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # for the Gaussian process without other tasks, in units of the encoding
ABLATED = ("metaopt, no features", NOT_ADAPTED)  # with --ablate


class Records(NamedTuple):
    """T tasks × C configurations."""

    name: str
    error: np.ndarray  # [T, C], NaN if the configuration failed
    features: np.ndarray  # [T, F]
    family: np.ndarray  # [T]
    fold: np.ndarray  # [T]
    configurations: list[dict]

    @property
    def regret(self) -> np.ndarray:
        low, high = np.nanmin(self.error, 1, keepdims=True), np.nanmax(self.error, 1, keepdims=True)
        return (self.error - low) / np.maximum(high - low, 1e-12)


def load_pmlb(name: str, forest_only: bool) -> Records:
    import pandas as pd

    rows: Any = pd.read_parquet(script.data_file(__file__, "pmlb_sklearn_results.parquet"))
    rows = rows[rows["file"] == "kb_r6"]
    if forest_only:
        rows = rows[rows["algorithm"] == "RandomForestClassifier"]
    rows = rows.assign(**{column: rows[column].astype(object) for column in rows if rows[column].dtype == "category"})
    described = pd.read_csv(script.data_file(__file__, "pmlb_metafeatures.csv.gz")).set_index("dataset")
    rows = rows.assign(c=rows["algorithm"] + ":" + rows["config_id"].astype(str))
    error = 1 - rows.pivot_table(index="dataset", columns="c", values="bal_accuracy")
    first = rows.drop_duplicates("c").set_index("c").loc[error.columns]
    keys = [column for column in first if column == "algorithm" or column.startswith("hp_")]
    configurations = [
        {key.removeprefix("hp_"): row[key] for key in keys if not pd.isna(row[key])} for _, row in first.iterrows()
    ]
    described = described.loc[error.index]
    numbers = described.drop(columns=["family", "fold5", "aliro_id"], errors="ignore").select_dtypes("number")
    family, fold = described["family"].astype(str).to_numpy(), described["fold5"].to_numpy()
    return Records(name, error.to_numpy(), numbers.to_numpy(float), family, fold, configurations)


def load_oboe() -> Records:
    data = np.load(script.data_file(__file__, "oboe_error_matrix.npz"), allow_pickle=False)
    parsed = [json.loads(text) for text in data["configs"]]
    configurations = [{"algorithm": c["algorithm"], **c["hyperparameters"]} for c in parsed]
    rows, columns = data["size"].astype(float).T
    features = np.stack([rows, columns, rows / columns], 1)
    return Records("OBOE", data["error"].astype(float), features, data["family"], data["fold5"], configurations)


def make_space(configurations: list[dict]) -> tuple[dict, list[dict]]:
    """Returns a space that contains all configurations, and the configurations in it.

    Numbers are between their extremes, and everything else is a category.
    """
    values: dict[str, list] = {}
    for configuration in configurations:
        for name, value in configuration.items():
            values.setdefault(name, []).append(value)
    space = {}
    for name, found in values.items():
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found)
        low, high = (min(found), max(found)) if numeric else (0, 0)
        if numeric and low < high:
            log = low > 0 and high / low > 20
            space[name] = spaces.interval(float(low), float(high), log=log)
        elif len({str(v) for v in found}) > 1:
            space[name] = spaces.choice(sorted({str(v) for v in found}))
    plain = [
        {n: float(v) if isinstance(space[n], spaces.Interval) else str(v) for n, v in c.items() if n in space}
        for c in configurations
    ]
    return space, plain


def curve(regret: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the best regret so far of one task, for configurations in this order.

    Failed configurations are skipped.
    """
    tried = regret[order]
    tried = tried[np.isfinite(tried)][:NUM_TRIALS]
    return np.minimum.accumulate(np.pad(tried, (0, NUM_TRIALS - len(tried)), mode="edge"))


def greedy(regret: np.ndarray) -> np.ndarray:
    """Returns configurations that complement one another on these tasks. A failed one counts as the worst."""
    regret, best, order = np.where(np.isnan(regret), 1, regret), np.ones(len(regret)), []
    for _ in range(min(8 * NUM_TRIALS, regret.shape[1])):
        value = np.minimum(best[:, None], regret).mean(0) + 1e-6 * regret.mean(0)
        value[order] = np.inf
        order.append(int(value.argmin()))
        best = np.minimum(best, regret[:, order[-1]])
    return np.array(order)


@partial(jax.jit, static_argnames="adaptation_steps")
def search(surrogate, x, functions, weights, error, start, distances, adaptation_steps=10):
    """Runs the searcher of `methods` on one task, with all steps in one program. Returns [NUM_TRIALS] configurations.

    `distances` [C, C] define the farthest configuration.
    """
    open_, share = jnp.isfinite(error), surrogate.transformer_share
    error = jnp.where(open_, error, 0.0)
    typical_scale = jnp.exp(jnp.median(surrogate.log_scales))

    def step(carry, i):
        seen, mask, tried = carry
        y = error[seen]
        conditioned = _posterior.condition(surrogate, weights, (x[seen], y, mask), adaptation_steps=adaptation_steps)
        mixture = _posterior.posterior_at(surrogate, conditioned, x, functions=functions)
        best = jnp.where(mask > 0, y, jnp.inf).min()
        score = _acquisition.expected_improvement(mixture, best)
        if surrogate.transformers is not None:
            # As in the searcher: outcomes far above the upper quartile of the trials are cut off.
            upper = jnp.sort(jnp.where(mask > 0, y, jnp.inf))[(3 * (i - 1)) // 4] - best
            shown = jnp.where((i >= 4) & (upper > 0), jnp.minimum(y, best + 4 * upper), y)
            read = _transformer.read_trials(surrogate.transformers, (x[seen], shown, mask), typical_scale)
            binned = _transformer.predict_binned(surrogate.transformers, read, x)
            score = share * _transformer.binned_improvement(binned, best) + (1 - share) * score
        nearest = jnp.where(mask[:, None] > 0, distances[seen], jnp.inf).min(0)
        score = jnp.where(i % FARTHEST_EVERY == FARTHEST_EVERY - 1, nearest, score)
        new = jnp.argmax(jnp.where(open_ & ~tried, score, -jnp.inf))
        return (seen.at[i].set(new), mask.at[i].set(1.0), tried.at[new].set(True)), None

    seen, mask = jnp.full(NUM_TRIALS, start), jnp.zeros(NUM_TRIALS).at[0].set(1.0)
    tried = jnp.zeros(len(error), bool).at[start].set(True)
    (seen, _, _), _ = jax.lax.scan(step, (seen, mask, tried), jnp.arange(1, NUM_TRIALS))
    return seen


@jax.jit
def plain_search(grams, error, starts):
    """Returns [runs, NUM_TRIALS] trials of one Gaussian process, by expected improvement.

    Its kernel (of K), mean and amplitude are set by maximum likelihood.
    """
    open_ = jnp.isfinite(error)
    error = jnp.where(open_, error, 0.0)

    def one(start):
        def step(carry, i):
            seen, mask, tried = carry
            y = error[seen]
            both = mask[:, None] * mask[None]

            def fitted(gram):
                among = gram[seen][:, seen] * both + jnp.diag(jnp.where(mask > 0, 1e-3, 1.0))
                inverse = jnp.linalg.inv(among)
                total = mask @ inverse @ mask
                mean = (mask @ inverse @ y) / total
                rest = (y - mean) * mask
                square = (rest @ inverse @ rest) / jnp.maximum(i - 1, 1) + 1e-8
                nll = (i - 1) * jnp.log(square) + jnp.linalg.slogdet(among)[1] + jnp.log(total)
                return nll, inverse, mean, rest, jnp.sqrt(square)

            nll, *found = jax.vmap(fitted)(grams)
            best = jnp.argmin(nll)
            inverse, mean, rest, scale = (leaf[best] for leaf in found)
            cross = grams[best][:, seen] * mask[None]
            variance = 1 + 1e-3 - ((cross @ inverse) * cross).sum(1)
            mu, std = mean + cross @ inverse @ rest, scale * jnp.sqrt(jnp.maximum(variance, 1e-9))
            mixture = _posterior.Mixture(jnp.zeros(1), mu[:, None], std[:, None])
            score = _acquisition.expected_improvement(mixture, jnp.where(mask > 0, y, jnp.inf).min())
            new = jnp.argmax(jnp.where(open_ & ~tried, score, -jnp.inf))
            return (seen.at[i].set(new), mask.at[i].set(1.0), tried.at[new].set(True)), None

        seen, mask = jnp.full(NUM_TRIALS, start), jnp.zeros(NUM_TRIALS).at[0].set(1.0)
        tried = jnp.zeros(len(error), bool).at[start].set(True)
        return jax.lax.scan(step, (seen, mask, tried), jnp.arange(1, NUM_TRIALS))[0][0]

    return jax.vmap(one)(starts)


def encode(space: dict, plain: list[dict]) -> jax.Array:
    """Returns the encoding [C, D] that g uses.

    Missing values are at their defaults, and a missing label is one of the other labels.
    """
    whole = [spaces.from_configuration(space, spaces.complete(space, c)) for c in plain]
    return jnp.stack([spaces.encode(space, hyperparams) for hyperparams in whole])


def without_others(data: Records, test: np.ndarray, num_starts: int) -> dict:
    """Returns [test tasks, NUM_TRIALS] curves of the Gaussian process without other tasks."""
    encoded = encode(*make_space(data.configurations))
    of_length = lambda log: _surrogates.Kernel(jnp.full(encoded.shape[1], log), jnp.array(4.0), jnp.array(0.0))
    grams = jnp.stack([_surrogates.kernel_matrix(of_length(log), encoded, encoded) for log in np.log(PLAIN_LENGTHS)])
    rng, curves = np.random.default_rng(0), []
    for t in test:
        regret = data.regret[t]
        starts = jnp.asarray(rng.choice(np.flatnonzero(np.isfinite(regret)), num_starts))
        tried = np.asarray(plain_search(grams, jnp.asarray(data.error[t], jnp.float32), starts))
        curves.append(np.mean([curve(regret, run) for run in tried], 0))
    return {PLAIN: np.stack(curves)}


@jax.jit
def expected(of, encoded, weights):
    """Returns [C] the expected outcomes without a trial."""
    found = _surrogates.expected_outcomes(of, encoded) @ weights
    if of.transformers is None:
        return found
    read = _transformer.read_trials(of.transformers, (encoded[:0], encoded[:0, 0], encoded[:0, 0]))
    mean, _ = _transformer.binned_moments(_transformer.predict_binned(of.transformers, read, encoded), 1.0)
    return of.transformer_share * mean + (1 - of.transformer_share) * found


def learned(
    data: Records, train: np.ndarray, test: np.ndarray, seed: int, options, with_transformers: bool
) -> dict[str, Any]:
    """Returns name -> [test tasks, NUM_TRIALS] curves of `metaopt`.

    The time is measured only for the first key. For other keys, the programs are already compiled, and all parts are
    trained together, which gives the same result.
    """
    timed = seed == 0
    space, plain = make_space(data.configurations)
    names = [str(t) for t in range(len(data.error))]
    records = [
        base.Record(names[t], plain[c], float(e), status="COMPLETE" if np.isfinite(e) else "FAIL")
        for t in train
        for c, e in enumerate(data.error[t])
    ]
    features, families = dict(zip(names, data.features, strict=True)), dict(zip(names, data.family, strict=True))
    num_steps = 5 if options.smoke else 150
    train_g = partial(
        blackbox.train_meta_searcher,
        records,
        space=space,
        candidates=plain,
        features=features,
        families=families,
        key=jax.random.key(seed),
        num_steps=num_steps,
    )
    seconds, learners = [np.nan] * 3, {}
    every = {"deep_kernels": NUM_DEEP} | ({"transformers": NUM_TRANSFORMERS} if with_transformers else {})
    if timed:
        networks = {}
        for i, (name, num) in enumerate([("", 0), *every.items()]):  # each is trained as if it were the only one
            jax.clear_caches()
            begin = time.process_time()
            g = train_g(**({name: num} if name else {}))
            seconds[i] = time.process_time() - begin
            networks[name] = g.surrogate
            if name != "deep_kernels":
                learners[name] = g
        surrogate, deep, h = networks[""], networks["deep_kernels"].deep, networks.get("transformers")
    else:
        h = train_g(**every).surrogate
        deep, h = h.deep, h._replace(deep=None, deep_share=0.0)
        surrogate = h._replace(transformers=None, transformer_share=0.0)
    variants = {"metaopt": surrogate}
    variants |= {name: surrogate._replace(deep=deep, deep_share=share) for name, share in DEEP.items()}
    if with_transformers:
        variants |= {name: h._replace(transformer_share=share) for name, share in TRANSFORMERS.items()}
    if options.ablate:
        variants |= {ABLATED[0]: surrogate, NOT_ADAPTED: variants["deep kernels alone (FSBO)"]}
    encoded = encode(space, plain)
    functions = _posterior.functions_at(surrogate, encoded)
    distances = jnp.asarray(cdist(encoded, encoded), jnp.float32)
    curves = {name: [] for name in variants}

    def trials(name, t, error, open_):
        known = None if name == ABLATED[0] else data.features[t]
        weights, of = _surrogates.task_weights(variants[name], known), _surrogates.at_task(variants[name], known)
        start = open_[np.asarray(expected(of, encoded, weights))[open_].argmin()]
        return search(of, encoded, functions, weights, error, start, distances, 0 if name == NOT_ADAPTED else 10)

    asks = []
    # The last task is repeated with the user's interface. A task without failures is preferred, so that all trials are
    # compared.
    whole = [t for t in test if np.isfinite(data.error[t]).all()]
    t = (whole or list(test))[-1]
    error, open_ = jnp.asarray(data.error[t], jnp.float32), np.flatnonzero(np.isfinite(data.error[t]))
    for name, learner in zip(("metaopt", *TRANSFORMERS), learners.values(), strict=False):
        tried = np.asarray(trials(name, t, error, open_)).tolist()
        again, milliseconds = one_by_one(learner, data, t, plain)
        asks.append(milliseconds)
        check_same_trials(f"{data.name}, {name}", again, tried)
    for t in test:
        error, regret = jnp.asarray(data.error[t], jnp.float32), data.regret[t]
        open_ = np.flatnonzero(np.isfinite(regret))
        for name in variants:
            curves[name].append(curve(regret, np.asarray(trials(name, t, error, open_))))
    curves = {name: np.stack(found) for name, found in curves.items()}
    return curves | {"seconds": (*seconds, *asks, np.nan, np.nan)[:5]}


def check_same_trials(name: str, again: list[int], tried: list[int]) -> None:
    """Raises an error if the first trials of the searcher differ from those of `search`, which replaces it."""
    if again != tried[: len(again)]:
        raise RuntimeError(
            f"{name}: the searcher of `methods` tries {again}, and `search`, whose curves would be reported as "
            f"metaopt's, {tried[: len(again)]}. They must be one and the same; mend `search`."
        )


def one_by_one(g: blackbox.MetaOptimizer, data: Records, t: int, plain: list[dict]) -> tuple[list[int], float]:
    """Runs the first trials of the searcher, one by one. Also returns the median milliseconds of an `ask`."""
    searcher = g.searcher(data.features[t], first=())
    state, tried, times = searcher.init(jax.random.key(0), g.space), [], []
    for _ in range(8):
        begin = time.process_time()
        (trial,), state = searcher.ask(state, 1)
        times.append(1e3 * (time.process_time() - begin))
        tried.append(plain.index(trial.configuration))
        outcome = data.error[t, tried[-1]]
        if not np.isfinite(outcome):  # `search` does not try it
            return tried[:-1], float(np.median(times[2:]))
        state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=float(outcome))])
    return tried, float(np.median(times[2:]))


class Labels(NamedTuple):
    """A table's parameters one by one, for optimizers that do not know tables: ordered numbers, and categories."""

    columns: dict[str, np.ndarray]  # [C] texts by parameter, "" if a configuration lacks it
    values: dict[tuple[str, str], list[str]]  # (algorithm, parameter) -> its values, if there are several
    numbers: set[tuple[str, str]]  # parameters with more than two values, all numbers, in ascending order

    def nearest(self, algorithm: str, given: dict[str, str], open_: np.ndarray, rng: np.random.Generator) -> int:
        """Returns the open configuration nearest to these values. Ties are broken at random."""
        distance = 100.0 * (self.columns["algorithm"] != algorithm)
        for name, value in given.items():
            values, column = self.values[algorithm, name], self.columns[name]
            if (algorithm, name) in self.numbers:
                at = np.array([values.index(v) if v in values else -1 for v in column])
                apart = np.abs(at - values.index(value)) / (len(values) - 1)
                distance += np.where(at < 0, 1.0, apart)
            else:
                distance += column != value
        distance = np.where(open_, distance, np.inf)
        return int(rng.choice(np.flatnonzero(distance < distance.min() + 1e-9)))


def label(data: Records) -> Labels:
    found = [{n: str(v) for n, v in c.items()} for c in data.configurations]
    values: dict[tuple[str, str], set[str]] = {}
    for c in found:
        for name, value in c.items():
            values.setdefault((c.get("algorithm", "") if name != "algorithm" else "", name), set()).add(value)
    columns = {name: np.array([c.get(name, "") for c in found]) for name in {"algorithm", *(n for _, n in values)}}
    ordered, numbers = {}, set()
    for key, of in values.items():
        try:
            ordered[key] = sorted(of, key=float)
            numbers |= {key} if len(of) > 2 else set()
        except ValueError:
            ordered[key] = sorted(of)
    return Labels(columns, {key: of for key, of in ordered.items() if len(of) > 1}, numbers)


def tpe(data: Records, labels: Labels, t: int, seed: int) -> np.ndarray:
    """Returns the curve of Optuna's TPE.

    Proposals become the nearest row of the table. A number is given by its rank.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng([seed, t])  # so that every task begins differently
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(rng.integers(2**31))))
    regret, tried = data.regret[t], []
    open_ = np.isfinite(regret)
    while len(tried) < NUM_TRIALS and open_.any():
        trial = study.ask()
        algorithm, given = labels.columns["algorithm"][0], {}
        if ("", "algorithm") in labels.values:
            algorithm = trial.suggest_categorical("algorithm", labels.values["", "algorithm"])
        for (of, name), values in labels.values.items():
            if of == algorithm and name != "algorithm":
                if (of, name) in labels.numbers:
                    given[name] = values[trial.suggest_int(f"{of}.{name}", 0, len(values) - 1)]
                else:
                    given[name] = trial.suggest_categorical(f"{of}.{name}", values)
        tried.append(labels.nearest(algorithm, given, open_, rng))
        open_[tried[-1]] = False
        study.tell(trial, float(data.error[t, tried[-1]]))
    return curve(regret, np.array(tried))


def smac(data: Records, labels: Labels, t: int, seed: int) -> np.ndarray:
    """Returns the curve of SMAC3, with the nearest rows in the same way.

    SMAC3 uses a random forest and its facade's defaults for 20 trials.
    """
    import ConfigSpace
    from smac import HyperparameterOptimizationFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    rng = np.random.default_rng([seed, t])
    seed = int(rng.integers(2**31))
    space = ConfigSpace.ConfigurationSpace(seed=seed)
    which = None
    if ("", "algorithm") in labels.values:
        which = ConfigSpace.CategoricalHyperparameter("algorithm", labels.values["", "algorithm"])
        space.add(which)
    for (of, name), values in labels.values.items():
        if name != "algorithm":
            kind: Any = ConfigSpace.CategoricalHyperparameter
            if (of, name) in labels.numbers:
                kind = ConfigSpace.OrdinalHyperparameter
            parameter = kind(f"{of}.{name}", values)
            space.add(parameter)
            if which is not None:
                space.add(ConfigSpace.EqualsCondition(parameter, which, of))
    regret, tried = data.regret[t], []
    open_ = np.isfinite(regret)
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=NUM_TRIALS,
            seed=seed,
            output_directory=Path(folder),
            use_default_config=False,
        )
        refuse: Any = lambda config, seed=0: 1 / 0  # never called, since outcomes are looked up
        optimizer = HyperparameterOptimizationFacade(scenario, refuse, overwrite=True, logging_level=False)
        while len(tried) < NUM_TRIALS and open_.any():
            trial = optimizer.ask()
            given = {name: str(value) for name, value in dict(trial.config).items()}
            algorithm = given.pop("algorithm", labels.columns["algorithm"][0])
            given = {name.partition(".")[2]: value for name, value in given.items()}
            tried.append(labels.nearest(algorithm, given, open_, rng))
            open_[tried[-1]] = False
            optimizer.tell(trial, TrialValue(cost=float(data.error[t, tried[-1]])), save=False)
    return curve(regret, np.array(tried))


BASELINES = {"TPE": tpe, "SMAC": smac}


def run_baseline(name: str, data: Records, num_seeds: int, file: Path, judged: np.ndarray) -> None:
    """Writes [seeds, T, NUM_TRIALS] curves to a file, after every seed. Continues from that file."""
    labels, key = label(data), f"{data.name}/{name}"
    done = list(read_baselines(file).get(key, ()))
    for seed in range(len(done), num_seeds):
        curves = np.full((len(data.error), NUM_TRIALS), np.nan)
        for t in judged:
            curves[t] = BASELINES[name](data, labels, t, seed)
        done.append(curves)
        known = read_baselines(file) | {key: np.array(done, np.float32)}
        with open(f"{file}.part", "wb") as part:
            np.savez_compressed(part, **known)
        Path(f"{file}.part").replace(file)
        print(f"{key}: {len(done)} of {num_seeds} seeds", flush=True)


def read_baselines(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as found:
        return dict(found)


def by_family(data: Records) -> np.ndarray:
    """Returns [T, NUM_TRIALS] curves of average-best with one family left out at a time, instead of a fifth of them."""
    regret, curves = data.regret, []
    for t, family in enumerate(data.family):
        curves.append(curve(regret[t], np.nanmean(regret[data.family != family], 0).argsort()))
    return np.array(curves)


def by_extra_trees(data: Records, seed: int) -> np.ndarray:
    """Returns [T] regrets of the first trial, chosen by extremely randomized trees from a task's features.

    The trees predict regrets. In training, a failed configuration counts as the task's worst one. On the new task, it
    is not a candidate.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    regret, features = data.regret, np.nan_to_num(data.features)
    found = np.zeros(len(regret))
    for fold in np.unique(data.fold):
        train, test = data.fold != fold, data.fold == fold
        trees = ExtraTreesRegressor(300, min_samples_leaf=3, max_features=0.5, random_state=seed)
        trees.fit(features[train], np.nan_to_num(regret[train], nan=1.0))
        of_test = np.where(np.isfinite(regret[test]), trees.predict(features[test]), np.inf)
        found[test] = regret[test][np.arange(test.sum()), of_test.argmin(1)]
    return found


def split(data: Records, fold: int, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tasks to learn from, and the new tasks."""
    return np.flatnonzero(data.fold != fold), np.flatnonzero(data.fold == fold)[:: options.stride]


def learn(data: Records, options: argparse.Namespace, with_transformers: bool, fold: int, seed: int, wait: bool):
    """Returns the result of `learned`, saved or computed."""
    name = (
        f"{data.name}, {fold}, {seed}, {options.ablate}, {options.smoke}, {NUM_DEEP}, {NUM_TRANSFORMERS}, "
        f"{sorted(TRANSFORMERS.values())}, {with_transformers}"
    )
    make = partial(learned, data, *split(data, fold, options), seed, options, with_transformers)
    return script.kept(options.store, name, make, wait=wait)


class Found(NamedTuple):
    """The results of the methods on a table. T tasks.

    Attributes:
      curves: name -> [T, NUM_TRIALS], means over seeds if a method is random.
      by_key: name -> [keys, T, NUM_TRIALS] of learned methods.
      judged: the evaluated tasks.
      seconds: of training: metaopt by itself, with deep kernels, with transformers; then milliseconds of an `ask`:
        metaopt by itself and with transformers.
    """

    curves: dict[str, np.ndarray]
    by_key: dict[str, np.ndarray]
    judged: np.ndarray
    seconds: np.ndarray


def run(data: Records, options: argparse.Namespace, baselines: dict[str, np.ndarray], with_transformers: bool) -> Found:
    curves: dict[str, np.ndarray] = {}
    by_key: dict[str, np.ndarray] = {}
    regret, seconds, judged = data.regret, [], []
    few = options.transformer_seeds or options.train_seeds
    of_key = lambda fold, seed, wait: learn(data, options, with_transformers and seed < few, fold, seed, wait)
    for fold in options.folds:  # skips work of other processes; all keys of a fold share its compiled programs
        for seed in range(options.train_seeds):
            of_key(fold, seed, wait=False)

    def add(name, t, found):
        curves.setdefault(name, np.full((len(regret), NUM_TRIALS), np.nan))[t] = found

    for fold in options.folds:
        train, test = split(data, fold, options)
        judged.extend(test)
        average, portfolio = np.nanmean(regret[train], 0).argsort(), greedy(regret[train])
        ranks = _surrogates.rank_features(np.sort(data.features[train], 0).T, data.features, len(regret))
        for t in test:
            add("average-best", t, curve(regret[t], average))
            add("portfolio", t, curve(regret[t], portfolio))
            nearest = train[((ranks[train] - ranks[t]) ** 2).sum(1).argmin()]
            add(
                "1-NN in features",
                t,
                curve(regret[t], np.where(np.isnan(regret[nearest]), 2, regret[nearest]).argsort()),
            )
            rngs = [np.random.default_rng([seed, t]) for seed in range(options.seeds)]
            add("random", t, np.mean([curve(regret[t], rng.permutation(regret.shape[1])) for rng in rngs], 0))
            for name, found in baselines.items():
                add(name, t, found[:, t].mean(0))
        repeats = [of_key(fold, seed, wait=True) for seed in range(options.train_seeds)]
        for name in [name for name in repeats[0] if name != "seconds"]:
            found = np.stack([repeat[name] for repeat in repeats if name in repeat])
            add(name, test, found.mean(0))
            whole = by_key.setdefault(name, np.full((len(found), len(regret), NUM_TRIALS), np.nan))
            whole[:, test] = found
        seconds.append(repeats[0]["seconds"])
        plain = script.kept(
            options.store,
            f"{data.name}, {fold}, {options.plain_seeds}, {options.smoke}",
            partial(without_others, data, test, options.plain_seeds),
        )
        add(PLAIN, test, plain[PLAIN])
        print(
            data.name,
            "fold",
            fold,
            {n: c[test][:, [a - 1 for a in AT]].mean(0).round(4).tolist() for n, c in curves.items()},
            flush=True,
        )
    return Found(curves, by_key, np.array(sorted(judged)), np.mean(seconds, 0))


def over_keys(found: Found) -> str:
    """Describes how the means over tasks vary between keys of the training."""
    parts = []
    for name, curves in found.by_key.items():
        if len(curves) == 1:
            continue
        means = curves[:, found.judged][..., [at - 1 for at in AT]].mean(1)  # [keys, 3]
        parts.append(f"{name} {' '.join(f'{std:.4f}' for std in means.std(0, ddof=1))}")
    return (
        f"Standard deviation of the mean regret after {', '.join(map(str, AT))} trials from key to key of the "
        f"training: {'; '.join(parts)}."
    )


def compare(curves: dict, data: Records, judged: np.ndarray, reference: str) -> tuple[list, list]:
    """Returns rows of the table: regret, mean rank, paired differences to the reference, and Holm's p.

    The differences have 95 % intervals.
    """
    from scipy import stats

    _, of = np.unique(data.family[judged], return_inverse=True)
    # Families are drawn with replacement, not tasks: near-duplicates are one observation.
    draws = np.random.default_rng(0).multinomial(of.max() + 1, np.full(of.max() + 1, 1 / (of.max() + 1)), size=4000)
    weights = draws[:, of] / draws[:, of].sum(1, keepdims=True)
    names, rows, untouched = list(curves), [], data.fold[judged] >= 3
    wilcoxon: Any = stats.wilcoxon
    ranks, tests = {}, {}
    for at in AT:
        values = np.stack([curves[name][judged, at - 1] for name in names])
        ranks[at] = stats.rankdata(values.round(9), axis=0).mean(1)
        p = {}
        for name in names:
            difference = curves[name][judged, at - 1] - curves[reference][judged, at - 1]
            if name != reference:
                p[name] = wilcoxon(difference, method="approx").pvalue if np.any(difference) else 1.0
        worst = 0.0
        for i, name in enumerate(sorted(p, key=lambda n: p[n])):  # Holm
            worst = max(worst, min(1.0, (len(p) - i) * p[name]))
            tests[at, name] = worst
    for i, name in enumerate(names):
        row = [name]
        for at in AT:
            values, others = curves[name][judged, at - 1], curves[reference][judged, at - 1]
            cell = f"{values.mean():.4f}"
            if name != reference:
                low, high = np.quantile(weights @ (values - others), [0.025, 0.975])
                cell += f" ({values.mean() - others.mean():+.4f} [{low:+.4f}, {high:+.4f}], p {tests[at, name]:.2g})"
            row.append(cell)
        row.append(" ".join(f"{ranks[at][i]:.2f}" for at in AT))
        if untouched.any():
            row.append(" ".join(f"{curves[name][judged[untouched], at - 1].mean():.4f}" for at in AT))
        rows.append(row)
    header = ["method", *(f"after {at}" for at in AT), f"mean rank after {', '.join(map(str, AT))}"]
    return header + (["regret in folds 3, 4"] if untouched.any() else []), rows


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(method for curves, _ in results.values() for method in curves))
    others = [method for method in names if method not in LEARNED]
    style = {method: (f"C{i}", "-", 2.5) for i, method in enumerate(m for m in names if m in LEARNED)}
    style |= {method: (f"C{i}", ("--", ":")[i // 10], 1.5) for i, method in enumerate(others)}
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for axes, (name, (curves, judged)) in zip(panels[0], results.items(), strict=True):
        for method, found in curves.items():
            color, dashes, width = style[method]
            line = {"color": color, "ls": dashes, "lw": width, "label": method}
            axes.plot(range(1, NUM_TRIALS + 1), found[judged].mean(0), **line)
        axes.set(title=name, xlabel="trials on the new task", yscale="log", xticks=[1, 5, 10, 15, 20])
    panels[0][0].set_ylabel("mean normalized regret")
    figure.tight_layout()
    legend = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 2 * len(results), "fontsize": 8}
    figure.legend([legend[method] for method in names], names, **columns)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=20)
    parser.add_argument(
        "--baselines", nargs="*", default=["TPE"], choices=list(BASELINES), help="what of them lacks is run"
    )
    parser.add_argument("--baseline-seeds", type=int, help="of these; --seeds by default")
    parser.add_argument("--plain-seeds", type=int, default=20, help="random starts of the process without other tasks")
    parser.add_argument("--train-seeds", type=int, default=1, help="keys that metaopt is trained with")
    parser.add_argument("--transformer-seeds", type=int, help="keys of transformers; --train-seeds by default")
    parser.add_argument("--ablate", action="store_true", help="also without features, and without adaptation")
    parser.add_argument("--extra-trees", action="store_true", help="print their regrets of a first trial, and no more")
    parser.add_argument(
        "--store", type=Path, help="a folder that keeps what this code learned, to go on with or to share"
    )
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tables", nargs="+", default=["forest", "six", "oboe"])
    parser.add_argument("--transformers", nargs="*", default=["forest"], help="tables on which they are trained, too")
    parser.add_argument("--reference", default="average-best")
    options = parser.parse_args()
    options.stride = 1
    if options.store is not None:
        options.store = script.work_folder(options.store, __file__)
    if options.smoke:
        options.seeds = options.plain_seeds = options.train_seeds = 1
        options.folds, options.tables, options.stride = [0], ["forest"], 4
    load = {
        "forest": lambda: load_pmlb("random forest", True),
        "six": lambda: load_pmlb("six algorithms", False),
        "oboe": load_oboe,
    }
    if options.extra_trees:
        for name in options.tables:
            means = [by_extra_trees(load[name](), seed).mean() for seed in range(5)]
            print(f"{name}: mean regret of the first trial, of 5 seeds: {script.spread(means, 4)}")
        return
    text, results, counts, families = [], {}, [], []
    for name in options.tables:
        data = load[name]()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "smoke.npz" if options.smoke else CURVES
            for baseline in ["TPE"] if options.smoke else options.baselines:
                if baseline == "SMAC" and importlib.util.find_spec("smac") is None:
                    print('SMAC3 is not installed (`pip install "metaopt-jax[smac]"`), and is passed over.')
                    continue
                number = 1 if options.smoke else options.baseline_seeds or options.seeds
                judged = np.flatnonzero(np.isin(data.fold, options.folds))[:: options.stride]
                run_baseline(baseline, data, number, file, judged)
            known = read_baselines(file)
        baselines = {key.partition("/")[2]: found for key, found in known.items() if key.startswith(f"{data.name}/")}
        counts += [f"{b} on {data.name} {len(found)}" for b, found in baselines.items()]
        with_transformers = name in options.transformers
        found = run(data, options, baselines, with_transformers)
        curves, judged, seconds = found.curves, found.judged, found.seconds
        families.append(" ".join(f"{by_family(data)[:, at - 1].mean():.4f}" for at in AT))
        header, rows = compare(curves, data, judged, options.reference)
        results[data.name] = curves, judged
        text += [
            f"**{data.name}: {len(judged)} tasks of {len(np.unique(data.family[judged]))} families × "
            f"{data.error.shape[1]} configurations**; metaopt is trained in {seconds[0]:.0f} processor seconds a "
            f"fold, with {NUM_DEEP} deep kernels in {seconds[1]:.0f}, and asked for a trial in {seconds[3]:.0f} "
            "processor milliseconds (median)"
            + (
                f"; with {NUM_TRANSFORMERS} transformers in {seconds[2]:.0f} and {seconds[4]:.0f}"
                if with_transformers
                else ""
            ),
            "",
            script.table(header, rows),
            "",
            *([over_keys(found), ""] if options.train_seeds > 1 else []),
        ]
    text.append(
        f"Mean normalized regret over tasks; in brackets the difference to {options.reference}, its 95 % interval "
        "(bootstrap over families), and the p of Wilcoxon's signed-rank test by Holm's method. Random methods are "
        f"means over seeds: random search {options.seeds}, {', '.join(counts)}, the process without other tasks "
        f"{options.plain_seeds}, metaopt's training {options.train_seeds}"
        + (f" (of transformers {options.transformer_seeds})" if options.transformer_seeds else "")
        + "; the lists are deterministic. A fifth "
        "of the families is left out at a time; where one family is, average-best "
        f"has {'; '.join(families)} (more tasks to learn from, and others near the new one). BOHB is not among them: a "
        "table has one fidelity, at which it is TPE."
        + ("" if any(count.startswith("SMAC") for count in counts) else " SMAC3 (`--baselines SMAC`) was not run.")
        + " The curves of baselines are kept beside the results, and only what lacks of them is run."
    )
    picture = "Mean normalized regret over trials"
    script.publish(__file__, "Records of earlier tasks", "\n".join(text), options, picture=picture)
    if not options.smoke:
        plot(results, options.out / "record_tables.png")


if __name__ == "__main__":
    script.run(main)
