"""Retraining: the recipe by hand, dropped edges, going on after a stop; the report's figures from their definitions."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from metaopt import inner, nas, training
from metaopt.nas import _augmentation

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
CELL = nas.complete_cell(2, ("skip_connect", "linear"), num_inputs=2)
SPACE = nas.Network({"cell": CELL}, (nas.Layer("linear", 3), nas.Layer("cell", 3), nas.Layer("cell", 4, 2)), 3)
GENOTYPE = {"cell": ((0, 2, "linear"), (1, 2, "skip_connect"), (1, 3, "linear"), (2, 3, "linear"))}
NET = nas.discrete(SPACE, GENOTYPE)
X = jnp.asarray(RNG.normal(size=(12, 6, 2)))
DATA = {"x": X, "y": jnp.asarray(RNG.integers(3, size=12), jnp.int32)}


def recipe(**options):
    options = {"num_steps": 8, "batch_size": 12, "auxiliary_widths": (3, 4), **options}
    return nas.retraining(NET, (6, 2), ops=nas.BLOCKS, **options)


def cross_entropy(outputs, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


# ---- Dropped edges --------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_dropped_edges_by_hand():
    """A cell of three edges: each example drops the first one at random. Edges that pass their input on are kept."""
    edges = [nas.Edge(0, i + 1, (op,)) for i, op in enumerate(("linear", "skip_connect", "identity"))]
    cell = nas.Cell(1, tuple(edges), (1, 2, 3), preprocess=False)
    net = nas.Network({"cell": cell}, (nas.Layer("linear", 4), *[nas.Layer("cell", 4)]), 12)
    supernet = nas.supernet(net, (3,), ops=nas.NAS_BENCH_MACRO_OPS)
    x = jax.random.normal(KEY, (400, 3))

    @jax.jit
    def run(key, rate):
        params = supernet.init(KEY)
        params["head"] = {"w": jnp.eye(12), "b": jnp.zeros(12)}
        plain, dropped = supernet.apply(params, None, x), supernet.apply(params, None, x, (key, rate))
        features = supernet.features(params, None, x, (key, rate))
        return plain, dropped, features, supernet.head(params, features[-1])

    plain, dropped, features, repeated = jax.tree.map(np.asarray, run(KEY, 0.25))
    np.testing.assert_array_equal(dropped[:, 4:], plain[:, 4:])  # what passes its input on is never dropped
    kept = dropped[:, :4] / plain[:, :4]
    np.testing.assert_allclose(kept, np.broadcast_to(kept[:, :1], kept.shape), rtol=1e-9)
    assert set(np.round(kept[:, 0], 9)) == {0.0, np.round(4 / 3, 9)} and 0.68 < (kept[:, 0] > 0).mean() < 0.82
    np.testing.assert_array_equal(run(KEY, 0.0)[1], plain)
    assert (run(jax.random.key(1), 0.25)[1] != dropped).any()
    assert [f.shape for f in features] == [(400, 4), (400, 12)]
    np.testing.assert_array_equal(repeated, dropped)


@pytest.mark.once
def test_every_edge_and_layer_has_its_own_draws():
    cell = nas.Cell(1, (nas.Edge(0, 1, ("linear",)), nas.Edge(0, 2, ("linear",))), (1, 2))
    layers = (nas.Layer("linear", 4), *[nas.Layer("cell", 4)] * 3)  # the last two are one scan
    supernet = nas.supernet(nas.Network({"cell": cell}, layers, 4), (3,), ops=nas.BLOCKS)
    x = jax.random.normal(KEY, (40, 3))
    features = jax.jit(lambda: supernet.features(supernet.init(KEY), None, x, (KEY, 0.5)))()
    zeros = [np.asarray((part == 0).all(-1)) for layer in features[1:] for part in jnp.split(layer, 2, axis=1)]
    assert all(0.2 < mask.mean() < 0.8 for mask in zeros) and len({mask.tobytes() for mask in zeros}) == 6


# ---- The recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_by_hand():
    setup = recipe(auxiliary=0.3, drop_path=0.0, clip=0.05, decay=0.1, rate=0.2)
    supernet = nas.supernet(NET, (6, 2), ops=nas.BLOCKS)
    head = _augmentation.auxiliary_head(3, widths=(3, 4))

    @jax.jit
    def run():
        state = setup.loop.init(KEY, None, DATA)
        states = [state := inner.step(setup.loop, state, None, DATA) for _ in range(2)]
        return setup.loop.init(KEY, None, DATA).params, [s.params for s in states], states[0]

    start, after, first = run()

    def loss(params):
        features = supernet.features(params["network"], None, X)
        beside = head.apply(params["auxiliary"], features[2], 3, 1)
        return cross_entropy(supernet.apply(params["network"], None, X), DATA["y"]) + 0.3 * cross_entropy(
            beside, DATA["y"]
        )

    params, trace = start, jax.tree.map(jnp.zeros_like, start)
    gradient = jax.jit(jax.grad(loss))
    for t in range(2):
        grads = gradient(params)
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 0.05  # it is clipped
        direction = jax.tree.map(lambda g, p, n=norm: g * 0.05 / n + 0.1 * p, grads, params)
        trace = jax.tree.map(lambda d, m: d + 0.9 * m, direction, trace)
        rate = 0.2 * (1 + np.cos(np.pi * t / 8)) / 2
        params = jax.tree.map(lambda p, m, r=rate: p - r * m, params, trace)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), after[t], params)
    # By statistics of all training rows, these rows are normalized as one batch.
    outputs = setup.finish(first, DATA).outputs(X)
    np.testing.assert_allclose(outputs, supernet.apply(after[0]["network"], None, X), rtol=1e-9)


@pytest.mark.once
def test_the_probability_of_dropping_rises_and_augmentations_follow_one_another():
    shift = lambda key, x: x + 1.0
    setup = recipe(auxiliary=0.0, drop_path=0.5, augment=(shift, lambda key, x: 2 * x))
    supernet = nas.supernet(NET, (6, 2), ops=nas.BLOCKS)

    @jax.jit
    def losses(step):
        state = setup.loop.init(KEY, None, DATA)._replace(step=step)
        context = setup.loop.context(state)
        loss = setup.loop.loss(state.params, None, DATA, context)[0]
        drop = (jax.random.split(context.key, 3)[0], 0.5 * step / 8)
        outputs = supernet.apply(state.params["network"], None, 2 * (X + 1), drop)
        return loss, cross_entropy(outputs, DATA["y"])

    pairs = [losses(jnp.array(step)) for step in (0, 4, 7)]
    for loss, expected in pairs:
        np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert len({float(loss) for loss, _ in pairs}) == 3


@pytest.mark.once
def test_training_continues_only_with_the_same_data_and_network(tmp_path):
    """Of other data of the same shapes, another λ, or another network, it says so; and the data are not kept."""
    rows = {"x": jnp.arange(20_000.0), "y": jnp.ones(20_000)}
    loss = lambda params, scale, batch, context: ((params * batch["x"] - scale * batch["y"]) ** 2).mean()
    loop = inner.loop(loss, lambda _: optax.sgd(1e-9), init=lambda *_: (jnp.zeros(()), None), with_context=True)

    def run(data=rows, num_steps=2, scale=1.0, settings=("a", 1)):
        named = {"progress": False, "checkpoint_dir": tmp_path, "settings": {"net": settings}}
        return nas.train_loop(loop, data, num_steps=num_steps, key=KEY, hyperparams=scale, **named)

    run()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 100_000  # the rows are 320 kB
    assert len(run(num_steps=3)[1]) == 3
    for other, message in [
        (
            {"data": {**rows, "y": 2 * rows["y"]}},
            r"`tasks\['data'\]\['y'\]`, drawn for step 0, is .* in the checkpoint",
        ),
        ({"scale": 2.0}, r"`tasks\['hyperparams'\]`, drawn for step 0"),
        ({"settings": ("b", 1)}, r"`settings\['net'\]\[0\]` is a in the checkpoint and b in this run"),
    ]:
        with pytest.raises(ValueError, match=f"holds the checkpoint .* of another run: {message}"):
            run(**other, num_steps=4)


def test_ten_losses_that_are_not_finite_end_the_training():
    loss = lambda params, scale, batch, context: ((params - 1) ** 4 * batch["x"]).mean()
    loop = inner.loop(loss, lambda _: optax.sgd(10.0), init=lambda *_: (jnp.zeros(()), None), with_context=True)
    rows, losses = {"x": jnp.ones(3), "y": jnp.arange(3)}, []
    run = lambda num_steps, stop: nas.train_loop(
        loop, rows, num_steps=num_steps, key=KEY, progress=False, callback=lambda step, metrics: stop(step, metrics)
    )
    message = r'last 10 training losses, up to step .*the classes 0\.\.C-1 .*"y" has integers from 0 to 2.*: subtract'
    with pytest.raises(FloatingPointError, match=message):
        run(100, lambda step, metrics: losses.append(metrics["loss"]))
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    assert 0 < first < 10 and len(losses) == first + 10 and not np.isfinite(losses[first:]).any()
    # Training does not begin again in silence: so far it is that of one program.
    state, _ = run(100, lambda step, metrics: step == first + 9)
    assert int(state.step) == first + 9 and not np.isfinite(state.params)
    assert not np.isfinite(inner.run(loop, first + 9)(jax.random.split(KEY)[0], None, rows).params)


def test_nine_losses_that_are_not_finite_do_not_end_the_training(caplog):
    def loss(params, scale, batch, context):
        return (params - 1) ** 2 + jnp.where(context.step % 12 < 9, jnp.nan, 0.0)

    loop = inner.loop(loss, lambda _: optax.sgd(0.1), init=lambda *_: (jnp.zeros(()), None), with_context=True)
    state, losses = nas.train_loop(loop, {"x": jnp.ones(3)}, num_steps=24, key=KEY, progress=False)
    assert np.isnan(losses).sum() == 18
    np.testing.assert_allclose(state.params, 1 - 0.8**24, rtol=1e-12)
    assert not caplog.text  # plain training has no λ that could stay the same


@pytest.mark.parametrize("kept", [False, True])
def test_a_signal_leaves_nothing_that_looks_trained(kept, tmp_path):
    loss = lambda params, scale, batch, context: ((params - batch["x"]) ** 2).mean()
    loop = inner.loop(loss, lambda _: optax.sgd(0.1), init=lambda *_: (jnp.zeros(()), None), with_context=True)
    options = {"num_steps": 6, "key": KEY, "progress": False, "checkpoint_dir": tmp_path if kept else None}
    run = lambda **more: nas.train_loop(loop, {"x": jnp.ones(3)}, **options, **more)
    interrupt = lambda step, metrics: step == 2 and signal.raise_signal(signal.SIGTERM)  # SIGINT may be ignored
    with pytest.raises(SystemExit, match="after 2 of 6 steps.* continues" if kept else "not in a checkpoint") as error:
        run(callback=interrupt)
    assert error.value.code == 143
    np.testing.assert_allclose(error.value.result.state.estimator_state.params, 1 - 0.8**2, rtol=1e-12)
    if kept:
        steps = []
        state, losses = run(callback=lambda step, metrics: steps.append(step))
        assert steps == [3, 4, 5, 6]
        np.testing.assert_allclose(losses, 0.8 ** (2 * np.arange(6)), rtol=1e-12)
        np.testing.assert_allclose(state.params, 1 - 0.8**6, rtol=1e-12)


def test_a_log_of_the_training_has_only_the_loss(tmp_path):
    loss = lambda params, scale, batch, context: ((params - batch["x"]) ** 2).mean()
    loop = inner.loop(loss, lambda _: optax.sgd(0.1), init=lambda *_: (jnp.zeros(()), None), with_context=True)
    log_to = training.log_to(tmp_path / "run.jsonl")
    nas.train_loop(loop, {"x": jnp.ones(3)}, num_steps=2, key=KEY, progress=False, callback=log_to)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["step", "loss"]] * 2
    assert [line["loss"] for line in lines] == pytest.approx([1.0, 0.8**2])


@pytest.mark.slow
def test_training_that_is_stopped_goes_on_to_the_same_numbers(tmp_path):
    setup = recipe(batch_size=5)
    run = lambda **options: nas.train_loop(setup.loop, DATA, num_steps=6, key=KEY, progress=False, **options)
    whole, losses = run()
    stop = lambda step, metrics: step == 4
    _, first = run(checkpoint_dir=tmp_path, checkpoint_every=2, callback=stop)
    assert len(first) == 4 and int(whole.step) == 6
    state, continued_losses = run(checkpoint_dir=tmp_path, checkpoint_every=2)
    np.testing.assert_array_equal(continued_losses, losses)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    # In one program, the same to rounding.
    other = jax.jit(lambda: inner.run(setup.loop, 6)(jax.random.split(KEY)[0], None, DATA))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), other.params, whole.params)


@pytest.mark.once
@pytest.mark.parametrize("auxiliary", [0.4, 0.0])
def test_padding_trains_nothing(auxiliary):
    setup = recipe(auxiliary=auxiliary, drop_path=0.0)
    params = jax.jit(lambda: setup.loop.params(setup.loop.init(KEY, None, DATA)))()
    mask = np.ones(12)
    mask[[2, 11]] = 0
    padded = {"x": jnp.where(mask[:, None, None] > 0, X, 40.0), "y": DATA["y"], "mask": mask}
    context = inner.run(setup.loop, 0)(KEY, None, DATA)
    loss = jax.jit(lambda params, batch: setup.loop.loss(params, None, batch, setup.loop.context(context))[0])
    alone = loss(params, jax.tree.map(lambda a: a[mask > 0], DATA))
    np.testing.assert_allclose(loss(params, padded), alone, rtol=1e-9)
    state = context._replace(params=params)
    outputs = setup.finish(state, padded).outputs(X)
    np.testing.assert_allclose(outputs, setup.finish(state, {"x": X[mask > 0]}).outputs(X), rtol=1e-9)


@pytest.mark.slow
def test_training_is_by_real_rows_wherever_they_stand():
    setup = recipe(batch_size=4, auxiliary=0.0)
    place = np.array([1, 4, 5, 8, 10, 11])
    scattered = {
        "x": jnp.full(X.shape, 40.0).at[place].set(X[:6]),
        "y": jnp.zeros(12, int).at[place].set(DATA["y"][:6]),
        "mask": jnp.zeros(12).at[place].set(1.0),
    }
    run = jax.jit(lambda data: inner.run(setup.loop, 3)(KEY, None, data).params)
    first = {"x": X, "y": DATA["y"], "mask": jnp.arange(12) < 6.0}
    for a, b in zip(*(jax.tree.leaves(run(data)) for data in (first, scattered)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_images_of_integers_train_as_the_same_floats():
    image = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 1)).astype(np.uint8)
    space = nas.nas_bench_201_space(3, channels=2, cells_per_stage=1)
    net = nas.discrete(
        space._replace(layers=space.layers[:2]),
        {"cell": ((0, 1, "skip_connect"), (0, 3, "nor_conv_3x3"), (1, 3, "skip_connect"))},
    )
    shift = lambda key, x: x + 200  # of uint8 this would be modulo 256
    options = {"num_steps": 2, "batch_size": 4, "auxiliary": 0.0, "augment": (shift,), "drop_path": 0.5}
    setup = nas.retraining(net, (6, 5, 1), ops=nas.NAS_BENCH_201_OPS, **options)
    run = jax.jit(lambda data: inner.run(setup.loop, 2)(KEY, None, data))
    integers, floats = (run({"x": x, "y": DATA["y"]}) for x in (image, image.astype(float)))
    for a, b in zip(jax.tree.leaves(integers.params), jax.tree.leaves(floats.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    whole, of_floats = (setup.finish(integers, {"x": x}).outputs(x) for x in (image, image.astype(float)))
    np.testing.assert_allclose(whole, of_floats, rtol=1e-9)


ONE_EDGE = nas.Network({"cell": nas.complete_cell(1, ("linear",))}, (nas.Layer("cell", 2),), 3)


# ---- The report -----------------------------------------------------------------------------------------------------

SCORES = [
    nas.ArchitectureScores("found", 0.30, (0.5, 0.6), 0.45),
    nas.ArchitectureScores("a", 0.20, (0.4,)),
    nas.ArchitectureScores("b", 0.25, (0.45,)),
    nas.ArchitectureScores("c", 0.10, (0.48,)),
    nas.ArchitectureScores("d", 0.15, (0.30,)),
    nas.ArchitectureScores("e", 0.12, (0.35,)),
]


def test_the_report():
    report = nas.search_report(SCORES)
    rho = spearmanr([s.inherited for s in SCORES], [np.mean(s.retrained) for s in SCORES]).statistic
    assert report.correlation == pytest.approx(rho) and 0 < rho < 1
    # Published: for n = 6 and this correlation, on Fisher's scale, ± 1.96 √((1 + ρ²/2)/3).
    half = [(np.arctanh(end) - np.arctanh(rho)) / (1.96 * np.sqrt((1 + rho**2 / 2) / 3)) for end in report.interval]
    np.testing.assert_allclose(half, [-1, 1], rtol=1e-9)
    assert report.discretization_gap == pytest.approx(0.15)
    assert report.evaluation_gap == pytest.approx(np.mean([0.25, 0.2, 0.2, 0.38, 0.15, 0.23]))
    lines = report.text.splitlines()
    assert lines[2] == "| found | 45.0 | 30.0 | 55.0 ± 7.1 | 15.0 | 2 |" and lines[3] == "| a |  | 20.0 | 40.0 |  | 1 |"
    assert "Discretization gap (mixed − discrete, of the searched ones): 15.0 points" in lines[-1]
    few = nas.search_report(SCORES[:3])
    assert np.isnan(few.interval).all() and few.correlation == 1.0
    same = nas.search_report([s._replace(inherited=0.1) for s in SCORES])
    assert np.isnan(same.correlation) and "6 architectures: undefined, one side is constant." in same.text


def test_a_report_of_one_architecture_has_gaps_and_no_ranks():
    one = nas.search_report(SCORES[:1])
    assert np.isnan(one.correlation) and np.isnan(one.interval).all()
    assert one.discretization_gap == pytest.approx(0.15) and one.evaluation_gap == pytest.approx(0.25)
    conclusion = one.text.splitlines()[-1]
    assert "over 1 architecture: undefined, one architecture has no ranks. Discretization gap" in conclusion
    assert "15.0 points; retrained − discrete, of all: 25.0 points" in conclusion


def test_accuracies_may_be_above_one_by_rounding_and_missing_for_a_mixture():
    nas.search_report([SCORES[0]._replace(inherited=1 + 1e-7, mixed=float("nan"), retrained=(0.0,))])
