"""The sources of classification episodes as one array on the device, and the draws of classes, groups and rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import _permutations
from metaopt.tasks._class_sources import Source
from metaopt.tasks._episodes import Episode, EpisodeMeta, cumulative_shares, to_floats


class Pool(NamedTuple):
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


class Sides(NamedTuple):
    """The groups of the query set and of the support set, and the number of examples of each class on each side."""

    order: jax.Array  # [groups], the groups of the query set first
    num_query: jax.Array  # [W] examples; all of them if groups are ignored
    num_support: jax.Array  # [W]


def check_classes(source: Source, num_ways: int, num_examples: int, what: str) -> None:
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
            f"`source.keep(min_examples={num_examples})`."
        )


def support_groups(source: Source, num_shots: int, num_query: int, disjoint: bool) -> int:
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
            f"Source {source.name!r} has {source.num_groups} groups. Support and query examples must come from "
            f"different groups, and {least} + {query} groups are needed to guarantee {num_shots} and {num_query} "
            "examples of every class. Take fewer examples, drop groups with few examples (`source.keep`), or allow "
            "groups on both sides: `disjoint_groups=False`."
        )
    spare = source.num_groups - least - query
    return least + round(spare * num_shots / (num_shots + num_query))


def _cells(source: Source) -> np.ndarray:
    group = np.zeros_like(source.y) if source.group is None else source.group
    cell = source.y.astype(np.int64) * source.num_groups + group
    return np.bincount(cell, minlength=source.num_classes * source.num_groups).reshape(source.num_classes, -1)


def make_pool(
    sources: Sequence[Source],
    nodes: Sequence[Sequence[np.ndarray]],
    support_groups: Sequence[int],
    weights: Sequence[float] | None,
) -> tuple[Pool, int]:
    """Returns the pool, and the number of classes of the widest node."""
    shares = cumulative_shares(weights, len(sources))
    # If groups are ignored, all examples of a class belong to one group.
    sources = [s if num else s._replace(group=None) for s, num in zip(sources, support_groups, strict=True)]
    max_groups = max(source.num_groups for source in sources)
    cells = np.concatenate([np.pad(c, [(0, 0), (0, max_groups - c.shape[1])]) for c in map(_cells, sources)])
    rows = [np.lexsort((s.y if s.group is None else s.group, s.y)) for s in sources]
    first_class = np.cumsum([0] + [source.num_classes for source in sources])
    members_of_nodes = [members + first for node, first in zip(nodes, first_class, strict=False) for members in node]
    sizes = np.array([len(members) for members in members_of_nodes])
    num_nodes = np.array([len(node) for node in nodes])

    def index(values):
        return jnp.asarray(np.asarray(values), jnp.int32)

    pool = Pool(
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
        members=index(np.concatenate(members_of_nodes)),
        shares=shares,
    )
    return pool, int(sizes.max())


class Noise(NamedTuple):
    """The random bits of an episode. One call draws them all: each call would cost a tenth of a second to compile."""

    source: jax.Array  # []
    node: jax.Array  # []
    ways: jax.Array  # []
    size: jax.Array  # []
    weights: jax.Array  # [W]
    classes: jax.Array  # [widest node]
    groups: jax.Array  # [groups]


def draw_noise(widest: int, num_groups: int, key: jax.Array, padded_ways: int) -> tuple[Noise, jax.Array]:
    bits_key, row_key = jax.random.split(key)
    ends = np.cumsum([4, padded_ways, widest, num_groups])
    numbers, *others = jnp.split(jax.random.bits(bits_key, (int(ends[-1]),), jnp.uint32), ends[:-1])
    return Noise(*numbers, *others), row_key


def below(bits: jax.Array, size: jax.Array) -> jax.Array:
    """Uniform in 0..size-1, except for a bias of size / 2³²."""
    return (bits % jnp.asarray(size, jnp.uint32)).astype(jnp.int32)


def uniform(bits: jax.Array) -> jax.Array:
    """Uniform in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _random_order(bits: jax.Array, size: jax.Array) -> jax.Array:
    """The numbers 0..size-1 in random order, followed by the remaining numbers up to the number of bits."""
    return jnp.argsort(jnp.where(jnp.arange(len(bits)) < size, bits >> 1, jnp.uint32(2**31))).astype(jnp.int32)


def draw_classes(pool: Pool, noise: Noise, ways_fn: Callable) -> tuple[jax.Array, jax.Array]:
    """Returns the source and its classes [W], numbered across all sources; -1 is padding."""
    padded_ways = len(noise.weights)
    source = (pool.shares[:-1] <= uniform(noise.source)).sum().astype(jnp.int32)
    node = pool.first_node[source] + below(noise.node, pool.num_nodes[source])
    size = pool.node_size[node]
    order = _random_order(noise.classes, size)[:padded_ways]
    real = jnp.arange(padded_ways) < ways_fn(noise.ways, source, size)
    return source, jnp.where(real, pool.members[pool.node_start[node] + jnp.where(real, order, 0)], -1)


