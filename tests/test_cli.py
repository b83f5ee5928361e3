"""The command `metaopt`."""

import importlib.metadata
import logging
import os
import runpy
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets, linear_model

import metaopt
from metaopt import _cli, _doctor, automl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    frame = datasets.load_iris(as_frame=True).frame
    frame["target"] = np.array(["none", "b", "c"])[frame["target"]]  # "none" is a class, and not missing
    frame.iloc[::2].to_csv(folder / "train.csv", index=False, sep=";")
    frame.iloc[1::2].drop(columns="target").to_csv(folder / "new.csv", index=False)
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("x,target\n")
    (folder / "twice.csv").write_text("x,x,y\n1,2,a\n2,3,b\n")
    return folder, frame.iloc[1::2]["target"].to_numpy()


def test_fit_predict_and_leaderboard(files, capsys):
    folder, truth = files
    model = str(folder / "model.npz")
    train = [str(folder / "train.csv"), "--target", "target", "--out", model]
    assert _cli.main(["fit", *train, "--time", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "classification of 'target' from 4 columns and 75 rows" in printed
    assert "has the log loss 1.099" in printed  # log 3: the classes have equal shares
    out = folder / "predicted.csv"
    assert _cli.main(["predict", model, str(folder / "new.csv"), "--out", str(out)]) == 0
    predicted = pd.read_csv(out, keep_default_na=False)
    assert (predicted["prediction"] == truth).mean() > 0.85
    assert list(predicted.columns[1:]) == [f"probability of {label}" for label in ("b", "c", "none")]
    texts = pd.read_csv(folder / "new.csv")
    texts.assign(**{"sepal length (cm)": [f"about {k}" for k in range(len(texts))]}).to_csv(folder / "texts.csv")
    assert _cli.main(["predict", model, str(folder / "texts.csv"), "--out", str(out)]) == 0
    # once, though `predict` and `predict_proba` both see it
    assert capsys.readouterr().err.count("'sepal length (cm)' has") == 1
    assert _cli.main(["leaderboard", model]) == 0
    assert capsys.readouterr().out.split()[:5] == ["model", "score", "weight", "fit_seconds", "predict_seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "train.csv", "--target", "price", "--out", "m.npz"], "has no column 'price'; it has sepal length"),
        (["fit", "missing.csv", "--target", "y", "--out", "m.npz"], "missing.csv"),
        (["fit", "empty.csv", "--target", "y", "--out", "m.npz"], "is not a CSV file with a header"),
        (
            ["fit", "train.csv", "--target", "target", "--out", "m.npz", "--metric", "f1"],
            "`--metric` must be one of",
        ),
        (["fit", "train.csv", "--target", "Target ", "--out", "m.npz"], "Did you mean 'target'?"),
        (["fit", "header.csv", "--target", "target", "--out", "m.npz"], "header.csv has no rows below its header"),
        (["fit", "twice.csv", "--target", "y", "--out", "m.npz"], "more than one column with the name 'x'"),
        (
            ["fit", "train.csv", "--target", "target", "--out", "m.npz", "--models", "linear", "svm"],
            "`--models` must be among network, linear, extra_trees,",
        ),
        (["predict", "train.csv", "new.csv"], "is not a file that `metaopt.save` wrote"),
    ],
)
def test_errors_give_code_1_and_a_sentence(arguments, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files[0])
    assert _cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_gives_code_130_and_a_sentence(files, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    folder, _ = files
    monkeypatch.setattr(automl.AutoClassifier, "fit", interrupted)
    out = folder / "interrupted.npz"
    assert _cli.main(["fit", str(folder / "train.csv"), "--target", "target", "--out", str(out)]) == 130
    assert "ended by Ctrl-C; nothing was written" in capsys.readouterr().err
    assert not out.exists()


def test_wrong_arguments_give_code_2(capsys):
    with pytest.raises(SystemExit) as error:
        _cli.main(["fit"])
    assert error.value.code == 2


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        _cli.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "metaopt fit train.csv --target price" in out
    assert "metaopt score model.npz labeled.csv --groups patient --importance" in out
    for command in ("fit", "predict", "score", "leaderboard", "doctor"):
        with pytest.raises(SystemExit):
            _cli.main([command, "--help"])
        examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        assert examples and all(line.startswith(f"  metaopt {command}") for line in examples)


def test_help_states_which_columns_are_not_features(capsys):
    with pytest.raises(SystemExit):
        _cli.main(["fit", "--help"])
    options = " ".join(capsys.readouterr().out.split()).partition(" --target ")[2]
    for option, following in (("groups", "order"), ("order", "drop")):
        text = options.partition(f" --{option} ")[2].partition(f" --{following} ")[0]
        assert text.endswith("; the column is not a feature")


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["leaderboard", "missing.npz"], 1), (["fit"], 2)])
def test_python_m_metaopt_is_the_command(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["metaopt", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("metaopt", run_name="__main__")
    assert end.value.code == code
    text = capsys.readouterr()
    assert ("usage: metaopt" if code != 1 else "missing.npz") in text.out + text.err


def test_the_doctor_finds_a_package_under_its_other_name(monkeypatch):
    versions = {"jax": "0.10", "xgboost-cpu": "3.2"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert [_doctor.installed_version(name) for name in ("jax", "xgboost", "numpy")] == [
        "0.10",
        "3.2",
        "is not installed",
    ]


def test_the_doctor_checks_a_gradient_on_this_machine(capsys):
    assert _cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "devices: cpu" in out and "passed" in out


def test_the_doctor_lists_packages_that_are_not_installed(monkeypatch, capsys):
    version = importlib.metadata.version

    def without(name):
        if name in ("skops", "catboost"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert _cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'skops is not installed; the extra "automl" installs it' in lines
    assert 'catboost is not installed; the extra "catboost" installs it' in lines
    assert all(f"{name} {version(name)}" in lines for name in ("pandas", "joblib", "cloudpickle"))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([0, 1, 2, 1], "classification"),
        ([0.5, 1.0], "regression"),
        (range(20), "classification"),
        (range(21), "regression"),
    ],
)
def test_the_problem_follows_from_the_target(values, problem):
    assert _cli._problem(pd.Series(values)) == problem


def _run(*arguments):
    return _cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a model of a table with ids, texts that look like numbers, and dates."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": rng.permutation(200) + 1, "code": rng.choice(["01", "02", "1", "A"], 200)})
    frame["x"], frame["day"] = rng.normal(size=200), pd.date_range("2020-01-01", periods=200).strftime("%d/%m/%Y")
    frame["y"] = np.where(frame["code"] == "01", 2.0, 0.0) + frame["x"] + 0.1 * rng.normal(size=200)
    frame.to_csv(folder / "train.csv", index=False)
    train = [folder / "train.csv", "--target", "y", "--order", "day", "--out", folder / "model.npz"]
    assert _run("fit", *train, "--time", 0.001) == 0
    return folder, frame


