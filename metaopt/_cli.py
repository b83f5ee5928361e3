"""The command `metaopt`: models for CSV files, and a check of this machine.

Exit codes: 0 success, 1 an error that the message explains, 2 wrong arguments, 3 `doctor` found a wrong gradient,
4 `predict --strict` found warnings about the data, 130 Ctrl-C.
"""

import argparse
import csv
import difflib
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from metaopt import _doctor, _logs

_EXAMPLES = """examples:
  metaopt fit train.csv --target price --time 60 --out model.npz
  metaopt predict model.npz new.csv --coverage 0.9 --out predictions.csv
  metaopt score model.npz labeled.csv
  metaopt score model.npz labeled.csv --groups patient --importance
  metaopt leaderboard model.npz
  metaopt doctor

exit codes: 0 success, 1 error, 2 wrong arguments, 3 wrong gradient (doctor), 4 warnings (predict --strict), 130 Ctrl-C
"""

_OPTIONS = {
    "eval_metric": "--metric",
    "groups": "--groups",
    "models": "--models",
    "score_": "the score",
    "time": "--order",
    "time_limit": "--time",
}  # by the names of arguments
_MOST_CLASSES = 20  # a target of whole numbers with more different values is numeric


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the arguments of the command line; by default those of this process.

    Returns:
      The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        # Otherwise Python writes the rest of the output when it exits, and reports the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("metaopt: ended by Ctrl-C; nothing was written.", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"metaopt: {_with_options(str(error))}", file=sys.stderr)
        return 1


def _with_options(text: str) -> str:
    """A message of the library, with the options of the command line in place of the names of arguments."""
    for name, option in _OPTIONS.items():
        text = text.replace(f"`{name}`", f"`{option}`")
    return text


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    purpose = "Models for tables, with learned hyperparameters."
    parser = argparse.ArgumentParser("metaopt", description=purpose, epilog=_EXAMPLES, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="command")
    columns: Any = {"nargs": "+", "action": "extend", "metavar": "COLUMN", "default": []}

    fit = commands.add_parser("fit", help="fit models to a CSV file and save them")
    fit.add_argument("data", type=Path, help="a CSV file with a header")
    fit.add_argument("--target", required=True, help="the column to predict")
    fit.add_argument("--out", type=Path, required=True, help="the file to write")
    fit.add_argument("--time", type=float, default=60.0, help="seconds for the fit (default: 60)")
    fit.add_argument(
        "--preset",
        default="balanced",
        help="instant (only networks; the first one is finished even after the limit), balanced (default), best",
    )
    fit.add_argument("--problem", choices=("classification", "regression"), help="by default, from the target")
    fit.add_argument("--metric", help="what to maximize (default: log_loss or rmse)")
    fit.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="kinds of models, such as: linear lightgbm (default: all of the preset)",
    )
    fit.add_argument(
        "--groups",
        help="a column of groups, such as patients; rows of one group are never split between folds; the column is not "
        "a feature",
    )
    fit.add_argument(
        "--order", help="a column of times: models are validated on later rows; the column is not a feature"
    )
    fit.add_argument("--drop", **columns, help="columns that are not features, such as a leak of the target")
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=_fit)

    predict = commands.add_parser("predict", help="predict the rows of a CSV file")
    predict.add_argument("model", type=Path, help="a file that `metaopt fit` wrote")
    predict.add_argument("data", type=Path, help="a CSV file with the same columns")
    predict.add_argument("--out", type=Path, help="the CSV file to write (default: standard output)")
    predict.add_argument(
        "--coverage",
        type=float,
        help="also write, for each row, an interval (lower, upper) or a set of labels that contains the true value "
        "with this probability, such as 0.9",
    )
    predict.add_argument("--keep", **columns, help="columns, such as an id, to copy to the front of the output")
    predict.add_argument(
        "--strict",
        action="store_true",
        help="if there are warnings about the columns of the file, write no predictions and exit with code 4",
    )
    predict.set_defaults(run=_predict)

    _add_score(commands)

    leaderboard = commands.add_parser("leaderboard", help="show the models of a saved file with their scores")
    leaderboard.add_argument("model", type=Path, help="a file that `metaopt fit` wrote")
    leaderboard.add_argument(
        "--report", action="store_true", help="also the columns that were changed, and the models that were not fitted"
    )
    leaderboard.set_defaults(run=_leaderboard)

    doctor = commands.add_parser("doctor", help="show versions and devices, and check a gradient on this machine")
    doctor.set_defaults(run=lambda _: _doctor.doctor())
    for name, command in commands.choices.items():
        lines = [line for line in _EXAMPLES.splitlines() if f"metaopt {name}" in line]
        command.epilog, command.formatter_class = "\n".join(["examples:", *lines]), layout
    return parser


