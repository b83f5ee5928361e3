"""The plots show the values of their arguments."""

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from metaopt import evaluation, nas, plots
from metaopt.plots import _architectures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def test_a_learning_curve_has_a_gap_where_the_loss_is_not_finite():
    axes = plots.learning_curve({"value": np.array([3.0, np.inf, 1.0]), "skipped": np.zeros(3)}, label="F")
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [3.0, np.nan, 1.0])
    assert line.get_label() == "F" and "outer loss" in axes.get_ylabel()
    assert plots.learning_curve({"value": [1.0]}, axes=axes) is axes and len(axes.lines) == 2


def test_a_trace_has_a_line_an_entry_and_both_forms_agree():
    steps = [{"decay": jnp.array([1e-3, 2e-3]) * t, "rate": 0.1 * t} for t in (1.0, 2.0, 3.0)]
    stacked = {"decay": np.outer([1, 2, 3], [1e-3, 2e-3]), "rate": 0.1 * np.arange(1, 4)}
    for trace in (steps, stacked):
        axes = plots.hyperparameter_trace(trace)
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert list(drawn) == ["decay[0]", "decay[1]", "rate"] and axes.get_yscale() == "log"
        np.testing.assert_allclose(drawn["decay[1]"], [2e-3, 4e-3, 6e-3], rtol=1e-6)
    assert plots.hyperparameter_trace({"z": np.array([-1.0, 1.0])}).get_yscale() == "linear"
    two_forms = plots.hyperparameter_trace({"a.b": np.ones(2), "a": {"b": np.full(2, 2.0)}})
    assert [line.get_ydata()[0] for line in two_forms.lines] == [2.0, 1.0]


def test_a_comparison_draws_the_mean_and_the_interval_of_the_mean():
    scores = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    axes = plots.comparison({"default": scores, "learned": [1.5]}, errors={"learned": 0.25}, highlight=["learned"])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["default", "learned"]
    assert axes.yaxis_inverted()  # the first at the top
    spans = []
    for bar in axes.containers:
        points, _, (segments,) = bar.lines
        ((low, _), (high, _)) = segments.get_segments()[0]
        spans.append((points.get_xdata()[0], low, high))
    half = 1.96 * np.std([1, 2, 3, 4], ddof=1) / 2  # n = 4
    np.testing.assert_allclose(spans, [(2.5, 2.5 - half, 2.5 + half), (1.5, 1.25, 1.75)])


SCORES = {
    "steps": {"u": np.array([[0.0, 0.4], [0.2, 0.8]]), "v": np.array([[0.0, 0.2], [0.0, 0.4]])},
    "level": {"u": np.array([[0.5], [0.5]]), "v": np.array([[0.1], [0.3]])},
}
NUMBERS = {"u": np.array([5.0, 10.0]), "v": np.array([5.0, 10.0])}
EVALUATION = evaluation.Evaluation(SCORES, NUMBERS, NUMBERS, dict.fromkeys(SCORES, False))


def test_adaptation_curves_are_means_over_episodes():
    drawn = {line.get_label(): line for line in plots.adaptation_curves(EVALUATION, source="u").lines}
    np.testing.assert_allclose(drawn["steps"].get_ydata(), [0.1, 0.6])
    np.testing.assert_allclose(drawn["level"].get_data(), [[0, 1], [0.5, 0.5]])
    assert drawn["level"].get_linestyle() == "--"
    np.testing.assert_allclose(plots.adaptation_curves(EVALUATION).lines[0].get_ydata(), [0.05, 0.45])
    scores = np.random.default_rng(0).normal(size=(9, 2))
    by_hand = 1.96 * scores.std(axis=0, ddof=1) / 3
    (band,) = plots.adaptation_curves(EVALUATION._replace(scores={"steps": {"u": scores}})).collections
    ends = band.get_paths()[0].get_extents()
    assert ends.y0 == pytest.approx((scores.mean(axis=0) - by_hand).min())
    assert ends.y1 == pytest.approx((scores.mean(axis=0) + by_hand).max())


