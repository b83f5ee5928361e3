"""Skeletons of new parts; the page new_parts.md explains them."""


# --- A rule for dF/dλ ---


import jax
import jax.numpy as jnp
import optax

from metaopt import base, hypergrad, inner


def direct_part(problem, *, num_steps):
    """∂f/∂λ at θ(λ), without the path through θ."""
    train = inner.run(problem.loop, num_steps)

    def init(key, hyperparams, task):
        return key  # all that later estimates need

    def estimate(hyperparams, task, state):
        train_key, outer_key, key = jax.random.split(state, 3)
        trained = train(train_key, jax.lax.stop_gradient(hyperparams), task.train)
        params, context = (
            problem.loop.params(trained),
            problem.loop.context(trained),
        )
        batch = problem.outer_batch(outer_key, task)
        outer = lambda hyperparams: problem.outer_loss(
            params, hyperparams, batch, context
        )
        value, hypergrad = jax.value_and_grad(outer)(hyperparams)
        return base.Estimate(value, hypergrad, jnp.array(True), {}), key

    return base.Estimator(init, estimate, kind="biased")


loop = inner.loop(
    lambda params, hp, data: (params - data) ** 2 / 2 + hp * params**2 / 2,
    lambda hp: optax.sgd(0.5),
    init=lambda key, hp, data: jnp.zeros([]),
)
problem = inner.problem(loop, lambda params, hp, data: (params - data) ** 2 + hp**2)
task = base.Task(train=jnp.array(1.0), valid=jnp.array(1.0))
for rule in (direct_part, hypergrad.unrolled):
    print(hypergrad.check(rule(problem, num_steps=30), jnp.array(0.5), task))


# --- A solver of the linear system ---


def steepest_descent(*, num_steps):
    def solve(matvec, b, initial, *, key):
        def step(_, v):
            residual = optax.tree.sub(b, matvec(v))
            square = optax.tree.vdot(residual, residual)
            curvature = optax.tree.vdot(residual, matvec(residual))
            # not at the solution, where the residual is zero
            positive = curvature > 0
            rate = jnp.where(
                positive, square / jnp.where(positive, curvature, 1), 0
            )
            return optax.tree.add_scale(v, rate, residual)

        return jax.lax.fori_loop(0, num_steps, step, initial), 2 * num_steps

    return solve


rule = hypergrad.implicit(
    problem, num_steps=30, solver=steepest_descent(num_steps=5)
)
print(hypergrad.check(rule, jnp.array(0.5), task))


# --- A few-shot method ---


from metaopt import few_shot, tasks


def head_only(loss, *, num_steps=3, rate=0.1, **options):
    return few_shot.adaptation(
        loss, num_steps=num_steps, rate=rate, rates="one", adapt="^head", **options
    )


def regression(params, hyperparams, batch):
    return (
        (
            jnp.tanh(batch["x"][:, None] * params["body"][None]) @ params["head"]
            - batch["y"]
        )
        ** 2
    ).mean()


method = head_only(regression)
start = method.hyperparams({"body": jnp.arange(1.0, 9.0), "head": jnp.zeros(8)})
episodes = tasks.episode_batches(tasks.sinusoids(num_shots=10), 4)(
    jax.random.key(0)
)
estimator = hypergrad.over_tasks(method.estimator)
estimate, _ = estimator.estimate(
    start, episodes, estimator.init(jax.random.key(1), start, episodes)
)
print(estimate.value.round(2), estimate.hypergrad["rate"])


# --- A searcher ---


from metaopt import blackbox, spaces


def hill_climbing(*, spread=0.3):
    def init(key, space):
        return {
            "key": key,
            "space": space,
            "num": 0,
            "best": (float("inf"), spaces.default(space)),
        }

    def ask(state, num):
        trials, space = [], state["space"]
        for trial in range(state["num"], state["num"] + num):
            move_key, seed_key = jax.random.split(
                jax.random.fold_in(state["key"], trial)
            )
            z, unravel = jax.flatten_util.ravel_pytree(
                spaces.to_unconstrained(space, state["best"][1])
            )
            moved = unravel(
                z + spread * jax.random.normal(move_key, z.shape) * (trial > 0)
            )
            configuration = spaces.configuration(
                space, spaces.to_constrained(space, moved)
            )
            seed = int(jax.random.randint(seed_key, (), 0, 2**31 - 1))
            trials.append(
                base.Record(
                    "", configuration, trial=trial, seed=seed, status="WAITING"
                )
            )
        return trials, {**state, "num": state["num"] + num}

    def tell(state, records):
        inside = [
            r
            for r in records
            if not spaces.foreign(state["space"], r.configuration)
        ]
        complete = [r for r in inside if r.status == "COMPLETE" and r.fidelity == 1]
        done = [
            (r.outcome, r.configuration)
            for r in complete
            if -float("inf") < r.outcome < state["best"][0]
        ]
        if not done:
            return state
        outcome, configuration = min(done, key=lambda pair: pair[0])
        return {
            **state,
            "best": (
                outcome,
                spaces.from_configuration(state["space"], configuration),
            ),
        }

    return base.Searcher(init, ask, tell)


space = {"rate": spaces.interval(1e-4, 1.0, log=True, default=0.5)}
records = blackbox.collect(
    lambda trial, task: (jnp.log10(trial.configuration["rate"]) + task) ** 2,
    space,
    {"a": 2.0},
    num_trials=20,
    key=jax.random.key(0),
    searcher=hill_climbing(),
    isolated=False,
    progress=False,
)
print([round(float(record.outcome), 2) for record in records][::4])
