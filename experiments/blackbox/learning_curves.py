"""Learning curves of real training runs: predictions from their beginnings, and searches that pause trials.

TaskSet: 12 text RNNs × 1,000 optimizer configurations. Validation losses are clipped at 1.0 (chance is .693; a
divergence counts as 1). Each task is left out in turn. All tasks read the text of IMDB, so a left-out task has near
relatives.

LCDB: tables × 20 learners. Outcomes are error rates over the training set's size. The fidelity is this size, divided by
the largest size at which at least half of the learners have an outcome. Families (by the first word of a table's name)
are in five folds, and each is left out in turn. Tables without all sizes from 1/32 on are not used. Normalized regret
is 0 at a task's best and 1 at its worst candidate.

`metaopt` is `blackbox.train_curve_searcher`, trained on the other tasks' curves. Two baselines run candidates at the
full budget: random search, and the candidates that are the best on average on the other tasks. The other two are
Optuna's Hyperband and BOHB (`blackbox.bohb`). For these two, a suggestion becomes the nearest candidate that was not
begun. A repeated run at the same fidelity costs nothing. On TaskSet, trials continue after a pause, and all methods
only pay the difference. On LCDB, a larger training set is paid in full. The recommendation of a method is its best
trial at the full budget. Before there is one, it is the best at the largest fidelity.

    python experiments/blackbox/learning_curves.py                  TaskSet: results/learning_curves_taskset.md and .png
    python experiments/blackbox/learning_curves.py --table lcdb     LCDB
    python experiments/blackbox/learning_curves.py --smoke          seconds; prints only

The curves are read from the folder that METAOPT_DATA names.
"""

import argparse
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import script
from experiments.data import from_taskset
from metaopt import base, blackbox, spaces

BUDGETS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
SHOWN = (1.0, 2.0, 5.0, 10.0, 20.0)
# Columns of a prediction: the number of observed fidelities, the outcome, three predictions of it, and the PIT.
FOUND = ("seen", "came", "metaopt", "last value", "other tasks", "pit")
OURS = ("metaopt", "metaopt, full budgets alone")

NEAR_RELATIVES = (
    "All tasks are recurrent networks on the text of IMDB, with several cells and patch sizes. So a held-out task "
    "has near relatives among the training tasks. Hyperband and BOHB use no other task."
)


class Curves(NamedTuple):
    name: str
    y: np.ndarray  # [T, C, F], NaN if unknown
    fidelities: np.ndarray  # [F]
    configurations: list[dict]
    space: dict
    groups: np.ndarray  # [T] tasks of the same group are left out together
    families: np.ndarray  # [T] near-duplicates are one observation
    resumes: bool
    eta: int  # of Hyperband

    def regret(self, t: int) -> np.ndarray:
        """Returns the regret [C] at the full budget. It is NaN for candidates without an outcome at every fidelity."""
        last = np.where(np.isfinite(self.y[t]).all(1), self.y[t, :, -1], np.nan)
        return (last - np.nanmin(last)) / max(np.nanmax(last) - np.nanmin(last), 1e-12)


def load_taskset(options: argparse.Namespace) -> Curves:
    script.data_file(__file__, "taskset_rnn_curves.npz")
    table = from_taskset()
    num = len(table.fidelities)
    # Some checkpoints, including those of Hyperband (1/27, 1/9, 1/3, 1).
    steps = np.array([1, 2, 4, 6, 10, 17, 28, num]) - 1
    y = np.where(np.isnan(table.outcomes), 1.0, np.minimum(table.outcomes, 1.0))[:, :, steps]
    kept = slice(0, 60) if options.smoke else slice(None)
    configurations = [dict(c) for c in table.configurations[kept]]
    values = {name: np.array([c[name] for c in configurations]) for name in configurations[0]}
    # The parameters are 1 − β₁ and 1 − β₂, which vary over orders of magnitude.
    for name in ("beta1", "beta2"):
        values[name] = 1 - values[name]
    configurations = [{n: float(v[i]) for n, v in values.items()} for i in range(len(configurations))]
    space = {n: spaces.interval(float(v.min()), float(v.max()), log=True) for n, v in values.items()}
    num_tasks = 4 if options.smoke else len(y)
    return Curves(
        "TaskSet",
        y[:num_tasks, kept],
        table.fidelities[steps],
        configurations,
        space,
        *[np.arange(num_tasks)] * 2,
        True,
        3,
    )


