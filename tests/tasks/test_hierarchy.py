"""The sets of classes that an ontology gives."""

import numpy as np
import pytest

from metaopt.tasks import _hierarchy


def by_definition(graph, names, least, most):
    """Internal nodes of the graph of the classes' ancestors that have two children or more, by paths."""

    def below(node):
        return {node} if node in names else set().union(*[below(c) for c in graph.get(node, ())], set())

    def heads(node):
        """What stands for a node once chains are gone: the first below it that branches, or is a class."""
        children = set().union(*[heads(c) for c in graph.get(node, ()) if below(c)], set())
        return children if node not in names and len(children) == 1 else {node}

    nodes = set()
    for node in graph:
        if below(node) and heads(node) == {node}:
            leaves = sorted(names.index(name) for name in below(node))
            if least <= len(leaves) <= most:
                nodes.add((node, tuple(leaves)))
    return sorted(nodes)


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_by_their_definition(seed):
    rng = np.random.default_rng(seed)
    names = [f"leaf{k}" for k in range(8)]
    order = [f"n{k:02}" for k in range(12)] + names
    graph = {}
    for i, node in enumerate(order[:12]):
        later = order[i + 1 :]
        graph[node] = [later[j] for j in rng.choice(len(later), min(len(later), rng.integers(1, 4)), replace=False)]
    for name in names:  # every class has a parent
        graph[order[rng.integers(12)]].append(name)
    graph["n05"].append("elsewhere")  # no class is below it
    kept = names[: rng.integers(4, 9)]
    for least, most in ((2, 99), (3, 6)):
        expected = by_definition(graph, kept, least, most)
        if expected:
            nodes = _hierarchy.ontology_nodes(graph, kept, min_leaves=least, max_leaves=most)
            assert [(node, tuple(leaves)) for node, leaves in nodes] == expected
        else:
            with pytest.raises(ValueError, match="No node"):
                _hierarchy.ontology_nodes(graph, kept, min_leaves=least, max_leaves=most)


def test_two_classes_of_one_parent_are_a_node():
    assert len(list(_hierarchy.ontology_nodes({"u": ["a", "b"]}, ["a", "b"], min_leaves=2))) == 1
