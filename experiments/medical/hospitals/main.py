"""Leaves out each site in turn: chooses a variant within the others, learns g, predicts, and writes the result."""

import functools
import itertools
import time
from pathlib import Path

import jax
import numpy as np

from experiments import script
from experiments.medical import hospitals
from experiments.medical.hospitals import baselines, learning, report, tables, worlds
from experiments.medical.hospitals.learning import Settings, Trained
from experiments.medical.hospitals.tables import Patients

BY_SITE = (False, True)  # whether the pooled model has an intercept for each site
METHODS = {"g": False, "one λ": True}  # whether λ is the same for all tasks


class Judged:
    """A site that is left out, and its draws of labelled patients."""

    def __init__(self, patients: Patients, site: int, num: int, seed: int):
        self.site, (self.rows, self.labelled) = site, worlds.draws(patients, site, num, seed)
        self.y = patients.y[self.rows]
        self.judged = np.stack([~np.isin(self.rows, drawn) for drawn in self.labelled]).astype(float)
        largest = np.bincount(patients.site).max()
        self._padded = np.concatenate([self.rows, np.full(largest - len(self.rows), self.rows[0])])

    def call(self, fn, world: worlds.World):
        """Returns `fn(world, site, rows, labelled)`, with rows padded so that all sites share a program."""
        return jax.tree.map(np.asarray, fn(world, self.site, self._padded, self.labelled))

    def part(self, predictions: np.ndarray) -> np.ndarray:
        """Returns predictions [R, padded rows, ...] without the padding."""
        return predictions[:, : len(self.rows)]

    def log_loss(self, p: np.ndarray) -> float:
        p = np.clip(p, 1e-6, 1 - 1e-6)
        losses = -np.log(np.where(self.y > 0, p, 1 - p))
        return float((self.judged * losses).sum() / self.judged.sum())


def predicted(trained: Trained, judged: Judged, world: worlds.World):
    """Returns [R, n] probabilities and λ."""
    p, hp = judged.call(functools.partial(learning.predict, trained), world)
    return judged.part(p), hp


def choices(patients: Patients, settings: Settings) -> dict[str, np.ndarray]:
    """Returns method -> [BY_SITE, sites, sites], log losses at the second site of a g that saw neither of the two.

    The choice for the first site, which is left out, may only use its losses at the other sites.
    """
    num = len(patients.names)
    losses = {name: np.full((len(BY_SITE), num, num), np.nan) for name in METHODS}
    for (v, by_site), pair in itertools.product(enumerate(BY_SITE), itertools.combinations(range(num), 2)):
        training = [s for s in range(num) if s not in pair]
        world = worlds.make_world(patients, training, by_site)
        for name, constant in METHODS.items():
            trained = learning.learn(world, constant, 0, settings)
            for site, other in (pair, pair[::-1]):
                judged = Judged(patients, other, settings.choice_resamples, 1)
                p, _ = predicted(trained, judged, world)
                losses[name][v, site, other] = judged.log_loss(p)
    return losses


def choice(losses: dict[str, np.ndarray], site: int) -> dict[str, bool]:
    """Returns method -> whether pooled models have an intercept for each site, for a site that is left out."""
    return {name: BY_SITE[np.nanmean(of_pairs[:, site], axis=1).argmin()] for name, of_pairs in losses.items()}


def left_out(patients: Patients, site: int, chosen: dict[str, bool], seeds: int, settings: Settings) -> dict:
    """Returns the predictions of all methods for one site: arrays, by name."""
    judged = Judged(patients, site, settings.resamples, 0)
    training = [s for s in range(len(patients.names)) if s != site]
    arrays = {"rows": judged.rows, "judged": judged.judged}
    plain = worlds.make_world(patients, training, by_site=False)
    for name, p in judged.call(baselines.predict, plain).items():
        arrays[f"p:{name}"] = judged.part(p)[None]
    arrays |= {f"shrinkage:{name}": np.asarray(values) for name, values in baselines.shrinkages(plain).items()}
    transferred = np.asarray(baselines.transferred(plain, site, judged.rows))
    arrays["conformal:of the training sites"] = np.broadcast_to(
        transferred, (1, settings.resamples, *transferred.shape)
    )
    for name, constant in METHODS.items():
        world = worlds.make_world(patients, training, chosen[name])
        runs: dict[str, list] = {}
        for seed in range(seeds):
            trained = learning.learn(world, constant, seed, settings)
            p, hp = predicted(trained, judged, world)
            runs.setdefault(f"p:{name}", []).append(p)
            for path, leaf in jax.tree_util.tree_leaves_with_path(hp):
                key = jax.tree_util.keystr(path, simple=True, separator=" ")
                runs.setdefault(f"λ:{name}:{key}", []).append(leaf)
            for kind, rule in (("leave one out", learning.leave_one_out), ("split", learning.split)):
                if not constant:
                    call = functools.partial(rule, trained)
                    runs.setdefault(f"conformal:{kind}", []).append(judged.part(judged.call(call, world)))
        arrays |= {key: np.stack(values) for key, values in runs.items()}
    return arrays


def results_of(patients: Patients, label: str, seeds: int, settings: Settings, folder: Path | None, smoke: bool):
    """Returns the choices and, for each site, the arrays of `left_out`."""
    fixed = smoke or label != "heart disease"
    names = range(1) if smoke else range(len(patients.names))
    if fixed:
        losses = {name: np.zeros((1, len(patients.names), len(patients.names))) for name in METHODS}
    else:
        losses = script.kept(folder, f"{label}-choices", lambda: choices(patients, settings))
    chosen, by_site = [], []
    for site in names:
        chosen.append(choice(losses, site))
        started = time.process_time()
        make = functools.partial(left_out, patients, site, chosen[-1], seeds, settings)
        by_site.append(script.kept(folder, f"{label}-{site}-{seeds}", make))
        print(f"{label}, {patients.names[site]}: {time.process_time() - started:.0f} s", flush=True)
    return chosen, by_site


def main() -> None:
    parser = script.parser(hospitals.__doc__, num_seeds=3)
    parser.add_argument("--full", action="store_true", help="all seeds, and the tables with made-up sites")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    parser.add_argument("--only", choices=("heart disease", "breast cancer", "diabetes"), help="one of the tables")
    options = parser.parse_args()
    settings = learning.SMOKE if options.smoke else Settings()
    seeds = options.seeds if options.full else 1
    path = Path(__file__).parent
    folder = None if options.keep is None else script.work_folder(options.keep, path, path.parent / "scores.py")
    data = script.data_file(path, "heart_by_hospital.csv.gz").parent
    readers = {"heart disease": lambda: tables.heart_disease(data)}
    if options.full or options.only:
        readers |= {"breast cancer": tables.breast_cancer, "diabetes": tables.diabetes}
    if options.only:
        readers = {options.only: readers[options.only]}
    parts = {}
    for label, read in readers.items():
        patients = read()
        num_seeds = seeds if label == "heart disease" else 1
        parts[label] = patients, *results_of(patients, label, num_seeds, settings, folder, options.smoke)
    text = report.report(parts, settings)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        report.plot(*next(iter(parts.values())), options.out / "medical.png")
    script.publish(path, "Medical diagnosis", text, options, name="medical", picture="Reliability of probabilities")
