"""Meta-gradients of five hyperparameters of an actor-critic while it trains, from bad starting values.

Horizon 1 / (1 − γ), λ of the returns, entropy weight, value weight and Adam's rate start at `actor_critic.START`. After
every update, `hypergrad.truncated` looks back over one update, and judges it on the next rollout by an actor-critic
loss with fixed hyperparameters and a divergence (`actor_critic.OUTER`). One training run tunes all five.

Compared on three families of environments:

* the same run without tuning: with the bad values; with the reference values and the bad rate; and with the reference
  values and a usual rate (0.01);
* other bad values (`actor_critic.OTHER_START`, with a rate that is too large), fixed and tuned, and tuning without the
  divergence in the outer loss; `bad_values.py` has the controls;
* the best of 25 points (five rates, five horizons, the others as in the reference), chosen on other seeds;
* random search, TPE and PBT with 8 trials, in two variants. In the first one, all trials together take as many steps of
  the environments as the one run, so each trial takes an eighth. In the second one, each trial takes as many steps as
  the one run.

The score is the mean return of the episodes that end in the last tenth of the steps, on a scale on which 1 is an upper
bound of the return. A run without a finite return has score 0. A search chooses its trial by the tenth of the steps
before that. Intervals are stratified bootstrap intervals of the interquartile mean over seeds. The outer rate and the
outer loss were chosen on other seeds (`--develop`). `--families Acrobot` is a fourth family, which no choice saw.

    python experiments/rl/meta_gradients.py --full     # 14 minutes; writes results/rl_meta_gradients.md and .png
    python experiments/rl/meta_gradients.py            # five seeds
    python experiments/rl/meta_gradients.py --develop  # choices, on other seeds; prints only
    python experiments/rl/meta_gradients.py --smoke    # seconds; prints only
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import script
from experiments.rl import actor_critic, environments, scores, searches
from experiments.rl.actor_critic import FAMILIES, OTHER_START, OUTER, REFERENCE, SPACE, START, Family, Sizes
from metaopt import base, hypergrad
from metaopt.training import report_progress

FAMILY_NAMES = ("Catch", "maze", "CartPole")
RATES, HORIZONS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (2.0, 6.0, 18.0, 54.0, 162.0)
GRID = [{**REFERENCE, "rate": rate, "horizon": horizon} for rate in RATES for horizon in HORIZONS]
USUAL_RATE = 0.01
OUTER_RATES = (0.003, 0.01, 0.03)
DEVELOPMENT, SELECTION = 1000, 2000  # the first seeds of runs for choices by hand, and for the grid


class Settings(NamedTuple):
    seeds: int = 20
    selection_seeds: int = 4
    full_search_seeds: int = 10  # of searches that have the full steps for each trial
    num_updates: int = 800
    num_trials: int = 8
    grid: int = 25
    window: int = 1  # updates per hypergradient
    outer_rate: float = 0.03
    sizes: Sizes = Sizes()

    @property
    def env_steps(self) -> int:
        return self.num_updates * self.sizes.num_actors * self.sizes.length

    @property
    def chunk(self) -> int:
        """Training runs of one call. The last call of a method repeats runs, so fewer seeds need a smaller chunk."""
        return 2 * self.seeds


SMOKE = Settings(2, 1, 1, 20, 2, 2, sizes=Sizes(2, 10, 4))


class Programs(NamedTuple):
    """The compiled programs of one family: training with fixed hyperparameters, and with tuned ones."""

    family: Family
    problem: base.Problem
    trainer: searches.Trainer
    tune: Callable


def make_programs(name: str, settings: Settings) -> Programs:
    family = FAMILIES[name]
    problem = actor_critic.make_problem(family, settings.sizes)
    trainer = searches.trainer(problem, family.physics, settings.num_updates, settings.chunk)
    estimator = hypergrad.truncated(problem, num_steps=settings.num_updates, truncation_length=settings.window)
    num_estimates = settings.num_updates // settings.window
    return Programs(family, problem, trainer, searches.tuned(estimator, num_estimates, settings.chunk // 2))


def tune_all(programs: Programs, keys: jax.Array, settings: Settings, start=START, outer=OUTER, names=tuple(SPACE)):
    """Returns curves and paths of one run for each key, in which the hyperparameters `names` are tuned."""
    num = len(keys)
    z = searches.coordinates([start] * num)
    tasks = script.repeated(actor_critic.make_task(programs.family, outer), num)
    return programs.tune(keys, z, searches.outer_rates([settings.outer_rate] * num, names), tasks)


def measure(name: str, programs: Programs, settings: Settings, keep: Callable) -> dict[str, dict[str, np.ndarray]]:
    """Returns {method: {"score": [seeds], ...}} of one family."""
    family, trainer = programs.family, programs.trainer
    seeds, full, part = range(settings.seeds), settings.num_updates, settings.num_updates // settings.num_trials
    keys = searches.run_keys(seeds)

    def fixed(hyperparams):
        curves = trainer.train(keys, searches.coordinates([hyperparams] * len(seeds)), full)
        return {"score": family.score(searches.final(curves)), "curves": curves}

    def grid():
        selection = range(SELECTION, SELECTION + settings.selection_seeds)
        points = GRID[:: len(GRID) // settings.grid][: settings.grid]
        best, means = searches.best_of_grid(trainer, points, selection, full)
        point = {"rate": np.array(best["rate"]), "horizon": np.array(best["horizon"])}
        return {**fixed(best), **point, "means": family.score(means)}

    def tuned(start=START, **options):
        curves, paths = tune_all(programs, keys, settings, start, **options)
        paths = {f"path {key}": path for key, path in paths.items()}
        return {"score": family.score(searches.final(curves)), "curves": curves, **paths}

    def searched(search, num_updates):
        own = seeds[: settings.full_search_seeds] if num_updates == full else seeds
        return lambda: {"score": family.score(search(trainer, own, settings.num_trials, num_updates))}

    methods = {
        "bad values": lambda: fixed(START),
        "reference, bad rate": lambda: fixed(REFERENCE),
        "reference, usual rate": lambda: fixed({**REFERENCE, "rate": USUAL_RATE}),
        "meta-gradients": tuned,
        "meta-gradients, no divergence": lambda: tuned(outer={**OUTER, "kl": 0.0}),
        "other bad values": lambda: fixed(OTHER_START),
        "meta-gradients, other bad values": lambda: tuned(OTHER_START),
        "best of the grid": grid,
    }
    for kind, search in {"random search": searches.random_search, "TPE": searches.tpe, "PBT": searches.pbt}.items():
        methods[f"{kind}, equal steps"] = searched(search, part)
        methods[f"{kind}, {settings.num_trials} times the steps"] = searched(search, full)
    return {method: keep(f"{name}, {method}", make) for method, make in methods.items()}


def growth(programs: Programs, settings: Settings) -> float:
    """Returns the growth that `hypergrad.diagnose` measures at the reference with the usual rate."""
    z = jax.tree.map(lambda x: x[0], searches.coordinates([{**REFERENCE, "rate": USUAL_RATE}]))
    num_steps = min(100, settings.num_updates)
    return hypergrad.diagnose(programs.problem, z, actor_critic.make_task(programs.family), num_steps=num_steps).growth


def speeds(programs: Programs, settings: Settings) -> np.ndarray:
    """Returns steps of the environments per processor second: a bare scan, training, and tuned training."""
    sizes, num = settings.sizes, settings.chunk
    env, keys, z = programs.family.environment, searches.run_keys(range(num)), searches.coordinates([START] * num)
    physics = jax.tree.map(jnp.asarray, programs.family.physics)

    def bare(key):
        act = lambda key, observation: jax.random.randint(key, (sizes.num_actors,), 0, env.num_actions)
        actors = actor_critic.start(env, key, physics, sizes.num_actors)
        actors, rollout = actor_critic.roll_out(env, act, key, actors, physics, sizes.length * settings.num_updates)
        return actors.finished, rollout.observation.sum()

    scan = jax.jit(jax.vmap(bare))
    runs = [
        lambda: scan(keys),
        lambda: programs.trainer.train(keys, z, settings.num_updates),
        lambda: tune_all(programs, keys[: num // 2], settings),
    ]
    rates = []
    for run, share in zip(runs, (1, 1, 0.5), strict=True):
        jax.block_until_ready(run())  # compiles
        begin = time.process_time()
        jax.block_until_ready(run())
        rates.append(share * num * settings.env_steps / (time.process_time() - begin))
    return np.array(rates)


# ---- the page --------------------------------------------------------------------------------------------------------


def interval_text(values: np.ndarray) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*scores.interval(values))


def score_table(results: dict[str, dict], settings: Settings) -> str:
    """Returns the interquartile means of all methods."""
    equal, full = settings.env_steps, settings.env_steps * settings.num_trials
    rows = []
    for method in next(iter(results.values())):
        values = np.stack([family[method]["score"] for family in results.values()])
        steps = full if "times the steps" in method else equal
        if method == "best of the grid":
            steps = settings.env_steps * settings.grid * settings.selection_seeds
        cells = [interval_text(row[None]) for row in values]
        rows.append([method, f"{steps / 1e6:.3f}", *cells, interval_text(values)])
    return script.table(["method", "million steps", *results, "all"], rows)


def failures(results: dict[str, dict]) -> str:
    """Returns a sentence on the runs without a finite score."""
    numbers = {}
    for name, family in results.items():
        for method, arrays in family.items():
            if num := int((~np.isfinite(arrays["score"])).sum()):
                numbers.setdefault(method, []).append(f"{name} {num}")
    return f"Runs without a finite score, which count as 0: {script.listed(numbers)}."


def differences(results: dict[str, dict]) -> str:
    """Returns interquartile means of meta-gradients minus those of the best of the grid; seeds are resampled."""
    rng, parts = np.random.default_rng(0), []

    def resampled(values):
        draws = rng.integers(values.shape[1], size=(2000, *values.shape))
        return scores.interquartile_mean(np.take_along_axis(values[None], draws, axis=2).reshape(2000, -1))

    for name, families in {**{name: [family] for name, family in results.items()}, "all": results.values()}.items():
        tuned, best = (np.stack([f[key]["score"] for f in families]) for key in ("meta-gradients", "best of the grid"))
        low, high = np.quantile(resampled(tuned) - resampled(best), [0.025, 0.975])
        difference = scores.interquartile_mean(tuned.reshape(-1)) - scores.interquartile_mean(best.reshape(-1))
        parts.append(f"{name} {difference:+.3f} [{low:+.3f}, {high:+.3f}]")
    return "Meta-gradients minus the best of the grid, interquartile means: " + "; ".join(parts) + "."


def hyperparameter_table(results: dict[str, dict]) -> str:
    """Returns the tuned values at the middle and the end of training, medians over seeds, and the best of the grid."""
    rows = [["start", *(f"{START[key]:g}" for key in SPACE)]]
    for name, family in results.items():
        paths = {key: family["meta-gradients"][f"path {key}"] for key in SPACE}
        for label, place in (("half", 0.5), ("end", 1.0)):
            step = round(place * paths["rate"].shape[1]) - 1
            rows.append([f"{name}, {label}", *(f"{np.median(path[:, step]):.2g}" for path in paths.values())])
        best = {**REFERENCE, **{key: float(family["best of the grid"][key]) for key in ("rate", "horizon")}}
        rows.append([f"{name}, best of the grid", *(f"{best[key]:.2g}" for key in SPACE)])
    return script.table(["", *SPACE], rows)


def report(
    results: dict[str, dict], measured: dict[str, list[str]], growths: dict[str, float], settings: Settings
) -> str:
    sizes = settings.sizes
    speed = script.table(
        ["steps per processor second", "bare scan", "training", "with meta-gradients"], [*measured.values()]
    )
    growth_text = "; ".join(f"{name} {value:+.3f}" for name, value in growths.items())
    outer_text = ", ".join(f"{key} {value:g}" for key, value in OUTER.items())
    grids = "; ".join(
        f"{name} from {scores.counted(family['best of the grid']['means']).min():.3f} to "
        f"{scores.counted(family['best of the grid']['means']).max():.3f}"
        for name, family in results.items()
    )
    return (
        "Interquartile mean of the score over seeds, with a 95 % stratified bootstrap interval. Million steps: of the "
        f"environments, for one result. {failures(results)}\n\n"
        f"{score_table(results, settings)}\n\n{differences(results)}\n\nMean scores of the points of the "
        f"grid on its own seeds: {grids}.\n\nHyperparameters, medians over seeds:\n\n"
        f"{hyperparameter_table(results)}\n\n{speed}\n\nMean log growth of a small change of the weights per update "
        f"(`hypergrad.diagnose`, at the reference with rate {USUAL_RATE}): {growth_text}.\n\n"
        f"{settings.num_updates} updates of {sizes.num_actors} environments and {sizes.length} steps, {sizes.hidden} "
        f"hidden units; `hypergrad.truncated` over {settings.window} update(s), outer Adam with rate "
        f"{settings.outer_rate}. Outer loss: {outer_text}. Seeds 0 to {settings.seeds - 1}, up to "
        f"{settings.full_search_seeds - 1} for searches with {settings.num_trials} times the steps; for the grid "
        f"{SELECTION} to {SELECTION + settings.selection_seeds - 1}; for choices by hand from {DEVELOPMENT}."
    )


def plot(results: dict[str, dict], settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(3 + 3.3 * len(results), 6), layout="constrained")
    for column, (name, family) in enumerate(results.items()):
        for color, method in enumerate(("bad values", "reference, bad rate", "meta-gradients", "best of the grid")):
            curves, edges = family[method]["curves"], np.linspace(0, 1, 21)
            values = np.stack([searches.mean_returns(curves, a, b) for a, b in zip(edges, edges[1:], strict=False)], 1)
            middle = scores.interquartile_mean(FAMILIES[name].score(values).T)
            middle = np.where(np.isfinite(values).any(0), middle, np.nan)  # no episode has ended
            axes[0, column].plot(edges[1:] * settings.env_steps / 1e3, middle, color=f"C{color}", label=method)
        level = scores.interquartile_mean(family[f"TPE, {settings.num_trials} times the steps"]["score"])
        axes[0, column].axhline(level, color="gray", ls=":", label=f"TPE, {settings.num_trials} times the steps")
        axes[0, column].set(title=name, xlabel="thousand steps of the environments")
        for color, key in enumerate(SPACE):
            values = np.median(family["meta-gradients"][f"path {key}"], 0)
            axes[1, column].plot(
                np.linspace(0, settings.env_steps / 1e3, len(values)), values / values[0], color=f"C{color}", label=key
            )
        axes[1, column].set(yscale="log", xlabel="thousand steps of the environments")
    axes[0, 0].set_ylabel("score")
    axes[1, 0].set_ylabel("hyperparameter / its bad start")
    for row in axes[:, -1]:  # next to the curves, so that it hides none
        row.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def develop(settings: Settings, names: tuple[str, ...]) -> str:
    """Returns the mean scores, and the tuned values at the end, of outer losses and outer rates on other seeds."""
    rows, seeds = [], range(DEVELOPMENT, DEVELOPMENT + 3)
    choices = [(rate, {**OUTER, "kl": weight}) for weight in (0.0, 1.0) for rate in OUTER_RATES]
    keys = jnp.tile(searches.run_keys(seeds), len(choices))
    z = searches.coordinates([START] * len(keys))
    outer_rates = searches.outer_rates(np.repeat([rate for rate, _ in choices], len(seeds)))
    for name in names:
        programs = make_programs(name, settings)
        tasks = [actor_critic.make_task(programs.family, reference) for _, reference in choices for _ in seeds]
        curves, paths = programs.tune(keys, z, outer_rates, jax.tree.map(lambda *x: jnp.stack(x), *tasks))
        score = programs.family.score(searches.final(curves)).reshape(len(choices), -1)
        ends = [np.median(path[:, -1].reshape(len(choices), -1), 1) for path in paths.values()]
        for i, (rate, reference) in enumerate(choices):
            row = [name, f"{reference['kl']:g}", str(rate), script.spread(scores.counted(score[i]))]
            rows.append([*row, *(f"{end[i]:.2g}" for end in ends)])
            print(rows[-1], flush=True)
    return script.table(["family", "weight of the divergence", "outer rate", "score", *SPACE], rows)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=5)
    parser.add_argument("--full", action="store_true", help="20 seeds")
    parser.add_argument("--develop", action="store_true", help="compare outer rates on other seeds")
    parser.add_argument("--families", nargs="*", help="only these families")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    args = parser.parse_args()
    settings = SMOKE if args.smoke else Settings(seeds=20 if args.full else args.seeds)
    if args.develop:
        print(develop(settings, args.families or FAMILY_NAMES))
        return
    files = [Path(module.__file__) for module in (actor_critic, environments, scores, searches)]
    folder = None if args.keep is None or args.smoke else script.work_folder(args.keep, Path(__file__), *files)
    keep, seconds = script.timed_parts(folder and folder / f"{settings.seeds}_seeds")
    names = FAMILY_NAMES[:1] if args.smoke else args.families or FAMILY_NAMES
    results, measured, growths = {}, {}, {}
    with report_progress(len(names), None, "{family}", unit="family", family="") as progress:
        for count, name in enumerate(names):
            programs = make_programs(name, settings)
            results[name] = measure(name, programs, settings, keep)
            own = keep(f"{name}, speed", lambda programs=programs: {"rates": speeds(programs, settings)})
            measured[name] = [name, *(f"{rate:,.0f}" for rate in own["rates"])]
            own = keep(f"{name}, growth", lambda programs=programs: {"growth": np.array(growth(programs, settings))})
            growths[name] = float(own["growth"])
            progress(count + 1, family=name)
    text = report(results, measured, growths, settings)
    name = "rl_meta_gradients"
    script.publish(__file__, "Meta-gradients of an actor-critic", text, args, name=name, seconds=sum(seconds))
    if not args.smoke:
        plot(results, settings, args.out / f"{name}.png")


if __name__ == "__main__":
    script.run(main)
