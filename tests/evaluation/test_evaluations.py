"""Summaries of scores that can be worked out by hand."""

import json

import jax
import numpy as np
import pytest

import metaopt
from metaopt import evaluation


def by_hand(scores, num_ways=None, higher=True):
    scores = {m: {s: np.array(v, float) for s, v in by_source.items()} for m, by_source in scores.items()}
    sources = next(iter(scores.values()))
    ways = {s: np.ones(len(v)) for s, v in sources.items()} if num_ways is None else num_ways
    return evaluation.Evaluation(scores, ways, ways, dict.fromkeys(scores, False), higher, {}, "accuracy")


HAND = by_hand(
    {
        "a": {"u": [[0.0, 0.5], [0.0, 0.7], [0.0, 0.6]], "v": [[0.0, 0.2], [0.0, 0.4], [0.0, 0.0]]},
        "b": {"u": [[0.4], [0.6], [0.5]], "v": [[0.3], [0.1], [0.2]]},
    },
    {"u": np.array([5, 5, 10]), "v": np.array([10, 20, 20])},
)


def test_scores_without_a_name_join_any():
    other = HAND._replace(scores={"c": HAND.scores["a"]}, transductive={"c": True})
    for score in ("accuracy", ""):  # evaluations without a name of the score have ""
        for pair in ((HAND, other._replace(score=score)), (other._replace(score=score), HAND)):
            joined = evaluation.join_evaluations(*pair)
            assert sorted(joined.scores) == ["a", "b", "c"] and joined.score == "accuracy"


def test_the_same_episodes_by_another_machine():
    """Whose sums are rounded otherwise: of episodes that are much alike, too."""
    rng = np.random.default_rng(0)
    marks = {"u": (1e-4 + 4e-5 * rng.normal(size=50)).astype(np.float32)}
    one = by_hand({"a": {"u": np.zeros((50, 1))}})._replace(marks=marks)
    other = lambda marks: by_hand({"b": {"u": np.zeros((50, 1))}})._replace(marks={"u": marks})
    rounded = (marks["u"] + 5e-9 * rng.choice([-1, 1], size=50)).astype(np.float32)
    assert list(evaluation.join_evaluations(one, other(rounded)).scores) == ["a", "b"]
    far = marks["u"] + np.float32(4e-6) * (np.arange(50) == 7)  # one that differs by a tenth of what others do
    for wrong in (far, np.where(np.arange(50) == 3, np.nan, marks["u"]), np.roll(marks["u"], 1)):
        with pytest.raises(ValueError, match="source 'u' are not the same .their `marks` differ"):
            evaluation.join_evaluations(one, other(wrong))
        with pytest.raises(ValueError, match="source 'u' are not the same .their `marks` differ"):
            evaluation.join_evaluations(other(wrong), one)


def test_the_same_episodes_whose_marks_are_all_zero():
    """Of black images, for example: nothing differs, and nothing is rounded."""
    one = by_hand({"a": {"u": np.zeros((3, 1))}})._replace(marks={"u": np.zeros(3)})
    other = by_hand({"b": {"u": np.zeros((3, 1))}})._replace(marks={"u": np.zeros(3)})
    assert list(evaluation.join_evaluations(one, other).scores) == ["a", "b"]
    with pytest.raises(ValueError, match="their `marks` differ"):
        evaluation.join_evaluations(one, other._replace(marks={"u": np.array([0.0, 0.0, 1e-9])}))


def test_an_evaluation_on_disk(tmp_path):
    file = tmp_path / "scores.npz"
    saved = HAND._replace(transductive={"a": True, "b": False}, higher_is_better=False, marks={"u": np.ones(3)})
    saved = saved._replace(score="mean_squared_error")
    metaopt.save(file, saved)
    loaded = metaopt.load(file)
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)
    assert evaluation.leaderboard(loaded) == evaluation.leaderboard(saved) and loaded.transductive == saved.transductive
    arrays = dict(np.load(file))
    header = json.loads(arrays.pop("header").tobytes())
    for change, drop, message in (
        ({}, "scores 1 0", "does not describe a `Evaluation` as it should: it lacks 'scores 1 0'"),
        ({"transductive": [True]}, None, "does not describe a `Evaluation` as it should"),
    ):
        kept = {k: v for k, v in arrays.items() if k != drop}
        np.savez(file, header=np.frombuffer(json.dumps({**header, **change}).encode(), np.uint8), **kept)
        with pytest.raises(ValueError, match=message):
            metaopt.load(file)
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **{**arrays, "shots 0": np.ones(2)})
    with pytest.raises(ValueError, match="the arrays of source 'u' are not all of 3 episodes"):
        metaopt.load(file)