@pytest.mark.parametrize("num", [5, 5_000])  # less and more than a buffer of the output
def test_a_reader_that_ends_early_is_no_error(shop, num):
    """As in `metaopt predict ... | head`."""
    folder, frame = shop
    frame.iloc[np.arange(num) % len(frame)].to_csv(folder / "many.csv", index=False)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    predict = [sys.executable, "-m", "metaopt", "predict", folder / "model.npz", folder / "many.csv"]
    command = subprocess.Popen(predict, env=buffered, **pipes)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 0
    command.stderr.close()


def test_new_files_may_have_other_columns_and_another_order(shop, capsys):
    folder, frame = shop
    new = frame[frame["code"].isin(["01", "02"])]  # all codes look like numbers: "01" is not 1
    variants = [new, new[new.columns[::-1]], new.drop(columns=["id", "day", "y"]).assign(more=1)]
    predictions = []
    for i, variant in enumerate(variants):
        variant.to_csv(folder / "new.csv", index=False, sep=",;|"[i])
        assert _run("predict", folder / "model.npz", folder / "new.csv", "--out", folder / "p.csv") == 0
        predictions.append(pd.read_csv(folder / "p.csv")["prediction"].to_numpy())
    np.testing.assert_array_equal(predictions[0], predictions[1])
    np.testing.assert_array_equal(predictions[0], predictions[2])
    assert np.corrcoef(predictions[0], new["y"])[0, 1] > 0.95
    new.drop(columns="code").to_csv(folder / "new.csv", index=False)
    assert _run("predict", folder / "model.npz", folder / "new.csv") == 1
    assert (
        "has no column 'code', which the model needs. If it was renamed, it may be 'day', 'y'."
        in capsys.readouterr().err
    )
    new[["code", "x"]].head(0).to_csv(folder / "new.csv", index=False)
    assert _run("predict", folder / "model.npz", folder / "new.csv") == 1
    assert "new.csv has no rows below its header." in capsys.readouterr().err


