"""The sources of training and of the tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments.data import from_image_sets, omniglot_split
from experiments.few_shot.small_meta_dataset.methods import BATCH, EPISODES, LEFT_OUT, Settings
from metaopt import tasks


def drawn_rows(source: tasks.Source, rows: int, *, fresh: bool = False) -> np.ndarray | None:
    """Returns at most `rows` random rows; None means all rows.

    With `fresh`, these are other rows than without it, if the source has at least `2 * rows` rows.
    """
    if source.name == "omniglot" or len(source.x) <= rows:
        return None
    order = np.random.default_rng(0).permutation(len(source.x))
    others = fresh and len(order) >= 2 * rows
    return order[-rows:] if others else order[:rows]


def small(source: tasks.Source, rows: int, *, fresh: bool = False) -> tasks.Source:
    """Returns fewer random rows, and images of half the size.

    With `fresh`, these are other rows than without it, if the source has at least `2 * rows` rows.
    """
    kept = drawn_rows(source, rows, fresh=fresh)
    source = source if kept is None else source.keep(rows=kept)
    x = source.x.reshape(len(source.x), 14, 2, 14, 2).mean((2, 4)).astype(np.uint8)
    return source._replace(x=x)


def weights(sources: Sequence[tasks.Source], left_out: str) -> list[float]:
    return [0.0 if source.name == left_out else 1.0 for source in sources]


def of_all_trainings(make: Callable, left_out: Sequence[str]) -> Partial:
    """Returns one sampler whose data have a leading axis of trainings.

    The trainings only differ in the shares of the sources.
    """
    some = [make(name) for name in left_out]
    return Partial(some[0].func, *jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.args for one in some)))


def splits(whole: dict[str, tasks.Source], omniglot: dict[str, Any], rows: int) -> dict[str, tasks.Split]:
    """Returns, for each left-out source, the classes and rows of the sources for training ("train") and test."""

    def rows_of(name, fresh=False):
        kept = drawn_rows(whole[name], rows, fresh=fresh)
        return {} if kept is None else {"rows": kept.tolist()}

    names = [name for name in whole if name != "omniglot"]
    return {
        left_out: tasks.merge_splits(
            omniglot,
            {"train": {name: rows_of(name) for name in names if name != left_out}},
            {"test": {left_out: rows_of(left_out, fresh=True)}},
        )
        for left_out in names
    }


class Data(NamedTuple):
    """The sources of training and of the tests."""

    whole: dict[str, tasks.Source]
    split: dict[str, Any]  # of Omniglot
    left_out: list[str]  # each training leaves one source out
    judged_on: dict[str, tasks.Source]
    unseen: tasks.Source  # Omniglot's test classes
    num_classes: int  # in all training sources
    episodes: Partial  # sampler of all trainings
    rows: Partial  # the same, of labelled rows


def load_data(folder: Path, settings: Settings) -> Data:
    left_out = list(LEFT_OUT[: settings.sources])
    whole = from_image_sets(["omniglot", *left_out], path=folder)
    sources = {name: small(s, settings.rows) for name, s in whole.items()}
    judged_on = {name: small(s, settings.rows, fresh=True) for name, s in whole.items()}
    split = omniglot_split(folder)
    background, unseen = (tasks.select(sources["omniglot"], split, part)[0] for part in ("train", "test"))
    trained_on = [background, *(sources[name] for name in left_out)]
    num_classes = sum(source.num_classes for source in trained_on)
    episodes = of_all_trainings(
        lambda name: tasks.meta_dataset_episodes(trained_on, **EPISODES, weights=weights(trained_on, name)), left_out
    )
    rows = of_all_trainings(
        lambda name: tasks.labelled_batches(trained_on, BATCH, weights=weights(trained_on, name)), left_out
    )
    return Data(whole, split, left_out, judged_on, unseen, num_classes, episodes, rows)


def test_samplers(data: Data) -> dict[str, Callable]:
    """Returns samplers of test episodes by source. An episode holds the number of the training that left it out."""

    def of_training(number, sample):
        def marked(key):
            support, query, meta = sample(key)
            return tasks.Episode({**support, "training": jnp.int32(number)}, query, meta)

        return marked

    tests = {"omniglot": of_training(0, tasks.meta_dataset_episodes(data.unseen, **EPISODES))}
    return tests | {
        name: of_training(number, tasks.meta_dataset_episodes(data.judged_on[name], **EPISODES))
        for number, name in enumerate(data.left_out)
    }
