"""Checks of an adaptation: options of unrolling, and at trace time λ, tasks, and the leaves that adapt."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metaopt import _checks
from metaopt.few_shot import _leaves

RATES = ("fixed", "one", "leaf", "entry")


def check_options(rates: str, order: Any, outer: Any, remat: str, rule: Any) -> None:
    """Raises ValueError for unknown `rates` or `order`, or a rule with `num_steps` or with options of unrolling."""
    if rates not in RATES:
        raise ValueError(f"`rates` must be one of {', '.join(map(repr, RATES))}; got {rates!r}.")
    is_number = isinstance(order, (int, np.integer)) and not isinstance(order, bool)
    if order not in ("first", "second") and not (is_number and order >= 0):
        raise ValueError(f'`order` must be "first", "second" or a number of outer steps; got {order!r}.')
    options = {"order": (order, "second"), "outer": (outer, "last"), "remat": (remat, "none")}
    changed = [name for name, (value, default) in options.items() if not (isinstance(value, str) and value == default)]
    if rule is not None and changed:
        raise ValueError(
            f"`{changed[0]}` is an option of unrolled training and cannot be combined with a `rule`. Pass only one of "
            "them, and none to a method that sets the other: `imaml` sets `rule`, `fomaml` `order`, and "
            "`maml_plus_plus` `outer`."
        )
    if isinstance(rule, functools.partial) and "num_steps" in rule.keywords:
        raise ValueError(
            "Pass `num_steps` to the method, which passes it on to its `rule`; do not set it in the `rule`."
        )


def check_hyperparams(hyperparams: Any, *, learned_rates: bool) -> None:
    """Raises ValueError if λ lacks "init", or "rate" where rates are learned."""
    is_dict = isinstance(hyperparams, Mapping)
    if is_dict and "init" in hyperparams and ("rate" in hyperparams or not learned_rates):
        return
    got = f"a dict of {[*hyperparams]}" if is_dict else type(hyperparams).__name__
    rates = ' and the learned rates as "rate"' if learned_rates else ""
    other = "Is it from an adaptation whose rates are fixed?" if is_dict and "init" in hyperparams else ""
    raise ValueError(
        f'λ must be a dict with the meta-parameters as "init"{rates}, as `a.hyperparams(meta_params)` returns '
        f"for an adaptation `a`; got {got}. {other or 'Did you pass only the meta-parameters?'}"
    )


def check_one_task(data: Any) -> None:
    """Raises ValueError if a support set has an axis of tasks, or a label that its "class_mask" does not allow.

    Traced labels are not checked. With an axis of tasks, all tasks would be treated as one, which is another objective.
    """
    if not isinstance(data, Mapping):
        return
    _checks.check_task_labels("data", data)
    mask, y = (np.shape(data.get(name, ())) for name in ("mask", "y"))
    # An episode has a scalar "num_rows". Without it, a two-dimensional mask is either a batch of tasks, or marks parts
    # of rows, such as tokens. It is a batch if the labels have the same two axes.
    batch = np.ndim(data["num_rows"]) > 0 if "num_rows" in data else len(mask) == 2 and y[:2] == mask
    if batch:
        raise ValueError(
            f'An adaptation takes one task, whose "mask" is [N], a number for each row; got shape {mask}. Use '
            "`hypergrad.over_tasks` for a batch of tasks. If the mask is for labels with several values per row, give "
            "it another name."
        )


def check_leaves(spec: Any, params: Any, made: Any, meta_leaves: Mapping[Any, Any]) -> None:
    """Raises ValueError if the patterns or the options of an adaptation do not fit the leaves that `init` returned.

    Args:
      spec: the `Spec`.
      params: all leaves that `init` returned.
      made: the leaves that it made and that do not adapt, with None in place of the others.
      meta_leaves: the leaves of λ["init"] by path.
    """
    leaves = _leaves.by_path(params)
    adapting = [path for path in leaves if _leaves.matches(spec.adapt, path)]
    if not adapting:
        names = [*map(_leaves.name, leaves)]
        raise ValueError(f"`adapt` must match at least one leaf: {spec.adapt.pattern!r} matches none of {names}.")
    if spec.leaves_per_step is not None:
        both = [_leaves.name(path) for path in adapting if _leaves.matches(spec.leaves_per_step, path)]
        if both:
            raise ValueError(f"Leaves with a value for each step cannot adapt: {both}. Exclude them from `adapt`.")
    # A leaf of λ["init"] is identified by its keys, so `init` must not pass it on under other keys.
    hint = 'If `init` only passed them on, it must return them in the containers and under the keys of λ["init"]'
    new = [_leaves.name(path) for path in adapting if path not in meta_leaves]
    if spec.proximal and new:
        raise ValueError(
            f'`proximal` is the distance from λ["init"], which lacks the leaves {new} that `init` returned: let them '
            f"not adapt (`adapt`), or leave out `proximal`. {hint}."
        )
    # Unbiased rules perturb λ before `init`. Others may start after it: `lookahead(commit=0)` is of kind "exact", and
    # holds its state constant.
    if spec.rule_kind not in (None, "unbiased") and jax.tree.leaves(made):
        raise ValueError(
            f"`init` made the leaves {[*map(_leaves.name, _leaves.by_path(made))]}, which do not adapt, and the "
            f"`rule` (of kind {spec.rule_kind!r}) may see no derivative through them: let them adapt (`adapt`), leave "
            f"out the `rule`, or use one that perturbs λ, such as `hypergrad.evolution`. {hint}."
        )