def test_with_strict_a_file_with_warnings_gives_code_4_and_no_predictions(shop, capsys, caplog):
    folder, frame = shop
    out, far = folder / "strict.csv", folder / "far.csv"
    frame.to_csv(folder / "near.csv", index=False)
    frame.assign(x=1e3 * frame["x"] + 9).to_csv(far, index=False)
    caplog.set_level(logging.ERROR, "metaopt.tasks")  # the code does not depend on the level
    predict = "predict", folder / "model.npz"
    assert _run(*predict, folder / "near.csv", "--strict", "--out", out) == 0
    before = out.read_bytes()
    assert _run(*predict, far, "--strict", "--out", out) == 4 and out.read_bytes() == before
    warning, end = capsys.readouterr().err.splitlines()
    assert warning.startswith("the column 'x' has ") and end.startswith("metaopt: no predictions are written, because")
    assert _run(*predict, far, "--strict") == 4 and capsys.readouterr().out == ""
    assert _run(*predict, far, "--out", out) == 0 and out.read_bytes() != before
    assert capsys.readouterr().err.splitlines() == [warning]


def test_kept_columns_are_copied_to_the_front_of_the_output(shop, capsys):
    folder, frame = shop
    model, new, out = folder / "model.npz", folder / "kept.csv", folder / "p.csv"
    rows = frame.head(12).assign(name=[f"{k:03}" if k else "" for k in range(12)], size="1.50", lower=0)
    rows.to_csv(new, index=False)
    assert _run("predict", model, new, "--coverage", 0.9, "--keep", "name", "size", "--keep", "code", "--out", out) == 0
    table = pd.read_csv(out, dtype=str, keep_default_na=False)
    assert list(table.columns) == ["name", "size", "code", "prediction", "lower", "upper"]
    assert all(table[name].tolist() == rows[name].tolist() for name in ("name", "size", "code"))
    before = out.read_bytes()
    for options, message in (
        (["--keep", "number"], "kept.csv has no column 'number'; it has id, code"),
        (
            ["--coverage", 0.9, "--keep", "lower"],
            "`--keep` cannot copy 'lower': predictions have a column of this name",
        ),
    ):
        assert _run("predict", model, new, *options, "--out", out) == 1 and out.read_bytes() == before
        assert message in capsys.readouterr().err
    assert _run("predict", model, new, "--keep", "lower", "--out", out) == 0  # without intervals
    assert list(pd.read_csv(out).columns) == ["lower", "prediction"]


