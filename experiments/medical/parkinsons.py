"""The course of Parkinson's disease of a new patient after five recordings, with λ predicted by g.

Research, not a medical device.

**Task.** 42 patients recorded their voice at home for half a year. The first five recordings of a new patient, in time
order, give five motor scores, and the scores of all later recordings are predicted. The error is the mean absolute
error over recordings, then over patients. The scores are interpolated linearly between visits to a clinic. So five
recordings of one day have the same score. The slope of five recordings depends on the score of the next visit, months
later. Errors of a forecast from real visits would be larger.

**Model.** With the score y₅ and the day t₅ of the fifth recording, and u(t) = D (1 − exp(−(t − t₅)/D)), which is t − t₅
for a large D,

    ŷ(t) = y₅ + α + β u(t),    (α, β) = argmin Σ_{i ≤ 5} (y_i − ŷ(t_i))² + ρ_α α² + ρ_β (β − β₀)².

g predicts λ = (ρ_α, ρ_β, β₀, D) from six numbers: score and slope in the five recordings, whether they span three days,
the day, age and sex. It is learned by hypergradients through the closed form on windows of five recordings that begin
in the first 60 days of the training patients. The outer loss is the mean absolute error of later recordings. The
control "one λ" has the same model and training, but the same λ for all patients.

**Folds.** There are six folds of seven patients, which differ from seed to seed. Weight decay and tanh units of g are
chosen by leaving out each of the five training folds in turn. The penalties of the baselines are chosen on the training
patients. Errors of other models on these patients were known before (`few_shot/personalization.py`). A saturating slope
was chosen because scores are interpolated between visits. No variant was compared on the test patients.

    python experiments/medical/parkinsons.py --full    minutes; writes experiments/results/medical_parkinsons.md
    python experiments/medical/parkinsons.py           one seed
    python experiments/medical/parkinsons.py --smoke   seconds; prints only

Data: Tsanas et al., IEEE Transactions on Biomedical Engineering 2009; UCI, in the folder that METAOPT_DATA names.
"""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.data import from_parkinsons
from metaopt import base, hypergrad, predictors, spaces, training

SHOTS = 5
NUM_FOLDS = 6
NUM_FEATURES = 6
NUM_RESAMPLES = 200  # of the patients
WINDOW_DAYS = 60.0  # windows of training begin by this day
SPAN_DAYS = 3.0  # shorter spans give no slope
VARIANTS = ((0, 0.01), (0, 1.0), (8, 1.0))  # tanh units, weight decay
CONSTANT = (0, 0.01)  # of "one λ"
SPACE = {
    "level_penalty": spaces.interval(1e-2, 1e3, log=True, default=10.0),  # ρ_α
    "slope_penalty": spaces.interval(1e-4, 1e2, log=True, default=0.1),  # ρ_β
    "slope": spaces.interval(-15.0, 15.0, default=0.0),  # β₀, per 100 days
    "days": spaces.interval(10.0, 1000.0, log=True, default=200.0),  # D
}


class Settings(NamedTuple):
    steps: int = 200
    tasks: int = 16
    query: int = 32  # later recordings of a training task


SMOKE = Settings(steps=2, tasks=2, query=4)


class Courses(NamedTuple):
    """P patients with up to L recordings, in the order of time.

    Attributes:
      day, score: [P, L]; padded with the last recording.
      number: [P], recordings of each patient.
      starts: [P], how many recordings can begin a window of training.
      age, sex: [P].
    """

    day: jax.Array
    score: jax.Array
    number: jax.Array
    starts: jax.Array
    age: jax.Array
    sex: jax.Array


def read(folder: Path) -> Courses:
    table = from_parkinsons(folder)
    age, sex = (table.x[:, table.feature_names.index(name)] for name in ("age", "sex"))
    return courses_of(table.user, table.time, table.y, age, sex)


def courses_of(patient: np.ndarray, day: np.ndarray, score: np.ndarray, age: np.ndarray, sex: np.ndarray) -> Courses:
    """Returns the patients of N recordings, in the order of their numbers.

    Args:
      patient: [N], numbers or names.
      day: [N], days since the patient's first visit. Training windows begin by day 60.
      score, age, sex: [N]; age and sex are read from the first recording.

    Raises:
      ValueError: if a patient has fewer than six recordings: five, and one to predict.
    """
    _, user, counts = np.unique(patient, return_inverse=True, return_counts=True)
    day, score, age, sex = (np.asarray(values, float) for values in (day, score, age, sex))
    if counts.min() <= SHOTS:
        raise ValueError(f"Each patient must have at least {SHOTS + 1} recordings; one has {counts.min()}.")
    rows = []
    for number in range(len(counts)):
        own = np.flatnonzero(user == number)
        own = own[np.argsort(day[own], kind="stable")]
        place = np.minimum(np.arange(counts.max()), len(own) - 1)
        early = np.sum(day[own[: len(own) - SHOTS]] <= WINDOW_DAYS)
        rows.append((day[own][place], score[own][place], len(own), max(early, 1), age[own[0]], sex[own[0]]))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Courses(*(jnp.asarray(c, jnp.int32 if c.dtype.kind == "i" else jnp.float32) for c in columns))


