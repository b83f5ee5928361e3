"""Meta-learning over families of tasks: MAML on mazes, and evolution strategies where gradients explode.

**MAML.** A task is a goal in an open maze, which the policy does not observe. The policy adapts by up to three steps of
a policy gradient, each from a rollout of 16 environments and 32 steps. `few_shot.adaptation` learns the initialization
and a rate for each leaf: the loss makes the rollout, as in `actor_critic.py`. The hypergradient goes through the
updates, and not through the probabilities of the rollouts before them (as in Finn et al., ICML 2017,
https://arxiv.org/abs/1703.03400). A quarter of the goals is held out, and policies are judged on these. There are four
controls. The first one is first-order MAML. The next two are a policy that is trained on all goals without adaptation,
and a random policy. Both adapt at the best of eight rates on the training goals. The last control learns the same λ by
evolution strategies, with as many steps of the environments. It has a sixteenth of the outer steps, with 16 times the
rate of the initialization.

**Evolution strategies.** A task is a CartPole with other masses, length and force. λ are the five hyperparameters of
the actor-critic, which trains for 200 updates from a new start. `hypergrad.diagnose` reports that products of Jacobians
explode. Four methods are compared at an equal number of steps of the environments: `hypergrad.unrolled` over all
updates, `hypergrad.truncated` over windows, `hypergrad.persistent_es`, and random search. The rollouts of the outer
loss count too, although the next update repeats those within a run. The methods are judged on new physics.

    python experiments/rl/families.py --full     # minutes; writes results/rl_families.md and .png
    python experiments/rl/families.py            # one seed
    python experiments/rl/families.py --smoke    # seconds; prints only
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script
from experiments.rl import actor_critic, environments, searches
from experiments.rl.actor_critic import FAMILIES, REFERENCE, SPACE, START, Sizes
from metaopt import base, few_shot, hypergrad, inner, spaces, training

OPEN = " ".join(["." * 7] * 7)
CENTER = 24
HIDDEN_REFERENCE = {"horizon": 10.0, "trace": 0.95, "entropy": 0.01, "value": 0.5}  # a goal is at most six moves away
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the controls without a learned rate


class Settings(NamedTuple):
    num_steps: int = 3  # of adaptation
    goals_per_step: int = 16
    maml_updates: int = 200
    judged_rollouts: int = 8  # for each goal
    outer_rate: float = 3e-3  # of the initialization
    leaf_rate: float = 0.1  # outer rate of the rates of the leaves, which start at 1
    num_pairs: int = 8  # of evolution strategies for the initialization
    sizes: Sizes = Sizes(16, 32, 32)
    course: int = 200  # updates of the actor-critic
    budget: int = 200  # training runs of the actor-critic for each method
    tasks: int = 4  # per outer step
    new_tasks: int = 40
    course_sizes: Sizes = Sizes()


OUTER_RATES = {"unrolled": 0.1, "truncated": 0.03, "persistent_es": 0.1}
# An episode on the maze ends after 16 steps at the latest, so every rollout has finished episodes.
SMOKE = Settings(1, 2, 2, 1, 3e-3, 0.1, 1, Sizes(2, 16, 4), 4, 8, 2, 2, Sizes(2, 6, 4))


# ---- Mazes with a hidden goal ----------------------------------------------------------------------------------------


class Goal(NamedTuple):
    maze: environments.MazeParams
    goal: Any  # the number of the cell


def hidden_goal() -> environments.Environment:
    """Returns an open maze, in which episodes start in the center and observe only row and column of the position."""
    visible = environments.maze(OPEN)
    size = len(visible.params.walls)

    def observe(state):
        return jnp.concatenate(
            [jax.nn.one_hot(state.position // size, size), jax.nn.one_hot(state.position % size, size)]
        )

    def reset(key, params):
        state = visible.reset(key, params.maze)[1]._replace(position=jnp.int32(CENTER), goal=jnp.int32(params.goal))
        return observe(state), state

    def step(key, state, action, params):
        _, new, reward, terminated, truncated, info = visible.step(key, state, action, params.maze)
        new = new._replace(
            position=jnp.where(terminated | truncated, CENTER, new.position).astype(jnp.int32),
            goal=jnp.int32(params.goal),
        )
        return observe(new), new, reward, terminated, truncated, info

    params = Goal(visible.params._replace(max_steps=16), 0)
    return environments.Environment(reset, step, params, visible.num_actions)


def split_goals(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns 36 training goals and 12 other ones."""
    goals = np.random.default_rng(seed).permutation(np.delete(np.arange(49), CENTER))
    return goals[:36], goals[36:]