@pytest.mark.parametrize("options", [[], ["--coverage", 0.9]])
def test_predict_calls_each_model_once(options, files, tmp_path, monkeypatch):
    train = [files[0] / "train.csv", "--target", "target", "--out", tmp_path / "m.npz", "--models", "linear"]
    assert _run("fit", *train, "--time", 0.001) == 0
    num_rows, predict_proba = [], linear_model.LogisticRegression.predict_proba

    def counted(self, X):
        num_rows.append(len(X))
        return predict_proba(self, X)

    monkeypatch.setattr(linear_model.LogisticRegression, "predict_proba", counted)
    assert _run("predict", tmp_path / "m.npz", files[0] / "new.csv", *options) == 0
    assert num_rows == [2] * 8 + [75] * 8  # of the check of the file, and of the new rows


def test_the_delimiter_of_a_file_with_one_row_is_that_of_its_header(shop, capsys):
    folder, frame = shop
    frame[["code", "x"]].head(1).to_csv(folder / "one.csv", index=False, sep=";")
    assert _run("predict", folder / "model.npz", folder / "one.csv") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_column_of_dates_orders_the_rows_by_time(shop):
    from metaopt import load

    model = load(shop[0] / "model.npz")
    rows = shop[1].index[np.isnan(model.ensemble_.out_of_fold)]  # rows are in order of time
    assert len(model.ensemble_.inputs) == 1 and rows.max() < 30


def test_files_that_are_read_are_not_replaced(shop, capsys):
    folder, frame = shop
    data, model = folder / "train.csv", folder / "model.npz"
    before = data.read_bytes(), model.read_bytes()
    assert _run("fit", data, "--target", "y", "--out", data, "--time", 0.001) == 1
    assert _run("predict", model, data, "--out", data) == 1
    assert _run("predict", model, data, "--out", model) == 1
    assert capsys.readouterr().err.count("`--out` is the input file") == 3
    assert _run("fit", data, "--target", "y", "--out", folder / "none" / "m.npz") == 1
    assert "must be a file in a folder that exists" in capsys.readouterr().err
    assert (data.read_bytes(), model.read_bytes()) == before


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1,065", "870", "2,000"], [1065, 870, 2000]),
        (["1,5", "2,25", "1,0"], [1.5, 2.25, 1]),
        (["1.5", "NA", "2.5"], [1.5, np.nan, 2.5]),
        ([str(10**9 + i) for i in range(30)], [10**9 + i for i in range(30)]),
        (
            [f"{2**53}", "NA", f"{2**53 + 1}"],
            [f"{2**53}", np.nan, f"{2**53 + 1}"],
        ),  # float64 would merge the two classes
        (["a", "1", "b"], ["a", "1", "b"]),
        (["none", "b", "none"], ["none", "b", "none"]),
        ([True, False, True], [True, False, True]),
    ],
)
def test_a_target_of_texts_becomes_numbers_if_all_are(values, expected):
    target = pd.Series(values, index=range(5, 5 + len(values)))
    numbers, _ = _cli._numbers(target)
    assert list(numbers.index) == list(target.index)
    pd.testing.assert_series_equal(numbers, pd.Series(expected, index=target.index), check_dtype=False)


def test_rows_without_a_target_are_named_and_left_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=60)})
    frame["y"] = (2 * frame["x"]).round(3).astype(object)
    frame.loc[3:5, "y"], frame.loc[6:7, "y"] = "NA", None
    frame.to_csv(tmp_path / "train.csv", index=False)
    arguments = [tmp_path / "train.csv", "--target", "y", "--out", tmp_path / "m.npz", "--time", 0.001]
    assert _run("fit", *arguments) == 0
    text = capsys.readouterr()
    assert "5 rows have no valid target (such as 'NA'); they are not used" in text.err
    assert "regression of 'y' from 1 columns and 55 rows" in text.out


def test_a_blank_line_of_a_file_with_one_column_is_a_row(tmp_path):
    (tmp_path / "one.csv").write_text("a\n1\n\n3\n")
    (tmp_path / "two.csv").write_text("a,b\n1,2\n\n3,4\n")
    assert _cli._read(tmp_path / "one.csv")["a"].tolist()[::2] == [1, 3]
    assert len(_cli._read(tmp_path / "two.csv")) == 2


