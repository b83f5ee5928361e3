"""One fold: learns h by hypergradient or from records, generates and fine-tunes architectures, and compares them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architecture.auto_architecture.baselines import best_fixed, best_of, evolve
from experiments.architecture.auto_architecture.darts import Darts
from experiments.architecture.auto_architecture.prepared import Prepared, asked, compared_key, rows_of_fold
from experiments.architecture.auto_architecture.results import (
    A_STAR,
    BOTH,
    EVOLUTION,
    FINE_TUNED,
    FIXED,
    IGNORANT,
    LEARNED,
    RANDOM,
    RECORDS,
)
from experiments.architecture.auto_architecture.searcher import make_sampler, scale_features, trusted, with_features
from experiments.architecture.auto_architecture.training import in_chunks
from metaopt import training


def run_fold(p: Prepared, f: int, key: jax.Array, seed: int, say: Callable) -> dict[str, Any]:
    """Runs steps 2 to 4 and the comparison.

    h is not trained on the families of this fold. The result is ready for JSON.
    """
    shape, config, units, name = p.shape, p.shape.config, p.units, p.shape.name
    keys = iter(jax.random.split(key, 16))
    take = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
    train_rows, learn_rows, left_rows, held = rows_of_fold(p, f, seed)
    n = len(held)
    values, names = scale_features(units, p.gradients, train_rows)
    with_values = with_features(shape, p.batch, values)
    new, new_test = take(with_values, held), take(p.test, held)

    # 2. h and the initial weights, over the meta-training tasks.
    start = time.perf_counter()
    meta = p.meta
    init_key, fit_key = jax.random.split(next(keys))
    result = training.fit(
        meta.learner,
        make_sampler(with_values, learn_rows, config.meta_batch),
        hyperparams=meta.hyperparams(init_key),
        num_steps=config.meta_steps,
        key=fit_key,
    )
    learned, history = result.hyperparams, np.asarray(result.history["value"])
    tail = max(1, len(history) // 5)
    say(
        f"{name}, fold {f}: validation loss {history[:tail].mean():.3f} -> {history[-tail:].mean():.3f} in "
        f"{time.perf_counter() - start:.0f} s of meta-training"
    )

    # The left-out tasks select the trust in h, and the rate of α.
    left = asked(learn_rows, left_rows, f, seed)
    check_keys = jax.random.split(next(keys), 3)

    def best(candidates: tuple[float, ...], rows: np.ndarray, search: Callable) -> float:
        """Returns the candidate with the smallest validation loss.

        The loss is a mean over tasks and three trainings per architecture.
        """
        on, on_test, losses = take(with_values, rows), take(p.test, rows), []
        for candidate in candidates if len(candidates) > 1 else ():
            found = shape.decode(search(candidate, on))
            losses.append(shape.validation_loss(check_keys, found, on._replace(features=None), on_test))
        return candidates[int(np.argmin(losses or [0]))]

    trust = 1.0
    if len(left_rows):
        trust = best(config.trusts, left[: config.held_out], lambda t, on: meta.alpha(learned, trusted(on, t)))
        with_values = trusted(with_values, trust)
    new = trusted(new, trust)

    # 3. a*, for families that were not used for training; and the choice of h for the average task.
    alpha = meta.alpha(learned, new)
    generated = shape.decode(alpha)
    ignorant = shape.decode(meta.alpha(learned, trusted(new, 0.0)))

    # 4. Fine-tuning.
    some = left[: config.tuned_on]
    tune_keys = jax.random.split(next(keys), len(some))

    tune = lambda rate, keys, on: in_chunks(meta.fine_tune, (jnp.float32(rate), learned), (keys, on), 4)
    rates = {FINE_TUNED: best(config.rates, some, lambda rate, on: tune(rate, tune_keys, on)[0][0])}
    (tuned, tuned_params), _ = tune(rates[FINE_TUNED], jax.random.split(next(keys), n), new)
    fine = shape.decode(tuned)

    # The baselines. The best fixed architecture has the smallest mean loss over the meta-training tasks.
    fixed = np.repeat(best_fixed(p.codes, p.outcomes[:, train_rows, 0])[None], n, 0)
    plain_new = new._replace(features=None)
    next(keys)  # the key of `run_darts`
    run_key = next(keys)  # the same as `compared_key`
    trained = lambda code, start=None: shape.train(run_key, shape.one_hot(code), plain_new, new_test, start)[0][:, 1:]
    fold_scores = {
        A_STAR: trained(generated),
        A_STAR + LEARNED: trained(generated, learned["init"]),
        FINE_TUNED: trained(fine),
        FINE_TUNED + LEARNED: trained(fine, learned["init"]),
        IGNORANT: trained(ignorant),
        FIXED: trained(fixed),
        FIXED + LEARNED: trained(fixed, learned["init"]),
    }
    outcomes = p.outcomes[:, held]
    if len(p.codes) > len(outcomes):
        more = [
            shape.train(jax.random.fold_in(run_key, i), shape.one_hot(np.repeat(code[None], n, 0)), plain_new, new_test)
            for i, code in enumerate(p.codes[len(outcomes) :])
        ]
        outcomes = np.concatenate([outcomes, [outcome for outcome, _ in more]])
    for t in config.trials:
        fold_scores[RANDOM.format(t)] = best_of(outcomes, t, np.random.default_rng(seed))
    evolved = evolve(shape, next(keys), plain_new, new_test, config.evolution)
    fold_scores[EVOLUTION.format(config.evolution)] = best_of(evolved, config.evolution, np.random.default_rng(seed))
    say(f"{name}, fold {f}: " + "; ".join(f"{k} {x[:, 0].mean():.3f}" for k, x in fold_scores.items()))
    chosen = {"a*": generated, "fine-tuned": fine, "best fixed": fixed}
    return {
        "shape": name,
        "tasks": [units[u].name for u in held],
        "families": [units[u].family for u in held],
        "scores": {label: x.tolist() for label, x in fold_scores.items()},
        "supernets": {FINE_TUNED: shape.gaps(tuned, tuned_params, fine, new_test).tolist()},
        "rates": rates,
        "trust": trust,
        "left_out": len(left_rows),
        "tuned_on": len(some),
        "history": history.tolist(),
        "features": names,
        "values": values[held, : len(names)].tolist(),
        "weights": {k: np.asarray(jax.nn.softmax(a, -1)).tolist() for k, a in alpha.items()},
        "ops": {kind: list(cell.edges[0].ops) for kind, cell in shape.network.cells.items()},
        "architectures": {label: [shape.describe(code) for code in x] for label, x in chosen.items()},
        "space": int(np.prod(shape.sizes())),
        "num_folds": int(p.fold.max() + 1),
    }


def effects(codes: np.ndarray, losses: np.ndarray, sizes: list[int], ridge: float = 1.0) -> list[np.ndarray]:
    """Estimates for every edge [ops] how much an op adds to a network's loss, by a ridge regression on all records.

    The unit is the standard deviation of the losses of a task, so that hard tasks do not outweigh the others.

    Args:
      codes: [networks, tasks, edges] of integers.
      losses: [networks, tasks], on validation rows.
      sizes: the number of ops of each edge.
      ridge: the weight of the coefficients' squares, in records.
    """
    x = np.concatenate([codes[..., [e]] == np.arange(n) for e, n in enumerate(sizes)], -1).astype(float)
    x, y = x.reshape(losses.size, -1), ((losses - losses.mean(0)) / (losses.std(0) + 1e-9)).ravel()
    x = x - x.mean(0)
    found = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    return np.split(found, np.cumsum(sizes)[:-1])


def run_records(p: Prepared, f: int, fold: dict[str, Any], codes, losses, key: jax.Array, seed: int) -> dict[str, Any]:
    """Evaluates h from records of the other families' tasks on one fold's tasks.

    It is evaluated by itself, and combined with the α of h by hypergradient.

    codes: [records, units, edges]; losses: [records, units]; key: the same as for `run_fold`.
    """
    shape, sizes = p.shape, p.shape.sizes()
    train_rows, _, _, held = rows_of_fold(p, f, seed)
    found = effects(codes[:, train_rows], losses[:, train_rows], sizes)
    by_records = np.repeat(np.array([e.argmin() for e in found])[None], len(held), 0)
    # Mixing weights [tasks, edges, ops] of each kind, as logits. Logits and effects are in units of their spread within
    # an edge.
    weights = [np.array(fold["weights"][kind]) for kind in shape.network.cells]  # in the order of the codes
    logits = [np.log(w[:, e]) for w in weights for e in range(w.shape[1])]
    spread = lambda rows: np.sqrt(np.mean([x.var(-1).mean() for x in rows])) + 1e-9
    logits_spread, effects_spread = spread(logits), spread(found)
    both = np.stack(
        [(a / logits_spread - e / effects_spread).argmax(-1) for a, e in zip(logits, found, strict=True)], 1
    )
    at = lambda tree: jax.tree.map(lambda x: x[held], tree)
    task, test = at(p.batch), at(p.test)
    trained = lambda code: shape.train(compared_key(key), shape.one_hot(code), task, test)[0][:, 1:]
    chosen = {RECORDS: by_records, BOTH: both}
    return {
        "scores": {label: trained(code).tolist() for label, code in chosen.items()},
        "architectures": {label: [shape.describe(code) for code in x] for label, x in chosen.items()},
    }


def run_darts(
    p: Prepared, darts: Darts, order: str, f: int, key: jax.Array, seed: int, say: Callable
) -> dict[str, Any]:
    """Runs DARTS of one order on one fold's tasks.

    It is tuned on the same tasks as fine-tuning; the key is the same as for `run_fold`.
    """
    keys, config = jax.random.split(key, 16), p.shape.config
    _, learn_rows, left_rows, held = rows_of_fold(p, f, seed)
    some = asked(learn_rows, left_rows, f, seed)[: config.tuned_on]
    at = lambda rows: jax.tree.map(lambda x: x[rows], (p.batch, p.test))
    tuning = (jax.random.split(keys[2], len(some)), jax.random.split(keys[1], 3), *at(some))
    found = darts.variants(order, tuning, (jax.random.split(keys[4], len(held)), compared_key(key), *at(held)))
    told = (f"{name} {np.mean(x, 0)[0]:.3f}" for name, x in found["scores"].items())
    say(f"{p.shape.name}, DARTS, {order} order, fold {f}: {'; '.join(told)}")
    return found
