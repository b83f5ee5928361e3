"""The command `metaopt score`, and the targets that it reads as `metaopt fit` does."""

import numpy as np
import pandas as pd
import pytest

from metaopt import _cli, _logs

FAST = ["--models", "linear", "--time", 0.001]


def _run(*arguments):
    return _cli.main([str(argument) for argument in arguments])


def test_score_reads_a_target_as_fit_did(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=200)
    prices = (1000 + 300 * x).round().clip(1).astype(int)
    frame = pd.DataFrame({"x": x, "price": [f"{price:,} €".replace(",", ".") for price in prices]})
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame[prices >= 1000].to_csv(tmp_path / "large.csv", index=False)  # alone, "1.234 €" would be 1.234
    arguments = ["--models", "linear", "--time", 0.001, "--out", tmp_path / "m.npz"]
    assert _run("fit", tmp_path / "train.csv", "--target", "price", *arguments) == 0
    capsys.readouterr()
    assert _run("score", tmp_path / "m.npz", tmp_path / "large.csv") == 0
    values = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:])
    assert float(values["r2"]) > 0.9


def test_an_uncertain_reading_of_the_target_is_printed(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=60)
    for texts, value in (([f"{1 + abs(v):.3f} €" for v in x], "as 1."), ([f"{5 + abs(v):.2f} €" for v in x], "as 5.")):
        pd.DataFrame({"x": x, "price": texts}).to_csv(tmp_path / "train.csv", index=False)
        arguments = ["--models", "linear", "--time", 0.001, "--out", tmp_path / "m.npz"]
        assert _run("fit", tmp_path / "train.csv", "--target", "price", *arguments) == 0
        printed = capsys.readouterr().err
        assert f"The target 'price' is text; '{texts[0]}' is read {value}" in printed
        assert ("If this is wrong, remove separators of thousands, and write" in printed) == (value == "as 1.")


def test_score_reads_labels_and_amounts_as_fit_does(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=120), "who": np.repeat(np.arange(12), 10)})
    frame["price"] = [f"{1000 * value:,.2f} €" for value in 5 + frame["x"]]
    frame["code"] = np.where(frame["x"] > 0, "01", "1")
    frame["flag"] = frame["x"] > 0.5
    frame.loc[:1, "code"] = "A"  # the labels of the other file are numbers only
    for target in ("price", "code", "flag"):
        frame[["x", "who", target]].to_csv(tmp_path / "train.csv", index=False)
        frame.loc[2:, ["x", "who", target]].to_csv(tmp_path / "new.csv", index=False)
        arguments = ["--groups", "who", "--models", "linear", "--time", 0.001, "--out", tmp_path / "m.npz"]
        assert _run("fit", tmp_path / "train.csv", "--target", target, *arguments) == 0
        capsys.readouterr()
        assert _run("score", tmp_path / "m.npz", tmp_path / "new.csv", "--groups", "who") == 0
        text = capsys.readouterr()
        assert f"'{target}' of 118 rows in 12 groups" in text.out
        values = dict(line.split()[:2] for line in text.out.splitlines()[2:])
        assert float(values["r2" if target == "price" else "accuracy"]) > 0.9
        assert ("The target 'price' is text; '" in text.err) == (target == "price")


def test_score_of_a_model_without_the_name_of_its_target(tmp_path, capsys):
    from metaopt import automl, save

    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)), columns=["a", "b"])
    model = automl.AutoRegressor(models="linear", preset="instant", time_limit=None, verbose=False)
    save(tmp_path / "m.npz", model.fit(rows, rows["a"].to_numpy()))
    rows.assign(y=rows["a"]).to_csv(tmp_path / "new.csv", index=False)
    assert _run("score", tmp_path / "m.npz", tmp_path / "new.csv") == 1
    assert "has no name of its target: use `--target`." in capsys.readouterr().err
    assert _run("score", tmp_path / "m.npz", tmp_path / "new.csv", "--target", "y", "--groups", "b") == 0
    assert "'y' of 60 rows in 60 groups" in capsys.readouterr().out  # the column b is a feature, too


def fitted(folder, frame, capsys, *options):
    """The files of a model of the column "y" of a frame, and of the frame."""
    frame.to_csv(folder / "rows.csv", index=False)
    assert _run("fit", folder / "rows.csv", "--target", "y", "--out", folder / "m.npz", *FAST, *options) == 0
    capsys.readouterr()
    return folder / "m.npz", folder / "rows.csv"