def test_means_differences_and_ranks_by_hand():
    mean, half = evaluation.mean_scores(HAND)["a"]["u"]
    assert mean == pytest.approx(0.6) and half == pytest.approx(1.96 * 0.1 / np.sqrt(3))
    assert (
        evaluation.mean_scores(HAND, step=0)["a"]["u"] == (0, 0)
        and evaluation.mean_scores(HAND, step=1)["b"] == (evaluation.mean_scores(HAND)["b"])
    )
    difference, half = evaluation.paired_differences(HAND, "b")["a"]["u"]
    assert difference == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-12)  # always .1 better
    difference, half = evaluation.paired_differences(HAND, "b")["a"]["v"]
    assert difference == pytest.approx(0) and half == pytest.approx(
        1.96 * np.std([-0.1, 0.3, -0.2], ddof=1) / np.sqrt(3)
    )
    tied = by_hand({"a": {"u": [[1]], "v": [[3]]}, "b": {"u": [[1]], "v": [[2]]}, "c": {"u": [[0]], "v": [[9]]}})
    assert evaluation.average_ranks(tied) == {"a": 1.75, "c": 2.0, "b": 2.25}
    assert evaluation.average_ranks(tied._replace(higher_is_better=False)) == {"b": 1.75, "c": 2.0, "a": 2.25}
    ranks = evaluation.average_ranks(tied._replace(transductive={"a": True, "b": False, "c": False}))
    assert list(ranks.items()) == [("b", 1.5), ("c", 1.5), ("a", 1.0)]  # each kind among themselves


def test_against_ways_by_hand():
    bins = evaluation.by_number(HAND, "ways", [5, 10, 11, 15, 30])
    assert [(n, count) for n, count, _, _ in bins["a"]] == [(5, 2), (10, 2), (20, 2)]  # the empty bin is left out
    np.testing.assert_allclose([mean for _, _, mean, _ in bins["a"]], [0.6, 0.4, 0.2])
    np.testing.assert_allclose([mean for _, _, mean, _ in bins["b"]], [0.5, 0.4, 0.15])


def test_the_leaderboard():
    table = evaluation.leaderboard(HAND, reference="b", digits=2)
    lines = table.splitlines()
    assert lines[0] == "| method | u | v | average rank | against b |"
    assert lines[2] == "| a | **0.60 ± 0.11** | **0.20 ± 0.23** | 1.25 | +0.05 ± 0.15 |"
    assert lines[3] == "| b | 0.50 ± 0.11 | **0.20 ± 0.11** | 1.75 |  |"
    assert "3 episodes of each source" in lines[-1] and "higher is better" in lines[-1]
    errors = evaluation.leaderboard(HAND._replace(higher_is_better=False, transductive={"a": True, "b": False}))
    lines = errors.splitlines()  # two tables: each has its own best
    assert lines[0].startswith("| method |") and lines[2].startswith("| b | **0.500") and "**0.200" in lines[2]
    assert lines[4].startswith("| transductive method |") and lines[6].startswith("| a | **0.600 ± 0.113** | **0.200")
    assert lines[2].endswith("1.00 |") and lines[6].endswith("1.00 |") and "lower is better" in lines[-1]
    of_one = evaluation.leaderboard(by_hand({"a": {1: [[0.5]]}, "b": {1: [[0.25]]}}), reference="b")
    assert of_one.splitlines()[2] == "| a | **0.500** | 1.00 | +0.250 |"  # one episode has no interval
    bars = evaluation.leaderboard(by_hand({"a|b": {"x|y": [[0.5]]}}), reference="a|b").splitlines()
    assert bars[0] == r"| method | x\|y | average rank | against a\|b |" and bars[2].startswith(r"| a\|b |")


def test_methods_with_the_same_scores_are_all_in_bold():
    scores = {"a": [[0.5], [0.7]], "b": [[0.5], [0.7]], "less": [[0.4], [0.6]]}
    lines = evaluation.leaderboard(by_hand({name: {"u": values} for name, values in scores.items()})).splitlines()
    bold = {line.split(" | ")[0][2:]: "**" in line for line in lines[2:5]}
    assert bold == {"a": True, "b": True, "less": False}


@pytest.mark.parametrize("order", ["low first", "high first"])
@pytest.mark.parametrize("higher", [True, False])
def test_the_best_is_in_bold_whatever_its_place(order, higher):
    scores = {"low": {"u": [[0.1], [0.3]]}, "high": {"u": [[0.5], [0.7]]}}
    names = ["low", "high"] if order == "low first" else ["high", "low"]
    table = evaluation.leaderboard(by_hand({name: scores[name] for name in names}, higher=higher))
    bold = {line.split(" | ")[0][2:] for line in table.splitlines()[2:4] if "**" in line}
    assert bold == {"high" if higher else "low"}


def test_scores_that_are_not_finite_have_a_mean_and_no_interval():
    wild, large = [[[np.inf], [1.0]], [[np.inf], [-np.inf]]], np.array([[1e30], [3e30]], np.float32)
    evaluated = by_hand({"a": {"u": wild[0], "v": wild[1]}, "b": {"u": [[1.0], [1.0]], "v": wild[1]}})
    assert evaluation.mean_scores(evaluated)["a"]["u"] == (np.inf, pytest.approx(np.nan, nan_ok=True))
    assert np.isnan(evaluation.mean_scores(evaluated)["a"]["v"]).all()
    differences = evaluation.paired_differences(evaluated, "b")["a"]
    assert differences["u"][0] == np.inf and np.isnan(differences["v"]).all()
    assert "| a | inf | nan |" in evaluation.leaderboard(evaluated._replace(higher_is_better=False), reference="b")
    mean, half = evaluation.mean_scores(evaluated._replace(scores={"a": {"u": large, "v": large}}))["a"]["u"]
    assert mean == pytest.approx(2e30) and half == pytest.approx(1.96e30)
