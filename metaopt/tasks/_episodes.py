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
    ...     return tasks.Episode(support, {"x": x[1:6], "y": y[1:6], "mask": jnp.ones(5)}, coefficients)
    >>> batch = tasks.episode_batches(lines, 16)(jax.random.key(0))
    >>> batch.train["x"].shape, batch.valid["y"].shape
    ((16, 3), (16, 5))
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks, _permutations, base
from metaopt.tasks._class_sources import Source, check_alike, labelled_rows
from metaopt.tasks._hierarchy import ontology_nodes


class Episode(NamedTuple):
    """One few-shot task. `W` ways, `S` support and `Q` query examples, after padding.

    Attributes:
      support: of a classification episode: "x" [S, ...] float32, "y" [S] int32 in 0..W-1, "mask" [S] float32 (1 for a
        real row, 0 for padding), "class_mask" [W] float32 and "num_rows" [] int32. Padding consists of zeros, at the
        end. A model whose derivative is not finite at zeros, such as x / |x|, gives NaN there, and a mask does not
        remove it (0 · NaN). Write x / √(|x|² + ε) instead.
      query: the same with Q rows.
      meta: additional information that methods do not see: `EpisodeMeta`, or the coefficients of a function family.
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

    Raises:
      ValueError: if `num_tasks < 1`.
    """
    _checks.check_integer("num_tasks", num_tasks, 1)

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
      weights: of the sources, proportional to their probabilities for each row; a source of weight 0 is never drawn. By
        default, all rows of all sources are equally likely.
      preprocess: as for `episodes`.

    Returns:
      `key -> base.Task`, pure, on the device. `train` and `valid` are the same rows: "x" [N, ...], "y" [N] int32 in
      0..C-1, "mask" [N] and "class_mask" [C], both ones. It returns one task, for an estimator of one task.

    Raises:
      ValueError: if `batch_size < 1`, weights are negative or all 0, or sources cannot be joined.
    """
    _checks.check_integer("batch_size", batch_size, 1)
    sources = _as_list(sources)
    rows = labelled_rows(sources)
    num_classes = int(rows["y"].max()) + 1
    sizes = np.array([len(source.y) for source in sources])
    shares = _shares(sizes.tolist() if weights is None else weights, len(sources))
    first = np.cumsum(sizes) - sizes

    def sample(x, y, shares, first, sizes, key):
        source_key, row_key = jax.random.split(key)
        source = (shares[None, :-1] <= jax.random.uniform(source_key, (batch_size, 1))).sum(axis=1)
        at = first[source] + jax.random.randint(row_key, (batch_size,), 0, sizes[source])
        drawn = _to_floats(x[at]) if preprocess is None else preprocess(x[at])
        masks = {"mask": jnp.ones(batch_size, jnp.float32), "class_mask": jnp.ones(num_classes, jnp.float32)}
        batch = {"x": drawn, "y": y[at], **masks}
        return base.Task(batch, batch)

    numbers = (jnp.asarray(n, jnp.int32) for n in (first, sizes))
    return Partial(jax.jit(sample), jnp.asarray(rows["x"]), jnp.asarray(rows["y"]), shares, *numbers)


def _shares(weights: Sequence[float] | None, num_sources: int) -> jax.Array:
    """[sources], the cumulative shares of the sources in the draws."""
    weights = [1.0] * num_sources if weights is None else list(weights)
    # The last condition rejects `nan` and `inf`.
    if len(weights) != num_sources or not all(w >= 0 for w in weights) or not 0 < sum(weights) < np.inf:
        raise ValueError(
            f"`weights` must be one for each of the {num_sources} sources, at least 0, and not all 0; got {weights}."
        )
    cumulated = np.cumsum(weights)
    return jnp.asarray(cumulated / cumulated[-1], jnp.float32)


def episodes(
    sources: Source | Sequence[Source],
    *,
    num_ways: int = 5,
    num_shots: int = 1,
    num_query: int = 15,
    within_superclass: bool = False,
    disjoint_groups: bool = True,
    weights: Sequence[float] | None = None,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> SampleEpisodeFn:
    """N-way K-shot episodes: N classes of one source, K support and Q query examples of each, without repetition.

    If a source has groups (the makers of its examples), no group is in both sets of an episode. For each episode, about
    K / (K + Q) of the groups, drawn at random, make the support set. The other groups make the query set. So the
    variation between hands or voices is part of the task.

    Args:
      sources: one or several; their examples have one shape.
      num_ways: N, at least 2.
      num_shots: K, at least 1.
      num_query: Q, at least 1.
      within_superclass: all classes of an episode are of one superclass (one alphabet), drawn uniformly from the
        superclasses with at least N classes.
      disjoint_groups: if False, all examples of a class are equally likely in both sets. The published results on
        Omniglot do this and ignore the drawers.
      weights: of the sources, proportional to their probabilities; a source of weight 0 is never drawn. None draws
        sources uniformly.
      preprocess: `[rows, ...] -> [rows, ...]`, examples to inputs. By default, bytes become floats in [0, 1], and all
        other types become float32.

    Returns:
      `key -> Episode`, pure, on the device, without a derivative. The support set has N K rows and the query set N Q,
      class by class.

    Raises:
      ValueError: if an argument is out of range.
      ValueError: if a source has too few classes.
      ValueError: if a class has too few examples, or too few groups to guarantee K and Q examples.

    >>> from metaopt import tasks
    >>> images = np.repeat(np.arange(60, dtype=np.uint8), 16).reshape(60, 4, 4)  # of 6 classes
    >>> source = tasks.from_arrays(images, np.arange(60) // 10)
    >>> sample = tasks.episodes(source, num_ways=3, num_shots=2, num_query=4)
    >>> episode = jax.jit(sample)(jax.random.key(0))
    >>> episode.support["x"].shape, episode.query["y"].shape
    ((6, 4, 4), (12,))
    """
    for name, value, least in (("num_ways", num_ways, 2), ("num_shots", num_shots, 1), ("num_query", num_query, 1)):
        _checks.check_integer(name, value, least)
    sources = _as_list(sources)
    nodes = []
    for source in sources:
        _check_classes(source, num_ways, num_shots + num_query, f"{num_shots} support and {num_query} query examples")
        if not within_superclass:
            nodes.append([np.arange(source.num_classes)])
            continue
        if source.superclass is None:
            raise ValueError(f"Source {source.name!r} has no superclasses; take `within_superclass=False`.")
        members = [np.flatnonzero(source.superclass == k) for k in np.unique(source.superclass)]
        nodes.append([m for m in members if len(m) >= num_ways])
        if not nodes[-1]:
            raise ValueError(f"No superclass of source {source.name!r} has {num_ways} classes; take fewer ways.")
    support_groups = [_support_groups(source, num_shots, num_query, disjoint_groups) for source in sources]
    pool, widest = _pool(sources, nodes, support_groups, weights)
    sizes = (num_ways * num_shots, num_ways * num_query)

    def sample(pool, key):
        noise, row_key = _noise(widest, pool.cells.shape[1], key, num_ways)
        source, classes = _draw_classes(pool, noise, lambda bits, source, size: num_ways)
        sides = _sides(pool, noise, source, classes)
        shots = jnp.full(num_ways, num_shots, jnp.int32)
        return _gather(pool, row_key, source, classes, sides, shots, jnp.int32(num_query), sizes, preprocess)

    return Partial(sample, pool)


def meta_dataset_episodes(
    sources: Source | Sequence[Source],
    *,
    min_ways: int = 5,
    max_ways: int = 50,
    max_query: int = 10,
    max_support: int = 500,
    max_support_per_class: int = 100,
    log_weights: tuple[float, float] = (math.log(0.5), math.log(2.0)),
    hierarchy: bool = True,
    disjoint_groups: bool = True,
    weights: Sequence[float] | None = None,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> SampleEpisodeFn:
    """Makes a sampler of Meta-Dataset's episodes: ways, shots and the balance of classes vary as in the real world.

    Let n_c be the number of examples of class c. U{a..b} and U[a, b] are uniform distributions:

        classes   flat          ways N ~ U{5..min(50, C)}, of all C classes
                  superclasses  one superclass, then N ~ U{5..min(50, its classes)} of its classes      (Omniglot)
                  ontology      one node with 5 to 392 classes below it, all of them, at most 50        (ImageNet)
        query     q = min(10, ⌊min_c n_c / 2⌋) examples of every class
        support   S = min(500, Σ_c ⌊β min(100, n_c − q) + 1⌋),  β ~ U[0, 1)
        shots     k_c = min(⌊p_c (S − N) + 1⌋, n_c − q),  p_c ∝ n_c exp(α_c),  α_c ~ U[log ½, log 2]

    Superclasses, nodes and classes are drawn uniformly. Classes and examples are drawn without repetition.

    If a source has groups (the makers of its examples), half of the groups make the support set and the others the
    query set. The halves are drawn at random for each episode. Then n_c − q is replaced by the number of examples of
    class c in the first half. The number q is at most the number of examples of any class in the second half. For
    Omniglot, whose 20 drawers drew every character once, this does not change the counts.

    Args:
      sources: one or several; their examples have one shape. If a source has an ontology, its superclasses are ignored.
      min_ways: at least 2.
      max_ways: at least `min_ways`.
      max_query: the largest number of query examples of one class.
      max_support: the largest number of support examples; at least `max_ways`.
      max_support_per_class: the largest amount that one class adds to S; it may get more of S than that.
      log_weights: the range of α.
      hierarchy: if False, classes are drawn flat.
      disjoint_groups: if False, all examples of a class are equally likely in both sets.
      weights: of the sources, proportional to their probabilities; a source of weight 0 is never drawn. None draws
        sources uniformly.
      preprocess: as for `episodes`.

    Returns:
      `key -> Episode`, pure, on the device, without a derivative. The shapes fit the largest possible episode. They
      have `max_ways` ways (or as many as there are classes), and at most `max_support` support rows and max_ways ·
      max_query query rows.

    Raises:
      ValueError: if an argument is out of range.
      ValueError: if a source, a superclass or all nodes have too few classes.
      ValueError: if a class has fewer than two examples, or too few groups for two halves.

    Source: Triantafillou et al., ICLR 2020, https://arxiv.org/abs/1903.03096, Sec. 3.2 and App. B.
    """
    _checks.check_integer("min_ways", min_ways, 2)
    _checks.check_integer("max_ways", max_ways, min_ways)
    _checks.check_integer("max_support", max_support, max_ways)
    _checks.check_integer("max_query", max_query, 1)
    _checks.check_integer("max_support_per_class", max_support_per_class, 1)
    if not log_weights[0] <= log_weights[1]:
        raise ValueError(f"`log_weights` must ascend; got {log_weights}.")
    sources = _as_list(sources)
    nodes, whole = [], []
    for source in sources:
        _check_classes(source, min_ways, 2, "1 support and 1 query example")
        whole.append(hierarchy and source.ontology is not None)
        if hierarchy and source.ontology is not None:
            eligible = ontology_nodes(source.ontology, source.class_names, min_leaves=min_ways)
            nodes.append([np.array(leaves) for _, leaves in eligible])
        elif hierarchy and source.superclass is not None:
            nodes.append([np.flatnonzero(source.superclass == k) for k in np.unique(source.superclass)])
            small = [len(members) for members in nodes[-1] if len(members) < min_ways]
            if small:
                raise ValueError(
                    f"{len(small)} superclasses of source {source.name!r} have fewer than {min_ways} classes (one has "
                    f"{small[0]}); drop their classes (`tasks.keep`), or take fewer `min_ways` or `hierarchy=False`."
                )
        else:
            nodes.append([np.arange(source.num_classes)])
    support_groups = [_support_groups(source, 1, 1, disjoint_groups) for source in sources]
    pool, widest = _pool(sources, nodes, support_groups, weights)
    takes_all = jnp.asarray(whole)
    padded_ways = min(max_ways, max(len(members) for of in nodes for members in of))
    counts = [np.sort(np.bincount(source.y))[::-1] for source in sources]
    padded_query = padded_ways * min(max_query, max(int(c[0]) // 2 for c in counts))
    sizes = (min(max_support, max(int((c[:padded_ways] - 1).sum()) for c in counts)), padded_query)

    def draw_ways(bits, source, size):
        most = jnp.minimum(size, max_ways)
        return jnp.where(takes_all[source], most, min_ways + _below(bits, most + 1 - min_ways))

    def sample(pool, key):
        noise, row_key = _noise(widest, pool.cells.shape[1], key, padded_ways)
        source, classes = _draw_classes(pool, noise, draw_ways)
        sides = _sides(pool, noise, source, classes)
        real, grouped = classes >= 0, pool.support_groups[source] > 0
        total = sides.num_query + sides.num_support
        halves = jnp.where(grouped, jnp.minimum(total // 2, sides.num_query), total // 2)
        query = jnp.minimum(jnp.where(real, halves, max_query).min(), max_query).astype(jnp.int32)
        left = jnp.where(grouped, sides.num_support, total - query)
        parts = jnp.floor(_uniform(noise.size) * jnp.minimum(left, max_support_per_class) + 1).astype(jnp.int32)
        size = jnp.minimum(jnp.where(real, parts, 0).sum(), max_support)
        alpha = log_weights[0] + (log_weights[1] - log_weights[0]) * _uniform(noise.weights)
        share = jnp.where(real, total * jnp.exp(alpha), 0)
        shots = jnp.floor(share / share.sum() * (size - real.sum()) + 1).astype(jnp.int32)
        shots = jnp.where(real, jnp.minimum(shots, left), 0)
        return _gather(pool, row_key, source, classes, sides, shots, query, sizes, preprocess)

    return Partial(sample, pool)


# --- shared by both samplers -----------------------------------------------------------------------------------------


class _Pool(NamedTuple):
    """All sources as one, on the device: rows sorted by class, then by group. Classes are numbered across sources."""

    x: jax.Array  # [rows, ...]
    row: jax.Array  # [rows], the row in the source
    cells: jax.Array  # [classes, groups], how many rows of the class the group made
    cell_start: jax.Array  # [classes, groups], the first of these rows
    first_class: jax.Array  # [sources]
    num_groups: jax.Array  # [sources]
    support_groups: jax.Array  # [sources], how many groups make the support set; 0 if groups are ignored
    first_node: jax.Array  # [sources]
    num_nodes: jax.Array  # [sources]
    node_start: jax.Array  # [nodes], the position in `members`
    node_size: jax.Array  # [nodes]
    members: jax.Array  # the classes of all nodes, one node after the other
    shares: jax.Array  # [sources], cumulative shares of the episodes


class _Sides(NamedTuple):
    """The groups of the query set and of the support set, and the number of examples of each class on each side."""

    order: jax.Array  # [groups], the groups of the query set first
    num_query: jax.Array  # [W] examples; all of them if groups are ignored
    num_support: jax.Array  # [W]


def _as_list(sources: Source | Sequence[Source]) -> list[Source]:
    sources = [sources] if isinstance(sources, Source) else list(sources)
    check_alike(sources)
    return sources


def _check_classes(source: Source, num_ways: int, num_examples: int, what: str) -> None:
    if source.num_classes < num_ways:
        raise ValueError(
            f"Source {source.name!r} has {source.num_classes} classes, too few for {num_ways} ways; take fewer."
        )
    counts = np.bincount(source.y, minlength=source.num_classes)
    small = np.flatnonzero(counts < num_examples)
    if len(small):
        raise ValueError(
            f"{len(small)} classes of source {source.name!r} have too few examples for {what}: "
            f"{source.class_names[small[0]]!r} has {counts[small[0]]}. Take fewer, or drop such classes: "
            f"`tasks.keep(source, min_examples={num_examples})`."
        )


def _support_groups(source: Source, num_shots: int, num_query: int, disjoint: bool) -> int:
    """Returns the number of groups in the support set.

    With this number, both sides have enough examples, whichever groups are drawn.
    """
    if not disjoint or source.num_groups < 2:
        return 0
    ascending = np.cumsum(np.sort(_cells(source), axis=1), axis=1)  # examples of the k least productive groups

    def needed(num):
        return int((ascending < num).sum(axis=1).max()) + 1

    least, query = needed(num_shots), needed(num_query)
    if least + query > source.num_groups:
        raise ValueError(
            f"Source {source.name!r} has {source.num_groups} groups. To be sure of {num_shots} support and {num_query} "
            f"query examples of every class from different ones, it takes {least} and {query}; take fewer examples, "
            "drop groups with few (`tasks.keep`), or let groups be on both sides: `disjoint_groups=False`."
        )
    spare = source.num_groups - least - query
    return least + round(spare * num_shots / (num_shots + num_query))


def _cells(source: Source) -> np.ndarray:
    group = np.zeros_like(source.y) if source.group is None else source.group
    flat = source.y.astype(np.int64) * source.num_groups + group
    return np.bincount(flat, minlength=source.num_classes * source.num_groups).reshape(source.num_classes, -1)


def _pool(
    sources: Sequence[Source],
    nodes: Sequence[Sequence[np.ndarray]],
    support_groups: Sequence[int],
    weights: Sequence[float] | None,
) -> tuple[_Pool, int]:
    """Returns the pool, and the number of classes of the widest node."""
    shares = _shares(weights, len(sources))
    # If groups are ignored, all examples of a class belong to one group.
    sources = [s if num else s._replace(group=None) for s, num in zip(sources, support_groups, strict=True)]
    most = max(source.num_groups for source in sources)
    cells = np.concatenate([np.pad(c, [(0, 0), (0, most - c.shape[1])]) for c in map(_cells, sources)])
    rows = [np.lexsort((s.y if s.group is None else s.group, s.y)) for s in sources]
    first_class = np.cumsum([0] + [source.num_classes for source in sources])
    flat = [members + first for of, first in zip(nodes, first_class, strict=False) for members in of]
    sizes = np.array([len(members) for members in flat])
    num_nodes = np.array([len(of) for of in nodes])

    def index(values):
        return jnp.asarray(np.asarray(values), jnp.int32)

    pool = _Pool(
        x=jnp.concatenate([jnp.asarray(s.x[r]) for s, r in zip(sources, rows, strict=True)]),
        row=index(np.concatenate(rows)),
        cells=index(cells),
        cell_start=index((np.cumsum(cells) - cells.ravel()).reshape(cells.shape)),
        first_class=index(first_class[:-1]),
        num_groups=index([source.num_groups for source in sources]),
        support_groups=index(support_groups),
        first_node=index(np.cumsum(num_nodes) - num_nodes),
        num_nodes=index(num_nodes),
        node_start=index(np.cumsum(sizes) - sizes),
        node_size=index(sizes),
        members=index(np.concatenate(flat)),
        shares=shares,
    )
    return pool, int(sizes.max())


class _Noise(NamedTuple):
    """The random bits of an episode. One call draws them all: each call would cost a tenth of a second to compile."""

    source: jax.Array  # []
    node: jax.Array  # []
    ways: jax.Array  # []
    size: jax.Array  # []
    weights: jax.Array  # [W]
    classes: jax.Array  # [widest node]
    groups: jax.Array  # [groups]


def _noise(widest: int, num_groups: int, key: jax.Array, padded_ways: int) -> tuple[_Noise, jax.Array]:
    bits_key, row_key = jax.random.split(key)
    ends = np.cumsum([4, padded_ways, widest, num_groups])
    numbers, *others = jnp.split(jax.random.bits(bits_key, (int(ends[-1]),), jnp.uint32), ends[:-1])
    return _Noise(*numbers, *others), row_key


def _below(bits: jax.Array, size: jax.Array) -> jax.Array:
    """Uniform in 0..size-1, except for a bias of size / 2³²."""
    return (bits % jnp.asarray(size, jnp.uint32)).astype(jnp.int32)


def _uniform(bits: jax.Array) -> jax.Array:
    """Uniform in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _random_order(bits: jax.Array, size: jax.Array) -> jax.Array:
    """The numbers 0..size-1 in random order, followed by the remaining numbers up to the number of bits."""
    return jnp.argsort(jnp.where(jnp.arange(len(bits)) < size, bits >> 1, jnp.uint32(2**31))).astype(jnp.int32)


def _draw_classes(pool: _Pool, noise: _Noise, ways_fn: Callable) -> tuple[jax.Array, jax.Array]:
    """Returns the source and its classes [W], numbered across all sources; -1 is padding."""
    padded_ways = len(noise.weights)
    source = (pool.shares[:-1] <= _uniform(noise.source)).sum().astype(jnp.int32)
    node = pool.first_node[source] + _below(noise.node, pool.num_nodes[source])
    size = pool.node_size[node]
    order = _random_order(noise.classes, size)[:padded_ways]
    real = jnp.arange(padded_ways) < ways_fn(noise.ways, source, size)
    return source, jnp.where(real, pool.members[pool.node_start[node] + jnp.where(real, order, 0)], -1)


def _sides(pool: _Pool, noise: _Noise, source: jax.Array, classes: jax.Array) -> _Sides:
    """Draws the groups of both sides."""
    num = pool.num_groups[source]
    order = _random_order(noise.groups, num)
    made = pool.cells[classes][:, order] * (classes >= 0)[:, None]
    on_query = jnp.arange(len(order)) < num - pool.support_groups[source]
    num_query = (made * on_query[None]).sum(axis=1)
    return _Sides(order, num_query, made.sum(axis=1) - num_query)


def _gather(
    pool: _Pool,
    key: jax.Array,
    source: jax.Array,
    classes: jax.Array,
    sides: _Sides,
    shots: jax.Array,
    num_query: jax.Array,
    sizes: tuple[int, int],
    preprocess: Callable | None,
) -> Episode:
    """Returns the episode with the given number of examples of each class, padded to `sizes`."""
    grouped, padded_ways = pool.support_groups[source] > 0, len(classes)
    num_ways = (classes >= 0).sum().astype(jnp.int32)
    # The class of each row, and the index among its examples: [S] rows of the support set, then [Q] of the query set.
    at, ends = jnp.arange(sizes[0], dtype=jnp.int32), jnp.cumsum(shots)
    way = (ends[None] <= at[:, None]).sum(axis=1).astype(jnp.int32)
    nth = at - jnp.append(0, ends)[way]
    at_query = jnp.arange(sizes[1], dtype=jnp.int32)
    is_query = jnp.arange(sum(sizes)) >= sizes[0]
    way = jnp.minimum(jnp.append(way, at_query // num_query), padded_ways - 1)
    nth = jnp.append(nth, at_query % num_query)
    real = jnp.append(at < ends[-1], at_query < num_query * num_ways)
    # Permutations of the examples of each class: one for each side if groups matter. Otherwise one, and the query set
    # takes its beginning.
    apart = grouped & ~is_query
    epoch = jnp.where(apart, way + padded_ways, way)
    nth = jnp.where(grouped | is_query, nth, nth + num_query)
    place = _permutations.shuffled(
        key, epoch, nth, jnp.maximum(jnp.where(apart, sides.num_support[way], sides.num_query[way]), 1)
    )
    place = place + jnp.where(apart, sides.num_query[way], 0)
    # From the place within the class, in the order of the groups, to the row: rows of one group are contiguous.
    cumulated = jnp.cumsum(pool.cells[classes][:, sides.order], axis=1)  # [W, groups]
    group = (cumulated[way] <= place[:, None]).sum(axis=1)
    start = pool.cell_start[classes[way], sides.order[jnp.minimum(group, len(sides.order) - 1)]]
    row = jnp.where(real, start + place - jnp.where(group > 0, cumulated[way, group - 1], 0), 0)

    x = _to_floats(pool.x[row]) if preprocess is None else preprocess(pool.x[row])
    rows = {
        "x": jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0),
        "y": jnp.where(real, way, 0),
        "mask": real.astype(jnp.float32),
    }
    of_source = jnp.where(real, pool.row[row], -1)
    whole = {"class_mask": (classes >= 0).astype(jnp.float32)}
    support = {k: v[: sizes[0]] for k, v in rows.items()} | whole | {"num_rows": ends[-1]}
    query = {k: v[sizes[0] :] for k, v in rows.items()} | whole | {"num_rows": num_query * num_ways}
    local = jnp.where(classes >= 0, classes - pool.first_class[source], -1)
    meta = EpisodeMeta(source, local, num_ways, shots, num_query, of_source[: sizes[0]], of_source[sizes[0] :])
    return Episode(support, query, meta)


def _to_floats(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
