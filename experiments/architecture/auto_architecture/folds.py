"""One fold: learns h by hypergradient or from records, generates and fine-tunes architectures, and compares them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
from metaopt import base, training


def take(tree, rows):
    """Returns these rows of every leaf."""
    return jax.tree.map(lambda x: x[rows], tree)


class Fold(NamedTuple):
    """The data that all steps of a fold share."""

    p: Prepared
    number: int
    keys: jax.Array  # [16]; each step uses a fixed index
    train_rows: np.ndarray  # meta-training tasks
    learn_rows: np.ndarray  # those of them that h learns from
    left_rows: np.ndarray  # those of left-out families
    held: np.ndarray  # held-out tasks
    left: np.ndarray  # the tasks that select trust and rates
    with_values: base.Task  # all tasks, with the features that h reads
    feature_names: list[str]


def make_fold(p: Prepared, f: int, key: jax.Array, seed: int) -> Fold:
    train_rows, learn_rows, left_rows, held = rows_of_fold(p, f, seed)
    values, names = scale_features(p.units, p.gradients, train_rows)
    left = asked(learn_rows, left_rows, f, seed)
    with_values = with_features(p.shape, p.batch, values)
    keys = jax.random.split(key, 16)
    return Fold(p, f, keys, train_rows, learn_rows, left_rows, held, left, with_values, names)


def learn_h(fold: Fold, say: Callable) -> tuple[Any, np.ndarray]:
    """Learns h and the initial weights over the meta-training tasks. Also returns the history of validation losses."""
    p, config = fold.p, fold.p.shape.config
    start = time.perf_counter()
    init_key, fit_key = jax.random.split(fold.keys[0])
    result = training.fit(
        p.meta.learner,
        make_sampler(fold.with_values, fold.learn_rows, config.meta_batch),
        hyperparams=p.meta.hyperparams(init_key),
        num_steps=config.meta_steps,
        key=fit_key,
    )
    history = np.asarray(result.history["value"])
    tail = max(1, len(history) // 5)
    say(
        f"{p.shape.name}, fold {fold.number}: validation loss {history[:tail].mean():.3f} -> "
        f"{history[-tail:].mean():.3f} in {time.perf_counter() - start:.0f} s of meta-training"
    )
    return result.hyperparams, history


def best_candidate(fold: Fold, candidates: tuple[float, ...], rows: np.ndarray, search: Callable) -> float:
    """Returns the candidate with the smallest validation loss of the architectures that `search` gives.

    The loss is a mean over the tasks `rows` and three trainings per architecture.
    """
    shape, losses = fold.p.shape, []
    check_keys = jax.random.split(fold.keys[1], 3)
    some, some_test = take(fold.with_values, rows), take(fold.p.test, rows)
    for candidate in candidates if len(candidates) > 1 else ():
        codes = shape.decode(search(candidate, some))
        losses.append(shape.validation_loss(check_keys, codes, some._replace(features=None), some_test))
    return candidates[int(np.argmin(losses or [0]))]


def baseline_scores(fold: Fold, new: base.Task, new_test, run_key, seed: int) -> dict[str, np.ndarray]:
    """Returns test loss and error [n, 2] of random search and evolution on the held-out tasks."""
    p, config, n = fold.p, fold.p.shape.config, len(fold.held)
    outcomes = p.outcomes[:, fold.held]
    if len(p.codes) > len(outcomes):
        more = [
            p.shape.train(jax.random.fold_in(run_key, i), p.shape.one_hot(np.repeat(code[None], n, 0)), new, new_test)
            for i, code in enumerate(p.codes[len(outcomes) :])
        ]
        outcomes = np.concatenate([outcomes, [outcome for outcome, _ in more]])
    scores = {RANDOM.format(t): best_of(outcomes, t, np.random.default_rng(seed)) for t in config.trials}
    evolved = evolve(p.shape, fold.keys[6], new, new_test, config.evolution)
    scores[EVOLUTION.format(config.evolution)] = best_of(evolved, config.evolution, np.random.default_rng(seed))
    return scores


def run_fold(p: Prepared, f: int, key: jax.Array, seed: int, say: Callable) -> dict[str, Any]:
    """Runs steps 2 to 4 and the comparison.

    h is not trained on the families of this fold. The result is ready for JSON.
    """
    shape, config, meta, name = p.shape, p.shape.config, p.meta, p.shape.name
    fold = make_fold(p, f, key, seed)
    held, n = fold.held, len(fold.held)
    new, new_test = take(fold.with_values, held), take(p.test, held)

    # 2. h and the initial weights. The left-out tasks select the trust in h, and the rate of α.
    learned, history = learn_h(fold, say)
    trust = 1.0
    if len(fold.left_rows):
        alpha_at = lambda trust, some: meta.alpha(learned, trusted(some, trust))
        trust = best_candidate(fold, config.trusts, fold.left[: config.held_out], alpha_at)
        fold = fold._replace(with_values=trusted(fold.with_values, trust))
    new = trusted(new, trust)

    # 3. a*, for families that were not used for training; and the choice of h for the average task.
    alpha = meta.alpha(learned, new)
    generated = shape.decode(alpha)
    ignorant = shape.decode(meta.alpha(learned, trusted(new, 0.0)))

    # 4. Fine-tuning.
    some = fold.left[: config.tuned_on]
    tune_keys = jax.random.split(fold.keys[2], len(some))
    tune = lambda rate, keys, batch: in_chunks(meta.fine_tune, (jnp.float32(rate), learned), (keys, batch), 4)
    rate = best_candidate(fold, config.rates, some, lambda rate, batch: tune(rate, tune_keys, batch)[0][0])
    (tuned, tuned_params), _ = tune(rate, jax.random.split(fold.keys[3], n), new)
    fine = shape.decode(tuned)

    # The baselines. The best fixed architecture has the smallest mean loss over the meta-training tasks.
    fixed = np.repeat(best_fixed(p.codes, p.outcomes[:, fold.train_rows, 0])[None], n, 0)
    plain_new, run_key = new._replace(features=None), compared_key(key)
    trained = lambda code, start=None: shape.train(run_key, shape.one_hot(code), plain_new, new_test, start)[0][:, 1:]
    scores = {
        A_STAR: trained(generated),
        A_STAR + LEARNED: trained(generated, learned["init"]),
        FINE_TUNED: trained(fine),
        FINE_TUNED + LEARNED: trained(fine, learned["init"]),
        IGNORANT: trained(ignorant),
        FIXED: trained(fixed),
        FIXED + LEARNED: trained(fixed, learned["init"]),
        **baseline_scores(fold, plain_new, new_test, run_key, seed),
    }
    say(f"{name}, fold {f}: " + "; ".join(f"{k} {x[:, 0].mean():.3f}" for k, x in scores.items()))
    chosen = {"a*": generated, "fine-tuned": fine, "best fixed": fixed}
    return {
        "shape": name,
        "tasks": [p.units[u].name for u in held],
        "families": [p.units[u].family for u in held],
        "scores": {label: x.tolist() for label, x in scores.items()},
        "supernets": {FINE_TUNED: shape.gaps(tuned, tuned_params, fine, new_test).tolist()},
        "rates": {FINE_TUNED: rate},
        "trust": trust,
        "left_out": len(fold.left_rows),
        "tuned_on": len(some),
        "history": history.tolist(),
        "features": fold.feature_names,
        "values": np.asarray(fold.with_values.features["values"])[held, : len(fold.feature_names)].tolist(),
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
    coefficients = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    return np.split(coefficients, np.cumsum(sizes)[:-1])


def run_records(p: Prepared, f: int, fold: dict[str, Any], codes, losses, key: jax.Array, seed: int) -> dict[str, Any]:
    """Evaluates h from records of the other families' tasks on one fold's tasks.

    It is evaluated by itself, and combined with the α of h by hypergradient.

    codes: [records, units, edges]; losses: [records, units]; key: the same as for `run_fold`.
    """
    shape, sizes = p.shape, p.shape.sizes()
    train_rows, _, _, held = rows_of_fold(p, f, seed)
    op_effects = effects(codes[:, train_rows], losses[:, train_rows], sizes)
    by_records = np.repeat(np.array([e.argmin() for e in op_effects])[None], len(held), 0)
    # Mixing weights [tasks, edges, ops] of each kind, as logits. Logits and effects are in units of their spread within
    # an edge.
    weights = [np.array(fold["weights"][kind]) for kind in shape.network.cells]  # in the order of the codes
    logits = [np.log(w[:, e]) for w in weights for e in range(w.shape[1])]
    spread = lambda rows: np.sqrt(np.mean([x.var(-1).mean() for x in rows])) + 1e-9
    logits_spread, effects_spread = spread(logits), spread(op_effects)
    both = np.stack(
        [(a / logits_spread - e / effects_spread).argmax(-1) for a, e in zip(logits, op_effects, strict=True)], 1
    )
    task, test = take(p.batch, held), take(p.test, held)
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
    tuning = (jax.random.split(keys[2], len(some)), jax.random.split(keys[1], 3), *take((p.batch, p.test), some))
    variants = darts.variants(
        order, tuning, (jax.random.split(keys[4], len(held)), compared_key(key), *take((p.batch, p.test), held))
    )
    losses = (f"{name} {np.mean(x, 0)[0]:.3f}" for name, x in variants["scores"].items())
    say(f"{p.shape.name}, DARTS, {order} order, fold {f}: {'; '.join(losses)}")
    return variants
