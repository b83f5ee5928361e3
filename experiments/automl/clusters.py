"""`AutoClusterer` on labeled tables: does it find the classes better than k-means with the silhouette's k?

The methods see the columns without the labels, of at most 500 rows. The score is the adjusted Rand index (ARI) with
the labels: 0 is chance, 1 is equal. `clusters.json` lists two sets of tables. The tables for judging, one of each of 15
families, were fixed before the first run, and no choice was made on them. All choices were made on the other set.

    python experiments/automl/clusters.py --full           # minutes on two cores; writes results/clusters.md
    python experiments/automl/clusters.py                  # one seed
    python experiments/automl/clusters.py --smoke          # seconds, on two of the other tables; prints only
    python experiments/automl/clusters.py --development    # the other tables

A run that is interrupted goes on from `--keep`. Needs the folder that the environment variable METAOPT_DATA names.
"""

import json
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.preprocessing import StandardScaler

from experiments import script
from experiments.data import from_data_folder
from metaopt import automl, tasks
from metaopt.training import report_progress

TABLES = Path(__file__).with_name("clusters.json")
MAX_ROWS = 500
MAX_CLUSTERS = 10
BAR = "k-means, k by silhouette"


def sampled(table: tasks.Table, seed: int, max_rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The columns and the classes of random rows. Categorical columns have pandas' categorical dtype."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(table.y))[:max_rows])
    x = table.x[rows]
    columns = {f"x{j}": pd.Categorical(c) if table.categorical[j] else c for j, c in enumerate(x.T)}
    return pd.DataFrame(columns), table.y[rows]


# --- methods: `(frame, y, seed) -> (labels, description)` ---


def usual_inputs(frame: pd.DataFrame) -> np.ndarray:
    """One-hot columns with medians in gaps, zero mean and unit variance."""
    numbers = pd.get_dummies(frame).astype(np.float64)
    return StandardScaler().fit_transform(numbers.fillna(numbers.median()).fillna(0.0))


def same_inputs(frame: pd.DataFrame) -> np.ndarray:
    """The columns that `AutoClusterer` clusters, before its principal axes."""
    encoder = tasks.fit_encoder(frame)
    x = encoder.transform(frame)
    return tasks.fit_columns(x, encoder.categorical, scaling="standard").transform(x).astype(np.float64)


def kmeans(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    return KMeans(k, n_init=10, random_state=seed).fit_predict(x)


def by_silhouette(inputs):
    def method(frame, y, seed):
        x = inputs(frame)
        labels = [kmeans(x, k, seed) for k in range(2, MAX_CLUSTERS + 1)]
        best = max(labels, key=lambda part: silhouette_score(x, part))
        return best, f"{best.max() + 1}"

    return method


def with_true_k(frame, y, seed):
    k = len(np.unique(y))
    return kmeans(usual_inputs(frame), k, seed), f"{k}"


def auto(**options):
    def method(frame, y, seed):
        model = automl.AutoClusterer(MAX_CLUSTERS, random_state=seed, **options).fit(frame)
        return model.labels_, f"{model.n_clusters_} {model.algorithm_ or ''}"

    return method


METHODS = {
    "one cluster": lambda frame, y, seed: (np.zeros(len(y), int), "1"),
    BAR: by_silhouette(usual_inputs),
    "the same, with AutoClusterer's inputs": by_silhouette(same_inputs),
    "k-means, true k (an oracle)": with_true_k,
    "AutoClusterer": auto(),
    "AutoClusterer, k-means only": auto(algorithms="kmeans"),
}


def score(method, table: tasks.Table, seed: int, max_rows: int) -> dict[str, np.ndarray]:
    frame, y = sampled(table, seed, max_rows)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels, description = method(frame, y, seed)
    seconds = time.perf_counter() - start
    index = adjusted_rand_score(y, labels)
    return {"ari": np.float64(index), "seconds": np.float64(seconds), "description": np.array(description.strip())}


# --- the page ---


def report(tables: list[tasks.Table], results: dict[str, list[list[dict]]]) -> str:
    """Mean ARI over tables by method, and the ARI of each table. `results` is [table][seed] of each method."""
    ari = {name: np.array([[r["ari"] for r in seeds] for seeds in rows]) for name, rows in results.items()}
    rows = []
    for name, values in ari.items():
        seconds = np.mean([r["seconds"] for seeds in results[name] for r in seeds])
        rows.append(
            [name, script.spread(values.mean(axis=0)), _interval((values - ari[BAR]).mean(axis=1)), f"{seconds:.1f}"]
        )
    header = [f"{len(tables)} tables", "mean ARI ± over seeds", f"difference to {BAR} [95 %]", "s"]
    names = [name for name in results if name != "one cluster"]
    cells = [
        [table.name, f"{table.num_classes}", *(_cell(ari[name][i], results[name][i]) for name in names)]
        for i, table in enumerate(tables)
    ]
    return f"{script.table(header, rows)}\n\nARI and the number of clusters of each table:\n\n" + script.table(
        ["table", "classes", *names], cells
    )


def _cell(ari: np.ndarray, seeds: list[dict]) -> str:
    described = list(dict.fromkeys(str(r["description"]) for r in seeds))
    return f"{ari.mean():.3f} ({', '.join(described)})"


def _interval(difference: np.ndarray, num: int = 4000) -> str:
    """The mean with a bootstrap interval over families, each of which has one table."""
    if not difference.any():
        return ""
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(num, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}], better on {np.mean(difference > 0):.0%}"


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="all seeds")
    parser.add_argument("--development", action="store_true", help="other tables than those for judging")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the results of finished tables")
    args = parser.parse_args()
    names = json.loads(TABLES.read_text())["development" if args.development or args.smoke else "judging"]
    tables = [table for table in from_data_folder() if table.name in names]
    tables, max_rows = (tables[:2], 100) if args.smoke else (tables, MAX_ROWS)
    seeds = args.seeds if args.full and not args.smoke else 1
    folder = None if args.keep is None or args.smoke else script.work_folder(args.keep, __file__)
    results: dict[str, list[list[dict]]] = {name: [] for name in METHODS}
    with report_progress(len(tables) * len(METHODS), None, "{table}, {method}", table="", method="") as progress:
        for number, table in enumerate(tables):
            for count, (name, method) in enumerate(METHODS.items()):
                make = lambda seed, method=method, table=table: score(method, table, seed, max_rows)
                row = [
                    script.kept(folder, f"{table.name}, {name}, {seed}", lambda seed=seed, make=make: make(seed))
                    for seed in range(seeds)
                ]
                results[name].append(row)
                progress(number * len(METHODS) + count + 1, table=table.name, method=name)
    title = "Clusters of labeled tables"
    text = report(tables, results) + f"\n\nSeeds 0 to {seeds - 1}, for the rows and the methods."
    name = "clusters_development" if args.development else "clusters"
    script.publish(__file__, title, text, args, name=name)


if __name__ == "__main__":
    script.run(main)
