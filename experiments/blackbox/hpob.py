"""HPO-B v3: the published curves of 14 methods, and the curve of metaopt if the benchmark's tables are available.

There are 86 test tasks of 16 search spaces, each of thousands of evaluated configurations. The protocol is the
benchmark's own (discrete candidates). For each of five seeds, `bo-initializations.json` gives five configurations. A
method then chooses 100 more, one by one, among the configurations that it has not seen. Outcomes are accuracies,
normalized to the task's worst and best. The score is the best so far.

metaopt (`blackbox.train_meta_optimizer`) learns from `meta-train-dataset.json` of the same search space, with at most
200 configurations per data set. It maximizes expected improvement over the candidates. Its searcher would spend one
trial in eight on the configuration farthest from all earlier ones; here, it does not.

    python experiments/blackbox/hpob.py  the published curves: hpob.md, .png and the rank diagrams
    python experiments/blackbox/hpob.py --tables FOLDER  also metaopt; FOLDER has the three JSON files of HPO-B v3
    python experiments/blackbox/hpob.py --smoke  seconds; prints only

The published curves are read from the folder that METAOPT_DATA names. The tables (meta-test-dataset.json,
meta-train-dataset.json, bo-initializations.json) are from https://github.com/releaunifreiburg/HPO-B.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import script
from experiments.data import from_hpob_curves
from metaopt import base, blackbox, plots, spaces

# This experiment studies pieces of the learned optimizers, which are private: no user needs them.
from metaopt.blackbox import _acquisition, _posterior, _surrogates

AT = (5, 25, 50, 100)
SEEDS = ("test0", "test1", "test2", "test3", "test4")
MAX_CONFIGURATIONS = 200  # per earlier data set
NAME = "metaopt"

# (seen x, their accuracies in [0, 1], open x) -> index of an open row
Suggest = Callable[[np.ndarray, np.ndarray, np.ndarray], int]


def run_protocol(x: np.ndarray, y: np.ndarray, first: list[int], suggest: Suggest, num_trials: int = 100) -> np.ndarray:
    """Returns [1 + num_trials] normalized regret of the best so far.

    The entries are after the first configurations, and after each trial.
    """
    y = (y - y.min()) / (y.max() - y.min())
    seen, open_ = list(first), [i for i in range(len(x)) if i not in set(first)]
    best = [y[seen].max()]
    for _ in range(num_trials):
        if open_:
            seen.append(open_.pop(suggest(x[seen], y[seen], x[open_])))
        best.append(y[seen].max())
    return 1.0 - np.array(best)


def learn(file: Path, search_space: str, num_steps: int) -> tuple[_surrogates.Surrogate, jax.Array]:
    """Learns from the training data sets of a search space. Also returns the tasks' weights, which are equal."""
    records = blackbox.from_hpob(file, search_space)
    rng, by_space = np.random.default_rng(0), {}
    for record in records:
        by_space.setdefault(record.task, []).append(record)
    kept: list[base.Record] = []
    for trials in by_space.values():
        kept += [trials[i] for i in rng.permutation(len(trials))[:MAX_CONFIGURATIONS]]
    space = {name: spaces.interval(0.0, 1.0) for name in sorted(records[0].configuration, key=lambda n: int(n[1:]))}
    kept = [r._replace(configuration={n: float(np.clip(v, 0, 1)) for n, v in r.configuration.items()}) for r in kept]
    g = blackbox.train_meta_optimizer(kept, space=space, num_steps=num_steps)
    # Trees sort names: x0, x1, x10, ...; but a candidate is a row in the table's own order.
    order = np.argsort([int(name[1:]) for name in sorted(space)])
    kernel = g.surrogate.kernel
    kernel = kernel._replace(log_lengths=kernel.log_lengths[order])
    surrogate = g.surrogate._replace(reference=g.surrogate.reference[:, order], kernel=kernel)
    return surrogate, _surrogates.task_weights(surrogate)


@jax.jit
def score(surrogate, weights, trials, x):
    best = jnp.where(trials[2] > 0, trials[1], jnp.inf).min()
    return _acquisition.expected_improvement(_posterior.posterior(surrogate, weights, trials, x), best)


def make_suggest(surrogate: _surrogates.Surrogate, weights: jax.Array, *, chunk: int = 1024) -> Suggest:
    def suggest(seen, y, open_):
        size = max(32, 1 << (len(y) - 1).bit_length())
        pad = size - len(y)
        # Padding is far away, so that it is not a neighbor of any row.
        far = 1e3 + np.arange(pad)[:, None] * np.ones(seen.shape[1])
        trials = jnp.asarray(np.concatenate([seen, far])), jnp.asarray(np.pad(1 - y, (0, pad)))
        trials = *trials, jnp.asarray(np.pad(np.ones(len(y)), (0, pad)))
        proposals = []
        for start in range(0, len(open_), chunk):
            part = open_[start : start + chunk]
            rows = np.concatenate([part, np.zeros((chunk - len(part), part.shape[1]))])
            proposals.append(np.asarray(score(surrogate, weights, trials, jnp.asarray(rows)))[: len(part)])
        return int(np.concatenate(proposals).argmax())

    return suggest


