"""Search spaces: trees of bounded, positive, relaxed and fixed quantities, and the coordinates in which they are tuned.

A **space** is any pytree whose leaves are made by the factories of this subpackage. Each leaf has three parts:

- a bijection z ↦ λ from unconstrained coordinates, in which a gradient step of any size is valid, to the range of λ;
- a distribution from which λ is sampled;
- coordinates in [0, 1] (`encode`), in which that distribution is uniform. The weights of a simplex or choice are their
  own coordinates.

    real           λ = default + scale·z                              z ~ N(0, 1)
    positive       λ = default·exp(scale·z)                           z ~ N(0, 1)
    interval       λ = low + (high − low)·σ(z)                        λ ~ U(low, high)
    interval, log  log λ = log low + (log high − log low)·σ(z)        log λ ~ U(log low, log high)
    integer        the interval [low − ½, high + ½], rounded by `discretize`
    simplex        λ = softmax(z)                                     λ ~ Dirichlet(1)
    choice         a simplex with a label for each weight             every label is equally probable
    fixed          λ is the value; there is no z, and so no gradient

The functions that take λ or z are pure. `jax.jit`, `jax.vmap` and differentiation in either mode work on all arguments
except the space, which is static: close over it, or use `functools.partial`.

λ is in **natural units**: `training.fit(space=...)` and `training.fine_tune(space=...)` take and return λ, and losses
read λ. Unconstrained coordinates z have their own type, `Unconstrained`. `to_unconstrained` and the predictors of a
space return it. `to_constrained` and the problems that `constrain` returns accept only this type, so that λ passed as
z, or z passed as λ, raises an error.

A λ that does not fit the space in structure or shape raises a `ValueError` during tracing. `to_unconstrained` raises a
`ValueError` for a value outside the range of its leaf. A traced value cannot raise: its coordinate becomes NaN.
`encode` and `discretize` accept values outside the range, for example from a record of another space, and replace them
by the nearest bound.

Code without a gradient runs with a **configuration**:

- `configuration` writes λ as plain values by name. It rounds integers, writes choices as their labels, and omits
  quantities that are not active (`active_if`).
- `from_configuration` reads a configuration back as λ.
- `complete` adds the missing parts of a configuration.
- `foreign` returns the entries of a configuration that the space does not allow.
- `infer` makes a space from configurations of earlier trials.

Source for the bijections: Stan Reference Manual, "Constraint transforms",
https://mc-stan.org/docs/reference-manual/transforms.html
"""

from metaopt.spaces._configuration import active, complete, configuration, foreign, from_configuration
from metaopt.spaces._constrain import constrain
from metaopt.spaces._convert import from_configspace, from_optuna, suggest, to_configspace, to_optuna
from metaopt.spaces._factories import (
    active_if,
    choice,
    fixed,
    integer,
    interval,
    positive,
    real,
    simplex,
)
from metaopt.spaces._infer import infer
from metaopt.spaces._leaves import Fixed, Integer, Interval, Leaf
from metaopt.spaces._serialize import from_json, to_json
from metaopt.spaces._tree import (
    at_bounds,
    default,
    discretize,
    encode,
    names,
    num_dims,
    sample,
    to_constrained,
    to_unconstrained,
)
from metaopt.spaces._unconstrained import Unconstrained

__all__ = [
    "Fixed",
    "Integer",
    "Interval",
    "Leaf",
    "Unconstrained",
    "active",
    "active_if",
    "at_bounds",
    "choice",
    "complete",
    "configuration",
    "constrain",
    "default",
    "discretize",
    "encode",
    "fixed",
    "foreign",
    "from_configspace",
    "from_configuration",
    "from_json",
    "from_optuna",
    "infer",
    "integer",
    "interval",
    "names",
    "num_dims",
    "positive",
    "real",
    "sample",
    "simplex",
    "suggest",
    "to_configspace",
    "to_constrained",
    "to_json",
    "to_optuna",
    "to_unconstrained",
]
