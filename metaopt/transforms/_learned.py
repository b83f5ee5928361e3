"""A learned optimizer: a small network maps features of a parameter to its next step.

Every entry i of every tensor has features x_i: the gradient, its momenta and second moments, Adafactor's factors, and
the parameter. Each is divided by its root mean square over the tensor. With features τ of the time,

    (d_i, m_i) = MLP(x_i, τ; φ),    u_i = −0.01 d_i exp(0.1 m_i).

One network serves all entries of all tensors. Its weights φ are meta-parameters. They can be trained like any λ
(`inner.problem` over many tasks, any estimator), and trained weights are shipped with metaopt.
"""

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import _files, _saving, base

# The initial decays of meta-training, one for each accumulator of a kind.
_DECAYS = {"momentum": (0.9, 0.99, 0.999), "second": (0.999,), "factored": (0.9, 0.99, 0.999)}
_TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
_ENDS = (16, 22, 28)  # cumulative numbers of features of an entry, its row and its column; the time follows
_STEP, _EXPONENT = 0.01, 0.1
_EPS = 1e-10  # added to squares: gradients far below its root count as zero


class LearnedWeights(NamedTuple):
    """Meta-parameters φ of a learned optimizer, at least float32 in a file.

    Attributes:
      decays: offsets of the decays' logits, {"momentum": [3], "second": [1], "factored": [3]}.
      layers: the layers of the network, {"0": {"w", "b"}, ...}.
    """

    decays: base.PyTree
    layers: base.PyTree


class LearnedState(NamedTuple):
    """State of `learned`. It is at least float32 for any dtype of the parameters.

    Attributes:
      count: [] int32, the number of steps taken.
      momenta: [3, ...] for each parameter [...].
      second: [1, ...] for each parameter, of squared gradients.
      factored: for each parameter [..., R, ..., C, ...] the means of its squared gradients over one of its two largest
        axes, {"row": [3, ..., R, ..., 1, ...], "column": [3, ..., 1, ..., C, ...]}; for a vector [C], both are [3, C].
    """

    count: jax.Array
    momenta: base.PyTree
    second: base.PyTree
    factored: base.PyTree


def init_learned(key: jax.Array, *, hidden: Sequence[int] = (4, 4)) -> LearnedWeights:
    """Initializes meta-parameters φ of a learned optimizer.

    The network's last layer starts small. So an untrained optimizer takes steps of about 1e-3 in a random direction.

    Args:
      key: consumed.
      hidden: the number of units of each hidden layer, at least one layer.

    Returns:
      φ, float32.

    >>> import jax, optax
    >>> from metaopt import transforms
    >>> weights = transforms.init_learned(jax.random.key(0))
    >>> print(optax.tree.size(weights))
    197
    """
    sizes = (_ENDS[-1] + len(_TIMES), *hidden, 2)
    layers = {}
    for i, (k, fan_in, fan_out) in enumerate(
        zip(jax.random.split(key, len(sizes) - 1), sizes, sizes[1:], strict=False)
    ):
        scale = (0.1 if i == len(hidden) else 1.0) / fan_in**0.5
        w = scale * jax.random.truncated_normal(k, -2.0, 2.0, (fan_in, fan_out), jnp.float32)
        layers[str(i)] = {"w": w, "b": jnp.zeros(fan_out, jnp.float32)}
    decays = {name: jnp.zeros(len(values), jnp.float32) for name, values in _DECAYS.items()}
    return LearnedWeights(decays, layers)


