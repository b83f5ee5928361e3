"""Trees over the parameters, as users write them: the parameters' own structure or a prefix of it, also in Flax NNX."""

import sys

import jax

from metaopt import base


def opened(tree: base.PyTree) -> base.PyTree:
    """The tree with each `nnx.State` as a dict of the same paths, and each `nnx.Variable` as its value.

    `nnx.Optimizer` calls `init` with variables and `update` with their values, both in a `State`.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # not imported, so the tree has no NNX nodes
        return tree

    def open_node(node):
        if isinstance(node, nnx.State):
            return {key: opened(below) for key, below in node.items()}
        return node.get_value() if isinstance(node, nnx.Variable) else node

    return jax.tree.map(open_node, tree, is_leaf=lambda node: isinstance(node, nnx.State | nnx.Variable))


def spread(prefix: base.PyTree, params: base.Params) -> base.PyTree:
    """A tree like the parameters, in which each leaf of the prefix is repeated for all parameters below it.

    Raises:
      ValueError: if `prefix` is not a prefix of `params`.
    """
    full = jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), opened(prefix), opened(params))
    return jax.tree.structure(params).unflatten(jax.tree.leaves(full))


def paths(params: base.Params) -> list[str]:
    """The path of each parameter, such as "encoder/0/bias"."""
    leaves = jax.tree_util.tree_leaves_with_path(opened(params))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
