"""What the searches of `nas` reject: options, labels, recipes, trained networks, and records of cells."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_search import NET, ONE, OPS, TASK, search_of

from metaopt import base, hypergrad, inner, nas, predictors, spaces, training
from metaopt.nas.search import _cell_encoder, _score_prior, _score_weights
from metaopt.nas.search._cell_searcher import cell_searcher

KEY = jax.random.key(0)
CELL = nas.complete_cell(2, ("none", "skip_connect", "mlp"))
THREE = nas.Network({"cell": CELL}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2)
GRAPHS = nas.nas_bench_101_space(3, channels=2, cells_per_stack=1, num_stacks=1, num_vertices=4)
SIZES = nas.mlp_space(2, widths=(2, 4), depths=(1, 2))

# ---- Searches -------------------------------------------------------------------------------------------------------

SCORES = [nas.ArchitectureScores("found", 0.30, (0.5, 0.6), 0.45), nas.ArchitectureScores("a", 0.20, (0.4,))]
ALPHA_OF_ONE = {"cell": jnp.zeros((1, 3))}
PAIR = nas.complete_cell(2, ("skip_connect", "linear"), num_inputs=2)
SPACE = nas.Network({"cell": PAIR}, (nas.Layer("linear", 3), nas.Layer("cell", 3), nas.Layer("cell", 4, 2)), 3)
EDGES = {"cell": ((0, 2, "linear"), (1, 2, "skip_connect"), (1, 3, "linear"), (2, 3, "linear"))}
RECIPE = nas.discrete(SPACE, EDGES)
ONE_EDGE = nas.Network({"cell": nas.complete_cell(1, ("linear",))}, (nas.Layer("cell", 2),), 3)
WITHOUT_SKIP = NET._replace(cells={"cell": nas.complete_cell(2, ("none", "smooth"), preprocess=False)})
WITH_RELU = NET._replace(layers=(*NET.layers, nas.Layer("norm_relu", 4)))
ROWS, LABELS, TEXTS = np.ones((12, 6, 2)), np.arange(12, dtype=np.int32) % 3, np.array([*"abababab"])
BATCH = {"x": np.random.default_rng(0).normal(size=(6, 3)), "y": np.array([0, 1, 1, 0, 1, 0])}


def shifted(rows, shift):
    """Rows whose labels are no classes."""
    return {**rows, "y": rows["y"] + shift}


def searched(search, train=TASK.train, valid=TASK.valid, **options):
    learner, alpha = training.learner(search.estimator, optax.sgd(0.1)), jax.eval_shape(search.hyperparams, KEY)
    alpha = jax.tree.map(lambda x: np.zeros(x.shape), alpha)
    options = {"hyperparams": alpha, "num_steps": 1, "key": KEY, **options}
    training.fit(learner, lambda key: base.Task(train, valid), **options)


def searched_by_batches(**changes):
    """With batches of 4 rows, whose shapes no message should name."""
    outer_batch = lambda key, task: inner.minibatch(4)(key, 0, task.valid)
    parts = {part: {**getattr(TASK, part), **change} for part, change in changes.items()}
    searched(search_of(nas.darts, network=ONE, sampler=inner.minibatch(4), outer_batch=outer_batch), **parts)


def estimate_of_tuples():
    """Inputs and labels that are not in a dict."""
    search, rows = search_of(nas.darts, network=ONE, order="first"), tuple(TASK.train.values())
    task = base.Task(rows, rows)
    estimate = lambda key: search.estimator.estimate(ALPHA_OF_ONE, task, search.estimator.init(key, ALPHA_OF_ONE, task))
    return jax.eval_shape(estimate, KEY)


def retraining(network=RECIPE, **options):
    return nas.retraining(network, (6, 2), ops=nas.BLOCKS, **{"num_steps": 1, **options})


def trained_on_rows(x, y):
    return nas.train_loop(retraining(auxiliary=0.0, batch_size=4).loop, {"x": x, "y": y}, num_steps=1, key=KEY)


def alpha_of_another(space, ask):
    search = nas.architecture_search(
        ONE, (3,), lambda problem: hypergrad.unrolled(problem, num_steps=1), ops=OPS, keep=None
    )
    meta = nas.meta_architecture_search(search, predictors.mlp(space, 2, num_hidden=2))
    task = base.Task(TASK.train, TASK.valid, np.zeros(2))
    ask = {"alpha": meta.alpha, "genotype": meta.genotype, "init": functools.partial(meta.estimator.init, KEY)}[ask]
    return jax.eval_shape(lambda learned: ask(learned, task), jax.eval_shape(meta.hyperparams, KEY))


def score_with_mask(name, mask):
    supernet = nas.supernet(WITH_RELU, (3,), ops=OPS, single_path=True)
    weights = nas.one_hot(WITH_RELU, {"cell": ((0, 1, "smooth"), (1, 2, "skip_connect"))})
    score = lambda params: nas.SCORES[name](supernet, params, weights, {**BATCH, "mask": mask})
    return jax.eval_shape(score, jax.eval_shape(supernet.init, KEY))


def nwot_without_relus():
    plain = nas.supernet(nas.Network({}, (nas.Layer("smooth", 4),), 2), (3,), ops=OPS)
    return nas.SCORES["nwot"](plain, jax.eval_shape(plain.init, KEY), None, BATCH)


SEARCHES = [
    (
        lambda: search_of(nas.darts, difference="backward"),
        "`difference` must be one of central, forward; got 'backward'",
    ),
    *(
        (
            lambda relaxation=relaxation: search_of(nas.darts, relaxation=relaxation, single_path=True),
            "gives weight to several ops of an edge of 'cell'",
        )
        for relaxation in (None, nas.sigmoid(), nas.auxiliary_skip(nas.gumbel_softmax(1.0, hard=True), 1.0))
    ),
    (lambda: nas.darts_plus(ONE, (3,), ops=OPS, every=0), "`every` must be at least 1; got 0"),
    (lambda: nas.darts_plus(ONE, (3,), ops=OPS, every=1, start=0), "`start` must be at least 1; got 0"),
    (
        lambda: nas.darts_plus(WITHOUT_SKIP, (3,), ops=OPS, every=1),
        "No edge of the network has 'skip_connect'",
    ),
    (lambda: nas.pc_darts(SIZES, (3,), ops={}), "`partial` must be 1 for a network of sizes.*got 4"),
    (
        lambda: nas.darts(GRAPHS, (8, 8, 1), ops=nas.NAS_BENCH_101_OPS, keep=2),
        "`keep` must be left out for NAS-Bench-101's space",
    ),
    *(
        (lambda alpha=alpha, read=read: getattr(search_of(nas.darts), read)(alpha), message)
        for alpha, message in [
            ({"normal": jnp.zeros((3, 3))}, r"each kind of cell .* \['cell'\]; got the kinds \['normal'\]"),
            ({"cell": jnp.zeros((3, 3)), "reduce": jnp.zeros((3, 3))}, r"got the kinds \['cell', 'reduce'\]"),
            (jnp.zeros((3, 3)), "each kind of cell .*; got Array"),
        ]
        for read in ("weights", "genotype")
    ),
    *(
        (
            lambda space=space, ask=ask: alpha_of_another(space, ask),
            r"with the leaves and shapes of the search.*\['cell'\].*\(1, 3\).*it returned .*" + leaves,
        )
        for space, leaves in [
            ({"other": spaces.real(shape=(1, 3))}, r"\['other'\]"),
            ({"cell": spaces.real(shape=(2, 3))}, r"\(2, 3\)"),
        ]
        for ask in ("alpha", "genotype", "init")
    ),
    # Labels that are no classes, where they are known.
    *(
        (
            lambda part=part, shift=shift, make=make: searched(make(), **{part: shifted(TASK.train, shift)}),
            rf"labels `task\.{part}\['y'\]` .* 2 outputs .* in 0\.\.1; got labels from {shift} to {1 + shift}",
        )
        for shift in (1, -1)
        for part in ("train", "valid")
        for make in (
            lambda: search_of(nas.darts, network=ONE),
            lambda: search_of(nas.robust_darts, network=ONE, every=1),
            # A rule whose own `init` does not draw θ_0.
            lambda: nas.architecture_search(
                ONE, (3,), lambda problem: hypergrad.unrolled(problem, num_steps=1), ops=OPS
            ),
        )
    ),
    (
        lambda: searched(search_of(nas.darts, network=ONE), shifted(TASK.train, 1), num_steps=2, steps_per_call=2),
        r"outside.*: subtract the smallest label, or use `np\.unique\(labels, return_inverse=True\)",
    ),
    *(
        (lambda shift=shift, call=call: call(shifted(TASK.train, shift)), "subtract the smallest label")
        for shift in (1, -1)
        for call in (
            lambda rows: nas.single_path_one_shot(ONE, (3,), ops=OPS, num_steps=1).train(KEY, rows),
            lambda rows: nas.single_path_one_shot(ONE, (3,), ops=OPS, num_steps=1).score(
                None, {"cell": ((0, 1, "smooth"),)}, rows
            ),
            lambda rows: nas.training_free_scores(ONE, (3,), ops=OPS)(KEY, {"cell": ((0, 1, "smooth"),)}, rows),
        )
    ),
    *(
        (
            lambda convert=convert: trained_on_rows(convert(ROWS), convert(LABELS + 1)),
            r"labels `data\['y'\]` .*must be in 0\.\.2; got labels from 1 to 3",
        )
        for convert in (jnp.asarray, np.asarray)
    ),
    (estimate_of_tuples, 'must be a dict with the inputs as "x".*got tuple'),
    # Labels that are text.
    *(
        (
            lambda texts=texts: searched(search_of(nas.darts, network=ONE), valid={**TASK.valid, "y": texts}),
            r"`tasks\.valid\['y'\]` must have numbers; got .*`names, y = np\.unique\(labels, return_inverse=True\)`",
        )
        for texts in (TEXTS, TEXTS.astype(object))
    ),
    (lambda: trained_on_rows(ROWS, np.array([*"abc"])[LABELS]), r"`tasks\['data'\]\['y'\]` must have numbers; got <U1"),
    # The shapes of the caller's arrays, not of a batch.
    *(
        (
            lambda part=part, num=num: searched_by_batches(**{part: {"x": np.ones((num, 2))}}),
            rf"`task\.{part}\['x'\]` must have the shape \(N, 3\); got \({num}, 2\)",
        )
        for part, num in (("train", 9), ("valid", 8))
    ),
    (
        lambda: searched_by_batches(train={"y": TASK.train["y"][:, None]}),
        r"labels `task\.train\['y'\]` .*must have the shape \(9,\).*got \(9, 1\)",
    ),
    (
        lambda: trained_on_rows(ROWS[0], LABELS),
        r"`data\['x'\]` must have the shape \(N, 6, 2\); got .*`data\['x'\]\[None\]`",
    ),
    (lambda: trained_on_rows(ROWS[..., :1], LABELS), r"`data\['x'\]` must have the shape .*; got \(12, 6, 1\)"),
    # Training from scratch, and the report.
    (lambda: retraining(clip=0.0), "`clip` must be positive; got 0.0"),
    (lambda: retraining(rate=-0.1), "`rate` must be positive; got -0.1"),
    (lambda: retraining(drop_path=1.0), "`drop_path` must be a probability below 1; got 1.0"),
    (lambda: retraining(SPACE), "one op on every edge"),
    (
        lambda: retraining(ONE_EDGE, auxiliary=0.0),
        "'cell' has only one, but `drop_path` is 0.2. Pass `drop_path=0`",
    ),
    (lambda: retraining(RECIPE._replace(layers=RECIPE.layers[:2])), "Pass `auxiliary=0`"),
    *(
        (
            lambda change=change, others=others: nas.search_report([SCORES[0]._replace(**change), *others]),
            r"in \[0, 1\], as `TrainedNetwork.accuracy`; .* of 'found'. Divide percentages by 100",
        )
        for change in ({"inherited": 30.0}, {"mixed": 1.1}, {"retrained": (0.5, 60.0)}, {"retrained": (-0.1,)})
        for others in ([], SCORES[1:])
    ),
    # Training-free scores.
    *(
        (lambda name=name, mask=mask: score_with_mask(name, mask), r'"mask" must be \[N\] = \(6,\).*got shape')
        for name in ("jacob_cov", "nwot", "grad_norm", "snip")
        for mask in (np.ones((6, 1)), np.ones(5), np.ones(()))
    ),
    *(
        (
            lambda name=name: score_with_mask(name, np.ones((6, 3))),
            r"needs a mask of rows, \[N\] = \(6,\).*got shape \(6, 3\)",
        )
        for name in ("jacob_cov", "nwot")
    ),
    (nwot_without_relus, "this network has no ReLU"),
    (
        lambda: nas.gradient_features(nas.supernet(NET, (3,), ops=OPS, single_path=True), KEY, BATCH),
        "`supernet` runs only one op per edge",
    ),
]

# ---- Trained networks -----------------------------------------------------------------------------------------------

SMALL = nas.Network({}, (nas.Layer("linear", 4), nas.Layer("norm_relu", 4)), 2)
X = np.random.default_rng(0).normal(size=(40, 3))


@functools.cache
def small():
    """A network of random weights, and the same as a predictor."""
    supernet = nas.supernet(SMALL, (3,), ops=nas.BLOCKS)
    params = supernet.init(KEY)
    return supernet, params, nas.trained_network(supernet, params, {"x": X})


def trained(data: Any, **options):
    return nas.trained_network(*small()[:2], data, **options)


def trained_with(op, **options):
    """With another op instead of a normalization and a ReLU."""
    supernet = nas.supernet(SMALL, (3,), ops={**nas.BLOCKS, "norm_relu": nas.Op(lambda *_: (), op)})
    return nas.trained_network(supernet, small()[1], {"x": X}, **options)


def looped(params, x, *_):
    return jax.lax.while_loop(lambda carry: carry[0] < 1, lambda c: (c[0] + 1, nas.normalized(c[1])), (0, x))[1]


def trained_mixture():
    path = nas.supernet(THREE, (3,), ops=nas.BLOCKS, single_path=True)
    return nas.trained_network(path, path.init(KEY), {"x": X}, weights={"cell": np.full((3, 3), 1 / 3)})


def accuracy(**changes):
    x = np.arange(8.0)[:, None]
    outputs = lambda x: np.stack([3.5 - np.asarray(x)[:, 0], np.asarray(x)[:, 0] - 3.5], 1)
    above = nas.TrainedNetwork(small()[0], None, None, [], 1.0, outputs)
    return above.accuracy({"x": x, "y": CLASSES} | changes)


CLASSES = (np.arange(8) > 3).astype(np.int32)
PREDICTORS = [
    (lambda: trained(X), 'must be a dict with the inputs as "x"'),
    (lambda: trained({"x": X[:1]}), "at least two real rows; got 1"),
    (lambda: trained({"x": X}, num_rows=1), "got 40 and `num_rows=1`"),
    (trained_mixture, "Pass one-hot weights"),
    (lambda: trained_with(looped), "inside of 'while'"),
    # A prediction would depend on the other rows.
    (
        lambda: trained_with(lambda params, x, channels, stride: x - x.mean(0, keepdims=True)),
        "still depend on the other rows of the batch, because one of your own ops",
    ),
    (
        lambda: small()[2].predict(X[0]),
        r"`x` must have the shape \(N, 3\); got \(3,\)\. For one input, use `x\[None\]`",
    ),
    (lambda: small()[2].predict(np.ones((300, 2))), r"`x` must have the shape \(N, 3\); got \(300, 2\)"),
    (lambda: trained({"x": np.ones((2_000, 2))}), r"`data\['x'\]` must have the shape \(N, 3\); got \(2000, 2\)"),
    (lambda: small()[2].predict(X * np.nan), "The outputs of 40 of 40 rows are NaN"),
    (
        lambda: small()[0].apply(small()[1], None, X, statistics=small()[2].statistics[:1]),
        "each of the 2 normalizations",
    ),
    (
        lambda: small()[0].statistics(small()[1], None, X[:1]),
        "one row, and an op normalizes it without positions",
    ),
    *(
        (lambda changes=changes: accuracy(**changes), message)
        for changes, message in [
            ({"y": CLASSES[:, None]}, r'The labels "y" must have the shape \(8,\), .*got \(8, 1\)'),
            ({"y": np.eye(2, dtype=int)[CLASSES]}, r"must have the shape \(8,\).*got \(8, 2\)"),
            ({"y": np.array(["a", "b"])[CLASSES]}, r"must be integers.*got <U1"),
            ({"y": CLASSES + 5.0}, "must be integers.*got float64"),
            ({"y": CLASSES + 1}, r"must be in 0\.\.1.*got labels from 1 to 2, 4 of 8 outside"),
            ({"y": CLASSES[:6]}, r'"x" and "y" must have the same number of rows; got 8 and 6'),
            ({"class_mask": np.array([1, 0, 1])}, r'"class_mask" must be \[C\] = \(2,\).*got shape \(3,\)'),
            ({"mask": np.ones((8, 1))}, r'"mask" must be \[N\] = \(8,\)'),
            ({"x": X[:0], "y": CLASSES[:0]}, '"x" must have at least one row'),
            ({"mask": np.zeros(8)}, "leave no real row"),
            ({"x": np.ones((8, 3)), "mask": np.ones((8, 3))}, r'"mask" must be \[N\] = \(8,\).*got shape \(8, 3\)'),
        ]
    ),
    (lambda: small()[2].accuracy((X, CLASSES)), 'must be a dict with the inputs as "x".*got tuple'),
]

# ---- Searchers learned from records ---------------------------------------------------------------------------------

CELLS = [dict(zip(("e0", "e1", "e2"), ops, strict=True)) for ops in itertools.product(("none", "a", "b"), repeat=3)]
DIAMOND = nas.Graph(
    ((0, 1, 1, 0, 1), (0, 0, 0, 1, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1), (0,) * 5), ("input", *"aba", "output")
)
OPS_OF_DIAMOND = ("input", "a", "b", "output")
TRIAL = base.Record("", {"op": 1}, 1.0)


def cell_graph(cell):
    return nas.edge_graph([(0, 1, cell["e0"]), (1, 2, cell["e1"]), (0, 2, cell["e2"])], output=(2,))


def records(cells=CELLS, **fields):
    each = [base.Record("t", cell, float(i)) for i, cell in enumerate(cells)]
    return [record._replace(**fields) for record in each]


def learned(trials, **options):
    options = {"width": 8, "num_layers": 1, "num_members": 2, "num_steps": 0, **options}
    return nas.train_cell_searcher(trials, cell_graph, **options)


@functools.cache
def searcher_of_six():
    """Six candidates, of which the encoder knows nothing."""
    zeros, rng = np.zeros((1, 6, 2)), np.random.default_rng(0)
    features, spread = rng.normal(size=(6, 3)), 0.3 * rng.normal(size=(6, 2))
    prior = _score_prior.ScorePrior(features, np.arange(6.0), spread, np.full(3, 0.1), np.full(6, 0.2), 0.05)
    encoder = SimpleNamespace(coefficients=lambda meta_params, features: meta_params)
    cells = [{"op": i} for i in range(6)]
    return cell_searcher(zeros, encoder, zeros[:, 0], cells, ("a",), np.zeros(0), np.ones(0), prior, np.zeros(()))


def tell_searcher(trial):
    searcher = searcher_of_six().searcher()
    return searcher.tell(searcher.init(KEY, None), [trial])


def ask_searcher(name, trials):
    return getattr(searcher_of_six(), name)(trials=trials)


def encoded(graph):
    """By an encoder of cells of 6 vertices."""
    encoder, cells = _cell_encoder.cell_encoder(4, 6, width=8), _cell_encoder.cells([graph], OPS_OF_DIAMOND)
    return jax.eval_shape(lambda key: encoder.encode(encoder.init(key), cells), KEY)


FIELDS = [
    ({"status": "complete"}, "status must be one of .*; got 'complete'"),
    ({"fidelity": 12.0}, r"fidelity must lie in \(0, 1\]"),
    ({"outcome": None}, "outcome must be a number, or NaN if it is unknown; got None"),
    ({"task": 3}, "task must be a string"),
]
RECORDS = [
    (lambda: learned(records(), batch_size=0), "`batch_size` must be at least 1; got 0"),
    *(
        (lambda field=field: learned([*records(), records()[0]._replace(**field)]), rf"`records\[27\]`'s {message}")
        for field, message in FIELDS
    ),
    *(
        (
            lambda field=field: learned(records(), tests=[records()[0], records()[1]._replace(**field)]),
            rf"`tests\[1\]`'s {message}",
        )
        for field, message in FIELDS
    ),
    *(
        (
            lambda field=field, name=name: ask_searcher(name, [TRIAL, TRIAL._replace(**field)]),
            rf"`trials\[1\]`'s {message}",
        )
        for field, message in FIELDS
        for name in ("posterior", "predict", "suggest")
    ),
    *(
        (lambda field=field: tell_searcher(TRIAL._replace(**field)), rf"`records\[0\]`'s {message}")
        for field, message in FIELDS
    ),
    (lambda: learned([records()[0]._asdict()]), r"`records\[0\]` must be a `Record`; got dict"),
    (lambda: ask_searcher("predict", [TRIAL._asdict()]), r"`trials\[0\]` must be a `Record`; got dict"),
    *(
        (
            lambda name=name, op=op: ask_searcher(name, [base.Record("", {"op": op}, 1.0)]),
            "A trial must be one of the candidates",
        )
        for name in ("posterior", "predict", "suggest")
        for op in (8, [0])
    ),
    (lambda: learned([base.Record("t", CELLS[0], 1.0, fidelity=0.5)]), "it has none"),
    (lambda: learned(records(), candidates=[]), "it is empty"),
    (
        lambda: learned(records(), features={"other": [1.0]}),
        "has none of the records' tasks, 't'; its keys are 'other'",
    ),
    (
        lambda: learned(records(outcome=1.0)),
        "the same outcome for all trials, so no configuration is known to be better",
    ),
    (lambda: learned(records(), tests=records(outcome=1.0)), "`tests` must contain a task with trials of different"),
    *(
        (
            lambda tests=tests: learned(records(CELLS[9:]), tests=tests),
            "on the same task in both. The tasks of `tests` are .*, those of .* 't'[.]$",
        )
        for tests in (records(task="other"), records(CELLS[:9]))
    ),
    (lambda: encoded(nas.Graph(((0, 1), (1, 0)), ("input", "output"))), "cycle"),
    (lambda: encoded(DIAMOND), "cells of 6 vertices; got 5"),
    (
        lambda: _score_weights.choose_weights(_score_weights.HeldOut(*(np.zeros((4, 1)) for _ in range(5)))),
        "at least 2 tasks; got 1",
    ),
]


@pytest.mark.parametrize(("call", "message"), [*SEARCHES, *PREDICTORS, *RECORDS])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sampler_and_an_augmentation_may_cut_rows():
    rows = {"x": np.ones((12, 8, 2)), "y": LABELS}
    rows["y"] = LABELS[:, None]
    cut = lambda key, step, data: {"x": data["x"][:, :6], "y": data["y"][:, 0]}
    outer_batch = lambda key, task: cut(key, 0, task.valid)
    search = nas.darts(SPACE, (6, 2), ops=nas.BLOCKS, order="first", sampler=cut, outer_batch=outer_batch)
    recipe = retraining(augment=(lambda key, x: x[:, :6],))
    jax.eval_shape(lambda: search.estimator.init(KEY, search.hyperparams(KEY), base.Task(rows, rows)))
    jax.eval_shape(lambda: recipe.loop.init(KEY, search.hyperparams(KEY), {**rows, "y": LABELS}))


def test_a_rule_over_tasks_has_a_batch_of_tasks():
    rule = lambda problem: hypergrad.over_tasks(hypergrad.unrolled(problem, num_steps=1))
    search = nas.architecture_search(SPACE, (6, 2), rule, ops=nas.BLOCKS)
    cut = lambda key, step, data: {**data, "x": data["x"][:, :6]}
    cutting = nas.architecture_search(SPACE, (6, 2), rule, ops=nas.BLOCKS, sampler=cut)
    rows = {"x": np.stack([ROWS] * 2), "y": np.stack([LABELS] * 2)}
    long = {**rows, "x": np.ones((2, 12, 8, 2))}
    jax.eval_shape(lambda: cutting.estimator.init(KEY, cutting.hyperparams(KEY), base.Task(long, rows)))

    def start(rows):
        alpha, task = search.hyperparams(KEY), base.Task(rows, rows)
        jax.eval_shape(lambda: search.estimator.estimate(alpha, task, search.estimator.init(KEY, alpha, task)))

    start(rows)
    with pytest.raises(ValueError, match=r"`data\['x'\]` must have the shape \(N, 6, 2\); got \(12, 6, 1\)"):
        start({**rows, "x": rows["x"][..., :1]})
    with pytest.raises(ValueError, match=r"`task.train\['y'\]` of a network with 3 outputs"):
        start({**rows, "y": rows["y"] + 1})


def test_warns_of_images_that_are_not_scaled():
    search = nas.darts(SPACE, (6, 2), ops=nas.BLOCKS, order="first")
    for largest, convert in ((1, np.asarray), (255, np.asarray), (255, jnp.asarray)):
        rows = {"x": convert(largest * ROWS), "y": LABELS}
        for init, data in ((search.estimator.init, base.Task(rows, rows)), (retraining().loop.init, rows)):
            start = lambda init=init, data=data: init(KEY, search.hyperparams(KEY), data)
            if largest > 1:
                with pytest.warns(UserWarning, match=r"\['x'\]` has values from 255 to 255.* Divide by"):
                    jax.eval_shape(start)
            else:
                jax.eval_shape(start)