def test_options_reach_the_estimator(tmp_path, capsys):
    from metaopt import load

    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 12)
    frame = pd.DataFrame({"x": rng.normal(size=60), "who": groups, "one": 1, "y": rng.integers(0, 2, 60)})
    frame.to_csv(tmp_path / "train.csv", index=False)
    train = [tmp_path / "train.csv", "--target", "y", "--out", tmp_path / "m.npz", "--time", 0.002]
    more = ["--groups", "who", "--metric", "mae", "--problem", "regression", "--preset", "best", "--seed", 3]
    more += ["--models", "extra_trees", "linear"]
    assert _run("fit", *train, *more) == 0
    model = load(tmp_path / "m.npz")
    params = {
        name: model.get_params()[name] for name in ("time_limit", "eval_metric", "preset", "random_state", "models")
    }
    assert params.pop("models") == ("extra_trees", "linear")
    assert params == {"time_limit": 0.002, "eval_metric": "mae", "preset": "best", "random_state": 3}
    assert len(model.ensemble_.inputs) == 5  # one fold for each group
    assert list(model.feature_names_in_) == ["x", "one"]
    out = capsys.readouterr().out
    assert "one dropped is constant" in " ".join(out.split()) and "linear" in out
    for option, is_shown in (([], False), (["--report"], True)):
        assert _run("leaderboard", tmp_path / "m.npz", *option) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "model score weight fit_seconds" in out and ("one dropped is constant" in out) == is_shown


def test_probabilities_are_in_the_columns_of_their_labels(files, tmp_path, capsys):
    folder, truth = files
    train = [folder / "train.csv", "--target", "target", "--out", tmp_path / "m.npz", "--time", 0.001]
    assert _run("fit", *train) == 0
    capsys.readouterr()
    assert _run("predict", tmp_path / "m.npz", folder / "new.csv") == 0
    (tmp_path / "p.csv").write_text(capsys.readouterr().out)
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    probability = table.drop(columns="prediction")
    best = probability.idxmax(axis=1).str.removeprefix("probability of ")
    assert list(best) == list(table["prediction"]) and len(table) == len(truth)
    np.testing.assert_allclose(probability.sum(axis=1), 1)


def test_coverage_adds_the_sets_or_the_intervals_of_the_estimator(files, shop, tmp_path, capsys):
    from metaopt import load

    train = [files[0] / "train.csv", "--target", "target", "--out", tmp_path / "m.npz", "--time", 0.001]
    assert _run("fit", *train) == 0
    tables = {}
    for kind, model, new in (
        ("set", tmp_path / "m.npz", files[0] / "new.csv"),
        ("interval", shop[0] / "model.npz", shop[0] / "train.csv"),
    ):
        assert _run("predict", model, new, "--coverage", 0.98, "--out", tmp_path / "p.csv") == 0
        tables[kind] = load(model), pd.read_csv(new), pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    model, rows, table = tables["set"]
    inside = table[[f"{label} in the set" for label in ("b", "c", "none")]].to_numpy()
    np.testing.assert_array_equal(inside, model.predict_set(rows, coverage=0.98))
    assert inside.sum() > len(rows)  # else every coverage has these sets
    model, rows, table = tables["interval"]
    ends = model.predict_interval(rows[list(model.feature_names_in_)], coverage=0.98)
    np.testing.assert_allclose(table[["lower", "upper"]], ends)
    assert _run("predict", shop[0] / "model.npz", shop[0] / "train.csv", "--coverage", 90) == 1
    assert "`coverage` must be" in capsys.readouterr().err


def test_a_file_of_another_kind_is_no_model(tmp_path, capsys):
    from metaopt import save, tasks

    save(tmp_path / "split.json", tasks.Split({"train": {"a": {}}, "test": {"b": {}}}))
    assert _run("leaderboard", tmp_path / "split.json") == 1
    assert "holds a Split, and not a model" in capsys.readouterr().err