def _axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two largest axes of a tensor, in their order; among equal ones the last. None for vectors."""
    if len(shape) < 2:
        return None
    row, column = sorted(np.argsort(shape, kind="stable")[-2:].tolist())
    return row, column


def _mean(x: jax.Array, axis: Any) -> jax.Array:
    return x.sum(axis, keepdims=True) / max(1, np.prod([x.shape[a] for a in np.atleast_1d(axis)]))


def _inverse_root(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(x + _EPS)


def _column(decays: jax.Array, x: jax.Array) -> jax.Array:
    """Decays [K], shaped to multiply [K, ...]."""
    return decays.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _average(decays: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """β m + (1 − β) g for K decays; `new` is [1, ...]."""
    beta = _column(decays, old)
    return beta * old + (1 - beta) * new


def _features(g, p, m, v, row, column, axes) -> tuple[jax.Array, ...]:
    """[16, ...] for each entry, and [6, ...] for each row and each column, where the other axis has size 1."""
    inverse = _inverse_root(v)
    # Adafactor's estimate of the second moment is row ⊗ column / mean(row); for a vector it is the moment itself.
    if axes is None:
        scale = _inverse_root(row)
    else:
        # A product of roots, since the root of the product may over- or underflow.
        scale = _inverse_root(row) * _inverse_root(column) * jnp.sqrt(_mean(row, 1 + axes[0]) + _EPS)
    entries = jnp.concatenate([g, p, m, v, m * inverse, inverse, g * scale, m * scale])
    return entries, *(jnp.concatenate([x, _inverse_root(x)]) for x in (row, column))


def _network(layers: Mapping[str, Any], features: Sequence[jax.Array], count: jax.Array) -> jax.Array:
    """[2, ...] for each entry, from its features, the features of its row and its column, and the time."""
    dtype = features[0].dtype
    time = jnp.tanh(count.astype(dtype) / jnp.asarray(_TIMES, dtype) - 1)
    first, *rest = [jax.tree.map(lambda x: x.astype(dtype), layers[str(i)]) for i in range(len(layers))]
    # Features that many entries share (time, rows, columns) are multiplied only once. Dividing the weights by the
    # root mean squares has the same effect as dividing the features.
    *parts, time_weights = jnp.split(first["w"], _ENDS)
    x = (first["b"] + time @ time_weights).reshape(-1, *[1] * (features[0].ndim - 1))
    for w, feature in zip(parts, features, strict=True):
        inverse = _inverse_root(_mean(feature * feature, tuple(range(1, feature.ndim))))
        x = x + jnp.tensordot(w * inverse.reshape(-1, 1), feature, ((0,), (0,)))
    for layer in rest:
        x = jnp.tensordot(layer["w"], jax.nn.relu(x), ((0,), (0,))) + layer["b"].reshape(-1, *[1] * (x.ndim - 1))
    return x


def learned(weights: LearnedWeights | str = "small") -> optax.GradientTransformation:
    """Makes an optax transform of a learned optimizer with meta-parameters φ.

    In a chain it replaces Adam and its learning rate: `optax.chain(optax.clip_by_global_norm(1.0), learned())`.
    `optax.scale(0.5)` after it halves its steps. It needs the parameters (`update(grads, state, params)`). It uses the
    same network for all tensors. It ignores the order of the entries of a vector, and the orders of the rows and of the
    columns of a matrix. The features are divided by their root mean squares over the tensor, so steps do not depend on
    the scale of the loss. Nor do they depend on the scale of the parameters: a step is not relative to the size of its
    parameter.

    It is differentiable in φ and through the training, in both modes, with finite derivatives at zero gradients. It
    takes 4 times the memory of the parameters, in float32 at least, and 3 rows and columns for each matrix. A step
    costs about 150 multiplications for each parameter.

    The weights of `learned()` were meta-trained by `experiments/optimizers/learned_optimizer.py` on trainings of 200
    and 1,000 steps of small networks. The objective was the loss on held-out rows, and the estimator ES-Single
    (`hypergrad.es_single`). The script's `--rule` also offers persistent evolution strategies and gradients of
    truncated windows. The following results are on small images and on families of tables that were not in the
    meta-training. The numbers are validation losses relative to Adam with a rate tuned on each task. They are compared
    with Adam at one rate, chosen over the tasks of the meta-training. After 200 steps, `learned()` is about as good
    (1.14 against 1.12; Adam at 1e-3: 2.16), and needs no rate. After 1,000 steps it is worse (1.41 against 1.23; Adam
    at 1e-3: 1.27). Its training losses are much higher than those of a tuned optimizer, because its steps do not become
    small enough.

    Args:
      weights: φ, from `init_learned` or `metaopt.load`; or the name of shipped weights: "small".

    Returns:
      A transform.

    Raises:
      ValueError: if `weights` is not φ; in `update`, if the parameters are missing.
      FileNotFoundError: if `weights` is a name that metaopt has no weights for.

    Source: small_fc_lopt of Metz et al., CoLLAs 2022, https://arxiv.org/abs/2203.11860; with other constants, and
      decays parametrized by their logits.

    >>> import jax, optax
    >>> from metaopt import transforms
    >>> optimizer = transforms.learned()
    >>> params = jax.numpy.array([1.0, -2.0])
    >>> state = optimizer.init(params)
    >>> for _ in range(100):
    ...     updates, state = optimizer.update(2 * params, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(bool(abs(params).max() < 1.0))
    True
    """
    if isinstance(weights, str):
        with importlib.resources.as_file(
            importlib.resources.files("metaopt.transforms") / f"learned_{weights}.npz"
        ) as file:
            weights = _saving.load(file)
    fault = _fault(weights)
    if fault:
        raise ValueError(f"`weights` must be meta-parameters as `init_learned` gives them: {fault}.")
    # A tree of NumPy arrays is accepted too.
    learned_weights: Any = jax.tree.map(jnp.asarray, weights)
    decays = {
        name: jax.nn.sigmoid(jnp.asarray(np.log(np.divide(values, np.subtract(1, values))), offset.dtype) + offset)
        for (name, values), offset in ((item, learned_weights.decays[item[0]]) for item in _DECAYS.items())
    }

    def init(params):
        def zeros(num):
            return jax.tree.map(lambda p: jnp.zeros((num, *jnp.shape(p)), _wide(p)), params)

        return LearnedState(jnp.zeros([], jnp.int32), zeros(3), zeros(1), jax.tree.map(_initial_factors, params))

    def step(count, g, p, m, v, factored):
        shape, dtype = jnp.shape(p), m.dtype
        if not np.prod(shape):
            return jnp.zeros_like(p), m, v, factored
        g, p_ = (jnp.asarray(x, dtype)[None] for x in (g, p))
        square, axes = g * g, _axes(shape)
        m, v = _average(decays["momentum"], m, g), _average(decays["second"], v, square)
        new_moments = {"row": square, "column": square}
        if axes is not None:
            new_moments = {"row": _mean(square, 1 + axes[1]), "column": _mean(square, 1 + axes[0])}
        factored = {name: _average(decays["factored"], factored[name], new) for name, new in new_moments.items()}
        features = _features(g, p_, m, v, **factored, axes=axes)
        direction, magnitude = _network(learned_weights.layers, features, count)
        u = -_STEP * direction * jnp.exp(_EXPONENT * magnitude)
        return u.astype(jnp.result_type(p)), m, v, factored

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("`learned` needs the parameters: call `update(grads, state, params)`.")
        leaves, structure = jax.tree.flatten(updates)
        # State trees have more structure below each parameter.
        columns = [structure.flatten_up_to(tree) for tree in (params, state.momenta, state.second, state.factored)]
        steps = [step(state.count, *args) for args in zip(leaves, *columns, strict=True)]
        new, momenta, second, factored = (structure.unflatten([s[i] for s in steps]) for i in range(4))
        return new, LearnedState(jnp.asarray(optax.safe_increment(state.count)), momenta, second, factored)

    return optax.GradientTransformation(init, update)


def _wide(x: jax.Array) -> np.dtype:
    """The dtype of the state of a parameter: at least float32."""
    return jnp.result_type(x, jnp.float32)


def _initial_factors(p: jax.Array) -> dict[str, jax.Array]:
    """Zeros for the factors of the second moment: for each decay, a mean over the columns, and one over the rows."""
    shape, axes = jnp.shape(p), _axes(jnp.shape(p))
    mean_axes = (axes or (-1, -1))[::-1]  # the row's factor is a mean over the column axis, and conversely
    factor_shapes = [[1 if axes and i == axis else n for i, n in enumerate(shape)] for axis in mean_axes]
    zeros = [jnp.zeros((3, *factor_shape), _wide(p)) for factor_shape in factor_shapes]
    return dict(zip(("row", "column"), zeros, strict=True))


def _fault(weights: base.PyTree) -> str:
    """The reason why `weights` are not meta-parameters; empty if they are."""
    if not isinstance(weights, LearnedWeights):
        return f"they are `LearnedWeights`; got {jax.tree.structure(weights)}"
    try:
        *hidden, _ = [np.shape(weights.layers[str(i)]["b"])[0] for i in range(len(weights.layers))]
        template = jax.eval_shape(functools.partial(init_learned, hidden=hidden), jax.random.key(0))
    except (IndexError, KeyError, TypeError, ValueError):
        return 'their layers are a dict of "0", "1", ..., at least two of them, each a dict of "w" and "b"'
    if jax.tree.structure(weights) != jax.tree.structure(template):
        return f"their structure should be {jax.tree.structure(template)}; got {jax.tree.structure(weights)}"
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(template), strict=True
    ):
        dtype = (
            leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        )  # a file may hold dtypes that JAX does not have
        if np.shape(leaf) != wanted.shape or not jnp.issubdtype(dtype, jnp.floating):
            got = f"{dtype} of shape {np.shape(leaf)}"
            return f"{jax.tree_util.keystr(path)} should be floating-point of shape {wanted.shape}; got {got}"
    return ""


def _encode(weights: LearnedWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    fault = _fault(weights)
    if fault:
        raise ValueError(f"`weights` must be meta-parameters as `init_learned` gives them: {fault}.")
    arrays = {
        "/".join(key.key for key in keys): np.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(weights._asdict())
    }
    return {}, arrays


def _decode(header: dict[str, Any], file: _files.Npz) -> LearnedWeights:
    fault = _fault(_tree({name: jax.ShapeDtypeStruct(*spec) for name, spec in file.specs.items()}))
    if fault:
        raise ValueError(f"it has no weights of a learned optimizer: {fault}")
    return _tree(file.floats({name: spec.shape for name, spec in file.specs.items()}))


def _tree(leaves: Mapping[str, Any]) -> LearnedWeights:
    """Builds the weights from leaves with names such as "layers/0/w"."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/", 3)  # at most one level deeper than φ
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return LearnedWeights(**tree)


_saving.register(_saving.Kind("learned", LearnedWeights, _encode, _decode))