def load_lcdb(options: argparse.Namespace) -> Curves:
    path = script.data_file(__file__, "lcdb_accuracy_curves.npz")
    with np.load(path, allow_pickle=False) as data:
        error, sizes = 1.0 - data["valid"].astype(float), data["anchors"].astype(float)
        names, learners = [str(n).lower() for n in data["name"]], data["learners"].tolist()
    fidelities = 2.0 ** np.arange(-5, 1)
    y = np.full((len(error), len(learners), len(fidelities)), np.nan)
    for t, table in enumerate(error):
        enough = np.flatnonzero(np.isfinite(table).sum(0) >= len(learners) / 2)
        if len(enough):
            wanted = sizes[enough[-1]] * fidelities
            nearest = np.abs(np.log(sizes[:, None] / wanted[None])).argmin(0)
            fits = np.abs(np.log(sizes[nearest] / wanted)) < 0.05
            y[t][:, fits] = table[:, nearest[fits]]
    families = [(re.findall(r"[a-z]+", name) or [name])[0] for name in names]
    _, family = np.unique(families, return_inverse=True)
    fold = np.random.default_rng(0).permutation(np.arange(family.max() + 1) % 5)[family]
    complete = np.isfinite(y).all(2).sum(1) >= len(learners) / 2
    space = {"learner": spaces.choice(learners)}
    keep = np.flatnonzero(complete)[:: 12 if options.smoke else 1]
    configurations = [{"learner": n} for n in learners]
    return Curves("LCDB", y[keep], fidelities, configurations, space, fold[keep], family[keep], False, 2)


def learn(data: Curves, group, options: argparse.Namespace, *, whole: bool = False) -> blackbox.CurveSearcher:
    """Learns from the curves of all tasks outside the group. With `whole`, it only uses the curves' ends."""
    fidelities = [len(data.fidelities) - 1] if whole else range(len(data.fidelities))
    records = [
        base.Record(str(t), data.configurations[c], float(data.y[t, c, j]), float(data.fidelities[j]), trial=c)
        for t in np.flatnonzero(data.groups != group)
        for c in range(len(data.configurations))
        for j in fidelities
        if np.isfinite(data.y[t, c, j])
    ]
    return blackbox.train_curve_searcher(records, space=data.space, num_steps=2 if options.smoke else 100)


def name_of(configuration: dict) -> tuple:
    return tuple(sorted(configuration.items()))


# ---- Prediction ------------------------------------------------------------------------------------------------------


def predict(data: Curves, t: int, g: blackbox.CurveSearcher, num_draws: int) -> np.ndarray:
    """Returns [N, len(FOUND)] predictions for 20 candidates that were begun on the task t, for several draws."""
    rng, predictions = np.random.default_rng(t), []
    open_ = np.flatnonzero(np.isfinite(data.y[t]).all(1))
    number = {name_of(c): i for i, c in enumerate(g.candidates)}
    before = np.asarray(g.surrogate.mean)[:, -1]
    levels = np.linspace(0.02, 0.98, 49)
    for _ in range(num_draws if len(open_) else 0):
        some = rng.choice(open_, min(20, len(open_)), replace=False)
        for seen in range(len(data.fidelities)):
            trials = [
                base.Record("", data.configurations[c], float(data.y[t, c, j]), float(data.fidelities[j]))
                for c in some
                for j in range(seen)
            ]
            quantiles = g.predict(trials, levels)
            for c in some:
                row = quantiles[number[name_of(data.configurations[c])]]
                came, last = data.y[t, c, -1], data.y[t, c, seen - 1] if seen else np.nan
                average = before[number[name_of(data.configurations[c])]]
                pit = float(np.interp(came, row, levels, left=0.0, right=1.0))
                predictions.append((seen, came, row[24], last, average, pit))
    return np.array(predictions).reshape(-1, len(FOUND))


