"""Classification episodes: N-way K-shot, and those of Meta-Dataset."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks
from metaopt.tasks import _episodes, _pool
from metaopt.tasks._class_sources import Source
from metaopt.tasks._episodes import SampleEpisodeFn
from metaopt.tasks._hierarchy import ontology_nodes


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
    """Makes a sampler of N-way K-shot episodes: N classes of one source, with K support and Q query examples of each.

    Classes and examples are drawn without repetition.

    If a source has groups (the makers of its examples), no group is in both sets of an episode. For each episode, about
    K / (K + Q) of the groups, drawn at random, make the support set. The other groups make the query set. So the
    variation between those who drew or spoke is part of the task.

    Args:
      sources: one or several; their examples have one shape.
      num_ways: N, at least 2.
      num_shots: K, at least 1.
      num_query: Q, at least 1.
      within_superclass: all classes of an episode are of one superclass (one alphabet), drawn uniformly from the
        superclasses with at least N classes.
      disjoint_groups: if False, all examples of a class are equally likely in both sets. The published results on
        Omniglot do this and ignore the drawers.
      weights: a weight for each source, proportional to its probability; 0 means never. None draws sources uniformly.
      preprocess: `[rows, ...] -> [rows, ...]`, examples to inputs. By default, bytes become floats in [0, 1]. All
        other types become float32 with the same values, and a warning names images with values above 2.

    Returns:
      `key -> Episode`, pure, on the device, without a derivative. The support set has N K rows and the query set N Q,
      class by class.

    Raises:
      ValueError: if a source has too few classes.
      ValueError: if a class has too few examples, or too few groups to guarantee K and Q examples.

    >>> from metaopt import tasks
    >>> # images of 6 classes
    >>> images = np.repeat(np.arange(60, dtype=np.uint8), 16).reshape(60, 4, 4)
    >>> source = tasks.from_arrays(images, np.arange(60) // 10)
    >>> sample = tasks.episodes(source, num_ways=3, num_shots=2, num_query=4)
    >>> episode = jax.jit(sample)(jax.random.key(0))
    >>> episode.support["x"].shape, episode.query["y"].shape
    ((6, 4, 4), (12,))
    """
    sources = _episodes.as_list(sources, preprocess)
    for source in sources:
        needed = f"{num_shots} support and {num_query} query examples"
        _pool.check_classes(source, num_ways, num_shots + num_query, needed)
    nodes = [_superclasses(s, num_ways) if within_superclass else [np.arange(s.num_classes)] for s in sources]
    support_groups = [_pool.support_groups(source, num_shots, num_query, disjoint_groups) for source in sources]
    pool, widest = _pool.make_pool(sources, nodes, support_groups, weights)
    sizes = (num_ways * num_shots, num_ways * num_query)

    def sample(pool, key):
        noise, row_key = _pool.draw_noise(widest, pool.cells.shape[1], key, num_ways)
        source, classes = _pool.draw_classes(pool, noise, lambda bits, source, size: num_ways)
        sides = _pool.draw_sides(pool, noise, source, classes)
        shots = jnp.full(num_ways, num_shots, jnp.int32)
        return _pool.gather(pool, row_key, source, classes, sides, shots, jnp.int32(num_query), sizes, preprocess)

    return Partial(sample, pool)


def _superclasses(source: Source, num_ways: int) -> list[np.ndarray]:
    """Returns the classes of each superclass that has enough of them."""
    if source.superclass is None:
        raise ValueError(f"Source {source.name!r} has no superclasses; take `within_superclass=False`.")
    members = [np.flatnonzero(source.superclass == k) for k in np.unique(source.superclass)]
    members = [classes for classes in members if len(classes) >= num_ways]
    if not members:
        raise ValueError(f"No superclass of source {source.name!r} has {num_ways} classes; take fewer ways.")
    return members


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
      weights: a weight for each source, proportional to its probability; 0 means never. None draws sources uniformly.
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
    bounds = [("min_ways", min_ways, 2), ("max_ways", max_ways, min_ways), ("max_support", max_support, max_ways)]
    bounds += [("max_query", max_query, 1), ("max_support_per_class", max_support_per_class, 1)]
    for name, value, least in bounds:
        _checks.check_integer(name, value, least)
    sources = _episodes.as_list(sources, preprocess)
    nodes = [_nodes(source, min_ways, hierarchy) for source in sources]
    takes_all = jnp.asarray([hierarchy and source.ontology is not None for source in sources])
    support_groups = [_pool.support_groups(source, 1, 1, disjoint_groups) for source in sources]
    pool, widest = _pool.make_pool(sources, nodes, support_groups, weights)
    padded_ways = min(max_ways, max(len(classes) for source_nodes in nodes for classes in source_nodes))
    limits = _Limits(min_ways, max_ways, max_query, max_support, max_support_per_class, log_weights)
    sizes = _padded_sizes(sources, limits, padded_ways)

    def sample(pool, key):
        noise, row_key = _pool.draw_noise(widest, pool.cells.shape[1], key, padded_ways)
        source, classes = _pool.draw_classes(pool, noise, functools.partial(_draw_ways, limits, takes_all))
        sides = _pool.draw_sides(pool, noise, source, classes)
        shots, num_query = _draw_counts(limits, noise, classes >= 0, pool.support_groups[source] > 0, sides)
        return _pool.gather(pool, row_key, source, classes, sides, shots, num_query, sizes, preprocess)

    return Partial(sample, pool)


class _Limits(NamedTuple):
    """The arguments of `meta_dataset_episodes` that bound the random numbers of an episode."""

    min_ways: int
    max_ways: int
    max_query: int
    max_support: int
    max_support_per_class: int
    log_weights: tuple[float, float]


def _nodes(source: Source, min_ways: int, hierarchy: bool) -> list[np.ndarray]:
    """Returns the sets of classes from which the classes of an episode are drawn."""
    _pool.check_classes(source, min_ways, 2, "1 support and 1 query example")
    if hierarchy and source.ontology is not None:
        eligible = ontology_nodes(source.ontology, source.class_names, min_leaves=min_ways)
        return [np.array(leaves) for _, leaves in eligible]
    if not hierarchy or source.superclass is None:
        return [np.arange(source.num_classes)]
    nodes = [np.flatnonzero(source.superclass == k) for k in np.unique(source.superclass)]
    small = [len(classes) for classes in nodes if len(classes) < min_ways]
    if small:
        raise ValueError(
            f"{len(small)} superclasses of source {source.name!r} have fewer than {min_ways} classes (one has "
            f"{small[0]}); drop their classes (`source.keep`), or take fewer `min_ways` or `hierarchy=False`."
        )
    return nodes


def _padded_sizes(sources: Sequence[Source], limits: _Limits, padded_ways: int) -> tuple[int, int]:
    """Returns the rows of the largest possible support set and query set."""
    counts = [np.sort(np.bincount(source.y))[::-1] for source in sources]
    support = max(int((c[:padded_ways] - 1).sum()) for c in counts)
    query = padded_ways * min(limits.max_query, max(int(c[0]) // 2 for c in counts))
    return min(limits.max_support, support), query


def _draw_ways(limits: _Limits, takes_all: jax.Array, bits: jax.Array, source: jax.Array, size: jax.Array) -> jax.Array:
    """Draws N for a node of `size` classes; `takes_all` [sources] marks the sources with an ontology."""
    most = jnp.minimum(size, limits.max_ways)
    drawn = limits.min_ways + _pool.below(bits, most + 1 - limits.min_ways)
    return jnp.where(takes_all[source], most, drawn)


def _draw_counts(
    limits: _Limits, noise: _pool.Noise, real: jax.Array, grouped: jax.Array, sides: _pool.Sides
) -> tuple[jax.Array, jax.Array]:
    """Draws k_c [W] and q []; `real` [W] marks the classes of the episode, `grouped` [] whether groups matter."""
    total = sides.num_query + sides.num_support
    halves = jnp.where(grouped, jnp.minimum(total // 2, sides.num_query), total // 2)
    query = jnp.minimum(jnp.where(real, halves, limits.max_query).min(), limits.max_query).astype(jnp.int32)
    left = jnp.where(grouped, sides.num_support, total - query)
    beta = _pool.uniform(noise.size)
    parts = jnp.floor(beta * jnp.minimum(left, limits.max_support_per_class) + 1).astype(jnp.int32)
    size = jnp.minimum(jnp.where(real, parts, 0).sum(), limits.max_support)
    low, high = limits.log_weights
    alpha = low + (high - low) * _pool.uniform(noise.weights)
    share = jnp.where(real, total * jnp.exp(alpha), 0)
    shots = jnp.floor(share / share.sum() * (size - real.sum()) + 1).astype(jnp.int32)
    return jnp.where(real, jnp.minimum(shots, left), 0), query
