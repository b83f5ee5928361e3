"""Records of patients: one task per patient or hospital."""

import numpy as np

from metaopt import tasks

from ._folder import Folder, read_rows


def from_parkinsons(path: Folder = None, *, target: str = "motor_UPDRS") -> tasks.UserTable:
    """Parkinson's telemonitoring: 5,875 recordings of 42 patients over half a year, 16 measures of the voice.

    The scores are interpolated between visits to a clinic, so that neighbors in time are nearly equal.

    Args:
      path: the data folder; by default, the environment variable METAOPT_DATA.
      target: "motor_UPDRS" or "total_UPDRS".

    Returns:
      A `UserTable`. A user is a patient, and time is in days since recruitment. x has age, sex, time and the measures.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.
      KeyError: if `target` is not a column.

    Source: Tsanas et al., IEEE Transactions on Biomedical Engineering 2009; UCI, CC BY 4.0.
    """
    columns = _columns("parkinsons_telemonitoring.csv.gz", path)
    patient = np.array(columns.pop("subject#"), int)
    y = np.array([float(v) for v in columns[target]], np.float32)
    columns = {name: values for name, values in columns.items() if not name.endswith("_UPDRS")}
    x = np.array([[float(v) for v in values] for values in columns.values()], np.float32).T
    time = x[:, list(columns).index("test_time")]
    return tasks.from_user_records(x, y, patient, time=time, feature_names=list(columns))


def from_heart_disease(path: Folder = None) -> tasks.UserTable:
    """Heart disease: 920 patients of four hospitals, and whether disease was found. Here a "user" is a hospital.

    A cholesterol or a blood pressure of 0 is impossible. One hospital wrote a 0 for all of its patients, and another
    one for some. These values become gaps.

    Args:
      path: the data folder; by default, the environment variable METAOPT_DATA.

    Returns:
      A `UserTable` without time; y is 0 or 1. The last columns have many gaps. "cp", "restecg", "slope" and "thal" are
      codes. To leave one hospital out, standardize and train on the three others.

    Raises:
      FileNotFoundError: if the folder or the file does not exist.

    Source: Janosi, Steinbrunn, Pfisterer & Detrano; UCI, CC BY 4.0.
    """
    columns = _columns("heart_by_hospital.csv.gz", path)
    hospital = columns.pop("hospital")
    y = np.array([float(v) > 0 for v in columns.pop("num")])
    x = np.array([[float(v) if v else np.nan for v in values] for values in columns.values()], np.float32).T
    for name in ("chol", "trestbps"):
        column = x[:, list(columns).index(name)]
        column[column == 0] = np.nan
    return tasks.from_user_records(x, y, hospital, feature_names=list(columns))


def _columns(name: str, path: Folder) -> dict[str, list[str]]:
    rows = read_rows(name, path)
    return {column: [row[column] for row in rows] for column in rows[0]}
