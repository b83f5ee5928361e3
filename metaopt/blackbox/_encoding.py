"""Encodes configurations as vectors, with inactive values at their defaults."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import base, spaces


def encoder(space: base.PyTree) -> Callable[..., np.ndarray]:
    """Returns `(configuration, strict=False) -> [D]`, which caches results and puts inactive values at their defaults.

    If strict, values that are `spaces.foreign` raise an error. Otherwise:

    - an unknown label is encoded as equally near to all labels;
    - a number out of bounds is moved to the bound;
    - a non-number instead of a number becomes the default.
    """
    encode, cache = jax.jit(encode_fn(space)), {}

    def encoded(configuration, strict=False):
        # The types separate labels that compare equal (1, 1.0, True).
        name = strict, *configuration, *configuration.values(), *map(type, configuration.values())
        try:
            vector = cache.get(name)
        except TypeError:  # values of other spaces may not be hashable
            vector = cache.get(name := (strict, repr(sorted(configuration.items(), key=lambda item: item[0]))))
        if vector is None:
            gaps = {k: math.nan for k, v in configuration.items() if isinstance(v, float) and v != v}
            if any(configuration[key] is not math.nan for key in gaps):  # NaN != NaN: the cache finds only this object
                return encoded({**configuration, **gaps}, strict)
            # Fill missing labels with the default label first, because the default of the relaxed space lies between
            # labels.
            whole = spaces.complete(space, configuration, strict=strict)
            others = {} if strict else spaces.foreign(space, configuration)
            hyperparams = spaces.from_configuration(space, whole | others, strict=strict)
            vector = cache[name] = np.asarray(encode(hyperparams))
        return vector

    return encoded


def encode_fn(space: base.PyTree) -> Callable[[base.HyperParams], jax.Array]:
    """`spaces.encode` with inactive values at their defaults, so that unused values do not distinguish trials."""
    if not any(leaf.condition for leaf in jax.tree.leaves(space)):
        return lambda hyperparams: spaces.encode(space, hyperparams)
    default = lambda x: spaces.encode(space, spaces.default(space)).astype(x.dtype)

    def encode(hyperparams):
        x = spaces.encode(space, hyperparams)
        return jnp.where(spaces.active(space, hyperparams), x, default(x))

    return encode