def prediction_table(data: Curves, predictions: np.ndarray) -> tuple[list[str], list[list[str]]]:
    rows = []
    for seen in np.unique(predictions[:, 0]).astype(int):
        part = predictions[predictions[:, 0] == seen]
        error, away = np.abs(part[:, 2:5] - part[:, 1:2]).mean(0), np.abs(part[:, 5] - 0.5)
        row = ["nothing" if seen == 0 else f"up to {data.fidelities[seen - 1]:.3g}"]
        row += [f"{e:.4f}" if np.isfinite(e) else "" for e in error]
        rows.append([*row, f"{np.mean(away <= 0.25):.3f}", f"{np.mean(away <= 0.45):.3f}"])
    errors = [f"error of {name}" for name in FOUND[2:5]]
    return ["seen of the trial", *errors, "in the 50 % interval", "in the 90 % interval"], rows


# ---- Search ----------------------------------------------------------------------------------------------------------


class Snap:
    """Maps a configuration to the nearest candidate that was not begun. Each trial keeps its candidate."""

    def __init__(self, data: Curves, t: int):
        encode = jax.vmap(lambda z: spaces.encode(data.space, z))
        stacked = [spaces.from_configuration(data.space, c) for c in data.configurations]
        self.x = np.asarray(encode(jax.tree.map(lambda *leaves: np.stack([np.asarray(v) for v in leaves]), *stacked)))
        self.open_ = np.isfinite(data.y[t]).all(1)
        self.data = data

    def __call__(self, configuration: dict) -> int:
        if len(self.data.space) == 1:  # a label maps to itself, or to -1 if it is not open
            row = self.data.configurations.index(configuration)
            return row if self.open_[row] else -1
        values = []
        for name, leaf in self.data.space.items():  # the same as `spaces.encode`, without a compiled program
            low, high = np.log(leaf.low), np.log(leaf.high)
            values.append((np.log(configuration[name]) - low) / (high - low))
        scaled = (self.x - self.x.min(0)) / (self.x.max(0) - self.x.min(0))
        distance = np.where(self.open_, ((scaled - np.array(values)) ** 2).sum(1), np.inf)
        row = int(distance.argmin())
        self.open_[row] = False
        return row


class Run:
    """The budget that was spent so far, and the recommendation after it."""

    def __init__(self, data: Curves, t: int):
        self.data, self.t, self.paid, self.spent = data, t, {}, 0.0
        self.best = (0.0, np.inf, -1)
        self.regret, self.marks = data.regret(t), [(0.0, 1.0)]

    def trial(self, c: int, fidelity: float) -> float:
        j = int(np.abs(self.data.fidelities - fidelity).argmin())
        outcome = self.data.y[self.t, c, j]
        reached = self.paid.get(c, set())
        if j not in reached:
            before = max((self.data.fidelities[i] for i in reached), default=0.0) if self.data.resumes else 0.0
            self.spent += max(self.data.fidelities[j] - before, 0.0)
            self.paid[c] = reached | {j}
        if (-self.data.fidelities[j], outcome) < (-self.best[0], self.best[1]):
            self.best = self.data.fidelities[j], outcome, c
            self.marks.append((self.spent, self.regret[c]))
        return outcome

    def curve(self) -> np.ndarray:
        """Returns regret at BUDGETS. A trial that ends later does not count."""
        spent, regret = np.array(self.marks).T
        return np.array([regret[np.flatnonzero(spent <= b + 1e-9)[-1]] for b in BUDGETS])


