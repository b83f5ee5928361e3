"""The command `metaopt`."""

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets

from metaopt import _cli


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    frame = datasets.load_iris(as_frame=True).frame
    frame["target"] = np.array(["none", "b", "c"])[frame["target"]]  # "none" is a class, and not missing
    frame.iloc[::2].to_csv(folder / "train.csv", index=False, sep=";")
    frame.iloc[1::2].drop(columns="target").to_csv(folder / "new.csv", index=False)
    (folder / "empty.csv").write_text("")
    return folder, frame.iloc[1::2]["target"].to_numpy()


def test_fit_predict_and_leaderboard(files, capsys):
    folder, truth = files
    model = str(folder / "model.npz")
    train = [str(folder / "train.csv"), "--target", "target", "--out", model]
    assert _cli.main(["fit", *train, "--time", "0.001"]) == 0
    assert "classification of 'target' from 4 columns and 75 rows" in capsys.readouterr().out
    out = folder / "predicted.csv"
    assert _cli.main(["predict", model, str(folder / "new.csv"), "--out", str(out)]) == 0
    predicted = pd.read_csv(out, keep_default_na=False)
    assert (predicted["prediction"] == truth).mean() > 0.85
    assert list(predicted.columns[1:]) == [f"probability of {label}" for label in ("b", "c", "none")]
    assert _cli.main(["leaderboard", model]) == 0
    assert "out-of-fold score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "train.csv", "--target", "price", "--out", "m.npz"], "has no column 'price'; it has sepal length"),
        (["fit", "missing.csv", "--target", "y", "--out", "m.npz"], "missing.csv"),
        (["fit", "empty.csv", "--target", "y", "--out", "m.npz"], "is not a CSV file with a header"),
        (
            ["fit", "train.csv", "--target", "target", "--out", "m.npz", "--metric", "f1"],
            "`eval_metric` must be one of",
        ),
        (["predict", "train.csv", "new.csv"], "is not a file that `metaopt.save` wrote"),
    ],
)
def test_errors_give_code_1_and_a_sentence(arguments, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files[0])
    assert _cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_wrong_arguments_give_code_2(capsys):
    with pytest.raises(SystemExit) as error:
        _cli.main(["fit"])
    assert error.value.code == 2


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        _cli.main(["--help"])
    assert end.value.code == 0 and "metaopt fit train.csv --target price" in capsys.readouterr().out


def test_the_doctor_checks_a_gradient_on_this_machine(capsys):
    assert _cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "devices: cpu" in out and "passed" in out


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([0, 1, 2, 1], "classification"),
        ([0.5, 1.0], "regression"),
        (range(30), "regression"),
    ],
)
def test_the_problem_follows_from_the_target(values, problem):
    assert _cli._problem(pd.Series(values)) == problem
