"""Tables of patients with the site of each: hospitals, or quarters of a table by one of its columns."""

from typing import NamedTuple

import numpy as np

from experiments.data import from_heart_disease

CODES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "slope": (1, 2, 3), "thal": (3, 6, 7)}


class Patients(NamedTuple):
    """N patients, D columns of M measurements. A code is one measurement with a column for each value.

    Attributes:
      x: [N, D] float32; NaN where missing.
      owner: [D], the number of the measurement of each column.
      y: [N], 1 for disease.
      site: [N] int32, 0..S-1.
      names: S names of sites.
      age: [N] in years, for subgroups; None if it is not known.
      sex: [N], 1 for men, for subgroups; None if it is not known.
      window: the column of x for the windows of resampled tasks: the age if it is known.
    """

    x: np.ndarray
    owner: np.ndarray
    y: np.ndarray
    site: np.ndarray
    names: tuple[str, ...]
    age: np.ndarray | None
    sex: np.ndarray | None
    window: int


def heart_disease(folder) -> Patients:
    """Returns 920 patients of four hospitals, and whether their disease was found."""
    table = from_heart_disease(folder)
    columns, owner = [], []
    for number, (name, values) in enumerate(zip(table.feature_names, table.x.T, strict=True)):
        codes = CODES.get(name)
        new = [values] if codes is None else [np.where(np.isnan(values), np.nan, values == code) for code in codes]
        columns, owner = columns + new, owner + [number] * len(new)
    age, sex = (table.x[:, table.feature_names.index(name)] for name in ("age", "sex"))
    x = np.stack(columns, 1).astype(np.float32)
    window = owner.index(table.feature_names.index("age"))
    y = np.asarray(table.y, np.float32)
    return Patients(x, np.array(owner), y, table.user, table.user_names, age, sex, window)


def breast_cancer() -> Patients:
    """Returns scikit-learn's 569 tumors, 1 for malignant. It has no sites: they are quarters by mean texture."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    column = list(data.feature_names).index("mean texture")
    return _quartered(data.data, 1 - data.target, column, "texture")._replace(age=None)


def diabetes() -> Patients:
    """Returns scikit-learn's 442 patients, 1 for a progression above 140. Sites are quarters by age."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    sex = data.data[:, data.feature_names.index("sex")] == 2
    return _quartered(data.data, data.target > 140, data.feature_names.index("age"), "age")._replace(sex=sex)


def _quartered(x: np.ndarray, y: np.ndarray, column: int, name: str) -> Patients:
    rank = np.argsort(np.argsort(x[:, column], kind="stable"))
    site = (4 * rank // len(rank)).astype(np.int32)
    names = tuple(f"{name}, quarter {i + 1}" for i in range(4))
    owner = np.arange(x.shape[1])
    return Patients(x.astype(np.float32), owner, np.asarray(y, np.float32), site, names, x[:, column], None, column)
