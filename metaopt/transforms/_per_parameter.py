"""Hyperparameters that differ between parameters, for any optax factory.

optax's hyperparameters are scalars, one for all parameters. Here the parameters are split into groups that share all
their hyperparameters, and the factory makes one transform for each group (`optax.partition`). This works for any
factory, without knowledge of its internals. A transform that depends on all parameters at once, such as a global norm,
would see only one group, and is rejected.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt import _jaxpr, base
from metaopt.transforms import _prefixes


def per_parameter(factory: Callable[..., optax.GradientTransformation]) -> Callable:
    """Wraps a factory so that any hyperparameter may be a tree like the parameters.

    Each hyperparameter is one value for all parameters, or a tree with the structure of the parameters, or a prefix of
    it: {"encoder": 1e-3, "head": 1e-2}. Parameters with the same values of all hyperparameters share one call of the
    factory, so the program grows with the number of different settings. A value may be a schedule, a boolean or None.
    It may also be an array that broadcasts against its parameter, with one hyperparameter per entry, if the factory's
    own arithmetic broadcasts. A container that is a single value, not a tree of hyperparameters (`ns_coeffs` of Muon),
    must be bound to the factory by `functools.partial`. A PRNG key that is not a tree is the same for every group.

    Transforms that compute one number or one array from all parameters are rejected. Among optax's optimizers these are
    `lbfgs`, `polyak_sgd` and, from `contrib`, `dadapt_adamw`, `dog`, `dowg`, `dpsgd`, `mechanize`, `momo`, `momo_adam`,
    `prodigy`, `sam` and `sophia` (inner products, norms, a loss of all parameters). Among its components these are
    `clip_by_global_norm`, `normalize_by_update_norm`, `scale_by_polyak`, the line searches, and `normalize` and
    `differentially_private_aggregate` from `contrib`. `apply_if_finite` and a `MultiSteps` that skips are rejected too
    (one NaN skips all), and so is `flatten` (one array, whatever is done with it). In metaopt, `mixture` and
    `self_tuning` accept trees without this wrapper.

    In `nnx.Optimizer`, a tree is a dict of the paths in the model, {"layers": {0: {"kernel": 1e-3, "bias": 1e-2}}}, or
    an `nnx.State`, such as `jax.tree.map(lambda p: 1e-3, nnx.state(model, nnx.Param))`.

    It is differentiable in every floating-point hyperparameter in which the factory is. The state is that of
    `optax.partition`, whose labels are the path of a group's first parameter. With one value for all, the state is the
    factory's.

    Args:
      factory: such as `optax.adamw`: `(...) -> optax.GradientTransformation`.

    Returns:
      A factory with the same arguments, `-> optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: in `init` and `update`, by JAX, if a tree does not fit the parameters. Bind a container that is one
        value to the factory: `functools.partial(factory, ...)`.
      ValueError: in `update`, if the update of one group would depend on the gradient or the parameters of another.

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
            leaves[name], structure = jax.tree.flatten(_prefixes.opened(value), is_leaf=_is_one_value)
            numbers = structure.unflatten(range(structure.num_leaves))
            chosen[name] = jax.tree.leaves(_prefixes.spread(numbers, params))
        settings, labels, label_of = {}, [], {}
        for path, *numbers in zip(_prefixes.paths(params), *chosen.values(), strict=True):
            label = label_of.setdefault(tuple(numbers), path)
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
    """Wraps a factory so that any hyperparameter may be a dict by group of parameters.

    This is `per_parameter` with the groups named once: by patterns of the parameters' paths, or by a tree of labels,
    such as a mask. Every hyperparameter is one value for all, or a dict with an entry for each group.

    Args:
      factory: such as `optax.adamw`: `(...) -> optax.GradientTransformation`.
      patterns: group -> regular expression, searched for in paths like "encoder/0/bias" (in `nnx.Optimizer`, too). The
        first matching pattern determines the parameter's group, and `"rest": ""` matches the remaining ones. Every
        pattern must be the first match of at least one parameter.
      labels: replaces `patterns`: a tree of groups (strings, numbers or booleans) with the parameters' structure or a
        prefix of it, or a function `params -> tree`, such as a mask for `optax.masked`.

    Returns:
      A factory with the same arguments, `-> optax.GradientTransformationExtraArgs`. It raises the errors of
        `per_parameter`'s factory. It also raises if a parameter is in no group, or if a dict does not have exactly the
        groups.

    Raises:
      ValueError: if both `patterns` and `labels` are given or neither is.

    >>> import jax.numpy as jnp, optax
    >>> from metaopt import transforms
    >>> params = {
    ...     "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    ...     "norm": {"scale": jnp.ones(2)},
    ... }
    >>> grouped = transforms.per_group(
    ...     optax.adamw, patterns={"matrices": "kernel$", "rest": ""}
    ... )
    >>> adamw = grouped(1e-3, weight_decay={"matrices": 0.1, "rest": 0.0})
    >>> list(adamw.init(params).inner_states)
    ['matrices', 'rest']
    """
    if (patterns is None) == (labels is None):
        raise ValueError("`per_group` needs either `patterns` or `labels`.")

    def group_of(path):
        matches = [group for group, pattern in (patterns or {}).items() if re.search(pattern, path)]
        if not matches:
            raise ValueError(
                f"The parameter {path} matches no pattern of {patterns}; add the pattern "
                '`"rest": ""` for all remaining parameters.'
            )
        return matches[0]

    def choose(hyperparams, params):
        if patterns is not None:
            groups = jax.tree.structure(params).unflatten([group_of(path) for path in _prefixes.paths(params)])
        else:
            groups = labels(params) if callable(labels) else labels
            groups = _prefixes.spread(groups, params)
        names = list(patterns or dict.fromkeys(jax.tree.leaves(groups)))
        idle = set(names) - set(jax.tree.leaves(groups))
        if idle and jax.tree.leaves(params):
            raise ValueError(
                f"The groups {sorted(idle)} have no parameters: their patterns match none, or only parameters that "
                "earlier patterns match. Change, reorder or remove them."
            )
        for name, value in hyperparams.items():
            if isinstance(value, Mapping) and set(value) != set(names):
                raise ValueError(
                    f"The hyperparameter {name!r} must be one value, or a dict with the groups {names}; got the keys "
                    f"{list(value)}. Bind a dict that is one value to the factory with `functools.partial`."
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

    @functools.wraps(factory)  # `optax.inject_hyperparams` reads the signature
    def make(*args, **kwargs) -> optax.GradientTransformationExtraArgs:
        args, kwargs = _named(factory, args, kwargs)
        hyperparams = {**dict(enumerate(args)), **kwargs}
        checked = set()

        def call(setting):
            return factory(*(setting[i] for i in range(len(args))), **{name: setting[name] for name in kwargs})

        def transform(params):
            settings, labels = choose(hyperparams, params)
            if len(settings) < 2:  # one setting for all parameters
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
                _check_uncoupled(call(scalars), labels, updates, params, extra_args)
                checked.add(structure)
            return partition.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def _named(factory: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call by their names where the factory allows it, so that errors can name them."""
    parameters = inspect.signature(factory).parameters
    first = [p.name for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if list(parameters)[: len(args)] != first[: len(args)] or not set(first[: len(args)]).isdisjoint(kwargs):
        return args, kwargs
    return (), dict(zip(first, args, strict=False)) | kwargs


def _check_uncoupled(optimizer, labels, updates, params, extra_args):
    """Raises ValueError if a group's update depends on another group.

    It may depend neither on the parameters of the other group, nor on the gradient of the other group at any step.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
    grads, params = like(updates), like(updates if params is None else params)
    own = [frozenset([group]) for group in jax.tree.leaves(labels)]

    update = functools.partial(optimizer.update, **extra_args)
    first = lambda grads, params: update(grads, optimizer.init(params), params)
    jaxpr, (_, state) = jax.make_jaxpr(first, return_shape=True)(grads, params)
    sources = _jaxpr.dependencies(jaxpr.jaxpr, own * 2)
    jaxpr = jax.make_jaxpr(update)(grads, state, params).jaxpr  # a state may grow, but only in the first step
    one_step = lambda sources: _jaxpr.dependencies(jaxpr, [*own, *sources[len(own) :], *own])
    sources = _jaxpr.until_fixed(one_step, sources)
    for (group,), groups in zip(own, sources[: len(own)], strict=True):
        others = groups - {group}
        if others:
            raise ValueError(
                f"The hyperparameters must be one value for all parameters here: the update of the group {group!r} "
                f"depends on that of {sorted(others)[0]!r} (for example through a global norm), so groups "
                "cannot be updated separately. Wrap only the transforms that need no other parameters, such as "
                "`optax.adamw`. Chain transforms that need all parameters outside: "
                "`optax.chain(optax.clip_by_global_norm(1.0), adamw_of_groups)`."
            )


def _is_one_value(value: Any) -> bool:
    return value is None or isinstance(value, optax.GradientTransformation)


def _scalar(value: Any) -> Any:
    """An array with one hyperparameter per entry fits only its own parameter; for the others, use its first entry."""
    is_array = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)
    return jnp.ravel(value)[0] if is_array and jnp.ndim(value) else value
