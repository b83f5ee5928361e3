"""What `evaluation` rejects: scores that are not comparable, and numbers or names that the scores do not have."""

import numpy as np
import pytest

from metaopt import evaluation

WAYS = {"u": np.array([5, 5, 10]), "v": np.array([10, 20, 20])}
HALF = {"u": np.full((3, 2), 0.5), "v": np.full((3, 2), 0.5)}
ONE = evaluation.Evaluation({"a": HALF}, WAYS, WAYS, {"a": False}, True, {}, "accuracy")
OTHER = ONE._replace(scores={"c": HALF}, transductive={"c": True})


def joined(**changes):
    return evaluation.join_evaluations(ONE, OTHER._replace(**changes))


REFUSALS = [
    (lambda: joined(scores=ONE.scores), ValueError, "The method 'a' is in both"),
    (lambda: joined(higher_is_better=False), ValueError, "one has accuracies and the other errors"),
    (lambda: joined(score="other"), ValueError, "their scores are 'accuracy' and 'other'"),
    (lambda: joined(num_ways={"u": WAYS["u"]}), ValueError, r"same sources; got `num_ways` of \['u', 'v'\] and"),
    (lambda: joined(marks=WAYS), ValueError, "same sources; got `marks` of"),
    (lambda: joined(num_shots={**WAYS, "u": WAYS["u"] - [0, 0, 1]}), ValueError, "source 'u' .* `num_shots` differ"),
    (lambda: evaluation.mean_scores(ONE, step=-2), ValueError, "`step` must be a number of steps, or -1"),
    (lambda: evaluation.paired_differences(ONE, "c"), KeyError, "c"),
    (lambda: evaluation.by_number(ONE, "rows", [1, 2]), KeyError, "rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