def run_ours(folder: Path, names: tuple[str, ...], num_steps: int, num_trials: int = 100) -> np.ndarray:
    """Returns [T, 5, 1 + num_trials] regret on the test tasks."""
    test, first = (json.loads((folder / f).read_text()) for f in ("meta-test-dataset.json", "bo-initializations.json"))
    learned, curves = {}, []
    for name in names:
        search_space, data_set = name.split("/")
        if search_space not in learned:
            learned[search_space] = make_suggest(*learn(folder / "meta-train-dataset.json", search_space, num_steps))
        table = test[search_space][data_set]
        x, y = np.array(table["X"], float), np.ravel(table["y"]).astype(float)
        starts = first[search_space][data_set]
        curves.append([run_protocol(x, y, starts[seed], learned[search_space], num_trials) for seed in SEEDS])
        print(name, np.mean(curves[-1], 0)[[0, *(a for a in AT if a <= num_trials)]].round(4).tolist(), flush=True)
    return np.array(curves)


def report(regret: dict[str, np.ndarray], groups: np.ndarray) -> str:
    """Returns the table: mean normalized regret and mean rank over tasks, after some numbers of trials.

    The regrets of a task are first averaged over its seeds.
    """
    from scipy import stats

    means = {n: r.mean(1) for n, r in regret.items()}  # [T, N]
    rows = []
    ranks = {}
    for a in AT:
        complete = {n: m[:, a].round(9) for n, m in means.items() if np.isfinite(m[:, a]).all()}
        ranked = stats.rankdata(np.stack(list(complete.values())), axis=0).mean(1)
        ranks[a] = dict(zip(complete, ranked, strict=True))
    _, group = np.unique(groups, return_inverse=True)
    for name, m in means.items():
        # As in the benchmark, tasks of a search space are averaged first.
        by_space = np.mean([m[group == g].mean(0) for g in range(group.max() + 1)], 0)
        cells = [f"{m[:, a].mean():.4f} ({by_space[a]:.4f})" if name in ranks[a] else "" for a in AT]
        rows.append([name, *cells, *(f"{ranks[a][name]:.2f}" if name in ranks[a] else "" for a in AT)])
    rows.sort(key=lambda row: float(row[-1] or "inf"))
    return script.table(["method", *(f"regret after {a}" for a in AT), *(f"rank after {a}" for a in AT)], rows)


def plot(regret: dict[str, np.ndarray], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from scipy import stats

    means = {n: r.mean(1) for n, r in regret.items()}
    whole = {n: m for n, m in means.items() if np.isfinite(m).all()}
    ranks = dict(zip(whole, stats.rankdata(np.stack(list(whole.values())).round(9), axis=0).mean(1), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colors = plt.get_cmap("tab20")
    for i, (name, m) in enumerate(means.items()):
        style = {"color": colors(i % 20), "lw": 3 if name == NAME else 1.3, "label": name}
        left.plot(m.mean(0), **style)
        if name in ranks:
            right.plot(ranks[name], **style)
    left.set(yscale="log", xlabel="trials after the five initial ones", ylabel="mean normalized regret")
    right.set(xlabel="trials after the five initial ones", ylabel="mean rank")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(out / "hpob.png", dpi=120)
    plt.close(figure)
    figure, panels = plt.subplots(3, 1, figsize=(9, 11), layout="constrained")
    for axes, after in zip(panels, (5, 25, 100), strict=True):
        scores = {n: m[:, after].round(9) for n, m in means.items() if np.isfinite(m[:, after]).all()}
        plots.critical_difference(scores, highlight=[NAME] if NAME in scores else [], axes=axes)
        axes.set_title(f"mean rank after {after} trials", fontsize="small")
    figure.savefig(out / "hpob_ranks.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=5)
    parser.add_argument("--tables", type=Path, help="folder of HPO-B v3's JSON files: metaopt joins the others")
    options: argparse.Namespace = parser.parse_args()
    script.data_file(__file__, "hpob_baseline_curves.npz")
    published = from_hpob_curves()
    names = published.tasks[:3] if options.smoke else published.tasks
    regret = dict(zip(published.methods, published.regret[:, : len(names)], strict=True))
    if options.tables:
        regret[NAME] = run_ours(options.tables, names, 5 if options.smoke else 150)
    groups = np.array([name.split("/")[0] for name in names])
    text = report(regret, groups)
    text += (
        "\n\n"
        f"- {len(names)} tasks of {len(set(groups))} search spaces, five seeds.\n"
        "- The regret is the normalized regret after the number of trials in the header, in addition to the five "
        "given ones. It is a mean over tasks (in parentheses: over search spaces, of means over their tasks). The "
        "mean rank is over tasks, of means over seeds.\n"
        "- The curves are published by the benchmark's authors. Those of RF end after 5 trials on 80 tasks.\n"
        "- Methods that end in -C chose from a continuum, with outcomes from a surrogate of the benchmark. They are "
        "not quite comparable."
    )
    if not options.tables:
        text += "\n- metaopt is not included: it needs the benchmark's tables (`--tables`)."
    if not options.smoke:
        text = "![Regret and ranks](hpob.png)\n\n![Rank diagrams](hpob_ranks.png)\n\n" + text
        text += (
            "\n\nIn the rank diagrams, a bar joins methods if no two of them differ by Wilcoxon's signed-rank test "
            "over tasks, with Holm's correction, at .05."
        )
    script.publish(__file__, "HPO-B", text, options)
    if not options.smoke:
        plot(regret, options.out)


if __name__ == "__main__":
    script.run(main)