def search(data: Curves, t: int, searcher: base.Searcher, space, budget: float, seed: int, pick) -> np.ndarray:
    """Runs the searcher until the budget is spent."""
    run, state, chosen = Run(data, t), searcher.init(jax.random.key(seed), space), {}
    for _ in range(400):
        asked, state = searcher.ask(state, 1)
        if not asked or run.spent >= budget - 1e-9:
            break
        (trial,) = asked
        if trial.trial not in chosen:
            chosen[trial.trial] = pick(trial.configuration)
        c = chosen[trial.trial]
        outcome = run.trial(c, trial.fidelity) if c >= 0 else np.nan
        status = "COMPLETE" if c >= 0 else "FAIL"
        state = searcher.tell(state, [trial._replace(status=status, outcome=float(outcome))])
    return run.curve()


def pick_exactly(number: dict, open_: set[int], configuration: dict) -> int:
    row = number[name_of(configuration)]
    return row if row in open_ else -1


def compare(data: Curves, t: int, learned: list, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns method -> [seeds, budgets] regrets on one task."""
    number = {name_of(c): i for i, c in enumerate(data.configurations)}
    regret = data.regret(t)
    open_ = np.flatnonzero(np.isfinite(data.y[t]).all(1))
    pick, curves = partial(pick_exactly, number, set(open_.tolist())), {}
    for name, g in zip(OURS, learned, strict=False):
        curves[name] = [search(data, t, g.searcher(resumes=data.resumes), data.space, options.own_budget, 0, pick)]
    others = np.flatnonzero(data.groups != data.groups[t])
    lists = {"best on average": [np.nanmean([data.regret(s) for s in others], 0).argsort()]}
    lists["random search"] = [np.random.default_rng([s, t]).permutation(len(regret)) for s in range(options.seeds)]
    for name, orders in lists.items():
        runs = [Run(data, t) for _ in orders]
        for run, order in zip(runs, orders, strict=True):
            for c in order[np.isin(order, open_)][: int(BUDGETS[-1])]:
                run.trial(c, 1.0)
        curves[name] = [run.curve() for run in runs]
    num_rungs = 4 if data.eta == 3 else len(data.fidelities)
    for name, num_random in (("Hyperband", 10**6), ("BOHB", 10)):
        curves[name] = []
        for seed in range(options.bohb_seeds):
            searcher = blackbox.bohb(num_random=num_random, reduction_factor=data.eta, num_rungs=num_rungs, first=[])
            curves[name].append(search(data, t, searcher, data.space, BUDGETS[-1], seed, Snap(data, t)))
    return {name: np.array(by_seed) for name, by_seed in curves.items()}


def judge(data: Curves, group, options: argparse.Namespace, store: Path) -> None:
    """Evaluates all tasks of a group that are not yet in the store, and writes each to a file."""
    files = {t: store / f"{options.table}_{t}.npz" for t in np.flatnonzero(data.groups == group)}
    if all(file.is_file() for file in files.values()):
        return
    begin = time.process_time()
    learned = [learn(data, group, options, whole=w) for w in ([False, True] if options.ablate else [False])]
    seconds = (time.process_time() - begin) / len(learned)
    for t, file in files.items():
        if not file.is_file():
            predictions, curves = predict(data, t, learned[0], options.draws), compare(data, t, learned, options)
            with open(f"{file}.part", "wb") as part:
                np.savez_compressed(part, found=predictions, seconds=seconds, **curves)
            Path(f"{file}.part").replace(file)
            print(data.name, t, {n: c.mean(0).round(3).tolist() for n, c in curves.items()}, flush=True)


def search_table(means: dict[str, np.ndarray], seeds: dict[str, list[int]]) -> tuple[list[str], list[list[str]]]:
    """Returns rows: mean regret over tasks, from [T, budgets] of each method, and the mean rank after 5 budgets."""
    from scipy import stats

    after = BUDGETS.index(5.0)
    ranks = stats.rankdata(np.stack([m[:, after] for m in means.values()]).round(9), axis=0).mean(1)
    rows = []
    for (name, regret), rank in zip(means.items(), ranks, strict=True):
        shown = {b: f"{regret[:, BUDGETS.index(b)].mean():.4f}" for b in SHOWN if name not in OURS or b <= 10}
        number = "–".join(map(str, seeds[name])) if len(seeds[name]) < 3 else f"{seeds[name][0]}–{seeds[name][-1]}"
        rows.append([name, number, *(shown.get(b, "") for b in SHOWN), f"{rank:.2f}"])
    return ["method", "seeds", *(f"after {b:g}" for b in SHOWN), "mean rank after 5"], rows


def against_bohb(means: dict[str, np.ndarray], families: np.ndarray) -> str:
    """Compares metaopt at a quarter of BOHB's budget, paired over tasks."""
    from scipy import stats

    bohb, budgets = means["BOHB"][:, BUDGETS.index(20.0)], (1.0, 2.0, 5.0)
    _, family = np.unique(families, return_inverse=True)
    # Families are drawn with replacement, not tasks.
    draws = np.random.default_rng(0).multinomial(
        family.max() + 1, np.full(family.max() + 1, 1 / (family.max() + 1)), size=4000
    )
    weights = draws[:, family] / draws[:, family].sum(1, keepdims=True)
    difference = {b: means[OURS[0]][:, BUDGETS.index(b)] - bohb for b in budgets}
    p = {b: stats.wilcoxon(d, method="approx").pvalue if np.any(d) else 1.0 for b, d in difference.items()}
    holm, worst, parts = {}, 0.0, []
    for i, b in enumerate(sorted(p, key=lambda b: p[b])):
        holm[b] = worst = max(worst, min(1.0, (len(p) - i) * p[b]))
    for b, d in difference.items():
        low, high = np.quantile(weights @ d, [0.025, 0.975])
        less, more = (d.round(9) < 0).sum(), (d.round(9) > 0).sum()
        interval = f"{d.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        parts.append(f"- after {b:g} {interval}, better / worse on {less} / {more} tasks, p {holm[b]:.2g}.\n")
    ours, reached = means[OURS[0]][:, BUDGETS.index(5.0)].mean(), difference[5.0].mean() <= 0
    return (
        "metaopt's regret minus BOHB's after 20 full budgets:\n\n"
        f"{''.join(parts)}\n"
        "The aim is BOHB's regret after 20 full budgets, with at most a quarter of them: it is "
        f"{'reached' if reached else 'missed'}, {ours:.4f} after 5 against {bohb.mean():.4f}."
    )


def by_parts(means: dict[str, np.ndarray], group_of: np.ndarray) -> str:
    """Compares methods on two parts of the tasks.

    The first part was seen when the rule for trials without resuming was chosen, the second was not.
    """
    column, rows = {name: BUDGETS.index(20.0 if name == "BOHB" else 5.0) for name in means}, []
    names = (OURS[0], "best on average", "BOHB")
    for label, chosen in (("parts 0 and 1", group_of < 2), ("the other parts", group_of >= 2)):
        if chosen.any():
            cells = [f"{means[n][chosen, column[n]].mean():.4f}" for n in names]
            rows.append([f"{label} ({chosen.sum()} tasks)", *cells])
    return (
        "Trials do not resume here, and `searcher(resumes=False)` asks only for full budgets. This rule was chosen "
        "among several, some of which also use small fidelities, by the regrets in parts 0 and 1. An earlier table "
        "of these tasks was known then. The regrets after 5 full budgets (BOHB: 20):\n\n"
        + script.table(["tasks", *names], rows)
    )


def plot(data: Curves, curves: dict[str, np.ndarray], predictions: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, values in curves.items():
        shown = [i for i, b in enumerate(BUDGETS) if method not in OURS or b <= 10]
        line = {"lw": 2.5 if method == OURS[0] else 1.2, "label": method}
        left.plot([BUDGETS[i] for i in shown], values.mean(0)[shown], "o-", **line)
    left.set(title=data.name, xscale="log", xlabel="full budgets spent", ylabel="mean normalized regret")
    left.set_yscale("symlog", linthresh=1e-2)
    left.set_ylim(0, 1.1)
    left.legend(fontsize=7)
    lengths = np.unique(predictions[:, 0]).astype(int)
    for seen in lengths[:: max(1, len(lengths) // 3)]:
        pit = predictions[predictions[:, 0] == seen, 5]
        label = f"up to {data.fidelities[seen - 1]:.2g} seen" if seen else "nothing seen"
        right.hist(pit, bins=20, range=(0, 1), density=True, histtype="step", label=label)
    right.axhline(1, color="gray", lw=1)
    right.set(xlabel="probability integral transform of the outcome", ylabel="density")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=20)
    parser.add_argument("--table", choices=["taskset", "lcdb"], default="taskset")
    parser.add_argument("--bohb-seeds", type=int, default=20, help="of BOHB and Hyperband")
    parser.add_argument("--draws", type=int, default=5, help="of 20 candidates a task, for the errors of prediction")
    parser.add_argument("--ablate", action="store_true", help="also metaopt that spends only full budgets")
    parser.add_argument("--store", type=Path, help="folder of finished tasks, a file for each, to continue from")
    parser.add_argument("--backwards", action="store_true", help="the last tasks first: a second process, one store")
    options = parser.parse_args()
    options.own_budget = 1.0 if options.smoke else 10.0
    if options.smoke:
        options.seeds = options.draws = options.bohb_seeds = 1
    data = {"taskset": load_taskset, "lcdb": load_lcdb}[options.table](options)
    groups = np.unique(data.groups)[: 1 if options.smoke else None]
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder)
        store.mkdir(parents=True, exist_ok=True)
        for group in groups[:: -1 if options.backwards else 1]:
            judge(data, group, options, store)
        judged, stored = np.flatnonzero(np.isin(data.groups, groups)), []
        group_of, families = data.groups[judged], data.families[judged]
        for t in judged:
            with np.load(store / f"{options.table}_{t}.npz", allow_pickle=False) as file:
                stored.append(dict(file))
    predictions, seconds = (
        np.concatenate([s.pop("found") for s in stored]),
        np.mean([s.pop("seconds") for s in stored]),
    )
    curves = {name: np.array([s[name].mean(0) for s in stored]) for name in stored[0]}
    seeds = {name: sorted({len(s[name]) for s in stored}) for name in stored[0]}
    header, rows = prediction_table(data, predictions)
    text = "\n\n".join(
        [
            f"{len(stored)} tasks × {len(data.configurations)} candidates × {len(data.fidelities)} fidelities "
            f"({', '.join(f'{f:.3g}' for f in data.fidelities)}). Training takes {seconds:.0f} processor seconds for "
            f"each of {len(groups)} held-out parts." + ("" if options.table == "lcdb" else " " + NEAR_RELATIVES),
            "Mean normalized regret, by the number of full budgets spent:",
            script.table(*search_table(curves, seeds)),
            against_bohb(curves, families) + ("" if data.resumes else "\n\n" + by_parts(curves, group_of)),
            "Prediction of the outcome at the full budget, for 20 unfinished candidates on the new task:",
            script.table(header, rows),
            f"- Brackets have the paired 95 % interval, from a bootstrap over {len(np.unique(families))} "
            f"{'tasks' if len(np.unique(families)) == len(families) else 'families of tasks'}.\n"
            "- p is from Wilcoxon's signed-rank test over tasks, with Holm's correction for the three budgets. It "
            "may be small even if a few large differences make the mean.\n"
            "- `metaopt` is deterministic, given its training data. There is one key of its training.\n"
            "- Errors are means of absolute differences. The prediction is the median, and its intervals are the "
            "central ones.",
        ]
    )
    name = f"learning_curves_{options.table}"
    script.publish(
        __file__, f"Learning curves: {data.name}", text, options, name=name, picture="Regret, and calibration"
    )
    if not options.smoke:
        plot(data, curves, predictions, options.out / f"{name}.png")


if __name__ == "__main__":
    script.run(main)
