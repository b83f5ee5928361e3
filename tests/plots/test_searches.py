"""Regret, ranks and importance show numbers that are computed in another way."""

import itertools

import matplotlib
import numpy as np
import pytest
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot

from metaopt import base, plots, spaces


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def run(task, outcomes, **fields):
    return [base.Record(task, {"x": i}, float(y), trial=i, **fields) for i, y in enumerate(outcomes)]


def drawn(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def band(axes, number):
    """[N, 2] the lower and upper end of an interval at each budget."""
    x, y = axes.collections[number].get_paths()[0].vertices.T
    return np.array([[y[x == place].min(), y[x == place].max()] for place in sorted(set(x))])


def test_regret_is_the_normalized_distance_of_the_best_outcome_so_far():
    runs = {"a": [*run("s", [3, 5, 1]), *run("t", [20, 10, 40])], "b": [*run("t", [50, 10, 10]), *run("s", [2, 3, 3])]}
    axes = plots.regret(runs)
    # s: outcomes 1 ... 5, t: 10 ... 50.
    np.testing.assert_allclose(drawn(axes)["a"], [[1, (0.5 + 0.25) / 2], [2, (0.5 + 0) / 2], [3, 0]])
    np.testing.assert_allclose(drawn(axes)["b"], [[1, (0.25 + 1) / 2], [2, 0.25 / 2], [3, 0.25 / 2]])
    half = 1.96 * np.std([0.25, 1], ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(band(axes, 1)[0], [0.625 - half, 0.625 + half])
    assert "0: best" in axes.get_ylabel() and axes.get_yscale() == "linear"
    assert plots.regret(runs, axes=axes, log=True) is axes and axes.get_yscale() == "log"
    # Known bounds, such as those of a whole table.
    known = plots.regret(runs, bounds={"s": (0, 10)})
    np.testing.assert_allclose(drawn(known)["a"][:, 1], [(0.3 + 0.25) / 2, (0.3 + 0) / 2, (0.1 + 0) / 2])


def test_regret_is_a_mean_over_repetitions_and_families_and_its_interval_is_over_families():
    values = np.random.default_rng(0).uniform(size=(2, 3, 4))  # repetitions, tasks, trials
    values[:, :, -1] = [[0.0], [1.0]]  # the bounds of every task
    lists = [[r for t, name in enumerate("stu") for r in run(name, rows[t])] for rows in values]
    means = np.minimum.accumulate(values, axis=2).mean(0)
    axes = plots.regret({"a": lists})
    np.testing.assert_allclose(drawn(axes)["a"][:, 1], means.mean(0))
    half = 1.96 * stats.sem(means, axis=0)
    np.testing.assert_allclose(band(axes, 0), np.stack([means.mean(0) - half, means.mean(0) + half], 1))
    axes = plots.regret({"a": lists}, families={"s": "one", "t": "one"})
    families = np.stack([means[:2].mean(0), means[2]])
    half = 1.96 * stats.sem(families, axis=0)
    np.testing.assert_allclose(drawn(axes)["a"][:, 1], families.mean(0))
    np.testing.assert_allclose(band(axes, 0)[:, 1], families.mean(0) + half)


def test_trials_without_an_outcome_spend_their_budget():
    failed = base.Record("t", {}, status="FAIL")
    third = lambda outcome: base.Record("t", {}, outcome, fidelity=1 / 3)
    # A third of the budget has no outcome, however small it is: it is not comparable.
    records = [failed, *[third(0.0)] * 3, *run("t", [4, 2, 3]), third(1.0)]
    lines = drawn(plots.regret({"a": records}))
    np.testing.assert_allclose(lines["a"], [[1, 1], [2, 1], [3, 1], [4, 0], [5, 0]])
    equal = drawn(plots.regret({"a": [failed, *run("t", [4, 4])], "never": [failed, failed]}))
    np.testing.assert_allclose(equal["a"][:, 1], [1, 0, 0])
    np.testing.assert_allclose(equal["never"][:, 1], [1, 1])
    nothing = drawn(plots.regret({"never": [failed, failed]}))
    np.testing.assert_allclose(nothing["never"][:, 1], [1, 1])


def test_a_resumed_trial_only_spends_the_difference_of_its_fidelities():
    thirds = [base.Record("t", {}, 2.0, trial=0, fidelity=k / 3) for k in (1, 2, 3)]
    records = [*thirds, *(base.Record("t", {}, y, trial=i) for i, y in ((1, 0.0), (2, 4.0)))]
    lines = lambda **kwargs: drawn(plots.regret({"a": records}, **kwargs))["a"][:, 1]
    np.testing.assert_allclose(lines(), [1, 0.5, 0, 0])
    np.testing.assert_allclose(lines(resumes=True), [0.5, 0, 0])


def several(task, **outcomes):
    """Trials with several outcomes, the first of which is the records' own."""
    rows = [dict(zip(outcomes, map(float, row), strict=True)) for row in zip(*outcomes.values(), strict=True)]
    first = next(iter(outcomes))
    return [base.Record(task, {"x": i}, row[first], outcomes=row) for i, row in enumerate(rows)]


def test_infeasible_trials_only_spend_their_budget():
    records = several("t", error=[0, 8, 4, 6], depth=[5, 4, 3, 9])
    lines = lambda **kwargs: drawn(plots.regret({"a": records}, **kwargs))["a"][:, 1]
    np.testing.assert_allclose(lines(), [0, 0, 0, 0])
    np.testing.assert_allclose(lines(constraints={"depth": 4}), [1, 1, 0, 0])  # of 8 and 4, the feasible ones
    np.testing.assert_allclose(lines(constraints={"depth": 5}), [0, 0, 0, 0])  # a trial at the bound is feasible
    failed = base.Record("t", {}, status="FAIL")
    assert len(drawn(plots.regret({"a": [failed, *records]}, constraints={"depth": 4}))["a"]) == 5
    with pytest.raises(ValueError, match=r"lacks the outcomes 'size'; it has 'error', 'depth'\."):
        plots.regret({"a": records}, constraints={"size": 4})
    with pytest.raises(ValueError, match=r"lacks the outcomes 'depth'; it has no outcomes by name\."):
        plots.regret({"a": run("t", [1])}, constraints={"depth": 4})


def test_ranks_are_over_methods_on_each_task_and_ties_share_one():
    runs = {
        "a": [*run("s", [1, 1]), *run("t", [5, 4, 4])],
        "b": [*run("s", [2, 2]), *run("t", [5, 5])],
        "c": [*run("s", [3, 0]), *run("t", [9, 9])],
    }
    lines = drawn(plots.regret(runs, ranks=True))
    expected = {"a": [(1 + 1.5) / 2, (2 + 1) / 2], "b": [(2 + 1.5) / 2, (3 + 2) / 2], "c": [3, (1 + 3) / 2]}
    assert {name: line[:, 1].tolist() for name, line in lines.items()} == expected


def test_a_method_without_an_outcome_ranks_behind_the_one_with_the_worst_outcome():
    failed = base.Record("t", {}, status="FAIL")
    infinite = base.Record("t", {}, np.inf)
    runs = {
        "best": run("t", [0, 9]),
        "worst": run("t", [9, 9]),
        "never": [failed, infinite],
        "late": [failed, *run("t", [9])],
    }
    ranks = {name: line[:, 1].tolist() for name, line in drawn(plots.regret(runs, ranks=True)).items()}
    assert ranks == {"best": [1, 1], "worst": [2, 2.5], "never": [3.5, 4], "late": [3.5, 2.5]}
    regrets = {name: line[:, 1].tolist() for name, line in drawn(plots.regret(runs)).items()}
    assert regrets == {"best": [0, 0], "worst": [1, 1], "never": [1, 1], "late": [1, 1]}
    two = {name: runs[name] for name in ("worst", "never")}  # also with an outcome beyond the bounds
    lines = drawn(plots.regret(two, bounds={"t": (0, 5)}, ranks=True))
    assert {name: line[:, 1].tolist() for name, line in lines.items()} == {"worst": [1, 1], "never": [2, 2]}
    lines = drawn(plots.regret(two, bounds={"t": (0, 5)}))
    assert {name: line[:, 1].tolist() for name, line in lines.items()} == {"worst": [1, 1], "never": [1, 1]}
    # A mean over repetitions: 0, 0 and no outcome are better than 1, 1 and 1.
    runs = {"often": [run("t", [0]), run("t", [0]), [failed]], "worst": [run("t", [9])] * 3}
    assert {name: line[0, 1] for name, line in drawn(plots.regret(runs, ranks=True)).items()} == {
        "often": 1,
        "worst": 2,
    }


def rows(axes):
    """name -> (share, half-width of the interval or None), from the top."""
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    found = {}
    for name, bar in zip(names, axes.containers, strict=True):
        point, _, bars = bar.lines
        ends = bars[0].get_segments()[0][:, 0] if bars else None
        found[name] = point.get_xdata()[0], None if ends is None else np.ptp(ends) / 2
    return found


def grid(task, space_values, outcome):
    names, levels = zip(*space_values.items(), strict=True)
    configurations = [dict(zip(names, values, strict=True)) for values in itertools.product(*levels)]
    return [base.Record(task, c, float(outcome(**c))) for c in configurations]


UNIT = np.linspace(0.02, 0.98, 13)


def test_importance_is_the_share_of_each_main_effect_in_the_variance():
    space = {"x": spaces.interval(0.0, 1.0), "y": spaces.interval(0.0, 1.0)}
    additive = plots.importance(grid("t", {"x": UNIT, "y": UNIT}, lambda x, y: x + 2 * y), space)
    shares = rows(additive)
    assert list(shares) == ["y", "x", "interactions and noise"]
    np.testing.assert_allclose([share for share, _ in shares.values()], [4 / 5, 1 / 5, 0], atol=0.03)
    assert all(half is None for _, half in shares.values())
    # (x − 1/2)(y − 1/2) has no main effects.
    product = plots.importance(grid("t", {"x": UNIT, "y": UNIT}, lambda x, y: (x - 0.5) * (y - 0.5)), space)
    assert rows(product)["interactions and noise"][0] > 0.8


def test_importance_is_of_one_of_several_outcomes():
    space = {"x": spaces.interval(0.0, 1.0), "y": spaces.interval(0.0, 1.0)}
    values = {"x": UNIT, "y": UNIT}
    errors, sizes = grid("t", values, lambda x, y: x), grid("t", values, lambda x, y: 100 * y)
    both = [e._replace(outcomes={"e": e.outcome, "s": s.outcome}) for e, s in zip(errors, sizes, strict=True)]
    both.append(base.Record("t", {"x": 0.5, "y": 0.5}, status="FAIL"))
    assert rows(plots.importance(both, space)) == rows(plots.importance(errors, space))
    assert rows(plots.importance(both, space, outcome="s")) == rows(plots.importance(sizes, space))
    with pytest.raises(ValueError, match=r"lacks the outcomes 'size'; it has 'e', 's'\."):
        plots.importance(both, space, outcome="size")


def test_importance_is_over_the_logarithm_of_a_logarithmic_hyperparameter():
    """Over rates themselves, nearly all of the space would be in the last decade, and log10(rate) / 4 hardly vary."""
    space = {"rate": spaces.interval(1e-4, 1.0, log=True), "x": spaces.interval(0.0, 1.0)}
    records = grid("t", {"rate": 10 ** (-4 * UNIT), "x": UNIT}, lambda rate, x: np.log10(rate) / 4 + x)
    shares = rows(plots.importance(records, space))
    np.testing.assert_allclose([shares["rate"][0], shares["x"][0]], [0.5, 0.5], atol=0.04)


def test_importance_is_a_mean_over_tasks():
    space = {"x": spaces.interval(0.0, 1.0), "kind": spaces.choice(["a", "b"])}
    values = {"x": UNIT, "kind": ["a", "b"]}
    only_x = grid("s", values, lambda x, kind: 7 * x)
    only_kind = grid("t", values, lambda x, kind: float(kind == "a"))
    ignored = [base.Record("s", {"x": 0.5, "kind": "a"}, 1e9, fidelity=0.5)]
    ignored += [base.Record("t", {"x": 0.5, "kind": "a"}, status="FAIL")]
    shares = rows(plots.importance([*only_x, *ignored, *only_kind], space))
    half = 1.96 * stats.sem([0, 1])
    for name in ("x", "kind"):
        np.testing.assert_allclose(shares[name], [0.5, half], atol=0.01)
    np.testing.assert_allclose(shares["interactions and noise"], [0, 0], atol=0.01)