def test_scores_by_number_and_the_leaderboard():
    axes = plots.scores_by_number(EVALUATION, "shots", [1, 6, 11])
    points = {bar.get_label(): bar.lines[0].get_data() for bar in axes.containers}
    np.testing.assert_allclose(points["steps"], [[5, 10], [0.3, 0.6]])
    axes = plots.ranking(EVALUATION)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["steps", "level"]
    np.testing.assert_allclose([bar.lines[0].get_xdata()[0] for bar in axes.containers], [0.45, 0.35])
    evaluation = EVALUATION._replace(transductive={"steps": True, "level": False})  # ahead, by the query set's help
    axes = plots.ranking(evaluation)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["level", "steps, transductive"]
    np.testing.assert_allclose([bar.lines[0].get_xdata()[0] for bar in axes.containers], [0.35, 0.45])
    for axes in (plots.adaptation_curves(evaluation), plots.scores_by_number(evaluation, "shots", [1, 6, 11])):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["steps, transductive", "level"]


def test_lines_of_more_than_ten_methods_differ():
    scores = {f"steps {i}": SCORES["steps"] for i in range(23)} | {f"level {i}": SCORES["level"] for i in range(23)}
    many = EVALUATION._replace(scores=scores, transductive=dict.fromkeys(scores, False))
    curves = plots.adaptation_curves(many)
    bars = plots.scores_by_number(many, "shots", [1, 6, 11])
    for axes, lines in ((curves, curves.lines), (bars, [bar.lines[0] for bar in bars.containers])):
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(lines) == len(looks) == 46
        assert len({line.get_linestyle() for line in lines[:23]}) == 3  # by more than its marker, which may be small
        assert axes.get_legend().handlelength == 3  # shorter, a dashed line looks like a solid one
    assert {line.get_linestyle() for line in curves.lines[23:]} == {"--"}


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_method_that_diverges_is_drawn_without_its_points(value):
    scores = {"u": np.array([[0.5, value], [0.5, 1.0]]), "v": np.array([[0.5, np.inf], [0.5, -np.inf]])}
    kinds = dict.fromkeys([*SCORES, "wild"], False)
    diverging = EVALUATION._replace(scores={**SCORES, "wild": scores}, transductive=kinds)
    axes = plots.ranking(diverging)
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    (text,) = axes.texts
    assert sorted(labels) == ["level", "steps", "wild"] and axes.yaxis_inverted() and len(axes.containers) == 2
    assert text.get_text() == "diverges" and labels[text.get_position()[1]] == "wild"
    assert "wild" in evaluation.leaderboard(diverging, reference="steps")
    np.testing.assert_array_equal(plots.adaptation_curves(diverging).lines[2].get_ydata(), [0.5, np.nan])
    points = plots.scores_by_number(diverging, "shots", [1, 6, 11]).containers[2].lines[0].get_ydata()
    assert np.isnan(points[0]) and len(points) == 2


