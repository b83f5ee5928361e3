"""Runs all methods on one table, fold by fold and key by key."""

import argparse
from functools import partial
from typing import NamedTuple

import numpy as np

from experiments import script
from experiments.blackbox.record_tables.searches import (
    AT,
    NUM_DEEP,
    NUM_TRANSFORMERS,
    NUM_TRIALS,
    PLAIN,
    TRANSFORMERS,
    curve,
    greedy,
    learned,
    without_others,
)
from experiments.blackbox.record_tables.tables import Records
from metaopt.blackbox import _surrogates


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

    def add(name, t, method_curves):
        curves.setdefault(name, np.full((len(regret), NUM_TRIALS), np.nan))[t] = method_curves

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
            for name, method_curves in baselines.items():
                add(name, t, method_curves[:, t].mean(0))
        repeats = [of_key(fold, seed, wait=True) for seed in range(options.train_seeds)]
        for name in [name for name in repeats[0] if name != "seconds"]:
            method_curves = np.stack([repeat[name] for repeat in repeats if name in repeat])
            add(name, test, method_curves.mean(0))
            whole = by_key.setdefault(name, np.full((len(method_curves), len(regret), NUM_TRIALS), np.nan))
            whole[:, test] = method_curves
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