# ---- The model of a patient ------------------------------------------------------------------------------------------


def passed(day: jax.Array, last: jax.Array, days: jax.Array) -> jax.Array:
    """u(t) in 100 days. Before the fifth recording it is t − t₅: the exponential would explode."""
    later = jnp.maximum(day - last, 0.0)
    return (days * -jnp.expm1(-later / days) + jnp.minimum(day - last, 0.0)) / 100


def course(hp: base.HyperParams, day: jax.Array, score: jax.Array, query_day: jax.Array) -> jax.Array:
    """Returns ŷ at `query_day`, from the five recordings. Differentiable in λ."""
    ones, u = jnp.ones_like(day), passed(day, day[-1], hp["days"])
    rows = jnp.stack([ones, u], axis=1)
    penalty = jnp.stack([hp["level_penalty"], hp["slope_penalty"]])
    target = rows.T @ (score - score[-1]) + penalty * jnp.stack([jnp.zeros_like(hp["slope"]), hp["slope"]])
    level, slope = jnp.linalg.solve(rows.T @ rows + jnp.diag(penalty), target)
    return score[-1] + level + slope * passed(query_day, day[-1], hp["days"])


def outer_loss(coordinates: base.HyperParams, task: base.Task, key: jax.Array) -> jax.Array:
    """F(λ), the mean absolute error of the later recordings."""
    del key
    hp = spaces.to_constrained(SPACE, coordinates)
    day, score = task.train
    return jnp.abs(course(hp, day, score, task.valid[0]) - task.valid[1]).mean()


def features(day: jax.Array, score: jax.Array, age: jax.Array, sex: jax.Array) -> jax.Array:
    """Returns [NUM_FEATURES] numbers, before scaling by the training patients."""
    span = day[-1] - day[0]
    slope = jnp.where(span > SPAN_DAYS, (score[-1] - score[0]) / jnp.maximum(span, SPAN_DAYS), 0.0) * 100
    return jnp.stack([score[-1], slope, jnp.where(span > SPAN_DAYS, 1.0, 0.0), day[-1], age, sex])


# ---- Learning --------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """Weights of g, and the scaling of its features."""

    meta_params: Any
    mean: jax.Array
    deviation: jax.Array


def first_task(courses: Courses, patient: jax.Array) -> base.Task:
    """Returns the first five recordings of a patient, and the days of all recordings."""
    day, score = courses.day[patient], courses.score[patient]
    first = day[:SHOTS], score[:SHOTS]
    return base.Task(first, (day,), features(*first, courses.age[patient], courses.sex[patient]))


@functools.partial(jax.jit, static_argnums=(3, 4))
def window_tasks(courses: Courses, patients: jax.Array, key: jax.Array, num: int, num_query: int) -> base.Task:
    """Returns training tasks: windows of five recordings, and later ones to predict."""

    def one(key):
        patient_key, start_key, query_key = jax.random.split(key, 3)
        patient = jax.random.choice(patient_key, patients)
        day, score = courses.day[patient], courses.score[patient]
        start = jax.random.randint(start_key, (), 0, courses.starts[patient])
        window = start + jnp.arange(SHOTS)
        later = jax.random.randint(query_key, (num_query,), start + SHOTS, courses.number[patient])
        known = day[window], score[window]
        description = features(*known, courses.age[patient], courses.sex[patient])
        return base.Task(known, (day[later], score[later]), description)

    return jax.vmap(one)(jax.random.split(key, num))


def predictor(num_hidden: int, constant: bool) -> base.Predictor:
    """Returns g. With `constant`, it does not see the features, so λ is the same for all patients."""
    g = predictors.mlp(SPACE, NUM_FEATURES, num_hidden=num_hidden, limit=2.5)
    if not constant:
        return g
    unseen = lambda meta_params, task: g.apply(meta_params, task._replace(features=jnp.zeros(NUM_FEATURES)))
    return g._replace(apply=unseen)