def test_the_rows_of_one_source_have_its_order():
    # "a" is the best on v and the worst on the two other sources
    means = {
        "a": {"u": 0.1, "v": 0.9, "w": 0.1},
        "b": {"u": 0.8, "v": 0.5, "w": 0.8},
        "c": {"u": 0.4, "v": 0.1, "w": 0.4},
    }
    scores = {method: {name: np.full((4, 1), x) for name, x in of.items()} for method, of in means.items()}
    ways = dict.fromkeys(("u", "v", "w"), np.full(4, 5.0))
    three = EVALUATION._replace(scores=scores, num_ways=ways, transductive=dict.fromkeys(means, False))
    labels = lambda axes: [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels(plots.ranking(three, source="v")) == ["a", "b", "c"]
    assert labels(plots.ranking(three))[0] == "b"


def test_a_method_without_a_finite_score_is_drawn_as_diverging():
    (text,) = plots.comparison({"a": [np.nan], "b": [1.0, 2.0]}).texts
    assert text.get_text() == "diverges"


def test_fronts_are_steps_through_the_undominated_points():
    sets = {"all": [[4.0, 1.0], [2.0, 2.0], [3.0, 3.0], [1.0, 5.0]], "one": [[2.0, 4.0]]}
    axes = plots.pareto(sets, xlabel="FLOPs", log=True)
    front, single = axes.lines
    np.testing.assert_array_equal(front.get_xydata(), [[1, 5], [2, 2], [4, 1]])
    assert front.get_marker() != single.get_marker() and front.get_linestyle() != single.get_linestyle()
    assert front.get_drawstyle() == "steps-post" and (front.get_label(), single.get_label()) == ("all", "one")
    assert [len(c.get_offsets()) for c in axes.collections] == [4, 1]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "FLOPs"
    assert plots.pareto(sets, axes=axes) is axes and len(axes.lines) == 4


# ---- Cells ----------------------------------------------------------------------------------------------------------

DARTS_CELL = (
    *((0, 2, "sep_conv_3x3"), (1, 2, "sep_conv_3x3"), (0, 3, "sep_conv_3x3"), (1, 3, "sep_conv_3x3")),
    *((1, 4, "sep_conv_3x3"), (0, 4, "skip_connect"), (0, 5, "skip_connect"), (2, 5, "dil_conv_3x3")),
)


def texts(axes):
    """[(text, where it is on the page)], as drawn."""
    axes.figure.canvas.draw()
    return [(text.get_text(), text.get_window_extent()) for text in axes.texts if text.get_text()]


def test_a_cell_names_every_edge_and_no_name_covers_another():
    axes = plots.cell(DARTS_CELL, num_inputs=2, output=(2, 3, 4, 5), title="normal")
    drawn = texts(axes)
    assert sorted(name for name, _ in drawn) == sorted(
        [*(op for _, _, op in DARTS_CELL), "input k−2", "input k−1", "2", "3", "4", "5", "output"]
    )
    assert len(axes.patches) == 8 + 4 and axes.get_title() == "normal"
    for i, (_, box) in enumerate(drawn):
        assert not any(box.overlaps(other) for _, other in drawn[:i])
    # A name lies in the middle of its edge.
    (dilated,) = [text for text in axes.texts if text.get_text() == "dil_conv_3x3"]
    assert dilated.get_position()[0] == (2 + 5) / 2 and dilated.get_position()[1] != 0


def test_an_arc_rises_stays_level_and_falls_between_its_nodes():
    arcs = [(0, 2, "mlp"), (1, 3, "mlp"), (0, 4, "mlp")]
    patches = plots.cell(arcs, num_inputs=2, output=(4,)).patches
    ends = [(s, t) for s, t, _ in arcs] + [(4, 5)]
    assert len(patches) == len(ends)
    for (s, t), patch in zip(ends, patches, strict=True):
        x, y = patch.get_path().vertices.T
        assert x[0] == s and x[-1] == t and (np.diff(x) >= 0).all()
        np.testing.assert_allclose(x + x[::-1], s + t)  # symmetric
        assert y[0] == y[-1] == 0 and len(set(y[1:-1])) == 1 and y[1] != 0


def test_arcs_over_the_same_place_have_other_heights():
    rng = np.random.default_rng(0)
    for _ in range(20):
        spans = [tuple(sorted(rng.choice(9, 2, replace=False).tolist())) for _ in range(15)]
        heights = _architectures._arc_heights(spans)
        assert 0 not in heights
        for i, ((s, t), h) in enumerate(zip(spans, heights, strict=True)):
            for (a, b), other in zip(spans[:i], heights[:i], strict=True):
                assert h != other or t <= a or b <= s


def test_a_graph_has_its_ops_on_its_nodes_and_a_genotype_all_its_kinds():
    graph = nas.Graph(((0, 1, 1), (0, 0, 1), (0, 0, 0)), ("input", "conv3x3-bn-relu", "output"))
    axes = plots.cell(graph)
    assert [name for name, _ in texts(axes)] == ["input", "conv3x3", "output"] and len(axes.patches) == 3
    network = nas.darts_space(num_cells=3)
    drawn = plots.genotype(network, {"normal": DARTS_CELL, "reduce": DARTS_CELL[:2]})
    assert [axes.get_title() for axes in drawn] == ["normal", "reduce"] and len(drawn[1].patches) == 2 + 4
    assert drawn[0].figure.get_figwidth() >= 7  # an inch for each node: two inputs, four nodes and the output


# ---- Rank diagrams -------------------------------------------------------------------------------------------------


def drawn_ranks(axes):
    """method -> rank, as written; and the bars' ends."""
    texts = [text.get_text().strip() for text in axes.texts if " " in text.get_text()]
    ranks = {}
    for text in texts:
        first, _, second = text.partition(" ")
        name, rank = (second, first) if first.replace(".", "").isdigit() else (first, second)
        ranks[name] = float(rank)
    bars = [tuple(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 3]
    return ranks, bars


def test_a_rank_diagram_has_mean_ranks_and_joins_what_does_not_differ():
    rng = np.random.default_rng(0)
    level = rng.normal(size=60)
    same = rng.normal(size=(2, 60)) * 0.1
    scores = {"worst": level + 2, "twin": level + same[0], "other": level + same[1]}
    ranks, bars = drawn_ranks(plots.critical_difference(scores))
    smaller = np.mean(scores["twin"] < scores["other"])
    expected = {"worst": 3.0, "twin": 2 - smaller, "other": 1 + smaller}
    assert ranks == pytest.approx(expected, abs=0.006)
    ((low, high),) = bars
    assert low == pytest.approx(min(expected.values()), abs=0.05) and high == pytest.approx(
        expected[max(["twin", "other"], key=expected.get)], abs=0.05
    )
    # All apart: no bar. None apart: one bar over all.
    distinct = {name: level + shift for name, shift in {"a": 0.0, "b": 1.0, "c": 2.0}.items()}
    assert drawn_ranks(plots.critical_difference(distinct)) == ({"a": 1.0, "b": 2.0, "c": 3.0}, [])
    similar = {name: level + rng.normal(size=60) * 0.1 for name in "abc"}
    ranks, ((low, high),) = drawn_ranks(plots.critical_difference(similar))
    assert low < min(ranks.values()) + 0.01 and high > max(ranks.values()) - 0.01
    for names in ("ab", "abc"):  # equal scores: warnings of scipy or matplotlib would be errors
        middle = (len(names) + 1) / 2
        ranks, ((low, high),) = drawn_ranks(plots.critical_difference(dict.fromkeys(names, level)))
        assert ranks == dict.fromkeys(names, middle) and low < middle < high


def test_holm_s_correction_is_over_the_pairs():
    """Six of six tasks: p = .03125 of the one pair (alpha .05), which three pairs do not stand."""
    one = np.arange(1.0, 7.0)
    two = plots.critical_difference({"a": one, "b": one + 1 + one / 10}, alpha=0.05)
    assert drawn_ranks(two)[1] == []
    three = {"a": one, "b": one + 1 + one / 10, "c": one + 3 + one / 5}
    ((low, high),) = drawn_ranks(plots.critical_difference(three, alpha=0.05))[1]
    assert low < 1 and high > 3


def test_a_rank_diagram_has_room_for_its_names_and_bars():
    rng = np.random.default_rng(0)
    level = rng.normal(size=60)
    diagram = plots.critical_difference({name: level + shift for name, shift in {"a": 0.0, "b": 1.0, "c": 2.0}.items()})
    low, high = diagram.get_xlim()
    places = [text.get_position()[0] for text in diagram.texts]
    assert low < min(places) - 0.5 and high > max(places) + 0.5  # names extend outwards
    assert min(places) < 1 and max(places) > 3  # and are outside the ranks
    wide = plots.critical_difference({f"a method with a long name {i}": level + i for i in range(12)})
    for axes in (diagram, wide):
        drawn = [*texts(axes), ("title", axes.title.get_window_extent())]
        for i, (_, box) in enumerate(drawn):
            assert 0 <= box.x0 and box.x1 <= axes.figure.bbox.width
            assert not any(box.overlaps(other) for _, other in drawn[:i])
    joined = plots.critical_difference({name: rng.normal(size=60) for name in "abc"})
    heights = [axes.figure.get_size_inches()[1] for axes in (diagram, joined)]
    assert len(drawn_ranks(joined)[1]) == 1 and heights[1] > heights[0] + 0.1


def test_holm_s_levels_rise_with_each_rejected_pair():
    """c differs from a and b at p = .005. Then a and b, with p = .028, are tested at .05 and no longer at .05 / 3."""
    a = np.arange(10.0)
    b = a + np.array([1, 2, 3, 4, 5, -6, 7, 8, 9, 10])  # W = 6 of n = 10
    scores = {"a": a, "b": b, "c": np.maximum(a, b) + np.arange(20.0, 30.0)}
    assert drawn_ranks(plots.critical_difference(scores, alpha=0.05))[1] == []
    ((low, high),) = drawn_ranks(plots.critical_difference(scores, alpha=0.02))[1]
    assert low < 1.1 and 1.9 < high < 2  # a and b
