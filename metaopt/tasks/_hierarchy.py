"""Selects sets of related classes from an ontology. The classes of an episode are drawn from one such set."""

from collections.abc import Mapping, Sequence

# Nodes with more classes are not eligible, because their classes are too different. This is the smallest bound with
# which every class of ImageNet is below an eligible node.
MAX_LEAVES = 392


def ontology_nodes(
    ontology: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    *,
    min_leaves: int,
    max_leaves: int = MAX_LEAVES,
) -> list[tuple[str, list[int]]]:
    """Returns the nodes of a directed acyclic graph that are eligible for episodes, and the classes below each.

    The procedure is that of Meta-Dataset. First the graph is reduced to the classes and their ancestors. Then a node
    with one child is replaced by this child, until no such node is left. So a chain above a set of classes does not
    make the set count more often. Nodes with fewer than `min_leaves` or more than `max_leaves` classes are left out.
    (Here the children of a node are a set: a node that reaches its only child in two ways is a node with one child.)

    Args:
      ontology: node -> its children, which are nodes or classes.
      class_names: the classes; they must not have children.
      min_leaves: the smallest number of classes of a node.
      max_leaves: the largest number of classes of a node.

    Returns:
      (node, sorted numbers of its classes), sorted by node.

    Raises:
      ValueError: if a class is not in the ontology or has children there, the graph has a cycle, or no node is
        eligible.

    Source: Triantafillou et al., ICLR 2020, App. B, https://arxiv.org/abs/1903.03096
    """
    number = {name: i for i, name in enumerate(class_names)}
    parents: dict[str, set[str]] = {}
    for node, below in ontology.items():
        for child in below:
            parents.setdefault(child, set()).add(node)
    classes_with_children = sorted(name for name in number if ontology.get(name))
    if classes_with_children:
        raise ValueError(
            f"The class {classes_with_children[0]!r} has children in the ontology; a class must be a node without "
            "children."
        )
    unknown_classes = sorted(set(number) - set(parents))
    if unknown_classes:
        raise ValueError(f"The class {unknown_classes[0]!r} is not in the ontology as a child of any node.")
    ancestors: set[str] = set()
    frontier = set(number)
    while frontier:
        frontier = {p for name in frontier for p in parents.get(name, ())} - ancestors
        ancestors |= frontier
    children = {node: {c for c in ontology[node] if c in ancestors or c in number} for node in ancestors}
    spans = _spans(children, number)
    while single := [node for node in children if len(children[node]) == 1]:
        node = single[0]
        (child,) = children.pop(node)
        for below in children.values():
            if node in below:
                below.remove(node)
                below.add(child)
    nodes = [(node, sorted(spans[node])) for node in sorted(children)]
    nodes = [(node, leaves) for node, leaves in nodes if min_leaves <= len(leaves) <= max_leaves]
    if not nodes:
        raise ValueError(
            f"No node of the ontology has {min_leaves} to {max_leaves} of the {len(number)} classes below it."
        )
    return nodes


def _spans(children: Mapping[str, set[str]], number: Mapping[str, int]) -> dict[str, set[int]]:
    """Returns the classes below every node, computed from the leaves up. Raises ValueError if there is a cycle."""
    spans = {name: {i} for name, i in number.items()}
    waiting = set(children)
    while waiting:
        ready = {node for node in waiting if all(child in spans for child in children[node])}
        if not ready:
            raise ValueError(f"The ontology has a cycle through {sorted(waiting)[0]!r}.")
        for node in ready:
            spans[node] = set().union(*(spans[child] for child in children[node]))
        waiting -= ready
    return spans
