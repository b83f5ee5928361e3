"""Other optimizers, which look up the outcomes of their trials in the records."""

import json
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.blackbox.auto_random_forest.config import Config
from experiments.blackbox.auto_random_forest.records import FIDELITIES, Records, make_space
from metaopt import blackbox, spaces


def best_of(records: Records, t: int, order: Sequence[int]) -> int:
    order = np.asarray(order)
    return int(order[records.outcomes[t, order, -1].argmin()])


def run_searcher(
    records: Records, t: int, searcher, space, seed: int, budgets: Sequence[int], nearest=None
) -> list[int]:
    """Returns the best completed trial after each budget."""
    state = searcher.init(jax.random.key(seed), space)
    trial_of, spent, ended, reached, best = {}, 0.0, [], {}, []
    number = {name_of(c): i for i, c in enumerate(records.configurations)}
    open_ = np.ones(len(records.configurations), bool)
    while len(best) < len(budgets):
        asked, state = searcher.ask(state, 1)
        if not asked or (not open_.any() and asked[0].trial not in trial_of):
            break
        (trial,) = asked
        if trial.trial not in trial_of:
            row = number.get(name_of(trial.configuration))
            trial_of[trial.trial] = row if row is not None and open_[row] else nearest(trial.configuration, open_)
            open_[trial_of[trial.trial]] = False
        c = trial_of[trial.trial]
        j = int(np.abs(np.array(FIDELITIES) - trial.fidelity).argmin())
        spent += FIDELITIES[j] - reached.get(c, 0.0)
        reached[c] = FIDELITIES[j]
        if spent > budgets[len(best)] + 1e-6:  # the trial would not have ended
            best.append(best_of(records, t, ended) if ended else 0)  # the default, untried
        if len(best) < len(budgets) and j == len(FIDELITIES) - 1:
            ended.append(c)
            if abs(spent - budgets[len(best)]) < 1e-6:
                best.append(best_of(records, t, ended))
        state = searcher.tell(state, [trial._replace(status="COMPLETE", outcome=float(records.outcomes[t, c, j]))])
    return best + [best_of(records, t, ended)] * (len(budgets) - len(best))


def name_of(configuration: dict) -> tuple:
    return tuple(sorted((k, str(v)) for k, v in configuration.items()))


def make_nearest(space, configurations: list[dict]):
    """Returns `(configuration, open) -> number` of the nearest open configuration."""
    encode = jax.jit(lambda hyperparams: spaces.encode(space, hyperparams))
    encoded = lambda c: np.asarray(encode(spaces.from_configuration(space, c)))
    x = np.stack([encoded(c) for c in configurations])

    def nearest(configuration, open_) -> int:
        return int(np.where(open_, ((x - encoded(configuration)) ** 2).sum(1), np.inf).argmin())

    return nearest


def run_optimizer(name: str, records: Records, config: Config, num_seeds: int, file: Path) -> None:
    """Writes [seeds, T, len(trials)] chosen configurations to a file, after every seed. Continues from that file."""
    space = make_space(config)
    nearest = make_nearest(space, records.configurations)
    finished = read_optimizers(file, records, config)
    done = list(finished.get(name, ()))
    for seed in range(len(done), num_seeds):
        rows = []
        for t in range(len(records.names)):
            if name == "SMAC":
                rows.append(run_smac(records, t, space, seed, config.trials, nearest))
                continue
            make = {"TPE": lambda: blackbox.tpe(), "BOHB": lambda: blackbox.bohb(num_rungs=len(FIDELITIES))}
            rows.append(run_searcher(records, t, make[name](), space, seed, config.trials, nearest))
        done.append(np.array(rows))
        finished = read_optimizers(file, records, config) | {name: np.array(done, np.int16)}
        with open(f"{file}.part", "wb") as part:
            np.savez_compressed(part, of=fingerprint(records, config), **finished)
        Path(f"{file}.part").replace(file)
        print(f"{name}: {len(done)} of {num_seeds} seeds", flush=True)


def run_smac(records: Records, t: int, space, seed: int, budgets: Sequence[int], nearest) -> list[int]:
    """Runs SMAC3's facade for hyperparameters (random forest), with its defaults for that number of trials."""
    import ConfigSpace
    from smac import HyperparameterOptimizationFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    tried: list[int] = []
    open_ = np.ones(len(records.configurations), bool)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "space.json").write_text(json.dumps(spaces.to_configspace(space)))
        configspace = ConfigSpace.ConfigurationSpace.from_json(Path(folder) / "space.json")
        configspace.seed(seed)
        scenario = Scenario(
            configspace,
            deterministic=True,
            n_trials=budgets[-1],
            seed=seed,
            output_directory=Path(folder),
            use_default_config=True,
        )
        optimizer = HyperparameterOptimizationFacade(
            scenario, lambda config, seed=0: 1 / 0, overwrite=True, logging_level=False
        )
        for _ in range(budgets[-1]):
            trial = optimizer.ask()
            tried.append(
                nearest({k: getattr(v, "item", lambda v=v: v)() for k, v in dict(trial.config).items()}, open_)
            )
            open_[tried[-1]] = False
            optimizer.tell(trial, TrialValue(cost=float(records.outcomes[t, tried[-1], -1])), save=False)
    return [best_of(records, t, tried[:num]) for num in budgets]


def read_optimizers(file: Path, records: Records, config: Config) -> dict[str, np.ndarray]:
    """Reads the results of optimizers on these records. Results on other records are ignored."""
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as saved:
        same = "of" in saved and str(saved["of"]) == fingerprint(records, config)
        if not same:
            print(f"{file.name} is of other records, and left out; --optimizers makes it anew.")
        return {n: saved[n] for n in saved.files if n != "of"} if same else {}


def fingerprint(records: Records, config: Config) -> str:
    """Returns a hash of everything that a run of an optimizer depends on."""
    outcomes = np.ascontiguousarray(records.outcomes, np.float32).tobytes()
    names = json.dumps([records.names.tolist(), records.configurations, config.trials])
    return f"{zlib.crc32(outcomes):08x}{zlib.crc32(names.encode()):08x}"
