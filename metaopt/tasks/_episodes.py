"""Episodes: small tasks drawn from labeled examples, on the device, as a pure function of a key.

An episode has a support set, which a method adapts to, and a query set, on which the outcome is judged. All draws have
the same shapes, with padding at the end and masks that mark the real entries. So draws can be jitted, mapped over keys,
and carried by scans. All sources lie on the device, joined into one array. Drawing an episode costs one gather of its
examples and little else. Samplers are `jax.tree_util.Partial`s. So programs can take them as an argument, and hold no
copy of the data. Your own task distribution is any function `key -> Episode`, or `key -> base.Task`:

    >>> import jax, jax.numpy as jnp
    >>> from metaopt import tasks
    >>> def lines(key):  # y = a x + b from three points, judged on five
    ...     coefficients, x = jax.random.normal(key, (2,)), jnp.linspace(-1, 1, 8)
    ...     y = coefficients[0] * x + coefficients[1]
    ...     at = jnp.array([0, 4, 7])
    ...     support = {"x": x[at], "y": y[at], "mask": jnp.ones(3)}
    ...     return tasks.Episode(
    ...         support, {"x": x[1:6], "y": y[1:6], "mask": jnp.ones(5)}, coefficients
    ...     )
    >>> batch = tasks.episode_batches(lines, 16)(jax.random.key(0))
    >>> batch.train["x"].shape, batch.valid["y"].shape
    ((16, 3), (16, 5))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks, base
from metaopt.tasks._class_sources import Source, check_alike, labelled_rows


class Episode(NamedTuple):
    """One few-shot task. `W` ways, `S` support and `Q` query examples, after padding.

    Attributes:
      support: for classification, a dict of "x" [S, ...] float32, "y" [S] int32 in 0..W-1, "mask" [S] float32 (1 for a
        real row, 0 for padding), "class_mask" [W] float32 and "num_rows" [] int32. Padding consists of zeros, at the
        end. A model whose derivative is not finite at zeros, such as x / |x|, gives NaN there, and a mask does not
        remove it (0 · NaN). Write x / √(|x|² + ε) instead.
      query: the same with Q rows.
      meta: additional information that methods do not see. For a function family, its coefficients. For classification,
        a NamedTuple: `source` [], the number of the source; `classes` [W]; `num_ways` []; `num_shots` [W]; `num_query`
        []; and `support_rows` [S] and `query_rows` [Q], the rows of the source.
    """

    support: dict[str, jax.Array]
    query: dict[str, jax.Array]
    meta: base.PyTree = None

    @property
    def task(self) -> base.Task:
        """The episode as a task: `train` is the support set, `valid` the query set."""
        return base.Task(self.support, self.query)


class EpisodeMeta(NamedTuple):
    """The origin of the examples of an episode. `W`, `S` and `Q` as in `Episode`; padding is -1, or 0 for counts.

    Attributes:
      source: [] int32, the number of the source.
      classes: [W] int32, the classes in the source.
      num_ways: [] int32.
      num_shots: [W] int32, support examples of each class.
      num_query: [] int32, query examples of every class.
      support_rows: [S] int32, rows of the source.
      query_rows: [Q] int32.
    """

    source: jax.Array
    classes: jax.Array
    num_ways: jax.Array
    num_shots: jax.Array
    num_query: jax.Array
    support_rows: jax.Array
    query_rows: jax.Array


class SampleEpisodeFn(Protocol):
    def __call__(self, key: jax.Array) -> Episode:
        """Draws one episode. Pure, works under `jit` and `vmap`; the shapes are the same for every key."""
        ...


def episode_batches(sample: Callable[[jax.Array], Any], num_tasks: int) -> Callable[[jax.Array], base.Task]:
    """Makes a function that draws batches of tasks on the device, in the form that `training.fit` takes.

    Args:
      sample: `key -> Episode` or `key -> base.Task`.
      num_tasks: B, at least 1.

    Returns:
      `key -> base.Task`, jitted; its leaves have a leading axis of B. The data of a sampler of `episodes` are an
      argument of this program and of the programs of `training.fit`. They are not constants in the programs, which
      would take long to compile.
    """

    def batch(sample, key):
        def one(key):
            drawn = sample(key)
            return drawn.task if isinstance(drawn, Episode) else drawn

        return jax.vmap(one)(jax.random.split(key, num_tasks))

    return Partial(jax.jit(batch), sample if isinstance(sample, Partial) else Partial(sample))


def labelled_batches(
    sources: Source | Sequence[Source],
    batch_size: int,
    *,
    weights: Sequence[float] | None = None,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[jax.Array], base.Task]:
    """Makes tasks from rows of all classes at once, for training before fine-tuning (`few_shot.pretrained`).

    Args:
      sources: one or several; their examples have one shape. Their `C` classes are numbered across all sources.
      batch_size: N, at least 1; rows are drawn uniformly, with repetition.
      weights: a weight for each source, proportional to its probability for each row; 0 means never. By default, all
        rows of all sources are equally likely.
      preprocess: as for `episodes`.

    Returns:
      `key -> base.Task`, pure, on the device. `train` and `valid` are the same rows: "x" [N, ...], "y" [N] int32 in
      0..C-1, "mask" [N] and "class_mask" [C], both ones. It returns one task, for an estimator of one task.

    Raises:
      ValueError: if weights are negative or all 0, or sources cannot be joined.
    """
    sources = as_list(sources, preprocess)
    rows = labelled_rows(sources)
    num_classes = int(rows["y"].max()) + 1
    sizes = np.array([len(source.y) for source in sources])
    shares = cumulative_shares(sizes.tolist() if weights is None else weights, len(sources))
    first = np.cumsum(sizes) - sizes

    def sample(x, y, shares, first, sizes, key):
        source_key, row_key = jax.random.split(key)
        source = (shares[None, :-1] <= jax.random.uniform(source_key, (batch_size, 1))).sum(axis=1)
        row = first[source] + jax.random.randint(row_key, (batch_size,), 0, sizes[source])
        drawn = to_floats(x[row]) if preprocess is None else preprocess(x[row])
        masks = {"mask": jnp.ones(batch_size, jnp.float32), "class_mask": jnp.ones(num_classes, jnp.float32)}
        batch = {"x": drawn, "y": y[row], **masks}
        return base.Task(batch, batch)

    numbers = (jnp.asarray(n, jnp.int32) for n in (first, sizes))
    return Partial(jax.jit(sample), jnp.asarray(rows["x"]), jnp.asarray(rows["y"]), shares, *numbers)


def cumulative_shares(weights: Sequence[float] | None, num_sources: int) -> jax.Array:
    """[sources], the cumulative shares of the sources in the draws."""
    weights = [1.0] * num_sources if weights is None else list(weights)
    # The last condition rejects `nan` and `inf`.
    if len(weights) != num_sources or not all(w >= 0 for w in weights) or not 0 < sum(weights) < np.inf:
        raise ValueError(
            f"`weights` must be one for each of the {num_sources} sources, at least 0, and not all 0; got {weights}."
        )
    cumulated = np.cumsum(weights)
    return jnp.asarray(cumulated / cumulated[-1], jnp.float32)


def as_list(sources: Source | Sequence[Source], preprocess: Callable | None) -> list[Source]:
    """Returns the sources of a sampler as a list. Warns of images that neither `preprocess` nor `to_floats` scales.

    Raises:
      ValueError: if the sources cannot be joined into one array.
    """
    sources = [sources] if isinstance(sources, Source) else list(sources)
    check_alike(sources)
    for source in sources:
        if preprocess is None and source.x.dtype != np.uint8:
            _checks.warn_of_unscaled_images(f"Source {source.name!r}: `x`", source.x)
    return sources


def to_floats(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
