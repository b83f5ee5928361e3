"""TPE and SMAC3, which run separately, and two more ways to choose without g."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import script
from experiments.blackbox.record_tables.searches import NUM_TRIALS, curve
from experiments.blackbox.record_tables.tables import Records

CURVES = script.RESULTS / "record_tables.npz"  # curves of the baselines that run separately


class Labels(NamedTuple):
    """A table's parameters one by one, for optimizers that do not know tables: ordered numbers, and categories."""

    columns: dict[str, np.ndarray]  # [C] texts by parameter, "" if a configuration lacks it
    values: dict[tuple[str, str], list[str]]  # (algorithm, parameter) -> its values, if there are several
    numbers: set[tuple[str, str]]  # parameters with more than two values, all numbers, in ascending order

    def nearest(self, algorithm: str, proposal: dict[str, str], open_: np.ndarray, rng: np.random.Generator) -> int:
        """Returns the open configuration nearest to these values. Ties are broken at random."""
        distance = 100.0 * (self.columns["algorithm"] != algorithm)
        for name, value in proposal.items():
            values, column = self.values[algorithm, name], self.columns[name]
            if (algorithm, name) in self.numbers:
                places = np.array([values.index(v) if v in values else -1 for v in column])
                apart = np.abs(places - values.index(value)) / (len(values) - 1)
                distance += np.where(places < 0, 1.0, apart)
            else:
                distance += column != value
        distance = np.where(open_, distance, np.inf)
        return int(rng.choice(np.flatnonzero(distance < distance.min() + 1e-9)))


def label(data: Records) -> Labels:
    texts = [{n: str(v) for n, v in c.items()} for c in data.configurations]
    values: dict[tuple[str, str], set[str]] = {}
    for c in texts:
        for name, value in c.items():
            values.setdefault((c.get("algorithm", "") if name != "algorithm" else "", name), set()).add(value)
    columns = {name: np.array([c.get(name, "") for c in texts]) for name in {"algorithm", *(n for _, n in values)}}
    ordered, numbers = {}, set()
    for key, options in values.items():
        try:
            ordered[key] = sorted(options, key=float)
            numbers |= {key} if len(options) > 2 else set()
        except ValueError:
            ordered[key] = sorted(options)
    return Labels(columns, {key: options for key, options in ordered.items() if len(options) > 1}, numbers)


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
        algorithm, proposal = labels.columns["algorithm"][0], {}
        if ("", "algorithm") in labels.values:
            algorithm = trial.suggest_categorical("algorithm", labels.values["", "algorithm"])
        for (owner, name), values in labels.values.items():
            if owner == algorithm and name != "algorithm":
                if (owner, name) in labels.numbers:
                    proposal[name] = values[trial.suggest_int(f"{owner}.{name}", 0, len(values) - 1)]
                else:
                    proposal[name] = trial.suggest_categorical(f"{owner}.{name}", values)
        tried.append(labels.nearest(algorithm, proposal, open_, rng))
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
    for (owner, name), values in labels.values.items():
        if name != "algorithm":
            kind: Any = ConfigSpace.CategoricalHyperparameter
            if (owner, name) in labels.numbers:
                kind = ConfigSpace.OrdinalHyperparameter
            parameter = kind(f"{owner}.{name}", values)
            space.add(parameter)
            if which is not None:
                space.add(ConfigSpace.EqualsCondition(parameter, which, owner))
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
            proposal = {name: str(value) for name, value in dict(trial.config).items()}
            algorithm = proposal.pop("algorithm", labels.columns["algorithm"][0])
            proposal = {name.partition(".")[2]: value for name, value in proposal.items()}
            tried.append(labels.nearest(algorithm, proposal, open_, rng))
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
        finished = read_baselines(file) | {key: np.array(done, np.float32)}
        with open(f"{file}.part", "wb") as part:
            np.savez_compressed(part, **finished)
        Path(f"{file}.part").replace(file)
        print(f"{key}: {len(done)} of {num_seeds} seeds", flush=True)


def read_baselines(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as saved:
        return dict(saved)


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
    first_regret = np.zeros(len(regret))
    for fold in np.unique(data.fold):
        train, test = data.fold != fold, data.fold == fold
        trees = ExtraTreesRegressor(300, min_samples_leaf=3, max_features=0.5, random_state=seed)
        trees.fit(features[train], np.nan_to_num(regret[train], nan=1.0))
        of_test = np.where(np.isfinite(regret[test]), trees.predict(features[test]), np.inf)
        first_regret[test] = regret[test][np.arange(test.sum()), of_test.argmin(1)]
    return first_regret