def _add_score(commands: Any) -> None:
    score = commands.add_parser("score", help="compare predictions with the target column of a CSV file")
    score.add_argument("model", type=Path, help="a file that `metaopt fit` wrote")
    score.add_argument("data", type=Path, help="a CSV file with the same columns and the target")
    score.add_argument("--target", help="the column of the true values (default: the target of `metaopt fit`)")
    score.add_argument(
        "--groups",
        help="a column of groups, such as patients, for the intervals, which are much too short without it if rows of "
        "a group are alike; give it if `fit` had groups",
    )
    score.add_argument("--coverage", type=float, default=0.95, help="of the intervals (default: 0.95)")
    score.add_argument(
        "--importance",
        action="store_true",
        help="also how much the accuracy or R² falls if the values of a column are shuffled",
    )
    score.set_defaults(run=_score)


def _fit(options: argparse.Namespace) -> int:
    import numpy as np

    from metaopt import _saving, automl

    _require_packages()
    _check_out(options.out, options.data)  # before the long fit
    frame = _read(options.data)
    if not len(frame):
        raise ValueError(f"{options.data} has no rows below its header.")
    special = [name for name in (options.target, options.groups, options.order) if name is not None]
    _check_columns(options.data, frame, [*special, *options.drop])
    features = frame.drop(columns=[*special, *options.drop])
    if options.target in options.drop or not len(features.columns):
        raise ValueError("`--drop` must leave the target, and at least one column as a feature.")
    target, target_encoder = _target(frame[options.target], as_labels=options.problem == "classification")
    frame, features = frame.loc[target.index], features.loc[target.index]
    problem = options.problem or _problem(target)
    kind = automl.AutoClassifier if problem == "classification" else automl.AutoRegressor
    model: Any = kind(
        time_limit=options.time,
        preset=options.preset,
        eval_metric=options.metric,
        models=None if options.models is None else tuple(options.models),
        random_state=options.seed,
    )
    model._decimal = frame.attrs["decimal"]
    extra = {"groups": options.groups, "time": options.order}
    model.fit(features, target, **{name: frame[column] for name, column in extra.items() if column})
    model.target_encoder_ = target_encoder
    _saving.save(options.out, model)
    print(f"{problem} of {options.target!r} from {model.n_features_in_} columns and {len(frame)} rows")
    if problem == "classification":
        counts = target.value_counts()
        shown = ", ".join(f"{label} {count}" for label, count in counts.head(_MOST_CLASSES).items())
        print(f"rows of each class: {shown}{', ...' if len(counts) > _MOST_CLASSES else ''}")
        shares = counts / len(target)
        print(f"a prediction of these shares for every row has the log loss {-(shares * np.log(shares)).sum():.4g}")
    _print_models(model, report=True)
    print(f"written to {options.out}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    pandas = _require_packages()
    model = _load(options.model)
    if options.out is not None:
        _check_out(options.out, options.data, options.model)
    frame, kept = _read_rows(options.data, model), _kept(options.data, options.keep)
    with _logs.hold_back() as messages:
        try:
            columns = _prediction_columns(model, frame, options.coverage)
        finally:
            for message in messages:
                print(message, file=sys.stderr)
    if options.strict and messages:
        print("metaopt: no predictions are written, because `--strict` does not allow warnings.", file=sys.stderr)
        return 4
    if clash := [name for name in kept if name in columns]:
        raise ValueError(
            f"`--keep` cannot copy {clash[0]!r}: predictions have a column of this name. Rename it in {options.data}."
        )
    result = pandas.DataFrame(kept | columns)
    result.to_csv(sys.stdout if options.out is None else options.out, index=False)
    return 0


def _prediction_columns(model: Any, frame: Any, coverage: float | None) -> dict[str, Any]:
    """The columns that `metaopt predict` writes, by name. The models predict the rows only once."""
    if not hasattr(model, "predict_proba"):
        columns = {"prediction": model.predict(frame)}
        if coverage is not None:
            columns["lower"], columns["upper"] = model._intervals(columns["prediction"], coverage).T
        return columns
    probabilities = model.predict_proba(frame)
    columns = {"prediction": model._labels(probabilities)}
    columns |= {f"probability of {c}": p for c, p in zip(model.classes_, probabilities.T, strict=True)}
    if coverage is not None:
        sets = model._label_sets(probabilities, coverage)
        columns |= {f"{c} in the set": inside for c, inside in zip(model.classes_, sets.T, strict=True)}
    return columns


def _kept(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The columns of `--keep` by name, as texts: "007" is not a number here."""
    if not names:
        return {}
    frame = _read(path, names)
    _check_columns(path, frame, names)
    return {name: frame[name] for name in names}


def _score(options: argparse.Namespace) -> int:
    _require_packages()
    model = _load(options.model)
    name = options.target or model.target_name_
    if name is None:
        raise ValueError(f"{options.model} has no name of its target: use `--target`.")
    kind = model.classes_.dtype.kind if hasattr(model, "classes_") else "f"
    as_labels = kind not in "iuf"
    special = [name] if options.groups is None else [name, options.groups]
    frame = _read_rows(options.data, model, special, texts=[name] if kind == "U" else [])
    target, _ = _target(frame[name], as_labels=as_labels, encoder=model.target_encoder_)
    frame = frame.loc[target.index]
    groups = None if options.groups is None else frame[options.groups]
    is_feature = model.encoder_.named and options.groups in model.encoder_.input_names
    rows = frame.drop(columns=special[:1] if is_feature else special)
    table = model.evaluate(rows, target, groups=groups, coverage=options.coverage)
    unit = "rows" if groups is None else f"rows in {groups.nunique()} groups"
    print(f"{name!r} of {len(target)} {unit}; lower and upper: {100 * options.coverage:g} % interval")
    _print_table(table)
    if groups is None and model.group_name_ is not None:
        option = f"--groups {shlex.quote(model.group_name_)}" if model.group_name_ else "--groups"
        print(f"`fit` had groups: without `{option}`, the intervals are much too short if rows of a group are alike.")
    if options.importance:
        _print_importance(model, rows, target)
    return 0


def _print_importance(model: Any, rows: Any, target: Any) -> None:
    is_classifier = hasattr(model, "classes_")
    # Labels of the type of `classes_`: those of a file with gaps have another type.
    labels = model.classes_[model._target_codes(target.to_numpy())] if is_classifier else target
    with _logs.hold_back():  # `evaluate` has logged the same warnings
        table = model.importance(rows, labels)
    score = "accuracy" if is_classifier else "R²"
    print(
        f"\nimportance: how much the {score} falls if the values of a column are shuffled (mean and sd of 5 shuffles)"
    )
    _print_table(table)


def _print_table(table: Any) -> None:
    print(table.to_string(index=False, float_format="{:.4g}".format))


def _leaderboard(options: argparse.Namespace) -> int:
    _require_packages()
    _print_models(_load(options.model), report=options.report)
    return 0


def _print_models(model: Any, *, report: bool) -> None:
    """Prints the leaderboard, and the score of the ensemble with its metric and unit.

    The report lists the columns that were changed or dropped, and the models that were not fitted.
    """
    metric = model._metric()
    if report and len(model.report_):
        print(_with_options(model.report_.to_string(index=False)))
    _print_table(model.leaderboard_)
    if report and model.not_fitted_:
        names: dict[str, list[str]] = {}  # by reason
        for name, reason in model.not_fitted_.items():
            names.setdefault(reason, []).append(name)
        print("not fitted:", "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items()))
    value = f"score of the ensemble: {model.score_:.4g}"
    if metric in ("rmse", "mae"):
        value += f"; {metric} {-model.score_ * model.scale_:.4g} in units of the target"
    print(f"{value}\nscore: {model._score_name()}, out of fold; larger is better")


def _require_packages() -> Any:
    """Returns pandas. Raises ImportError, naming the extra, if it or scikit-learn is not installed."""
    from metaopt import _extras

    _extras.require("sklearn", "automl", "The command `metaopt`")
    return _extras.require("pandas", "automl", "The command `metaopt`")


def _load(path: Path) -> Any:
    from metaopt import _saving

    model = _saving.load(path)
    if not hasattr(model, "ensemble_"):
        raise ValueError(f"{path} holds a {type(model).__name__}, and not a model that `metaopt fit` wrote.")
    return model


def _check_out(out: Path, *inputs: Path) -> None:
    """Raises ValueError if `out` is not a file in an existing folder, or is one of the input files."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"`--out` must be a file in a folder that exists; got {out}.")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"`--out` is the input file {path}, and would replace it; choose another name.")


def _check_columns(path: Path, frame: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame.columns:
            by_letters = {str(column).strip().casefold(): column for column in frame.columns}
            close = difflib.get_close_matches(name.strip().casefold(), by_letters, n=1)
            meant = f" Did you mean {by_letters[close[0]]!r}?" if close else ""
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(map(str, frame.columns))}.{meant}")


def _read_rows(path: Path, model: Any, special: Sequence[str] = (), texts: Collection[str] = ()) -> Any:
    """Reads new rows for a model. The result has the model's columns, in the model's order, and those of `special`.

    Columns that the model dropped may be missing in the file. The columns of `texts` are not read as numbers.
    """
    encoder = model.encoder_
    names = encoder.input_names
    texts = [*texts, *(names[code.source] for code in encoder.columns if code.levels or code.reading)]
    frame = _read(path, texts)  # a level such as "01" stays a text, even if all new rows have numbers
    if not len(frame):
        raise ValueError(f"{path} has no rows below its header.")
    _check_columns(path, frame, special)
    if not encoder.named:
        return frame
    needed = dict.fromkeys(names[code.source] for code in encoder.columns)
    if missing := [name for name in needed if name not in frame.columns]:
        # The column of groups is no feature, and stays in new files.
        others = [name for name in frame.columns if name not in (*names, model.group_name_)][:5]
        renamed = f" If it was renamed, it may be {', '.join(map(repr, others))}." if others else ""
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}, which the model needs.{renamed}")
    return frame.reindex(columns=list(dict.fromkeys([*names, *special])))


def _read(path: Path, texts: Collection[str] = ()) -> Any:
    """Reads a CSV file. Only empty fields count as missing here; the encoder interprets words such as "NA".

    The delimiter is one of ";", tab, "|" and ",". A delimiter that splits the header into several fields is preferred.
    Among these, one is preferred that gives the next lines as many fields as the header, and then the one that gives
    the header most fields. The columns of `texts` are not read as numbers. If semicolons separate the fields, the comma
    is the decimal mark of numbers that can be read with either; `attrs` of the result says so.
    """
    pandas = _require_packages()
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        start = file.read(65536).splitlines(keepends=True)
    num_blank = next((i for i, line in enumerate(start) if line.strip(" \r\n")), 0)
    # Of equal fits, `max` returns the first one. The comma is last, because it may be in numbers, too.
    fit_by_delimiter = {delimiter: _fit_of_delimiter(start[num_blank:], delimiter) for delimiter in ";\t|,"}
    separator = max(fit_by_delimiter, key=fit_by_delimiter.__getitem__)
    _check_header(path, next(csv.reader(start[num_blank:], delimiter=separator), []))
    options = {"sep": separator, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
    options |= {"low_memory": False, "dtype": dict.fromkeys(texts, str), "skiprows": num_blank}
    try:
        # In a file with one column, a blank line is a row with a gap.
        frame = pandas.read_csv(path, skip_blank_lines=fit_by_delimiter[separator][0], **options)
    except UnicodeDecodeError as error:
        if path.suffix.startswith(".xls"):
            raise ValueError(f"{path} is an Excel file: save it there as 'CSV UTF-8'.") from error
        raise ValueError(f"{path} is not in UTF-8: save it as UTF-8 ({error}).") from error
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not a CSV file with a header: {error}.") from error
    frame.attrs["decimal"] = "," if separator == ";" else "."  # of numbers such as 1,065
    return frame


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError if two columns have the same name: pandas would rename the second one without a message."""
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has more than one column with the name {twice[0]!r}: rename or remove one of them.")


def _fit_of_delimiter(lines: Sequence[str], delimiter: str) -> tuple[bool, bool, int, int]:
    """Returns how well a delimiter fits the lines; larger is better.

    The first entry is whether the header has several columns. A line is equal if it has as many columns as the header.
    The other entries are whether all lines are equal, the number of columns, and the number of equal lines.
    """
    header, *rows = [row for row in csv.reader(lines, delimiter=delimiter) if row][:20] or [[]]
    num_equal = sum(len(row) == len(header) for row in rows)
    return len(header) > 1, num_equal == len(rows), len(header), num_equal


def _target(values: Any, *, as_labels: bool, encoder: Any = None) -> tuple[Any, Any]:
    """Returns the valid values of a target, as numbers if possible, and the encoder that read them from texts, or None.

    It prints how many rows have none. With the `encoder` of an earlier file, texts are read as there.
    """
    target, encoder = (values, None) if as_labels else _numbers(values, encoder)
    known = (~target.isna()).to_numpy()
    if not known.all():
        invalid_values = values[~known].dropna().unique().tolist()
        example = f" (such as {invalid_values[0]!r})" if invalid_values else ""
        print(f"{(~known).sum()} rows have no valid target{example}; they are not used.", file=sys.stderr)
    if not known.any():
        raise ValueError(f"No row has a valid value in the target column {values.name!r}.")
    return target[known], encoder


def _numbers(target: Any, encoder: Any = None) -> tuple[Any, Any]:
    """Converts a target of texts to numbers, if an encoder reads all of them as numbers. Returns this encoder, too.

    Examples are "1,065", and "NA" among numbers. Standard error shows how separators and signs of currencies are read.
    Whole numbers above 2^53 stay texts if float64 would merge some of them and they have at most 20 different values,
    because such a target has classes.
    """
    import numpy as np

    from metaopt import tasks

    if target.dtype.kind in "biuf":
        return target, None
    with _logs.hold_back():  # `_print_a_reading` prints how texts are read
        decimal = target.attrs.get("decimal", ".")
        encoder = encoder or tasks.fit_encoder({"target": target}, keep=("target",), decimal=decimal)
        if [code.kind for code in encoder.columns] != ["number"]:
            return target, None
        shifted = encoder.transform({"target": target})[:, 0]
    code = encoder.columns[0]
    values = shifted + code.offset
    _print_a_reading(target, values, encoder)
    num_classes = len(np.unique(shifted))
    if len(np.unique(values)) < num_classes <= _MOST_CLASSES:
        return target.where(~np.isnan(shifted)), encoder
    return type(target)(values, index=target.index, name=target.name), encoder


def _print_a_reading(target: Any, values: Sequence[float], encoder: Any) -> None:
    """Prints how one text of a target is read, if some texts have a separator, a sign, parentheses, k or M."""
    sign = encoder.columns[0].sign
    pairs = [(t, v) for t, v in zip(target, values, strict=True) if isinstance(t, str) and v == v]
    # A text with parentheses, k or M says more than one that only has a separator.
    is_odd = lambda text: any(mark in text.replace(sign, "") for mark in "(kKM")
    has_mark = lambda text: sign or "," in text or "." in text
    shown = next((pair for test in (is_odd, has_mark) for pair in pairs if test(pair[0])), None)
    if shown is None:
        return
    text, value = shown
    _, hint, remedy = next((n.reason.partition("if this is wrong, ") for n in encoder.notes), ("", "", ""))
    unsure = f" If this is wrong, {remedy.partition(')')[0]}." if hint else ""
    print(f"The target {target.name!r} is text; {text!r} is read as {value:.10g}.{unsure}", file=sys.stderr)


def _problem(target: Any) -> str:
    """Classification if the target is text, boolean, or whole numbers with at most 20 values."""
    if target.dtype.kind not in "iuf":
        return "classification"
    is_whole = (target == target.round()).all()
    return "classification" if is_whole and target.nunique() <= _MOST_CLASSES else "regression"