def goal_tasks(goals: jax.Array) -> base.Task:
    """Returns tasks with a leading axis."""
    params = hidden_goal().params
    physics = script.repeated(params, len(goals))._replace(goal=jnp.asarray(goals, jnp.int32))
    return base.Task(physics, physics)


def losses(sizes: Sizes):
    """Returns the loss and the outer loss of the adaptation; the value of the latter is minus the mean reward."""
    env = hidden_goal()

    def rollout(params, physics, key):
        start_key, key = jax.random.split(key)
        actors = actor_critic.start(env, start_key, physics, sizes.num_actors)
        return actor_critic.policy_rollout(env, params, key, actors, physics, sizes.length)

    def loss(params, hyperparams, physics, context):
        return actor_critic.actor_critic_loss(params, HIDDEN_REFERENCE, rollout(params, physics, context.key)[1])

    def outer_loss(params, hyperparams, physics, context):
        steps = rollout(params, physics, context.key)[1]
        surrogate = actor_critic.actor_critic_loss(params, HIDDEN_REFERENCE, steps)
        return surrogate - jax.lax.stop_gradient(surrogate + steps.reward.mean())

    def mean_return(params, physics, context):
        actors, _ = rollout(params, physics, context.key)
        return actors.finished[0] / actors.finished[1]

    return loss, outer_loss, mean_return


@functools.cache
def adaptations(settings: Settings) -> dict[str, few_shot.Adaptation]:
    """Returns name -> adaptation; "fixed" has one rate in λ, which is not learned."""
    loss, outer_loss, _ = losses(settings.sizes)
    make = functools.partial(
        few_shot.adaptation, loss, outer_loss=outer_loss, with_context=True, num_steps=settings.num_steps
    )
    evolution = functools.partial(hypergrad.evolution, sigma=0.05, num_pairs=settings.num_pairs)
    return {
        "MAML": make(rate=1.0, rates="leaf"),
        "first-order MAML": make(rate=1.0, rates="leaf", order="first"),
        "MAML by evolution": make(rate=1.0, rates="leaf", rule=evolution),
        "all goals": make(num_steps=0),
        "fixed": make(rate=1.0, rates="one"),
    }


def draw_goals(key: jax.Array, goals: jax.Array, num: int) -> base.Task:
    return goal_tasks(jax.random.choice(key, goals, (num,)))


def outer_optimizer(outer_rate: float, leaf_rate: float, num: int) -> optax.GradientTransformation:
    """Returns Adam for λ = {"init": ..., "rate": ...}, whose entries have one outer rate each."""
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, num))
    return optax.multi_transform(
        {"init": adam(outer_rate), "rate": adam(leaf_rate)}, lambda hyperparams: {name: name for name in hyperparams}
    )


@functools.cache
def learning(name: str, num: int, outer_rate: float, settings: Settings) -> Callable:
    """Returns `(key, λ, goals) -> λ` after `num` outer steps on batches of goals."""
    learner = training.learner(
        hypergrad.over_tasks(adaptations(settings)[name].estimator, max_norm=1.0),
        outer_optimizer(outer_rate, settings.leaf_rate, num),
    )

    @jax.jit
    def run(key, hyperparams, goals):
        keys = jax.random.split(key, num + 2)
        draw = lambda key: draw_goals(key, goals, settings.goals_per_step)
        state = learner.init(keys[0], hyperparams, draw(keys[1]))
        step = lambda state, key: (learner.step(state, draw(key))[0], None)
        return jax.lax.scan(step, state, keys[2:])[0].hyperparams

    return run