@pytest.mark.parametrize("name", ["who", "the patient"])
def test_score_without_the_groups_of_fit_says_so(name, tmp_path, capsys):
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=60), name: np.repeat(np.arange(12), 5)})
    files = fitted(tmp_path, frame.assign(y=frame["x"]), capsys, "--groups", name)
    quoted = {"who": "who", "the patient": "'the patient'"}[name]
    for option, says_so in (([], True), (["--groups", name], False)):
        assert _run("score", *files, *option) == 0
        out = capsys.readouterr().out
        assert (f"`fit` had groups: without `--groups {quoted}`, the intervals are much too short" in out) == says_so
    files = fitted(tmp_path, frame.assign(y=frame["x"]), capsys)
    assert _run("score", *files) == 0
    assert "had groups" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "score"), [((0.25, 1.5), "R²"), ((False, True), "accuracy"), (("n", "y"), "accuracy")]
)
def test_score_prints_the_importance_of_columns(values, score, tmp_path, capsys, caplog):
    from metaopt import load

    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"noise": rng.normal(size=120), "cause": rng.normal(size=120), "place": rng.normal(size=120)})
    frame["y"] = np.where(frame["cause"] > 0, *values[::-1]).astype(object)
    model, data = fitted(tmp_path, frame, capsys)
    new = frame.assign(place=None)
    new.loc[3:4, "y"] = None  # other labels get another type
    new.to_csv(data, index=False)
    assert _run("score", model, data, "--importance") == 0
    head, *table = capsys.readouterr().out.split("importance: ")[1].splitlines()
    assert head == f"how much the {score} falls if the values of a column are shuffled (mean and sd of 5 shuffles)"
    assert table[0].split() == ["column", "mean", "sd"] and table[1].split()[0] == "cause"
    labels = frame["y"].drop(index=[3, 4]).to_list()
    with _logs.hold_back():
        expected = load(model).importance(new.drop(index=[3, 4], columns="y").astype({"place": float}), labels)
    assert table == expected.to_string(index=False, float_format="{:.4g}".format).splitlines()
    assert caplog.text.count("has no values in any of the") == 1  # not once for each shuffle


def test_score_prints_no_importance_without_the_option(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=60)
    assert _run("score", *fitted(tmp_path, pd.DataFrame({"x": x, "y": x}), capsys)) == 0
    assert "importance" not in capsys.readouterr().out


def test_predict_warns_once_of_columns_that_are_empty_in_all_rows(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 3)), columns=["a", "b", "c"]).assign(d=["u", "v"] * 30)
    model, data = fitted(tmp_path, frame.assign(y=frame["a"]), capsys)
    frame.assign(b=None, d="NA").to_csv(data, index=False)
    assert _run("predict", model, data, "--coverage", 0.9) == 0
    message = "the columns 'b', 'd' have no values in any of the 60 rows, but had values in the rows of `fit`"
    assert capsys.readouterr().err.splitlines() == [message]


def test_a_target_in_accounting_or_with_k_is_printed_with_one_value(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=60)
    accounting = [f"({-v:.2f})" if v < 0 else f"{v:.2f}" for v in x]
    remedy = " If this is wrong, write the numbers without parentheses, k and M."
    for texts in (accounting, [f"{v:.2f}k" for v in 5 + abs(x)], ["950", "1.2k"] * 30, ["5 €", "1.2k €"] * 30):
        pd.DataFrame({"x": x, "y": texts}).to_csv(tmp_path / "rows.csv", index=False)
        assert _run("fit", tmp_path / "rows.csv", "--target", "y", "--out", tmp_path / "m.npz", *FAST) == 0
        text = capsys.readouterr()
        kind = "regression" if len(set(texts)) > 2 else "classification"
        odd = next(t for t in texts if "(" in t or "k" in t)
        assert f"{kind} of 'y'" in text.out
        assert f"The target 'y' is text; '{odd}' is read as " in text.err
        assert (remedy in text.err) == (texts == accounting) and text.err.count("is read as") == 1


def test_the_remedy_of_a_target_ends_before_the_words_that_are_missing(capsys):
    with _logs.hold_back():
        _cli._numbers(pd.Series([f"{k}.5" for k in range(60)] + ["(7)", "unknown"], name="y", dtype=object))
    remedy = "If this is wrong, write the numbers without parentheses, k and M."
    assert capsys.readouterr().err == f"The target 'y' is text; '(7)' is read as -7. {remedy}\n"