@functools.cache
def _learner(num_hidden: int, decay: float, constant: bool, steps: int) -> training.Learner:
    estimator = predictors.amortize(hypergrad.direct(outer_loss), predictor(num_hidden, constant))
    decayed = lambda params: {name: name != "center" for name in params}
    adam = optax.adamw(optax.cosine_decay_schedule(0.03, steps), weight_decay=decay, mask=decayed)
    return training.learner(hypergrad.over_tasks(estimator, max_norm=1.0), adam)


def learn(courses: Courses, patients, variant: tuple, constant: bool, seed: int, settings: Settings) -> Trained:
    """Returns g, learned on some patients."""
    num_hidden, decay = variant
    patients = jnp.asarray(patients)
    described = window_tasks(courses, patients, jax.random.key(1000 + seed), 500, settings.query).features
    mean, deviation = described.mean(0), described.std(0) + 1e-3

    def sample(key):
        drawn = window_tasks(courses, patients, key, settings.tasks, settings.query)
        return drawn._replace(features=(drawn.features - mean[None]) / deviation[None])

    result = training.fit(
        _learner(num_hidden, decay, constant, settings.steps),
        sample,
        hyperparams=predictor(num_hidden, constant).init(jax.random.key(seed)),
        num_steps=settings.steps,
        key=jax.random.key(100 + seed),
        progress=False,
    )
    return Trained(result.hyperparams, mean, deviation)


@functools.partial(jax.jit, static_argnums=(1, 2))
def predict(trained: Trained, num_hidden: int, constant: bool, courses: Courses, patients: jax.Array):
    """Returns [patients, L] predictions from the first five recordings, and λ."""
    g = predictor(num_hidden, constant)

    def one(patient):
        task = first_task(courses, patient)
        task = task._replace(features=(task.features - trained.mean) / trained.deviation)
        hp = spaces.to_constrained(SPACE, g.apply(trained.meta_params, task))
        return course(hp, *task.train, task.valid[0]), hp

    return jax.vmap(one)(patients)


