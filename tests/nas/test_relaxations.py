"""Relaxations: exact one-hots, honest samples, the papers' formulas; curvature against a dense eigensolver."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import nas
from metaopt.nas import _relaxations

KEY = jax.random.key(0)
CELL = nas.complete_cell(2, ("none", "skip_connect", "mlp"))  # edges 0→1, 0→2, 1→2
ALPHA, DOWN = np.random.default_rng(0).normal(size=(2, 3, 3))


def test_the_plain_ones():
    np.testing.assert_allclose(nas.softmax()(ALPHA, CELL, KEY, 0), np.exp(ALPHA) / np.exp(ALPHA).sum(-1, keepdims=True))
    np.testing.assert_allclose(nas.sigmoid()(ALPHA, CELL, KEY, 0), 1 / (1 + np.exp(-ALPHA)))
    cold = nas.softmax(optax.linear_schedule(1.0, 0.1, 10))(ALPHA, CELL, KEY, jnp.array(10))
    np.testing.assert_allclose(cold, nas.softmax()(10 * ALPHA, CELL, KEY, 0), rtol=1e-6)


def test_hard_gumbel_samples_the_softmax_and_has_the_soft_ones_gradient():
    hard, soft = (nas.gumbel_softmax(0.7, hard=h) for h in (True, False))
    draws = np.asarray(jax.jit(jax.vmap(lambda key: hard(ALPHA, CELL, key, 0)))(jax.random.split(KEY, 4_000)))
    assert set(np.unique(draws)) == {0.0, 1.0} and (draws.sum(-1) == 1).all()
    p = np.asarray(jax.nn.softmax(ALPHA, -1))
    assert (abs(draws.mean(0) - p) < 3.5 * np.sqrt(p * (1 - p) / 4_000)).all()

    @jax.jit
    def both():
        w, pullback = jax.vjp(lambda a: soft(a, CELL, KEY, 0), ALPHA)
        _, hard_pullback = jax.vjp(lambda a: hard(a, CELL, KEY, 0), ALPHA)
        expected = jax.nn.softmax((ALPHA + jax.random.gumbel(KEY, (3, 3))) / 0.7, -1)
        return w, expected, pullback(DOWN)[0], hard_pullback(DOWN)[0]

    w, expected, soft_grad, hard_grad = both()
    np.testing.assert_allclose(w, expected, rtol=1e-9)
    np.testing.assert_allclose(hard_grad, soft_grad, rtol=1e-12)
    assert abs(soft_grad).max() > 0.01


def test_uniform_paths():
    draw = jax.jit(jax.vmap(lambda key: nas.uniform_path()(ALPHA, CELL, key, 0)))
    draws = np.asarray(draw(jax.random.split(KEY, 3_000)))
    assert (draws.sum(-1) == 1).all() and (abs(draws.mean(0) - 1 / 3) < 3.5 * np.sqrt(2 / 9 / 3_000)).all()


def test_edges_share_a_node():
    relax = _relaxations.edge_normalized(nas.softmax())
    beta = jnp.array([5.0, 1.0, 2.0])
    w = relax({"ops": ALPHA, "edges": beta}, CELL, KEY, 0)
    shares = np.array([1.0, 1 / (1 + np.e), np.e / (1 + np.e)])
    np.testing.assert_allclose(w, nas.softmax()(ALPHA, CELL, KEY, 0) * shares[:, None])
    np.testing.assert_allclose(jax.grad(lambda b: relax({"ops": ALPHA, "edges": b}, CELL, KEY, 0)[2].sum())(beta)[0], 0)


def test_an_auxiliary_skip_fades():
    relax = nas.auxiliary_skip(nas.softmax(), optax.linear_schedule(1.0, 0.0, 10))
    plain = nas.softmax()(ALPHA, CELL, KEY, 0)
    for step, beta in [(0, 1.0), (5, 0.5), (10, 0.0)]:
        np.testing.assert_allclose(
            relax(ALPHA, CELL, KEY, jnp.array(step)) - plain, beta * np.eye(3)[[1, 1, 1]], atol=1e-7
        )


def test_genotypes_are_read_without_noise_and_without_auxiliary_paths():
    plain = nas.softmax()
    assert (
        _relaxations.decoding(plain) is plain
        and _relaxations.decoding(nas.sigmoid())(ALPHA, CELL, KEY, 0).shape == ALPHA.shape
    )
    for relaxation in (nas.gumbel_softmax(5.0, hard=True), nas.auxiliary_skip(plain, lambda step: 1.0)):
        decoded = _relaxations.decoding(relaxation)(ALPHA, CELL, KEY, 0)
        np.testing.assert_allclose(decoded, plain(ALPHA, CELL, KEY, 0))
        assert abs(relaxation(ALPHA, CELL, KEY, 0) - decoded).max() > 1e-3
    # What wraps another one reads by what that one reads by.
    both = _relaxations.edge_normalized(nas.auxiliary_skip(nas.gumbel_softmax(1.0, hard=False), 1.0))
    alpha = {"ops": ALPHA, "edges": jnp.zeros(len(ALPHA))}
    decoded, expected = (
        r(alpha, CELL, KEY, 0) for r in (_relaxations.decoding(both), _relaxations.edge_normalized(plain))
    )
    np.testing.assert_allclose(decoded, expected)
    assert _relaxations.decoding(_relaxations.edge_normalized(plain)) is not plain


def test_beta_decay():
    alpha = {"normal": ALPHA, "reduce": 2 * ALPHA[:2]}
    expected = np.concatenate([np.log(np.exp(a).sum(-1)) for a in alpha.values()]).mean()
    np.testing.assert_allclose(_relaxations.beta_decay(alpha), expected)
    np.testing.assert_allclose(
        _relaxations.beta_decay({"cell": {"ops": ALPHA, "edges": jnp.zeros(3)}}), _relaxations.beta_decay([ALPHA])
    )


def test_discretized_weights_are_constants_and_checked_in_a_derivative():
    net = nas.Network({"cell": nas.complete_cell(1, ("smooth", "skip_connect"))}, (nas.Layer("cell", 3),), 2)
    chosen = lambda w: (_relaxations.discretized(net, {"cell": w})["cell"] * jnp.array([[2.0, 5.0]])).sum()
    value, slope = jax.value_and_grad(chosen)(jnp.array([[0.3, 0.7]]))
    assert value == 5 and (slope == 0).all()
    with pytest.raises(ValueError, match="cell"):
        jax.grad(chosen)(jnp.array([[jnp.nan, 0.7]]))


def test_kinds_have_keys_of_their_own():
    net = nas.darts_space(num_cells=3, num_nodes=1, primitives=("none", "skip_connect"))
    alpha = nas.init_alpha(KEY, net)
    assert {k: a.shape for k, a in alpha.items()} == {"normal": (2, 2), "reduce": (2, 2)}
    w = nas.mixing_weights(nas.gumbel_softmax(1.0, hard=False), net, jax.tree.map(jnp.zeros_like, alpha), KEY)
    assert abs(w["normal"] - w["reduce"]).min() > 1e-6
    assert (nas.init_alpha(KEY, net, scale=0.0)["normal"] == 0).all()


def bowl(seed, sign):
    matrix = np.random.default_rng(seed).normal(size=(12, 12))
    matrix = sign * (matrix @ matrix.T) - 0.5 * np.eye(12)

    def loss(point):
        x = jnp.concatenate([point["a"].ravel(), point["b"]])
        return x @ matrix @ x / 2 + (x**4).sum() / 12

    return loss, matrix


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.once
def test_the_dominant_eigenvalue(sign):
    loss, matrix = bowl(0, sign)
    point = {"a": jnp.linspace(0, 0.2, 8).reshape(2, 4), "b": jnp.full(4, -0.1)}
    x = np.concatenate([point["a"].ravel(), point["b"]])
    exact = np.linalg.eigvalsh(matrix + np.diag(x**2))
    exact = exact[abs(exact).argmax()]
    solve = jax.jit(
        lambda point, num: _relaxations.dominant_eigenvalue(loss, point, KEY, num_steps=num), static_argnums=1
    )
    np.testing.assert_allclose(solve(point, 8), exact, rtol=0.01)
    np.testing.assert_allclose(solve(point, 40), exact, rtol=1e-9)  # all of its dimensions


@pytest.mark.once
def test_the_dominant_eigenvalue_where_the_space_is_exhausted():
    point = jnp.zeros(6)
    eigenvalue = _relaxations.dominant_eigenvalue(lambda x: 3 * (x[:2] ** 2).sum() - x[3] ** 2, point, KEY)
    np.testing.assert_allclose(eigenvalue, 6.0, rtol=1e-9)
    assert _relaxations.dominant_eigenvalue(lambda x: x.sum() ** 2 * 0, point, KEY) == 0
