"""Evaluates trained methods on the episodes of unseen characters."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metaopt
from experiments.few_shot.omniglot.images import shrunk
from experiments.few_shot.omniglot.methods import Scale
from metaopt import evaluation, few_shot, tasks

ONE_SHOT = "Lake's 20 runs"
SEED = ", seed "


def one_shot_runs(path: Path, size: int) -> Callable:
    """Returns `(key, number) -> Episode`, one of Lake's 20 runs."""
    data = np.load(path)
    support, query = (
        jnp.asarray(shrunk(data[name].reshape(-1, 28, 28), size).reshape(20, 20, size, size)) / 255
        for name in ("support", "query")
    )
    label = jnp.asarray(data["label"], jnp.int32)

    def sample(key, number):
        whole = {"mask": jnp.ones(20), "class_mask": jnp.ones(20), "num_rows": jnp.int32(20)}
        return tasks.Episode(
            {"x": support[number], "y": jnp.arange(20), **whole}, {"x": query[number], "y": label[number], **whole}
        )

    return sample


def judge(trained: dict[tuple, dict], parts: dict, scale: Scale, options, one_shot: Path | None) -> dict[str, Any]:
    """Returns setting -> evaluation, with all methods on the same episodes.

    `trained` holds the methods with the names of their trainings.
    """
    by_setting = {}
    for (ways, shots), methods in trained.items():
        if methods:
            num_query = 15 if ways == 5 else 5
            sample = tasks.episodes(
                parts["test"],
                num_ways=ways,
                num_shots=shots,
                num_query=num_query,
                disjoint_groups=options.disjoint_drawers,
            )
            print(f"[{time.process_time():6.0f} s] judging {len(methods)} methods, {ways}w{shots}s", flush=True)
            setting = f"{ways}w{shots}s"
            each = [judge_one(name, *one, sample, setting, scale, options) for name, one in methods.items()]
            by_setting[setting] = functools.reduce(evaluation.join_evaluations, each)
    if (20, 1) in trained and one_shot is not None:
        runs = one_shot_runs(one_shot, scale.size)
        named = {name: method for name, (method, _) in trained[20, 1].items()}
        by_setting[ONE_SHOT] = few_shot.evaluate_episodes(named, runs, jax.random.key(0), each=20, chunk_size=10)
    return by_setting


def judge_one(
    name: str, method: Callable, training: str, sample: Callable, setting: str, scale: Scale, options
) -> evaluation.Evaluation:
    """Evaluates one method, or loads its saved evaluation."""
    file = options.work / f"{training}_at_{setting}.npz"
    if file.is_file() and not options.smoke:
        return metaopt.load(file)
    key, chunk_size = jax.random.key(2025), min(20, scale.episodes)
    scored = few_shot.evaluate_episodes({name: method}, sample, key, num_episodes=scale.episodes, chunk_size=chunk_size)
    if not options.smoke:
        metaopt.save(file, scored)
    return scored


def judge_over_steps(trained: dict[str, tuple], parts: dict, scale: Scale, options) -> evaluation.Evaluation | None:
    """Returns accuracy over the inner steps, 5w1s; for each method, the mean over its seeds."""
    sample = tasks.episodes(
        parts["test"], num_ways=5, num_shots=1, num_query=15, disjoint_groups=options.disjoint_drawers
    )
    setting = f"5w1s_over_{scale.over_steps}_steps"
    each = [judge_one(name, *one, sample, setting, scale, options) for name, one in trained.items()]
    return joined({"": functools.reduce(evaluation.join_evaluations, each)}, slice(None))[""] if each else None


def of_seeds(evaluation: evaluation.Evaluation) -> dict[str, list[str]]:
    """Returns method -> its trainings in an evaluation. Their names end in their seeds."""
    names: dict[str, list[str]] = {}
    for name in evaluation.scores:
        names.setdefault(name.rpartition(SEED)[0], []).append(name)
    return names


def joined(
    evaluations: dict[str, evaluation.Evaluation], steps: slice = slice(-1, None)
) -> dict[str, evaluation.Evaluation]:
    """Joins the seeds of each method.

    An episode's scores are means over seeds, each after its chosen number of steps.
    """

    def one(result):
        seeds = of_seeds(result)
        mean = lambda source, names: np.mean([result.scores[name][source][..., steps] for name in names], axis=0)
        return result._replace(
            scores={
                method: {source: mean(source, names) for source in result.sources} for method, names in seeds.items()
            },
            transductive={method: any(result.transductive[name] for name in names) for method, names in seeds.items()},
        )

    return {setting: one(result) for setting, result in evaluations.items()}