def errors(courses: Courses, patients: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Returns [patients], mean absolute errors over recordings after the fifth one."""
    place = np.arange(courses.day.shape[1])[None]
    later = (place >= SHOTS) & (place < np.asarray(courses.number)[patients][:, None])
    return (later * np.abs(np.asarray(predictions) - np.asarray(courses.score)[patients])).sum(1) / later.sum(1)


# ---- Baselines -------------------------------------------------------------------------------------------------------


def _known(courses: Courses, patients: np.ndarray):
    """Returns days and scores of all recordings, float64, with age and sex as columns."""
    arrays = (np.asarray(a, float)[patients] for a in (courses.day, courses.score, courses.age, courses.sex))
    day, score, age, sex = arrays
    return day, score, np.stack([age, sex], axis=1)


def _ridge(rows: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(rows.T @ rows + penalty * len(rows) * np.eye(rows.shape[1]), rows.T @ target)


def mixed_model(courses: Courses, fit: np.ndarray, test: np.ndarray, penalties: tuple[float, float]) -> np.ndarray:
    """Returns [test, L], a linear mixed model: fixed time, age and sex, random intercept and slope.

    The effects of a new patient are the best linear unbiased ones, from five residuals r with rows z = (1, t/100):
    b = (ZᵀZ + diag(ρ))⁻¹ Zᵀ r, where ρ is the residual variance over that of the effect.
    """
    day, score, person = _known(courses, fit)
    real = np.arange(day.shape[1])[None] < np.asarray(courses.number)[fit][:, None]
    rows = lambda day, person: np.concatenate(
        [np.ones((*day.shape, 1)), day[..., None] / 100, np.broadcast_to(person[:, None] / [65, 1], (*day.shape, 2))],
        -1,
    )
    weights = _ridge(rows(day, person)[real], score[real], 1e-6)
    day, score, person = _known(courses, test)
    fixed = rows(day, person) @ weights
    z = np.stack([np.ones_like(day), day / 100], axis=-1)
    first, residual = z[:, :SHOTS], (score - fixed)[:, :SHOTS]
    gram = np.einsum("pki,pkj->pij", first, first) + np.diag(penalties)
    effects = np.linalg.solve(gram, np.einsum("pki,pk->pi", first, residual)[..., None])[..., 0]
    return fixed + np.einsum("pli,pi->pl", z, effects)


def ridge(courses: Courses, fit: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """Returns [test, L]: ridge regression of the change since the fifth recording on (1, features) times days."""

    def rows(patients):
        day, score, person = _known(courses, patients)
        describe = jax.vmap(lambda p: first_task(courses, p).features)
        described = np.asarray(describe(jnp.asarray(patients)), float)
        later = (day - day[:, SHOTS - 1 : SHOTS]) / 100
        return described, later, score - score[:, SHOTS - 1 : SHOTS]

    described, later, change = rows(fit)
    mean, deviation = described.mean(0), described.std(0) + 1e-3
    place = np.arange(later.shape[1])[None]
    real = (place >= SHOTS) & (place < np.asarray(courses.number)[fit][:, None])
    inputs = lambda described, later: (
        later[..., None]
        * np.concatenate([np.ones((len(described), 1)), (described - mean) / deviation], axis=1)[:, None]
    )
    weights = _ridge(inputs(described, later)[real], change[real], penalty)
    described, later, _ = rows(test)
    last = np.asarray(courses.score, float)[test][:, SHOTS - 1 : SHOTS]
    return last + inputs(described, later) @ weights


GRIDS = {
    "random intercept": (mixed_model, [(p, 1e9) for p in (1e-3, 1e-2, 0.1, 1.0, 10.0)]),
    "random intercept and slope": (
        mixed_model,
        list(itertools.product((1e-3, 1e-2, 0.1, 1.0), (1e-3, 1e-2, 0.1, 1.0))),
    ),
    "ridge": (ridge, [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]),
}


def baselines(courses: Courses, folds: list[np.ndarray], i: int) -> dict[str, np.ndarray]:
    """Returns name -> [patients of fold i], errors; penalties are those with the least error on training folds."""
    test, others = folds[i], [fold for j, fold in enumerate(folds) if j != i]
    fit = np.concatenate(others)
    _, score, _ = _known(courses, test)
    by_name = {
        "last value": errors(courses, test, score[:, SHOTS - 1 : SHOTS]),
        "mean of the five": errors(courses, test, score[:, :SHOTS].mean(1, keepdims=True)),
    }
    for name, (model, grid) in GRIDS.items():

        def left_out(penalty, model=model):
            means = []
            for j, held in enumerate(others):
                rest = np.concatenate(others[:j] + others[j + 1 :])
                means.append(errors(courses, held, model(courses, rest, held, penalty)).mean())
            return np.mean(means)

        best = min(grid, key=left_out)
        by_name[name] = errors(courses, test, model(courses, fit, test, best))
    return by_name


# ---- The experiment --------------------------------------------------------------------------------------------------


def folds_of(num_patients: int, seed: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(num_patients), NUM_FOLDS)


def choose(courses: Courses, folds: list[np.ndarray], seed: int, settings: Settings) -> list[tuple]:
    """Returns the variant of g for each fold, which has the least error on the other folds."""
    losses = np.full((len(VARIANTS), NUM_FOLDS, NUM_FOLDS), np.nan)
    for (v, variant), (i, j) in itertools.product(enumerate(VARIANTS), itertools.combinations(range(NUM_FOLDS), 2)):
        fit = np.concatenate([fold for k, fold in enumerate(folds) if k not in (i, j)])
        trained = learn(courses, fit, variant, False, seed, settings)
        for own, other in ((i, j), (j, i)):
            held = folds[other]
            losses[v, own, other] = errors(courses, held, predict(trained, variant[0], False, courses, held)[0]).mean()
    return [VARIANTS[v] for v in np.nanmean(losses, axis=2).argmin(0)]


def one_seed(courses: Courses, seed: int, settings: Settings, smoke: bool) -> dict[str, np.ndarray]:
    """Returns name -> [patients] errors, "λ:NAME" -> [patients] the λ of g, "variants" -> [folds, 2]."""
    folds = folds_of(len(courses.number), seed)
    chosen = [VARIANTS[0]] * NUM_FOLDS if smoke else choose(courses, folds, seed, settings)
    arrays = {"variants": np.array(chosen)}
    for i, test in enumerate(folds[:1] if smoke else folds):
        values = baselines(courses, folds, i)
        fit = np.concatenate([fold for j, fold in enumerate(folds) if j != i])
        for name, variant, constant in (("one λ", CONSTANT, True), ("g", chosen[i], False)):
            trained = learn(courses, fit, variant, constant, seed, settings)
            predictions, hp = predict(trained, variant[0], constant, courses, test)
            values[name] = errors(courses, test, predictions)
            values |= {f"λ:{name}:{key}": np.asarray(leaf) for key, leaf in hp.items()}
        for name, of_fold in values.items():
            arrays.setdefault(name, np.zeros(len(courses.number)))[test] = of_fold
        print(f"seed {seed}, fold {i}: g {values['g'].mean():.2f}", flush=True)
    return arrays


def report(runs: list[dict[str, np.ndarray]], patients: np.ndarray) -> str:
    """Returns the text of the result, over these patients."""
    names = [name for name in runs[0] if name != "variants" and not name.startswith("λ:")]
    by_name = {name: np.stack([run[name][patients] for run in runs]) for name in names}
    rows, missed = [], []
    draws = np.random.default_rng(0).integers(len(patients), size=(NUM_RESAMPLES, len(patients)))
    for name in names:
        row = [name, script.spread(by_name[name].mean(1), 2)]
        for other in ("last value", "one λ"):
            gain = (by_name[name] - by_name[other]).mean(0)
            half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
            row.append("" if name == other else f"{gain.mean():+.2f} ± {half:.2f}")
            if name == "g" and round(gain.mean(), 2) + round(half, 2) >= 0:
                missed.append(other)
        lower = by_name[name] - by_name["last value"]
        resampled = lower.mean(0)[draws].mean(1)
        rows.append([*row, f"{100 * (lower < 0).mean():.0f}", f"{100 * (resampled < 0).mean():.0f}"])
    header = ["", "error", "minus last value", "minus one λ", "% of patients", "% of resamples"]
    text = "Research, not a medical device.\n\n" + script.table(header, rows)
    text += (
        f"\n\nMean absolute error of `motor_UPDRS` after five recordings, over {len(patients)} patients; mean ± "
        f"standard deviation over {len(runs)} seed(s), which differ in folds and in the start of g. Differences ± "
        "1.96 standard errors over patients, of means over seeds. The last two columns: in how many patients, and in "
        f"how many of {NUM_RESAMPLES} resamples of the patients, the error is below that of the last value. The "
        f"interval of g is not below 0 against: {', '.join(missed) or 'none'}.\n\n"
    )
    lambdas = [key for key in runs[0] if key.startswith("λ:g:")]
    cells = []
    for key in lambdas:
        low, middle, high = np.percentile([run[key][patients] for run in runs], [10, 50, 90])
        one = np.median([run[key.replace("λ:g:", "λ:one λ:")][patients] for run in runs])
        cells.append([key.removeprefix("λ:g:"), f"{low:.3g}", f"{middle:.3g}", f"{high:.3g}", f"{one:.3g}"])
    text += script.table(["λ of g", "10th percentile", "median", "90th percentile", "one λ, median"], cells)
    pairs, counts = np.unique(np.concatenate([run["variants"] for run in runs]), axis=0, return_counts=True)
    variants = ", ".join(f"{int(u)} units and {d:g} ({n} folds)" for (u, d), n in zip(pairs, counts, strict=True))
    return text + f"\n\nChosen tanh units and weight decay: {variants}."


def plot(runs: list[dict[str, np.ndarray]], path: Path) -> None:
    """Draws the error of each patient next to that of the last value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ("g", "one λ", "ridge", "random intercept and slope")
    mean = lambda name: np.mean([run[name] for run in runs], axis=0)
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.1), layout="constrained", sharey=True)
    for ax, name in zip(axes, shown, strict=True):
        limit = max(mean(other).max() for other in ("last value", *shown)) * 1.05
        ax.plot([0, limit], [0, limit], color="gray", linewidth=0.8)
        ax.scatter(mean("last value"), mean(name), s=14)
        ax.set_title(f"{name}: {mean(name).mean():.2f}", fontsize=10)
        ax.set_xlabel("error of the last value")
    axes[0].set_ylabel("error, one dot per patient")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=3)
    parser.add_argument("--full", action="store_true", help="all seeds")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished seeds")
    options = parser.parse_args()
    settings = SMOKE if options.smoke else Settings()
    folder = None if options.keep is None else script.work_folder(options.keep, __file__)
    courses = read(script.data_file(__file__, "parkinsons_telemonitoring.csv.gz").parent)
    seeds = range(options.seeds if options.full else 1)
    runs = [
        script.kept(folder, f"seed-{s}", functools.partial(one_seed, courses, s, settings, options.smoke))
        for s in seeds
    ]
    patients = folds_of(len(courses.number), 0)[0] if options.smoke else np.arange(len(courses.number))
    text = report(runs, patients)
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        plot(runs, options.out / "medical_parkinsons.png")
    title, picture = "The course of Parkinson's disease", "Errors of the motor score for each patient"
    script.publish(__file__, title, text, options, name="medical_parkinsons", picture=picture)


if __name__ == "__main__":
    script.run(main)