def draw_sides(pool: Pool, noise: Noise, source: jax.Array, classes: jax.Array) -> Sides:
    """Draws the groups of both sides."""
    num = pool.num_groups[source]
    order = _random_order(noise.groups, num)
    counts = pool.cells[classes][:, order] * (classes >= 0)[:, None]
    on_query = jnp.arange(len(order)) < num - pool.support_groups[source]
    num_query = (counts * on_query[None]).sum(axis=1)
    return Sides(order, num_query, counts.sum(axis=1) - num_query)


def gather(
    pool: Pool,
    key: jax.Array,
    source: jax.Array,
    classes: jax.Array,
    sides: Sides,
    shots: jax.Array,
    num_query: jax.Array,
    sizes: tuple[int, int],
    preprocess: Callable | None,
) -> Episode:
    """Returns the episode with the given number of examples of each class, padded to `sizes`."""
    grouped, padded_ways = pool.support_groups[source] > 0, len(classes)
    num_ways = (classes >= 0).sum().astype(jnp.int32)
    way, index_in_class, real = _classes_of_rows(shots, num_query, num_ways, padded_ways, sizes)
    is_query = jnp.arange(sum(sizes)) >= sizes[0]
    # If groups matter, each side has its own permutation of the examples of a class. Otherwise both sides share one,
    # and the query set takes its beginning.
    on_support_side = grouped & ~is_query
    epoch = jnp.where(on_support_side, way + padded_ways, way)
    index_in_class = jnp.where(grouped | is_query, index_in_class, index_in_class + num_query)
    num_examples = jnp.where(on_support_side, sides.num_support[way], sides.num_query[way])
    place = _permutations.shuffled(key, epoch, index_in_class, jnp.maximum(num_examples, 1))
    place = place + jnp.where(on_support_side, sides.num_query[way], 0)
    row = jnp.where(real, _pool_rows(pool, classes, sides.order, way, place), 0)

    x = to_floats(pool.x[row]) if preprocess is None else preprocess(pool.x[row])
    rows = {
        "x": jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0),
        "y": jnp.where(real, way, 0),
        "mask": real.astype(jnp.float32),
    }
    source_row = jnp.where(real, pool.row[row], -1)
    class_entries = {"class_mask": (classes >= 0).astype(jnp.float32)}
    support = {k: v[: sizes[0]] for k, v in rows.items()} | class_entries | {"num_rows": jnp.cumsum(shots)[-1]}
    query = {k: v[sizes[0] :] for k, v in rows.items()} | class_entries | {"num_rows": num_query * num_ways}
    class_in_source = jnp.where(classes >= 0, classes - pool.first_class[source], -1)
    support_row, query_row = source_row[: sizes[0]], source_row[sizes[0] :]
    meta = EpisodeMeta(source, class_in_source, num_ways, shots, num_query, support_row, query_row)
    return Episode(support, query, meta)


def _classes_of_rows(
    shots: jax.Array, num_query: jax.Array, num_ways: jax.Array, padded_ways: int, sizes: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three arrays [S + Q], for the rows of the support set and then those of the query set.

    They are the class of the row (in 0..W-1), the index of the row among the rows of its class in its set, and whether
    the row is real, not padding.
    """
    at_support, ends = jnp.arange(sizes[0], dtype=jnp.int32), jnp.cumsum(shots)
    way = (ends[None] <= at_support[:, None]).sum(axis=1).astype(jnp.int32)
    index_in_class = at_support - jnp.append(0, ends)[way]
    at_query = jnp.arange(sizes[1], dtype=jnp.int32)
    way = jnp.minimum(jnp.append(way, at_query // num_query), padded_ways - 1)
    index_in_class = jnp.append(index_in_class, at_query % num_query)
    real = jnp.append(at_support < ends[-1], at_query < num_query * num_ways)
    return way, index_in_class, real


def _pool_rows(pool: Pool, classes: jax.Array, order: jax.Array, way: jax.Array, place: jax.Array) -> jax.Array:
    """Converts places within the classes into rows of the pool. The rows of one class and group are contiguous.

    Args:
      pool: the pool.
      classes: [W] the classes of the episode, numbered across all sources.
      order: [groups] the order of the groups, by which the places of a class are numbered.
      way: [N] positions in `classes`.
      place: [N] the places within these classes.
    """
    cumulated = jnp.cumsum(pool.cells[classes][:, order], axis=1)  # [W, groups]
    group = (cumulated[way] <= place[:, None]).sum(axis=1)
    start = pool.cell_start[classes[way], order[jnp.minimum(group, len(order) - 1)]]
    return start + place - jnp.where(group > 0, cumulated[way, group - 1], 0)
