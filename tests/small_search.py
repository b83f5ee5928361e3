"""A small search space and task, for tests of architecture searches: programs that compile in seconds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import base, nas

KEY = jax.random.key(0)


def smooth(params, x, channels, stride):
    return jnp.tanh(x @ params["w"])


# Without normalization, which makes the loss independent of the weights' length, and without kinks.
OPS = {
    **nas.BLOCKS,
    "smooth": nas.Op(lambda key, shape, c, stride: {"w": nas.uniform(key, (shape[-1], c), shape[-1])}, smooth),
}
CELL = nas.complete_cell(2, ("none", "skip_connect", "smooth"), preprocess=False)
NET = nas.Network({"cell": CELL}, (nas.Layer("smooth", 4), nas.Layer("cell", 4)), 2)
ONE = nas.Network({"cell": nas.complete_cell(1, CELL.edges[0].ops, preprocess=False)}, (nas.Layer("cell", 3),), 2)
RNG = np.random.default_rng(0)


def rows(num):
    x = RNG.normal(size=(num, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray((x[:, 0] * x[:, 1] > 0).astype(np.int32))}


TASK = base.Task(rows(9), rows(8))

DARTS_V2 = (  # as its authors print it
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)


def graph(edges, ops):
    """A cell of NAS-Bench-101 with these edges between vertices, and the ops of its inner vertices."""
    size = len(ops) + 2
    matrix = np.zeros((size, size), int)
    for s, t in edges:
        matrix[s, t] = 1
    return nas.Graph(tuple(map(tuple, matrix.tolist())), ("input", *ops, "output"))


def sgd(hyperparams):
    return optax.sgd(0.3, momentum=0.5)


def nas_bench_201_cells():
    """All 15,625 genotypes of NAS-Bench-201, in the order of its table."""
    edges = nas.nas_bench_201_space().cells["cell"].edges
    cell = lambda ops: tuple((*edge[:2], op) for edge, op in zip(edges, ops, strict=True) if op != "none")
    return [{"cell": cell(ops)} for ops in itertools.product(*(edge.ops for edge in edges))]


def search_of(method, network=NET, **options):
    return method(network, (3,), ops=OPS, **{"optimizer": sgd, "decay": 0.03, **options})


def alpha_of(search):
    """A random λ of the search."""
    key = jax.random.key(5)
    return jax.jit(lambda: jax.tree.map(lambda a: a + 0.5 * jax.random.normal(key, a.shape), search.hyperparams(KEY)))()


def estimate_of(search, alpha):
    """The first estimate and the state after it, from `KEY`."""
    start = lambda: search.estimator.init(KEY, alpha, TASK)
    return jax.jit(lambda: search.estimator.estimate(alpha, TASK, start()))()


def close(hypergrad, expected, rtol):
    """Asserts that a tree is close to a vector that is not zero."""
    vector = jax.flatten_util.ravel_pytree(hypergrad)[0]
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(vector - expected) <= rtol * np.linalg.norm(expected)
