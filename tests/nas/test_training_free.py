"""Training-free search: one program for a space, and a searcher that tries what scores best."""

import jax
import numpy as np
import pytest

from metaopt import nas, spaces
from metaopt.nas import _scores

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
SPACE = {"depth": spaces.integer(0, 99)}


@pytest.mark.slow
def test_scores_of_a_space_are_those_of_its_discrete_networks():
    cell = nas.complete_cell(2, ("none", "skip_connect", "linear"), preprocess=False)
    net = nas.Network({"cell": cell}, (nas.Layer("linear", 4), nas.Layer("cell", 4)), 2)
    score = nas.training_free_scores(net, (3,), {"flow": _scores.synflow, "snip": _scores.snip}, ops=nas.BLOCKS)
    supernet = nas.supernet(net, (3,), ops=nas.BLOCKS)
    params = jax.jit(supernet.init)(KEY)
    batch = {"x": np.random.default_rng(0).normal(size=(5, 3)), "y": np.array([0, 1, 1, 0, 1])}
    flows = []
    for genotype in ({"cell": ((0, 2, "linear"),)}, {"cell": ((0, 1, "linear"), (1, 2, "skip_connect"))}):
        scores = score(KEY, genotype, batch)
        inherited = supernet.inherit(params, genotype)
        small = nas.supernet(nas.discrete(net, genotype), (3,), ops=nas.BLOCKS)
        np.testing.assert_allclose(scores["flow"], _scores.synflow(small, inherited, None), rtol=1e-9)
        np.testing.assert_allclose(scores["snip"], _scores.snip(small, inherited, None, batch), rtol=1e-9)
        flows.append(float(scores["flow"]))
    assert flows[0] != flows[1]  # each edge has its own weights
    assert score(jax.random.key(1), genotype, batch)["flow"] != flows[1]


def near(configuration):
    return np.nan if configuration["depth"] > 90 else -abs(configuration["depth"] - 40)


def test_candidates_are_tried_by_their_scores():
    searcher = nas.screened_random_search(near, num_candidates=30)
    state = searcher.init(KEY, SPACE)
    trials, after = searcher.ask(state, 60)
    scores = np.nan_to_num([near(trial.configuration) for trial in trials], nan=-99)
    assert (np.diff(scores[:30]) <= 0).all() and (np.diff(scores[30:]) <= 0).all() and scores[30] > scores[29]
    assert scores[0] > -4 and scores[29] == -99  # a NaN comes last
    assert [trial.trial for trial in trials] == list(range(60)) and len({trial.seed for trial in trials}) == 60
    assert all(trial.status == "WAITING" for trial in trials)
    one_by_one = []
    for _ in range(60):
        (trial,), state = searcher.ask(state, 1)
        state = searcher.tell(state, [trial._replace(outcome=1.0, status="COMPLETE")])
        one_by_one.append(trial)
    assert one_by_one == trials and state.num_asked == after.num_asked == 60
    others, _ = searcher.ask(searcher.init(jax.random.key(1), SPACE), 30)
    assert [t.configuration for t in others] != [t.configuration for t in trials[:30]]