@functools.cache
def judging(name: str, settings: Settings) -> Callable:
    """Returns `(keys [R], λ, goals [R]) -> [steps + 1]`, the mean return after 0, 1, ... steps of adaptation."""
    mean_return = losses(settings.sizes)[2]

    @jax.jit
    def run(keys, hyperparams, goals):
        method = few_shot.adapted(adaptations(settings)[name], hyperparams, mean_return, with_context=True)
        physics = goal_tasks(goals).train
        return jax.vmap(lambda key, physics: method(key, physics, physics))(keys, physics).mean(0)

    def judge(hyperparams, goals, seed):
        goals = np.repeat(goals, settings.judged_rollouts)
        keys = jax.random.split(jax.random.key(10_000 + seed), len(goals))
        return np.asarray(run(keys, hyperparams, jnp.asarray(goals)))

    return judge


def bound(goals: np.ndarray) -> float:
    """Returns the mean return of shortest paths: 1 − d / 16."""
    size, params = 7, hidden_goal().params.maze
    distance = np.abs(goals // size - CENTER // size) + np.abs(goals % size - CENTER % size)
    return float(np.mean(1 - distance / params.max_steps))


def mazes(seed: int, settings: Settings) -> dict[str, np.ndarray]:
    """Returns method -> mean returns on held-out goals after 0, 1, ... steps of adaptation."""
    train, test = split_goals(seed)
    start = actor_critic.initial_params(jax.random.key(seed), 14, 4, settings.sizes.hidden)
    learn = lambda name, num, rate=settings.outer_rate: learning(name, num, rate, settings)(
        jax.random.key(100 + seed), adaptations(settings)[name].hyperparams(start), jnp.asarray(train)
    )
    results = {}
    for name in ("MAML", "first-order MAML", "MAML by evolution"):
        # Evolution has the same number of rollouts. It takes fewer steps, whose rates have the same sum.
        fewer = 2 * settings.num_pairs if name == "MAML by evolution" else 1
        learned = learn(name, -(-settings.maml_updates // fewer), fewer * settings.outer_rate)
        results[name] = judging("MAML", settings)(learned, test, seed)
    pretrained = learn("all goals", settings.maml_updates * (settings.num_steps + 1))["init"]
    judge = judging("fixed", settings)
    for name, init in {"trained on all goals": pretrained, "random start": start}.items():
        hyperparams = [{"init": init, "rate": jnp.array(rate)} for rate in RATES]
        known = [judge(hp, train, 500 + seed)[-1] for hp in hyperparams]
        results[name] = judge(hyperparams[int(np.nan_to_num(known, nan=-np.inf).argmax())], test, seed)
    return {**results, "shortest paths": np.full(settings.num_steps + 1, bound(test))}


# ---- The hyperparameters of an actor-critic over CartPoles -----------------------------------------------------------


def physics_tasks(key: jax.Array, num: int) -> base.Task:
    """Returns CartPoles whose masses, length and force are up to twice or half of the usual ones."""
    usual = FAMILIES["CartPole"].physics
    names = ("cart_mass", "pole_mass", "length", "force")
    factors = 2 ** jax.random.uniform(key, (len(names), num), minval=-1.0, maxval=1.0)
    changes = {name: getattr(usual, name) * factor for name, factor in zip(names, factors, strict=True)}
    physics = script.repeated(usual, num)._replace(**changes)
    return base.Task(physics, (physics, script.repeated(actor_critic.OUTER, num)))


def estimators(problem: base.Problem, settings: Settings) -> dict[str, tuple[base.Estimator, float]]:
    """Returns name -> estimator, and the training runs that one estimate of a batch of tasks needs.

    A training run is `course` rollouts, one for each update. An outer loss makes a rollout too: one for each estimate,
    and for `persistent_es` one for each update of its eight runs.
    """
    course, tasks, window = settings.course, settings.tasks, max(settings.course // 10, 1)
    evolution = functools.partial(hypergrad.persistent_es, sigma=0.3, num_pairs=4)
    return {
        "unrolled": (hypergrad.unrolled(problem, num_steps=course), tasks * (course + 1) / course),
        f"truncated, {window} updates": (
            hypergrad.truncated(problem, num_steps=course, truncation_length=window),
            tasks * (window + 1) / course,
        ),
        "truncated, 1 update": (
            hypergrad.truncated(problem, num_steps=course, truncation_length=1),
            tasks * 2 / course,
        ),
        "persistent_es": (
            evolution(problem, num_steps=course, truncation_length=window),
            8 * tasks * 2 * window / course,
        ),
    }


def tune(estimator: base.Estimator, runs_per_estimate: float, outer_rate: float, seed: int, settings: Settings):
    """Returns z after the budget of training runs, and the share of skipped outer steps."""
    num = max(round(settings.budget / runs_per_estimate), 1)
    learner = training.learner(hypergrad.over_tasks(estimator, max_norm=1.0), optax.adam(outer_rate))
    draw = lambda key: physics_tasks(key, settings.tasks)

    @jax.jit
    def run(z):
        task_key, learn_key = jax.random.split(jax.random.key(200 + seed))

        def step(state, key):
            state, metrics = learner.step(state, draw(key))
            return state, metrics["hypergrad_norm"]

        state, norms = jax.lax.scan(step, learner.init(learn_key, z, draw(task_key)), jax.random.split(task_key, num))
        return state.hyperparams, (~jnp.isfinite(norms)).mean()

    return run(jax.tree.map(lambda x: x[0], searches.coordinates([START])))


@functools.lru_cache
def course_trainer(num_updates: int, sizes: Sizes):
    """Returns `(keys [R], z [R], physics [R]) -> scores [R]` of training runs from a new start."""
    family = FAMILIES["CartPole"]
    loop = actor_critic.make_problem(family, sizes).loop

    @jax.jit
    @jax.vmap
    def curves(key, z, physics):
        finished = lambda state: state.model_state.actors.finished
        return inner.run(loop, num_updates, trace_fn=finished)(key, z, physics)[1]

    return lambda *args: family.score(searches.final(np.asarray(curves(*args), np.float64)))


def judged_course(z: Any, key: jax.Array, num: int, settings: Settings) -> float:
    """Returns the mean score of training runs with λ on `num` draws of the physics."""
    physics_key, run_key = jax.random.split(key)
    trainer = course_trainer(settings.course, settings.course_sizes)
    return float(
        np.nan_to_num(
            trainer(jax.random.split(run_key, num), script.repeated(z, num), physics_tasks(physics_key, num).train)
        ).mean()
    )


def random_search(seed: int, settings: Settings) -> Any:
    """Returns z of the best of random points, each of which trains on eight draws of the physics."""
    each = min(8, settings.budget)
    keys = jax.random.split(jax.random.key(300 + seed), max(settings.budget // each, 1))
    points = [spaces.to_unconstrained(SPACE, spaces.sample(key, SPACE)) for key in keys]
    scores = [judged_course(z, key, each, settings) for z, key in zip(points, keys, strict=True)]
    return points[int(np.argmax(scores))]


def courses(seed: int, settings: Settings) -> dict[str, np.ndarray]:
    """Returns method -> (score on new physics, share of outer steps that were skipped, λ)."""
    problem = actor_critic.make_problem(FAMILIES["CartPole"], settings.course_sizes)
    one = lambda hp: jax.tree.map(lambda x: x[0], searches.coordinates([hp]))
    tuned = {
        "bad values": (one(START), 0.0),
        "reference, rate 0.01": (one({**REFERENCE, "rate": 0.01}), 0.0),
        "random search": (random_search(seed, settings), 0.0),
    }
    for name, (estimator, runs) in estimators(problem, settings).items():
        tuned[name] = tune(estimator, runs, OUTER_RATES[name.split(",")[0]], seed, settings)
    key, results = jax.random.key(20_000 + seed), {}
    for name, (z, skipped) in tuned.items():
        score = judged_course(z, key, settings.new_tasks, settings)
        hp = spaces.to_constrained(SPACE, z)
        results[name] = np.array([score, float(skipped), *(float(hp[key]) for key in SPACE)])
    return results


def growths(settings: Settings) -> dict[str, float]:
    """Returns the mean log growth of a perturbation per update, at the bad values and at the reference."""
    problem = actor_critic.make_problem(FAMILIES["CartPole"], settings.course_sizes)
    task = jax.tree.map(lambda x: x[0], physics_tasks(jax.random.key(0), 1))
    result = {}
    for name, hp in {"bad values": START, "reference, rate 0.01": {**REFERENCE, "rate": 0.01}}.items():
        z = jax.tree.map(lambda x: x[0], searches.coordinates([hp]))
        diagnosis = hypergrad.diagnose(problem, z, task, num_steps=settings.course)
        result[name] = diagnosis.growth
        print(name, diagnosis, flush=True)
    return result


# ---- the page --------------------------------------------------------------------------------------------------------


def report(of_mazes: list[dict], of_courses: list[dict], growth: dict[str, float], settings: Settings) -> str:
    steps = range(settings.num_steps + 1)
    maze_rows = [[name, *(script.spread([run[name][k] for run in of_mazes]) for k in steps)] for name in of_mazes[0]]
    course_rows = []
    for name in of_courses[0]:
        runs = np.stack([run[name] for run in of_courses])
        course_rows.append(
            [
                name,
                script.spread(runs[:, 0]),
                f"{runs[:, 1].mean():.2f}",
                *(f"{v:.2g}" for v in np.median(runs[:, 2:], 0)),
            ]
        )
    growth_text = "; ".join(f"{name} {value:+.3f}" for name, value in growth.items())
    maze_steps = settings.sizes.num_actors * settings.sizes.length
    course_steps = settings.course * settings.course_sizes.num_actors * settings.course_sizes.length
    return (
        "## Mazes with a hidden goal\n\nMean return on 12 held-out goals after 0, 1, ... steps of adaptation; mean ± "
        f"standard deviation over {len(of_mazes)} seeds, which differ in the goals too.\n\n"
        f"{script.table(['method', *(f'{k} step' + 's' * (k != 1) for k in steps)], maze_rows)}\n\n"
        f"{settings.maml_updates} outer steps of {settings.goals_per_step} goals; a step of adaptation takes "
        f"{maze_steps} steps of the environments.\n\n"
        "## Hyperparameters of an actor-critic over CartPoles\n\nMean score of training with the tuned "
        f"hyperparameters on {settings.new_tasks} new draws of the physics; mean ± standard deviation over "
        f"{len(of_courses)} seeds.\n\n"
        f"{script.table(['method', 'score', 'skipped', *SPACE], course_rows)}\n\n"
        f"Each method has {settings.budget} training runs of {settings.course} updates ({course_steps:,} steps of the "
        'environments each). "skipped" is the share of outer steps without a finite hypergradient; '
        f"hyperparameters are medians. Mean log growth of a small change of the weights per update "
        f"(`hypergrad.diagnose`): {growth_text}."
    )


def plot(of_mazes: list[dict], of_courses: list[dict], settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    deviation = lambda values: values.std(0, ddof=min(1, len(values) - 1))  # as in the tables
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for color, name in enumerate(name for name in of_mazes[0] if name != "shortest paths"):
        values = np.stack([run[name] for run in of_mazes])
        left.errorbar(
            range(values.shape[1]), values.mean(0), deviation(values), color=f"C{color}", label=name, capsize=2
        )
    left.axhline(np.mean([run["shortest paths"][0] for run in of_mazes]), color="gray", ls=":", label="shortest paths")
    left.set(xlabel="steps of adaptation", ylabel="mean return on held-out goals", xticks=range(settings.num_steps + 1))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    names = list(of_courses[0])
    values = np.array([[run[name][0] for name in names] for run in of_courses])
    right.barh(names, values.mean(0), xerr=deviation(values), color="C0")
    right.set(xlabel="score of training on new CartPoles")
    right.invert_yaxis()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--full", action="store_true", help="three seeds")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished parts")
    args = parser.parse_args()
    settings, seeds = (SMOKE, 1) if args.smoke else (Settings(), 3 if args.full else args.seeds)
    files = [Path(module.__file__) for module in (actor_critic, environments, searches)]
    folder = None if args.keep is None or args.smoke else script.work_folder(args.keep, Path(__file__), *files)
    of_mazes, of_courses = [], []
    keep, seconds = script.timed_parts(folder)
    for seed in range(seeds):
        of_mazes.append(keep(f"mazes_{seed}", lambda seed=seed: mazes(seed, settings)))
        of_courses.append(keep(f"courses_{seed}", lambda seed=seed: courses(seed, settings)))
    text = report(of_mazes, of_courses, growths(settings), settings)
    title = "Reinforcement learning over families of tasks"
    script.publish(__file__, title, text, args, name="rl_families", seconds=sum(seconds))
    if not args.smoke:
        plot(of_mazes, of_courses, settings, args.out / "rl_families.png")


if __name__ == "__main__":
    script.run(main)