def test_only_empty_fields_are_missing_and_a_byte_order_mark_is_no_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfa,b\nNone,1\n,2\nNA,\n")
    table = _cli._read(tmp_path / "a.csv")
    assert list(table.columns) == ["a", "b"]
    assert table["a"].isna().tolist() == [False, True, False] and table["b"].isna().tolist() == [False, False, True]


def test_the_doctor_returns_3_for_a_wrong_gradient(monkeypatch, capsys):
    from types import SimpleNamespace

    from metaopt import hypergrad

    # The gradient that the command checks is correct.
    monkeypatch.setattr(hypergrad, "check", lambda *_: SimpleNamespace(passed=False))
    assert _run("doctor") == 3


@pytest.mark.parametrize(
    ("text", "columns", "first"),
    [
        ("Length, cm;Width, cm;Price\n1.5;2.5;3\n", ["Length, cm", "Width, cm", "Price"], [1.5, 2.5, 3]),
        ("Length, cm;Width, cm;Price\n1,5;2,5;3\n", ["Length, cm", "Width, cm", "Price"], ["1,5", "2,5", 3]),
        ("\n\na\n1\n2\n", ["a"], [1]),
        ("\tvalue\n0\t1.5\n", ["Unnamed: 0", "value"], [0, 1.5]),
        ("a,b\n1,2\n", ["a", "b"], [1, 2]),
        ("  \n\na,b\n1,2\n", ["a", "b"], [1, 2]),
        ("Length, cm, outer;Price\n1.5;3\n2.5;4\n", ["Length, cm, outer", "Price"], [1.5, 3]),
    ],
)
def test_the_delimiter_and_the_header_are_found(text, columns, first, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(text)
    frame = _cli._read(path)
    assert list(frame.columns) == columns and frame.iloc[0].tolist() == first


@pytest.mark.parametrize("package", ["pandas", "sklearn"])
def test_a_missing_package_names_the_extra(package, shop, monkeypatch, capsys):
    folder, _ = shop
    monkeypatch.setitem(sys.modules, package, None)
    for command in (["predict", folder / "model.npz", folder / "train.csv"], ["leaderboard", folder / "model.npz"]):
        assert _run(*command) == 1
        err = capsys.readouterr().err
        assert f"needs {package}" in err and "pip install -e '.[automl]'".replace("'", '"') in err


def test_a_missing_library_of_a_model_names_the_extra(shop, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skops.io", None)
    assert _run("leaderboard", shop[0] / "model.npz") == 1
    assert "The file has a model linear: install the extra" in capsys.readouterr().err


def test_a_target_that_never_repeats_is_one_clear_error(tmp_path, capsys, caplog):
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=60), "who": [f"row {i}" for i in range(60)]})
    frame.to_csv(tmp_path / "train.csv", index=False)
    assert _run("fit", tmp_path / "train.csv", "--target", "who", "--out", tmp_path / "m.npz", "--time", 0.001) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "each of the 60 classes has one row only" in line and not caplog.messages


def test_scores_have_a_metric_a_unit_and_the_models_that_are_missing(shop, capsys):
    from metaopt import load

    model = load(shop[0] / "model.npz")
    assert _run("leaderboard", shop[0] / "model.npz") == 0
    assert "not fitted" not in capsys.readouterr().out
    assert _run("leaderboard", shop[0] / "model.npz", "--report") == 0
    out = capsys.readouterr().out
    assert "score: minus rmse, in standard deviations of the target, out of fold; larger is better" in out
    assert f"; rmse {-model.score_ * shop[1]['y'].std(ddof=0):.4g} in units of the target" in out
    assert (
        "not fitted: network" in out
        and out.count("would take longer than the time left") == 1
        and "network" in model.not_fitted_
    )


