"""Hyperparameters that differ from parameter to parameter, for any optax factory.

optax's hyperparameters are scalars, one for all parameters. Here the parameters are split into groups that share all
their hyperparameters, and the factory makes one transform for each group (`optax.partition`); nothing is known of what
the factory does with them. A transform that looks at all parameters at once, such as a global norm, would look at one
group instead, and is refused.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from metaopt import base


def per_parameter(factory: Callable[..., optax.GradientTransformation]) -> Callable:
    """The same factory, where any hyperparameter may be a tree like the parameters.

    Each hyperparameter is one value for all parameters, or a tree with the structure of the parameters, or a prefix of
    it: {"encoder": 1e-3, "head": 1e-2}. Parameters that share all their values are one call of the factory, so that the
    program grows with the number of different settings. A value may be an array that broadcasts against its parameter,
    for one hyperparameter an entry, as far as the factory's own arithmetic broadcasts; a schedule; a boolean; None.
    A container that is no tree of hyperparameters (`ns_coeffs` of Muon) belongs into the factory, by
    `functools.partial`. A PRNG key that is not a tree is the same for every group.

    Differentiable in every floating-point hyperparameter that the factory is. The state is that of `optax.partition`,
    whose labels are the path of a group's first parameter; with one value for all, that of the factory.

    Args:
      factory: such as `optax.adamw`: `(...) -> optax.GradientTransformation`.

    Returns:
      A factory with the same arguments, `-> optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: `factory` is no function; by `init` and `update`, a tree does not fit the parameters; by `update`, the
        update of one group would depend on the gradient or the parameters of another (a global norm, D-Adaptation, a
        line search).

    >>> import jax, optax
    >>> from metaopt import transforms
    >>> sgd = transforms.per_parameter(optax.sgd)(learning_rate={"w": 0.1, "b": 1.0})
    >>> params = {"w": 1.0, "b": 1.0}
    >>> updates, state = sgd.update(params, sgd.init(params), params)
    >>> round(float(updates["w"]), 3), round(float(updates["b"]), 3)
    (-0.1, -1.0)
    """

    def choose(hyperparams, params):
        leaves, chosen = {}, {}
        for name, value in hyperparams.items():
            leaves[name], structure = jax.tree.flatten(value, is_leaf=_is_one_value)
            numbers = structure.unflatten(range(structure.num_leaves))
            try:
                chosen[name] = jax.tree.leaves(_spread(numbers, params))
            except ValueError as error:
                raise ValueError(
                    f"The hyperparameter {name} must be one value, or a tree that is the parameters' or a prefix of "
                    f"it; got {structure} for parameters {jax.tree.structure(params)}. A container that is one value "
                    "belongs into the factory: `functools.partial(factory, ...)`."
                ) from error
        settings, labels, label_of = {}, [], {}
        for (path, _), *numbers in zip(jax.tree_util.tree_leaves_with_path(params), *chosen.values(), strict=True):
            label = label_of.setdefault(tuple(numbers), _path(path))
            settings[label] = {name: leaves[name][n] for name, n in zip(hyperparams, numbers, strict=True)}
            labels.append(label)
        if len(settings) < len(label_of):
            raise ValueError(f"Two parameters have the same path, among {sorted(settings)}: rename one of them.")
        return settings, jax.tree.structure(params).unflatten(labels)

    return _partitioned(factory, choose)


def per_group(
    factory: Callable[..., optax.GradientTransformation],
    *,
    patterns: Mapping[str, str] | None = None,
    labels: base.PyTree | Callable[[base.Params], base.PyTree] | None = None,
) -> Callable:
    """The same factory, where any hyperparameter may be a dict by group of parameters.

    As `per_parameter`, with the groups named once: by patterns of the parameters' paths, or by a tree of labels, among
    them masks. Every hyperparameter is one value for all, or a dict with an entry for each group.

    Args:
      factory: such as `optax.adamw`: `(...) -> optax.GradientTransformation`.
      patterns: group -> regular expression, searched for in paths like "encoder/0/bias"; the first that is found is the
        parameter's group, and `"rest": ""` fits what is left. Every pattern must find a parameter.
      labels: in the place of patterns: a tree of groups (strings, numbers or booleans) that is the parameters' or a
        prefix of it, or a function `params -> tree`, such as a mask for `optax.masked`.

    Returns:
      A factory with the same arguments, `-> optax.GradientTransformationExtraArgs`, that raises as `per_parameter`'s
      does; also where a parameter is in no group, or a dict does not have exactly the groups.

    Raises:
      ValueError: `factory` is no function, or there are both patterns and labels, or neither.

    >>> import jax.numpy as jnp, optax
    >>> from metaopt import transforms
    >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    >>> grouped = transforms.per_group(optax.adamw, patterns={"matrices": "kernel$", "rest": ""})
    >>> adamw = grouped(1e-3, weight_decay={"matrices": 0.1, "rest": 0.0})
    >>> list(adamw.init(params).inner_states)
    ['matrices', 'rest']
    """
    if (patterns is None) == (labels is None):
        raise ValueError("`per_group` needs either `patterns` or `labels`.")

    def group_of(path):
        found = [group for group, pattern in (patterns or {}).items() if re.search(pattern, _path(path))]
        if not found:
            raise ValueError(f'The parameter {_path(path)} fits no pattern of {patterns}; add `"rest": ""`.')
        return found[0]

    def choose(hyperparams, params):
        if patterns is not None:
            groups = jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)
        else:
            groups = labels(params) if callable(labels) else labels
            try:
                groups = _spread(groups, params)
            except ValueError as error:
                raise ValueError(f"`labels` must be a tree like the parameters or a prefix of it: {error}") from error
        names = list(patterns or dict.fromkeys(jax.tree.leaves(groups)))
        idle = set(names) - set(jax.tree.leaves(groups))
        if idle and jax.tree.leaves(params):
            raise ValueError(f"The patterns of {sorted(idle)} find no parameter that an earlier one does not.")
        for name, value in hyperparams.items():
            if isinstance(value, Mapping) and set(value) != set(names):
                raise ValueError(
                    f"The hyperparameter {name} must be one value, or a dict with the groups {names}; got the keys "
                    f"{list(value)}. A dict that is one value belongs into the factory: `functools.partial`."
                )
        if not any(isinstance(value, Mapping) for value in hyperparams.values()):
            names, groups = names[:1], jax.tree.map(lambda _: names[0], groups)
        settings = {
            str(group): {n: v[group] if isinstance(v, Mapping) else v for n, v in hyperparams.items()}
            for group in names
        }
        return settings, jax.tree.map(str, groups)

    return _partitioned(factory, choose)


def _partitioned(factory: Callable, choose: Callable) -> Callable:
    """The factory, with one call for each of the settings of `choose(hyperparams, params) -> (settings, labels)`."""
    if not callable(factory):
        raise ValueError(
            f"`factory` must be a function that makes a transform, such as `optax.adamw`; got a "
            f"{type(factory).__name__}, which it has made: its hyperparameters cannot be changed any more."
        )

    @functools.wraps(factory)  # the signature, for `optax.inject_hyperparams`
    def make(*args, **kwargs) -> optax.GradientTransformationExtraArgs:
        hyperparams = {**dict(enumerate(args)), **kwargs}
        checked = set()

        def call(setting):
            return factory(*(setting[i] for i in range(len(args))), **{name: setting[name] for name in kwargs})

        def transform(params):
            settings, labels = choose(hyperparams, params)
            if len(settings) < 2:  # nothing to tell apart
                return optax.with_extra_args_support(call(next(iter(settings.values()), hyperparams))), settings, labels
            return (
                optax.partition({label: call(s) for label, s in settings.items()}, lambda _: labels),
                settings,
                labels,
            )

        def init(params):
            return transform(params)[0].init(params)

        def update(updates, state, params=None, **extra_args):
            partition, settings, labels = transform(updates)
            structure = jax.tree.structure(updates)
            if len(settings) > 1 and structure not in checked:
                scalars = {name: _scalar(value) for name, value in next(iter(settings.values())).items()}
                _refuse_coupled(call(scalars), labels, updates, params, extra_args)
                checked.add(structure)
            return partition.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def _refuse_coupled(optimizer, labels, updates, params, extra_args):
    """Raises where one group's update depends on another group's parameters, or gradient in this step or the last."""
    optimizer = optax.with_extra_args_support(optimizer)

    def two_steps(grads, next_grads, params):
        first, state = optimizer.update(grads, optimizer.init(params), params, **extra_args)
        second, _ = optimizer.update(next_grads, state, params, **extra_args)
        return first, second

    like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
    shapes = like(updates)
    jaxpr = jax.make_jaxpr(two_steps)(shapes, shapes, shapes if params is None else like(params)).jaxpr
    groups = jax.tree.leaves(labels)
    sources = _sources(jaxpr, [frozenset([group]) for group in groups * 3])
    for group, found in zip(groups * 2, sources, strict=True):
        others = found - {group}
        if others:
            raise ValueError(
                f"The hyperparameters must be one value for all parameters here: the update of the group {group!r} "
                f"depends on that of {sorted(others)[0]!r} (a global norm, a step size from all gradients), which each "
                "group would be without. Chain what looks at all parameters outside: "
                "`optax.chain(optax.clip_by_global_norm(1.0), transforms.per_parameter(optax.adamw)(...))`."
            )


def _sources(jaxpr, given):
    """For each output of a jaxpr, the union of what is `given` for the inputs that it depends on."""
    known: dict[Any, frozenset] = dict(zip(jaxpr.invars, given, strict=True))
    look = lambda v: frozenset() if isinstance(v, core.Literal) else known.get(v, frozenset())
    for equation in jaxpr.eqns:
        operands = [look(v) for v in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in ("pjit", "jit", "closed_call", "custom_jvp_call"):
            outputs = _sources(inner.jaxpr, operands)
        else:
            outputs = [frozenset().union(*operands)] * len(equation.outvars)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [look(v) for v in jaxpr.outvars]


def _is_one_value(value: Any) -> bool:
    return value is None or isinstance(value, optax.GradientTransformation)


def _scalar(value: Any) -> Any:
    """An array of one hyperparameter an entry fits its own parameter alone; for the others, its first entry."""
    is_array = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)
    return jnp.ravel(value)[0] if is_array and jnp.ndim(value) else value


def _spread(prefix: base.PyTree, params: base.Params) -> base.PyTree:
    return jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), prefix, params)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
