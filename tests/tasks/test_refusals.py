"""What `tasks` rejects: sources and parts of them, episodes, records of users, tables, data frames, and features."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import base, tasks
from metaopt.tasks import _hierarchy

KEY = jax.random.key(0)
X = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
Y = np.array(["b", "a", "c", "a", "b", "b"])
SOURCE = tasks.from_arrays(np.arange(20.0).reshape(10, 2), np.arange(10) % 2, name="s")
LETTERS = tasks.from_arrays(np.arange(60), np.repeat(np.arange(12), 5), name="letters", group=np.tile(np.arange(5), 12))
DIGITS = tasks.from_arrays(np.arange(40), np.arange(40) % 2, name="digits")
TABLE = tasks.Table("t", "t", np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2, np.zeros(3, bool))
TIME = np.array([3.0, 1.0, 1.0, 2.0, 0.0, 5.0, 2.0, 4.0])
RECORDS = tasks.from_user_records(np.stack([TIME, TIME**2], 1), 10 * TIME, list("babbabab"), time=TIME)
DATES = np.array(["2026-01-02", "NaT", "2026-01-01"], "datetime64[D]")


def source(sizes, name="a", **options):
    """Classes of these sizes, "c0", "c1", ..."""
    y = np.repeat(np.arange(len(sizes)), sizes)
    names = [f"c{k}" for k in range(len(sizes))]
    return tasks.from_arrays(np.arange(len(y), dtype=np.float32)[:, None], y, name=name, class_names=names, **options)


FLAT = source(np.round(np.geomspace(4, 400, 30)).astype(int), "flat")
FEW = source([20, 20, 3, 20, 20, 20])
SUPERCLASS = np.repeat(np.arange(5), [5, 6, 20, 33, 60])
DRAWN = source([20] * 124, "superclasses", group=np.tile(np.arange(20), 124), superclass=SUPERCLASS)
DAG = source([9, 30, 150] * 20, "ontology", ontology={"root": [f"c{k}" for k in range(60)]})
# Six speakers who said each word a different number of times.
SAID = np.random.default_rng(3).integers(2, 12, size=(7, 6))
SPOKEN = source(SAID.sum(1), "spoken", group=np.concatenate([np.repeat(np.arange(6), row) for row in SAID]))
FEATURES = [{"even": float(v), "heavy": float(10.0**v)} for v in range(11)]
SCALING = tasks.fit_scaling(FEATURES)


def records_of(**changes):
    records = {"x": [[0, 1], [np.nan, 1], [0, 1]], "y": [0.5, 1.0, 2.0], "user": [7, 7, 9]}
    return tasks.from_user_records(**records | {"time": np.where(np.isnat(DATES), DATES[0], DATES)} | changes)


def tasks_of_types(*dtypes):
    return [base.Task({"x": np.ones((2, 1), dtype)}, {"x": np.ones((2, 1), dtype)}) for dtype in dtypes]


def nodes(ontology, *names, least=1):
    return _hierarchy.ontology_nodes(ontology, names or ("a", "b"), min_leaves=least)


def functions(**options):
    return tasks.function_episodes(lambda key: jnp.zeros(()), lambda c, x: x + c, **options)


def mixed(rows=400):
    """A number, a number with gaps, categories of 2, 4 and 30 levels, and a constant."""
    rng = np.random.default_rng(0)
    y = rng.choice(3, rows, p=(0.6, 0.3, 0.1)).astype(np.int32)
    skewed = np.where(rng.random(rows) < 0.1, np.nan, np.exp(rng.normal(size=rows) + y))
    columns = [rng.normal(size=rows), skewed, *(rng.integers(0, k, rows) for k in (2, 4, 30)), np.full(rows, 7.0)]
    categorical = np.array([False, False, True, True, True, False])
    return tasks.Table("mixed", "mixed", np.stack(columns, 1).astype(np.float32), y, categorical)


def with_value(table, value, dtype, column=1):
    x = table.x.astype(dtype)
    x[5, column] = value
    return table._replace(x=x)


def merged_codes(table):
    codes = np.where(np.arange(400) % 2, 2**24, 2**24 + 1)
    return table._replace(x=np.where(np.arange(6) == 3, codes[:, None], table.x.astype(np.float64)))


def prepared(rows=90):
    x, y = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32), (np.arange(rows) % 3).astype(np.int32)
    return tasks.prepare(tasks.Table("t0", "t0", x, y, np.zeros(4, bool)))


def padded(one, num_features=7, **options):
    return tasks.to_task(one, rows=(80, 40), num_features=num_features, num_classes=5, **options)


def padded_gap():
    one = prepared()
    one.train.x[2, 1] = np.nan
    return padded(one)


def padded_without(part):
    one = prepared()
    rows = getattr(one, part)
    return padded(one._replace(**{part: type(rows)(*(leaf[:0] for leaf in rows))}))


def stacked(*changes, **options):
    return tasks.stack([padded(prepared(), **change) for change in changes], **options)


def stacked_infinity():
    one, other = padded(prepared()), padded(prepared())
    other.valid["x"][0, 0] = np.inf
    return tasks.stack([one, other])


def stacked_in_float32():
    large = padded(prepared())._replace(features=np.array([1e300]))
    tasks.stack([large, large])
    with jax.enable_x64(False):
        return tasks.stack([large, large])


def from_arrays_in_float32():
    x = np.array([[1e300, 0.0], [0.0, 1.0]])
    tasks.from_arrays(x, [0, 1])
    with jax.enable_x64(False):
        return tasks.from_arrays(x, [0, 1])


def frame(**columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def state_with(field, value):
    state = tasks.fit_encoder({"a": ["u", "v"] * 2}).state()
    state[field] = [{**state["columns"][0], **value}] if field == "columns" else value
    return tasks.TableEncoder.from_state(state)


REFUSALS = [
    # Sources, and their parts.
    (lambda: tasks.from_arrays(X[:0], Y[:0]), "is empty"),
    (lambda: tasks.from_arrays(X, Y[:5]), r"`y` must have one entry for each of the 6 examples; got shape \(5,\)"),
    (lambda: tasks.from_arrays(X, Y, group=[1]), "`group` must have one entry"),
    (lambda: tasks.from_arrays(X, Y, class_names=["p", "q"]), "must be 3 different names"),
    (lambda: tasks.from_arrays(X, Y, class_names=["p", "q", "p"]), r"got 3 \(2 different\)"),
    (lambda: tasks.from_arrays(X, Y, superclass=[0]), "one entry for each of the 3 classes"),
    (lambda: tasks.from_arrays(X, np.arange(6) / 2), "must be classes.*; got 0.5 for example 1"),
    (lambda: tasks.from_arrays(X, [0, 1, 0, 1, 0, np.nan]), "got nan for example 5"),
    (lambda: tasks.from_arrays(X, ["a", "a", "b", np.nan, "b", "b"]), "got nan for example 3"),
    (lambda: tasks.from_arrays(X, jnp.array([0, 1, 0, 1, 0, 0.5], jnp.bfloat16)), "got 0.5 for example 5"),
    (
        lambda: tasks.from_arrays(jnp.array([jnp.inf, 1], jnp.bfloat16), [0, 1]),
        "`x` must be finite in bfloat16; got inf",
    ),
    (lambda: tasks.from_arrays(X, np.array(["a", None] * 3, object)), "got None for example 1"),
    (
        lambda: tasks.from_arrays([[0.0, 1.0], [np.nan, 2.0]], [0, 1]),
        r"`x` must be finite in float64; got nan at \[1, 0\]",
    ),
    (
        lambda: tasks.from_arrays(X, Y, group=[0, 1, 1, np.nan, 0, 1]),
        "`group` must not have missing values; entry 3 is nan",
    ),
    (lambda: tasks.from_arrays(X, Y, group=["a", None] * 3), "`group` must not have missing values; entry 1 is None"),
    (
        lambda: tasks.from_arrays(X, Y, superclass=[0, np.nan, 1]),
        "`superclass` must not have missing values; entry 1 is nan",
    ),
    (from_arrays_in_float32, r"finite in float32; got 1e\+300 at \[0, 0\]"),
    *(
        (lambda options=options: tasks.from_arrays(X, Y).keep(**options), message)
        for options, message in [
            ({"classes": ["z"]}, "has no class 'z'"),
            ({"min_examples": 4}, "is empty"),
            ({"rows": []}, "is empty"),
            ({"rows": slice(9, None)}, "is empty"),
            ({"rows": [-1]}, r"`rows` must be in 0..5; got -1..-1"),
            ({"rows": [0, 6]}, r"`rows` must be in 0..5; got 0..6"),
            ({"rows": np.ones(5, bool)}, r"must be \[M\] int, a mask \[6\] bool, or a slice; got bool of shape \(5,\)"),
            ({"rows": [0.0, 1.0]}, r"got float64 of shape \(2,\)"),
            ({"rows": 3}, r"of shape \(\)"),
        ]
    ),
    (lambda: tasks.split_classes(LETTERS, {"train": 10, "test": 3}), "has 12 classes; the parts ask for 13"),
    (lambda: tasks.split_classes(LETTERS, {"train": 0}), "at least 1"),
    (lambda: tasks.split_rows(LETTERS, {"train": 0.8, "test": 0.3}), "sum to at most 1"),
    (lambda: tasks.split_rows(LETTERS, {"train": 0.9, "test": 0.01}), "'test' .* has no example: its share"),
    (
        lambda: tasks.split_rows(tasks.from_arrays(range(12), [0] * 5 + [1] * 2 + [2] * 5), {"a": 0.25, "b": 0.25}),
        r"'b' of source 'arrays' has no example of 1 classes: '1' has 2 in all.*min_examples=4",
    ),
    (
        lambda: tasks.split_rows(
            tasks.from_arrays(range(8), [0, 1] * 3 + [2, 2], group=[0, 0, 1, 1, 2, 2, 0, 0]), {"a": 0.5, "b": 0.5}
        ),
        "has no example of 1 classes: '2' has 2 in all. The parts have different groups",
    ),
    (lambda: tasks.merge_splits(*[tasks.Split({"test": {"a": {}}})] * 2), "name the source 'a'"),
    (lambda: tasks.select([LETTERS], {"a": {"letters": {"classes": ["99"]}}}, "a"), "has no class '99'"),
    (
        lambda: tasks.select([DIGITS, DIGITS], {"a": {"digits": {}}}, "a"),
        "different names; got .'digits', 'digits'",
    ),
    (lambda: tasks.select({"b": DIGITS, "c": DIGITS}, {"a": {"digits": {}}}, "a"), "must have different names"),
    (
        lambda: tasks.select(
            [LETTERS], {"a": {"letters": {"classes": ["3"]}}, "b": {"letters": {"rows": [15, 2]}}}, "a"
        ),
        "'a' and 'b' share example 15",
    ),
    (lambda: tasks.split_classes(DIGITS, {"train": 1}, by_superclass=True), "has no superclasses"),
    *(
        (lambda split=split: tasks.select([DIGITS], split, "train"), "`split` is not a split")
        for split in ([1], {"train": [1]}, {"train": {"digits": [1]}})
    ),
    (lambda: nodes({"top": ["a"]}), "'b' is not in the ontology as a child"),
    (lambda: nodes({"top": ["a"], "a": ["b"]}), "'a' has children"),
    (lambda: nodes({"u": ["v", "a"], "v": ["u", "b"]}), "cycle through"),
    (lambda: nodes({"u": ["a", "b"]}, least=5), "No node of the ontology has 5 to 392 of the 2 classes"),
    # Episodes.
    (lambda: tasks.episodes([FLAT, FLAT]), "must have different names"),
    (lambda: tasks.episodes([FLAT, DAG._replace(x=DAG.x[:, :0])]), "one shape and type"),
    (lambda: tasks.episodes(SPOKEN, num_ways=8), "'spoken' has 7 classes, too few for 8 ways"),
    (lambda: tasks.episodes(FEW), r"1 classes of source 'a' have too few examples .* 'c2' has 3.*min_examples=16"),
    (lambda: tasks.episodes(DRAWN, num_shots=6), "classes of source 'superclasses' have too few examples"),
    (lambda: tasks.episodes(SPOKEN, num_ways=2, num_shots=9, num_query=9), "disjoint_groups=False"),
    (lambda: tasks.episodes(FLAT, num_query=1, within_superclass=True), "has no superclasses"),
    (lambda: tasks.episodes(DRAWN, num_ways=61, within_superclass=True), "No superclass .* has 61 classes"),
    (lambda: tasks.episodes(DRAWN, weights=[1, 2]), "`weights` must be one for each of the 1 sources, at least 0"),
    (lambda: tasks.meta_dataset_episodes(source([9, 9, 9])), "3 classes, too few for 5 ways"),
    (lambda: tasks.meta_dataset_episodes(source([9, 9, 9, 9, 9, 1])), "1 classes of source 'a' have too few"),
    (lambda: tasks.meta_dataset_episodes(DRAWN, min_ways=6), "1 superclasses .* fewer than 6 classes"),
    (lambda: tasks.meta_dataset_episodes(DAG, min_ways=61, max_ways=70), "60 classes, too few for 61 ways"),
    (lambda: tasks.meta_dataset_episodes(FLAT, max_support=40), "`max_support` must be at least 50; got 40"),
    (lambda: tasks.meta_dataset_episodes(FLAT, min_ways=1), "`min_ways` must be at least 2; got 1"),
    (lambda: tasks.meta_dataset_episodes(FLAT, min_ways=9, max_ways=8), "`max_ways` must be at least 9; got 8"),
    (lambda: tasks.meta_dataset_episodes(FLAT, max_query=0), "`max_query` must be at least 1; got 0"),
    (lambda: tasks.meta_dataset_episodes(FLAT, max_query=2.5), "`max_query` must be an integer of at least 1"),
    (lambda: tasks.meta_dataset_episodes(FLAT, max_support_per_class=0), "`max_support_per_class` must be at"),
    *(
        (
            lambda bad=bad: tasks.labelled_batches([DIGITS, DIGITS._replace(name="other")], 3, weights=bad),
            "`weights` must be one for each of the 2 sources, at least 0, and not all",
        )
        for bad in ([1.0, np.nan], [0, 0], [-1, 2], [1, np.inf])
    ),
    (lambda: functions(inputs=(1.0, 1.0)), r"`inputs` must be two finite numbers in ascending order; got \(1.0, 1.0\)"),
    (lambda: functions(inputs=(0.0, np.inf)), "`inputs` must be two finite"),
    *(  # JAX draws only the first number if it is above the second
        (
            lambda name=name, value=value: tasks.sinusoids(**{name: value}),
            rf"`{name}` must be two finite numbers in ascending order \(or two equal numbers\); got",
        )
        for name in ("amplitude", "phase")
        for value in [(5.0, 0.1), (np.nan, 1.0), (0.0, np.inf)]
    ),
    # Records of users.
    (lambda: tasks.from_user_records(np.ones(3), [1, 2, 3], [0, 0, 0]), r"must be \[records, columns\]"),
    (lambda: tasks.from_user_records(np.ones((3, 1)), [1, 2], [0, 0, 0]), "`y` must have one entry"),
    (lambda: tasks.from_user_records(np.ones((2, 1)), [-1, 1], [0, 0]), r"must be 0..C-1.*got \[-1, 1\]"),
    (lambda: tasks.from_user_records(np.ones((2, 1)), [0, 2], [0, 0]), r"must be 0..C-1.*got \[0, 2\]"),
    (lambda: tasks.from_user_records(np.ones((2, 1)), [0, 2**62], [0, 0]), r"must be 0..C-1.*got \[0, 46116860"),
    (lambda: tasks.from_user_records(np.ones((3, 1)), [1, 2, 3], [0, 0, 0], feature_names="ab"), "1 names; got 2"),
    (lambda: tasks.user_episodes(RECORDS, num_support=3), "User a has 3 records, but needs 3"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, order="past"), "must be one of 'time'"),
    (lambda: tasks.user_episodes(RECORDS._replace(time=None), num_support=1), '`order` must be "random"'),
    (lambda: tasks.user_episodes(RECORDS._replace(x=RECORDS.x * np.nan), num_support=1), "`table.standardized"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=[2]), r"integers in 0\.\.1, at least one; got \[2\]"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=[]), r"`users` must be indices .*; got \[\]"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=1), "`users` must be indices .*; got 1"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=np.array([False, True])), r"`np.flatnonzero\(mask\)`"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=[0, True]), r"got \[0, True\]"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=[1.7]), r"got \[1.7\]"),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=["1"]), r"got \['1'\].*`\[table.user_names.index"),
    *(
        (lambda user=user: tasks.user_episodes(RECORDS, num_support=1)(KEY, user), rf"integer in 0\.\.1; got {user}")
        for user in (2, -1, 99, True, 1.0)
    ),
    (lambda: tasks.user_episodes(RECORDS, num_support=1, users=[1])(KEY, 1), r"integer in 0\.\.0; got 1"),
    (
        lambda: tasks.from_user_records([["a"], ["b"]], [0.0, 1.0], [0, 0]),
        "`x` must be numbers; got <U1.*'b'.*text",
    ),
    (lambda: tasks.from_user_records(np.ones((2, 1)), ["a", "b"], [0, 0]), "`y` must be numbers.*np.unique"),
    (
        lambda: tasks.from_user_records(np.ones((2, 1)), [0.0, 1.0], [0, 0], time=["noon", "night"]),
        r"`time` must be numbers; got <U5, \['noon', 'night'\]: ISO 8601",
    ),
    (lambda: RECORDS.standardized(np.array([True, True])), "`fit_on` must be indices"),
    *(
        (lambda changes=changes: records_of(**changes), message)
        for changes, message in [
            ({"x": [[0, 1], [np.nan, 1], [0, np.inf]]}, "got inf in row 2, column '1', of user 9"),
            (
                {"x": [[0, 1], [1e300, 1], [0, 1]]},
                "`x` must be finite in float32, or NaN where missing; got inf in row 1",
            ),
            ({"y": [1.0, np.nan, 2.0]}, "`y` must be finite in float32; got nan in row 1, of user 7"),
            ({"time": [0, 1, np.nan]}, "`time` must be finite in float64; got nan in row 2, of user 9"),
            ({"time": DATES}, "`time` must be finite in float64; got nan in row 1, of user 7"),
            ({"user": [0, 1, np.nan]}, "row 2 has none"),
            ({"user": ["a", np.nan, "b"]}, "row 1 has none"),
            ({"user": ["a", "b", None]}, "row 2 has none"),
            (
                {"time": [datetime.datetime(2026, 1, day) if day else None for day in (1, 0, 2)]},
                "`time` must be finite",
            ),
        ]
    ),
    # Tables.
    *(
        (lambda change=change: tasks.prepare(change(mixed())), f"table mixed.*{message}")
        for change, message in [
            (lambda t: with_value(t, 1e300, np.float64), r"column 1 of `x` has 1e\+300 in row 5"),
            (
                lambda t: with_value(t, -np.inf, np.float32),
                "infinite values in float32: column 1 of `x` has -inf in row 5",
            ),
            (lambda t: t._replace(x=t.x + 1j), "`x` must be real numbers, NaN where missing; got complex64"),
            (lambda t: t._replace(x=t.x.astype(str)), "`x` must be real numbers, NaN where missing; got <U"),
            (lambda t: t._replace(x=t.x.astype(object)), "`x` must be real numbers, NaN where missing; got object"),
            (
                lambda t: t._replace(y=t.y.astype(np.int64) + 2**40),
                "`y` must be classes as integers from 0 on; got int64, such as .10995",
            ),
            (lambda t: t._replace(y=t.y.astype(complex)), "`y` must be classes as integers"),
            (
                lambda t: t._replace(x=t.x[:3], y=t.y[:3] * 0 + [0, 1, 2]),
                "`valid_fraction` 0.2 of 3 rows leaves no valid",
            ),
            (lambda t: t._replace(y=np.zeros_like(t.y)), "has fewer than 2 classes"),
            (lambda t: t._replace(x=t.x[:, 5:], categorical=t.categorical[5:]), "has no column that varies"),
            (lambda t: t._replace(x=np.where(t.x == 7, np.inf, t.x).astype(np.float32)), "has infinite values"),
        ]
    ),
    *(
        (lambda change=change: tasks.prepare(change(mixed())), message)
        for change, message in [
            (
                lambda t: t._replace(categorical=t.categorical[:2]),
                r"`x` must be \[rows, columns\].*got \(400, 6\), \(400,\) and \(2,\)",
            ),
            (
                lambda t: t._replace(y=np.full_like(t.y, -1)),
                r"`y` must be classes as integers from 0 on; got int32, such as \[-1",
            ),
            (merged_codes, "float32 merges 1 of the codes in the categorical column 3 of `x`. Number"),
        ]
    ),
    (lambda: tasks.prepare({"a": range(30)}, np.arange(29) % 2), "one label for each of the 30 rows; got 29"),
    (lambda: tasks.prepare({"a": range(30)}, "b"), "`column` .*'b'"),
    (lambda: tasks.prepare(mixed(), valid_fraction=0.5, test_fraction=0.5), "must leave rows to train on; got 0.5 and"),
    (lambda: tasks.prepare(mixed(), scaling="none"), "`scaling` must be one of"),
    (
        lambda: tasks.prepare(mixed(rows=40), valid_fraction=0.001),
        "`valid_fraction` 0.001 of 40 rows leaves no valid row",
    ),
    (
        lambda: tasks.prepare(mixed(rows=40), test_fraction=0.001),
        "`test_fraction` 0.001 of 40 rows leaves no test row",
    ),
    (lambda: tasks.split_by_family([TABLE, mixed()], num_folds=3), "2 families cannot fill 3 folds"),
    (padded_gap, r"task\.train\['x'\] of task t0 has NaN"),
    (lambda: padded(prepared(), features=np.array([np.inf])), r"task\.features of task t0 has NaN"),
    *(
        (lambda part=part: padded_without(part), f"t0 needs at least one row to train on and one to .*{part}_rows=0")
        for part in ("train", "valid")
    ),
    (
        lambda: stacked({}, {"num_features": 8}),
        r"feature_mask.* is \(8,\) in task 1 and \(7,\) in task 0: pad both to the same shape",
    ),
    (
        lambda: stacked({}, {"features": np.ones(2)}, names=["first", "second"]),
        "task second and task first differ in structure",
    ),
    (stacked_infinity, r"task\.valid\['x'\] of task 1 has NaN"),
    (stacked_in_float32, r"task\.features of .* infinite values in float32"),
    # Data frames and labels.
    (
        lambda: tasks.fit_encoder(np.zeros((0, 3))),
        r"Found array with 0 sample\(s\) \(shape=\(0, 3\)\) while a minimum of 1",
    ),
    (
        lambda: tasks.fit_encoder(np.zeros((12, 0))),
        r"Found array with 0 feature\(s\) \(shape=\(12, 0\)\) while a minimum of 1",
    ),
    (lambda: tasks.fit_encoder(frame()), "Found array with 0 sample"),
    (lambda: tasks.fit_encoder(frame(a=[])), "Found array with 0 sample"),
    (lambda: tasks.fit_encoder([]), "Expected 2D array, got 1D array instead"),
    (lambda: tasks.fit_encoder({}), "Found array with 0 sample"),
    (lambda: tasks.fit_encoder(np.zeros(3)), "Expected 2D array, got 1D array instead:(.|\n)*Reshape your data"),
    (lambda: tasks.fit_encoder([1, 2]), "Reshape your data"),
    (lambda: tasks.fit_encoder(["ab", "cd"]), "Reshape your data"),
    (lambda: tasks.fit_encoder(frame(a=[1, 2]).a), "Reshape your data"),
    (lambda: tasks.fit_encoder(3.0), "scalar array instead"),
    (lambda: tasks.fit_encoder(np.zeros((2, 2, 2))), "Found array with dim 3, while dim <= 2 is required"),
    (lambda: tasks.fit_encoder(np.ones((2, 2)) * 1j), "Complex data not supported"),
    (lambda: tasks.fit_encoder(frame(a=[1j, 2])), "Complex data not supported"),
    (lambda: tasks.fit_encoder([[1, 2j], [3, 4]]), "Complex data not supported"),
    (lambda: tasks.fit_encoder([[1, 2], [3]]), "All rows must have the same number of values; got 1 to 2"),
    (lambda: tasks.fit_encoder({"a": [1, 2], "b": [3]}), "All columns must have the same number of rows; got 1 to 2"),
    (lambda: tasks.fit_encoder({"a": "text", "b": "text"}), "The column 'a' must be one-dimensional; got 'text'"),
    (lambda: tasks.fit_encoder({"a": np.ones((2, 2))}), "The column 'a' must be one-dimensional"),
    *(
        (lambda options=options: tasks.fit_encoder({"size": [1.0, 2.0], "member": [0, 1]}, **options), message)
        for options, message in [
            ({"drop": ["colour"]}, "`drop` names the column 'colour'; there are size, member"),
            ({"keep": [12]}, "`keep` names the column 12"),
        ]
    ),
    *(
        (
            lambda field=field, value=value: state_with(field, value),
            "the values of the encoder do not fit each other",
        )
        for field, value in [
            ("named", "yes"),
            ("max_levels", 1.5),
            ("input_names", [3]),
            ("notes", [["a", "melted", "b"]]),
            ("columns", {"source": 9}),
            ("columns", {"kind": "number"}),
            ("columns", {"levels": ["a", "a"]}),
            ("columns", {"levels": [1, 2]}),
            ("columns", {"parts": ["days"]}),
            ("columns", {"reading": "eval"}),
            ("columns", {"offset": "1"}),
        ]
    ),
    *(
        (lambda y=y: tasks.fit_labels(y), message)
        for y, message in [
            ([0.5, 1, 2], "Unknown label type: continuous"),
            ([np.inf, 1, 2], "Unknown label type: continuous"),
            ([1, 1, None], r"at least 2 classes; got 1 class: \[1\]"),
            ([], "at least 2 classes; got 0 class"),
            (np.zeros((3, 1)), r"one-dimensional; got shape \(3, 1\)"),
            ([[1], [2]], "Unknown label type: list"),
            ([1, 2j], "Unknown label type: complex"),
            (np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), "Unknown label type: datetime64"),
        ]
    ),
    *(
        (lambda options=options: tasks.fit_columns(TABLE.x, TABLE.categorical, **options), message)
        for options, message in [
            ({"scaling": "rank"}, "`scaling` must be one of"),
            ({"max_levels": 1}, "`max_levels` must be at least 2"),
            ({"max_features": 3}, "`max_features` chooses columns by classes"),
        ]
    ),
    (
        lambda: tasks.fit_columns(TABLE.x, TABLE.categorical).transform(np.zeros((2, 6))),
        r"`x` must be \[rows, 3\]; got shape \(2, 6\)",
    ),
    (lambda: tasks.read_images("cat.png", size=8), "`files` must be a list of image files; got one path, 'cat.png'"),
    (lambda: tasks.read_images([], size=8), "`files` is empty"),
    (lambda: tasks.read_images(["cat.png"], size=0), "`size` must be at least 1; got 0"),
    *(
        (lambda options=options: tasks.read_images(["cat.png"], size=8, **options), "`channels` must be 1 .* or 3")
        for options in ({"channels": 4}, {"channels": "RGB"}, {"channels": True})
    ),
    (lambda: tasks.image_features(np.zeros((2, 4, 4)), np.array([0, 1])), r"got shape \(2, 4, 4\). Gray images need"),
    # Features of tables and images.
    (lambda: tasks.metafeatures((np.ones((40, 0)), TABLE.y, np.zeros(0, bool))), r"1 column; got \(40, 0\)"),
    (lambda: tasks.metafeatures((np.full((40, 1), np.inf), TABLE.y, np.zeros(1, bool))), "finite values"),
    (lambda: tasks.metafeatures(TABLE, groups=["model_based"]), r"got \['model_based'\]"),
    *(
        (
            lambda options=options: SCALING.transform(FEATURES[3], **options),
            "Pass `limit=` if the features are for a predictor with a `limit`, and",
        )
        for options in ({}, {"clip": 3.0, "limit": 2.0})
    ),
    (lambda: SCALING.transform(FEATURES[3], clip=0.0), "`clip` must be positive; got 0.0"),
    (lambda: SCALING.transform(FEATURES[3], limit=-2.0), "`limit` must be positive; got -2.0"),
    # Numbers and rows that would give an empty part or a wrong unit.
    (
        lambda: tasks.select(SOURCE, {"train": {"s": {"rows": [-1]}}, "test": {"s": {"rows": [9]}}}, "train"),
        "`rows` must be in",
    ),
    (lambda: tasks.stack(tasks_of_types(np.uint8, np.float32)), "is float32 in .* and uint8 in"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.from_arrays(np.array(["a"]), [0], name="s"), "isfinite"),  # an error of NumPy
        (lambda: tasks.fit_encoder("file.csv"), "A table is a data frame, .* got 'file.csv'"),
        (lambda: tasks.fit_encoder(None), "A table is a data frame"),
    ],
)
def test_types_that_are_rejected(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_feature_that_is_missing_is_an_error_of_python():
    with pytest.raises(KeyError, match="heavy"):
        SCALING.transform({"even": 1.0}, clip=3.0)
