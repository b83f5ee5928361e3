"""Regression tasks: functions of one family with different coefficients, each observed at a few points."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt import base
from metaopt._jaxpr import Tracer
from metaopt.tasks._episodes import Episode, SampleEpisodeFn


def function_episodes(
    draw: Callable[[jax.Array], base.PyTree],
    function: Callable[[base.PyTree, jax.Array], jax.Array],
    *,
    num_shots: int = 10,
    num_query: int = 10,
    inputs: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
) -> SampleEpisodeFn:
    """Makes a sampler of functions of one variable: y = f(coefficients, x) + noise ε, x ~ U, ε ~ N(0, 1).

    Args:
      draw: `key -> coefficients`, any pytree.
      function: `(coefficients, x [N, 1]) -> y [N, 1]`.
      num_shots: K, support points; at least 1.
      num_query: Q, query points; at least 1.
      inputs: the range of x; the second number is larger than the first.
      noise: standard deviation, in units of y. The query set has no noise, so that its error is the error of the
        function.

    Returns:
      `key -> Episode`: "x" [K, 1] and "y" [K, 1] float32, "mask" [K], "num_rows" []; the query set likewise. `meta` has
      the coefficients.

    Raises:
      ValueError: if a range is not two ascending, finite numbers.
    """
    _check_range("inputs", inputs)

    def sample(key):
        coefficients_key, x_key, noise_key = jax.random.split(key, 3)
        coefficients = draw(coefficients_key)
        x = jax.random.uniform(x_key, (num_shots + num_query, 1), jnp.float32, *inputs)
        y = function(coefficients, x)

        def part(x, y):
            num = x.shape[0]
            return {"x": x, "y": y, "mask": jnp.ones(num, jnp.float32), "num_rows": jnp.int32(num)}

        seen = y[:num_shots] + noise * jax.random.normal(noise_key, (num_shots, 1), jnp.float32)
        return Episode(part(x[:num_shots], seen), part(x[num_shots:], y[num_shots:]), coefficients)

    return sample


def _check_range(name: str, value: tuple[float, float], *, fixed: bool = False) -> None:
    """Raises ValueError unless `value` is two finite, ascending numbers, or two equal ones if `fixed`. Skips traced
    values.
    """
    low, high = value
    if isinstance(low, Tracer) or isinstance(high, Tracer):
        return
    if not -math.inf < low <= high < math.inf or low == high and not fixed:
        or_equal = " (or two equal numbers)" if fixed else ""
        raise ValueError(f"`{name}` must be two finite numbers in ascending order{or_equal}; got {value!r}.")


def _uniform(key: jax.Array, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, (), jnp.float32, low, high)


def sinusoids(
    *,
    num_shots: int = 10,
    num_query: int = 10,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    inputs: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
) -> SampleEpisodeFn:
    """Makes a sampler of MAML's sinusoids: y = A sin(x − φ), A ~ U[0.1, 5], φ ~ U[0, π], x ~ U[−5, 5].

    Args:
      num_shots: support points.
      num_query: query points.
      amplitude: the range of A, two ascending numbers; two equal numbers fix it.
      phase: the range of φ, in radians, likewise.
      inputs: the range of x, two ascending numbers.
      noise: the standard deviation of the noise in the support set's y, as for `function_episodes`.

    Returns:
      `key -> Episode`, as `function_episodes` returns it; `meta` has "amplitude" [] and "phase" [].

    Raises:
      ValueError: if a range is not two ascending, finite numbers.

    Source: Finn, Abbeel & Levine, ICML 2017, Sec. 5.1, https://arxiv.org/abs/1703.03400

    >>> episode = sinusoids(num_shots=5)(jax.random.key(0))
    >>> episode.support["y"].shape, sorted(episode.meta)
    ((5, 1), ['amplitude', 'phase'])
    """
    _check_range("amplitude", amplitude, fixed=True)
    _check_range("phase", phase, fixed=True)

    def draw(key):
        keys = jax.random.split(key)
        return {"amplitude": _uniform(keys[0], *amplitude), "phase": _uniform(keys[1], *phase)}

    def function(c, x):
        return c["amplitude"] * jnp.sin(x - c["phase"])

    return function_episodes(draw, function, num_shots=num_shots, num_query=num_query, inputs=inputs, noise=noise)


def mixed_functions(*, num_shots: int = 10, num_query: int = 10, noise: float = 0.0) -> SampleEpisodeFn:
    """Makes a sampler of three families in equal shares, with x ~ U[−5, 5]. No single initialization suits all of them.

        0  sinusoid   A sin(x − φ)      A ~ U[0.1, 5], φ ~ U[0, π]
        1  line       a x + b           a, b ~ U[−3, 3]
        2  parabola   a (x − c)² + b    a ~ ±U[0.02, 0.15], b, c ~ U[−3, 3]

    Args:
      num_shots: support points.
      num_query: query points.
      noise: the standard deviation of the noise in the support set's y, as for `function_episodes`.

    Returns:
      `key -> Episode`, as `function_episodes` returns it. `meta` has "family" [] int32 and "coefficients" [3]. For the
      families above, the coefficients are A, φ, –; a, b, –; a, c, b.

    Raises:
      ValueError: if a range is not two ascending, finite numbers.

    Source: Vuorio et al., NeurIPS 2019, https://arxiv.org/abs/1910.13616. The ranges are from the authors' code
    (`ManyFunctionsMetaDataset` of https://github.com/vuoristo/MMAML-Regression). The shares are drawn, not fixed.
    """
    ranges = jnp.array(
        [
            [(0.1, 5.0), (0.0, math.pi), (0.0, 0.0)],
            [(-3.0, 3.0), (-3.0, 3.0), (0.0, 0.0)],
            [(0.02, 0.15), (-3.0, 3.0), (-3.0, 3.0)],
        ],
        jnp.float32,
    )

    def draw(key):
        family_key, sign_key, key = jax.random.split(key, 3)
        family = jax.random.randint(family_key, (), 0, 3, jnp.int32)
        low, high = ranges[family, :, 0], ranges[family, :, 1]
        c = low + (high - low) * jax.random.uniform(key, (3,), jnp.float32)
        sign = jnp.where((family == 2) & jax.random.bernoulli(sign_key), -1.0, 1.0).astype(jnp.float32)
        return {"family": family, "coefficients": c.at[0].multiply(sign)}

    def function(c, x):
        a, b, d = c["coefficients"]
        return jnp.where(
            c["family"] == 0, a * jnp.sin(x - b), jnp.where(c["family"] == 1, a * x + b, a * (x - b) ** 2 + d)
        )

    return function_episodes(draw, function, num_shots=num_shots, num_query=num_query, noise=noise)