def test_commas_of_a_file_with_semicolons_are_decimal_marks(tmp_path, capsys):
    rows = "".join(f"{1 + i % 7},{i:03d};{2 + i % 5},{7 * i:03d};{'ab'[i % 2]}\n" for i in range(60))
    (tmp_path / "train.csv").write_text(f"weight;price;y\n{rows}")
    out = tmp_path / "m.npz"
    options = ("--out", out, "--models", "linear", "--preset", "instant")
    assert _run("fit", tmp_path / "train.csv", "--target", "y", *options) == 0
    assert "rows of each class: a 30, b 30" in capsys.readouterr().out
    weight = metaopt.load(out).encoder_.columns[0]
    assert weight.name == "weight" and weight.high == 7.055
    assert _run("fit", tmp_path / "train.csv", "--target", "price", *options) == 0
    printed = capsys.readouterr()
    assert "is read as 2" in printed.err and "is read as 2000" not in printed.err


def test_an_excel_file_is_named(tmp_path, capsys):
    (tmp_path / "train.xlsx").write_bytes(b"PK\x03\x04\x14\x8e\xff")
    assert _run("fit", tmp_path / "train.xlsx", "--target", "y", "--out", tmp_path / "m.npz") == 1
    assert "is an Excel file: save it there as 'CSV UTF-8'" in capsys.readouterr().err


def test_a_file_in_latin_1_is_named(tmp_path, capsys):
    (tmp_path / "train.csv").write_bytes("größe,y\n1,2\n".encode("latin-1"))
    assert _run("fit", tmp_path / "train.csv", "--target", "y", "--out", tmp_path / "m.npz") == 1
    assert "is not in UTF-8: save it as UTF-8" in capsys.readouterr().err


def test_score_compares_with_the_target_of_the_file(files, tmp_path, capsys):
    from metaopt import load

    folder, truth = files
    train = [folder / "train.csv", "--target", "target", "--out", tmp_path / "m.npz", "--models", "linear"]
    assert _run("fit", *train, "--time", 0.001) == 0
    new = pd.read_csv(folder / "new.csv").assign(target=truth)
    labels = truth.copy()
    labels[:2] = None
    new[new.columns[::-1]].assign(target=labels).to_csv(tmp_path / "labeled.csv", index=False, sep=";")
    capsys.readouterr()
    assert _run("score", tmp_path / "m.npz", tmp_path / "labeled.csv", "--coverage", 0.9) == 0
    text = capsys.readouterr()
    assert "2 rows have no valid target; they are not used." in text.err
    head, *table = text.out.splitlines()
    assert head == "'target' of 73 rows; lower and upper: 90 % interval"
    expected = load(tmp_path / "m.npz").evaluate(new[2:].drop(columns="target"), truth[2:], coverage=0.9)
    assert table == expected.to_string(index=False, float_format="{:.4g}".format).splitlines()
    for frame, message in (
        (new.drop(columns="target"), "labeled.csv has no column 'target'; it has sepal length"),
        (new.replace("b", "B"), "25 of 75 rows have a label that did not occur in `fit`, such as 'B'"),
        (new.assign(target=None), "No row has a valid value in the target column 'target'."),
    ):
        frame.to_csv(tmp_path / "labeled.csv", index=False)
        assert _run("score", tmp_path / "m.npz", tmp_path / "labeled.csv") == 1
        assert message in capsys.readouterr().err


def test_dropped_columns_are_no_features(files, tmp_path, capsys):
    from metaopt import load

    train = [files[0] / "train.csv", "--target", "target", "--out", tmp_path / "m.npz", "--models", "linear"]
    assert _run("fit", *train, "--time", 0.001, "--drop", "sepal length (cm)", "--drop", "sepal width (cm)") == 0
    assert load(tmp_path / "m.npz").feature_names_in_.tolist() == ["petal length (cm)", "petal width (cm)"]
    capsys.readouterr()
    for name, message in (
        ("nothing", "train.csv has no column 'nothing'; it has"),
        ("target", "`--drop` must leave the target, and at least one column as a feature."),
    ):
        assert _run("fit", *train, "--time", 0.001, "--drop", name) == 1
        assert message in capsys.readouterr().err
