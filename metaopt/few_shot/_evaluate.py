"""Fair few-shot evaluation: every method on the same seeded episodes, with intervals and paired differences.

A method is a function `(key, support, query) -> outputs`, where `query` has no labels. Its outputs have a leading axis
of adaptation steps: outputs[0] before the first step, outputs[t] after t steps. For a method without steps, this axis
has size one. With `inner.run` and `trace_fn`, a method is

    def method(key, support, query):
        predict = lambda state: model(loop.params(state), query["x"])
        start = predict(loop.init(key, hyperparams, support))
        _, outputs = inner.run(loop, num_steps=10, trace_fn=predict)(key, hyperparams, support)
        return jnp.concatenate([start[None], outputs])
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks, base, tasks
from metaopt._progress import Report, report_progress
from metaopt.evaluation import Evaluation


class AdaptFn(Protocol):
    def __call__(self, key: jax.Array, support: dict[str, jax.Array], query: dict[str, jax.Array]) -> jax.Array:
        """Returns outputs [T + 1, Q, ...] after 0..T steps on the support set, for a query set without labels."""
        ...


def accuracy(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The share of real query examples whose class has the largest output among the classes of the episode.

    An example with a NaN among its outputs counts as wrong, so a diverging method is scored and not left out.

    Args:
      outputs: [Q, W].
      query: with "y", "mask" and "class_mask", as in episodes.

    Returns:
      [], in [0, 1].

    Raises:
      ValueError: if the query set has no classes, or if outputs have another shape.
    """
    if "class_mask" not in query:
        raise ValueError(
            '`accuracy` needs episodes with classes, whose query sets have "class_mask"; this one has '
            f"{sorted(query)}. For regression use another score, such as `score_fn=few_shot.mean_squared_error`."
        )
    whole = (*query["y"].shape, *query["class_mask"].shape)
    if outputs.shape != whole:  # [W] and [Q, 1] would broadcast
        raise ValueError(
            f"The method's outputs must be [Q, W] = {whole}, one for each query example and class, after each step; "
            f"got {outputs.shape}."
        )
    among = jnp.where(query["class_mask"][None] > 0, outputs, -jnp.inf)
    right = (jnp.argmax(among, axis=-1) == query["y"]) & ~jnp.isnan(among).any(axis=-1)
    return (right * query["mask"]).sum() / query["mask"].sum()


def mean_squared_error(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The mean squared error over the real query examples.

    Args:
      outputs: shaped like `query["y"]`.
      query: with "y" and "mask".

    Returns:
      [], in squared units of y.
    """
    return _masked_mean((_like(outputs, query["y"]) - query["y"]) ** 2, query["mask"])


def mean_absolute_error(outputs: jax.Array, query: Mapping[str, jax.Array]) -> jax.Array:
    """The mean absolute error over the real query examples.

    Args:
      outputs: shaped like `query["y"]`.
      query: with "y" and "mask".

    Returns:
      [], in units of y.
    """
    return _masked_mean(abs(_like(outputs, query["y"]) - query["y"]), query["mask"])


def _like(outputs: jax.Array, y: jax.Array) -> jax.Array:
    if outputs.shape != y.shape:  # [Q, 1] and [Q] would broadcast
        raise ValueError(
            f"The method's outputs must have the shape of the labels, {y.shape}, after each step; got {outputs.shape}."
        )
    return outputs


def _masked_mean(errors: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask.reshape(-1, *[1] * (errors.ndim - 1)) * jnp.ones_like(errors)
    return jnp.where(mask > 0, errors, 0).sum() / mask.sum()


HIGHER_IS_BETTER: dict[Callable, bool] = {accuracy: True, mean_squared_error: False, mean_absolute_error: False}


def evaluate_episodes(
    methods: Mapping[str, AdaptFn],
    samplers: Mapping[str, Callable[[jax.Array], tasks.Episode]] | Callable[[jax.Array], tasks.Episode],
    key: jax.Array,
    *,
    num_episodes: int = 600,
    each: int | None = None,
    chunk_size: int = 8,
    score_fn: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array] = accuracy,
    higher_is_better: bool | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Scores all methods on the same episodes, which depend only on `key` and the name of their source.

    Each chunk of episodes is drawn once. Every method, jitted, adapts to all episodes of the chunk at once. Memory is
    that of one chunk, whatever the number of episodes. Query labels are removed before a method sees an episode.

    Transductive methods are detected. On the first chunk, each method runs again with every other query example blank.
    A method is transductive if its outputs for the other examples change.

    Leaves of a query set whose leading axis is Q belong to its examples, and are shuffled with them.

    Args:
      methods: name -> method.
      samplers: source -> `key -> Episode`. A single function is named "episodes".
      key: the key of the episodes; every method gets the same keys.
      num_episodes: E, the number of episodes from each source; 600 is usual.
      each: U, if there is a fixed number of tasks (users, patients). Samplers are then `(key, number) -> Episode`, such
        as `tasks.user_episodes`. Every number in 0..U-1 is evaluated once, so E = U, and `num_episodes` is ignored.
        Drawing a few users with replacement would count them as many, and intervals would be too narrow.
      chunk_size: episodes at once, at least 1.
      score_fn: `(outputs after one step [Q, ...], query) -> []`.
      higher_is_better: False if the score is an error. It is known for `accuracy`, `mean_squared_error` and
        `mean_absolute_error`, and required for all other scores.
      progress: None reports episodes and compilations on standard error. In a terminal or notebook it shows a bar.
        Elsewhere it prints a line every 10 s and for compilations of 2 s or more. True also prints a line at the end of
        a short evaluation; False reports nothing.

    Returns:
      An `Evaluation`. `leaderboard`, `paired_differences` and `by_number` read it.

    Raises:
      ValueError: if `methods` is not a dict of functions, if there is no method or no source, or if a number is below
        1. Also if `higher_is_better` is missing and the score is unknown. Also if a sampler draws users with
        replacement or has fewer than `each`, or if a label is not one of its episode's classes. At trace time, if a
        sampler does not return an episode, or if outputs have no axis of steps or a shape that the score does not
        take. Also if there are Q classes and a leaf could belong to either examples or classes.
    """
    if not isinstance(methods, Mapping):
        raise ValueError(f'`methods` must be a dict, such as `{{"MAML": method}}`; got {type(methods).__name__}.')
    if not methods:
        raise ValueError("`methods` must hold at least one method; it is empty.")
    for name, method in methods.items():
        if not callable(method):
            raise ValueError(
                f"The method {name!r} must be a function `(key, support, query) -> outputs`; got "
                f"{type(method).__name__}. For an `Adaptation`, use "
                "`few_shot.adapted(adaptation, hyperparams, predict)`."
            )
    if not isinstance(samplers, Mapping):
        samplers = {"episodes": samplers}
    if not samplers:
        raise ValueError("`samplers` must hold at least one source; it is empty.")
    _checks.check_integer("num_episodes", num_episodes, 1)
    _checks.check_integer("chunk_size", chunk_size, 1)
    _checks.check_integer("each", each, 1, optional=True)
    if higher_is_better is None:
        higher_is_better = next((better for fn, better in HIGHER_IS_BETTER.items() if fn is score_fn), None)
        if higher_is_better is None:
            raise ValueError(
                "`higher_is_better` must be given for your own `score_fn`: True for a score such as accuracy, False "
                "for an error."
            )
    num_episodes = num_episodes if each is None else each
    chunk_size = min(chunk_size, num_episodes)
    jitted = {name: jax.jit(jax.vmap(_scored(name, method, score_fn))) for name, method in methods.items()}
    transductive = dict.fromkeys(methods, False)
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in methods}
    ways, shots, marks = ({} for _ in range(3))
    total, text = num_episodes * len(samplers), "{source}: {method}"
    compiled: set = set()
    with report_progress(total, progress, text, unit="episode", source="", method="") as report:
        for number, (source, sample) in enumerate(samplers.items()):

            def judged(name, num, number=number, source=source):
                report(num_episodes * number + num, source=source, method=name)

            def compile_once(name, *args):
                _compile_once(jitted[name], name, args, compiled, report)

            # The key depends on the source's name, so adding another source before it changes nothing.
            source_key = jax.random.fold_in(key, zlib.crc32(str(source).encode()))
            asked = [name for name in methods if not transductive[name]]  # one source may not show it
            of_source, numbers, found = _of_source(
                jitted, sample, source_key, num_episodes, chunk_size, each is not None, asked, judged, compile_once
            )
            ways[source], shots[source], marks[source] = (numbers[name] for name in ("ways", "shots", "marks"))
            num_users = len(np.unique(numbers["users"]))
            if each is not None and num_users < each:
                raise ValueError(
                    f"`each` must be the number of users: the sampler of {source!r} has {num_users}, so with "
                    f"each={each} some users count more than once, and confidence intervals are too narrow."
                )
            transductive |= found
            for name in methods:
                scores[name][source] = of_source[name]
    return Evaluation(scores, ways, shots, transductive, higher_is_better, marks, _name(score_fn))


def _compile_once(method: Any, name: str, args: tuple, compiled: set, report: Report) -> None:
    """Compiles a jitted method for arguments of new shapes. JAX keeps the result for the following call."""
    kind = name, str(jax.eval_shape(lambda *args: args, *args))
    if kind not in compiled:
        with report.compiling(name):
            method.trace(*args).lower().compile()
        compiled.add(kind)


def _name(function: Callable) -> str:
    if isinstance(function, functools.partial):  # its arguments are in the name, because they change the score
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_name(function.func)}({', '.join(given)})" if given else _name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _of_source(
    jitted: Mapping[str, Callable],
    sample: Callable,
    key: jax.Array,
    num_episodes: int,
    chunk_size: int,
    by_number: bool,
    asked: Sequence[str],
    judged: Callable[[str, float], None],
    compile_once: Callable[..., None],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, bool]]:
    """Returns scores of all methods [E, T + 1]; numbers [E] of the episodes; and which of `asked` are transductive.

    `judged` is called after each method with the number of finished episodes; a chunk counts in part until all methods
    have run. `compile_once` is called before each method, with its arguments.
    """
    # Separate keys for drawing episodes, for the methods and for the order of query examples.
    draw_keys, method_keys, order_keys = (jax.random.split(k, num_episodes) for k in jax.random.split(key, 3))
    # An argument of the program, so that the data of a sampler that exposes them (`tasks.episodes`) are not constants.
    sample = sample if isinstance(sample, Partial) else Partial(sample)
    draw = jax.jit(jax.vmap(functools.partial(_shuffled, by_number), in_axes=(None, 0, 0, 0)))
    scores: dict[str, list[np.ndarray]] = {name: [] for name in jitted}
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("ways", "shots", "marks", "users")}
    transductive = {}
    for done in range(0, num_episodes, chunk_size):
        # The last chunk is filled up with episodes that are already done, so that there is one program.
        start = min(done, num_episodes - chunk_size)
        chunk, new = slice(start, start + chunk_size), slice(done - start, None)
        support, query, told = draw(sample, draw_keys[chunk], order_keys[chunk], jnp.arange(num_episodes)[chunk])
        _checks.check_task_labels("episode", {"support": support, "query": query})
        for place, (name, run) in enumerate(jitted.items()):
            compile_once(name, method_keys[chunk], support, query)
            score, outputs = run(method_keys[chunk], support, query)
            scores[name].append(np.asarray(score)[new])
            if start == 0 and name in asked:
                again = run(method_keys[chunk], support, _blank(query))[1]
                transductive[name] = _differ(outputs, again, query)
            judged(name, done + (place + 1) / len(jitted) * len(scores[name][-1]))
        way = np.asarray(support["class_mask"]).sum(axis=1) if "class_mask" in support else np.ones(chunk_size)
        told |= {"ways": way, "shots": np.asarray(support["mask"]).sum(axis=1) / way}
        for name, of_chunk in told.items():
            numbers[name].append(np.asarray(of_chunk)[new])
    joined = lambda found: {name: np.concatenate(chunks) for name, chunks in found.items()}
    return joined(scores), joined(numbers), transductive


def _shuffled(
    by_number: bool, sample: Callable, draw_key: jax.Array, order_key: jax.Array, number: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the support set, the query set in random order, and a dict with the user and a mark of the episode.

    The random order of the real query examples hides their classes. The mark is a number that depends on the data.
    """
    episode = sample(draw_key, number) if by_number else sample(draw_key)
    _check_episode(episode)
    support, query, meta = episode
    user = meta["user"] if isinstance(meta, dict) and "user" in meta else number
    if not by_number and isinstance(meta, dict) and "user" in meta:
        raise ValueError(
            "The sampler draws users with replacement, so episodes are not independent and their confidence intervals "
            "are wrong. Evaluate every user once: set `each` to the number of users."
        )
    size = query["y"].shape[0]
    _check_leaves(query, size)
    places = jnp.where(query["mask"] > 0, jax.random.uniform(order_key, (size,)), 2.0)  # padding stays last
    order = jnp.argsort(places)
    query = {name: _of_rows(lambda x: x[order], name, leaf, size) for name, leaf in query.items()}
    leaves = [x for x in jax.tree.leaves((support, query)) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    flat = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    finite = jnp.clip(jnp.nan_to_num(flat, posinf=1, neginf=-1), -1e30, 1e30)  # keeps the sum finite, too
    mark = jnp.mean(finite * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32)))
    return support, query, {"users": user, "marks": mark}


def _check_episode(episode: tasks.Episode) -> None:
    """Raises ValueError if a sampler returns something other than one episode, such as a batch of episodes."""
    if not isinstance(episode, tuple) or len(episode) != 3 or not all(isinstance(p, Mapping) for p in episode[:2]):
        raise ValueError(
            "A sampler must return an episode, `tasks.Episode(support, query)` of two dicts; got "
            f"{type(episode).__name__}."
        )
    for name, part in zip(("support", "query"), episode, strict=False):
        missing = [leaf for leaf in ("y", "mask") if leaf not in part]
        if missing:
            raise ValueError(
                f"The {name} set of an episode must have {missing[0]!r}; this one has {sorted(part)}. "
                '"y" has the labels, "mask" [N] is 1 for each real row: `jnp.ones(len(y))` where none is padding.'
            )
        if jnp.ndim(part["mask"]) != 1 or jnp.shape(part["y"])[:1] != jnp.shape(part["mask"]):
            shapes = f"{jnp.shape(part['mask'])} and {jnp.shape(part['y'])}"
            raise ValueError(
                'A sampler must return one episode, with "mask" [N], a number for each row, and "y" [N, ...]; in the '
                f"{name} set they are {shapes}. Batches are only for training: pass the sampler of single episodes."
            )


def _of_rows(function: Callable, name: str, tree: base.PyTree, size: int, axis: int = 0) -> base.PyTree:
    """Applies a function to the leaves that have a value for each of `size` examples."""

    def one(x):
        return function(x) if jnp.ndim(x) > axis and x.shape[axis] == size else x

    return tree if name in ("class_mask", "num_rows") else jax.tree.map(one, tree)


def _check_leaves(query: Mapping[str, base.PyTree], size: int) -> None:
    """Raises ValueError if a leaf [Q, ...] could belong to examples or to classes."""
    if "class_mask" not in query or query["class_mask"].shape[0] != size:
        return
    others = {name: tree for name, tree in query.items() if name not in ("x", "y", "mask", "class_mask", "num_rows")}
    unclear = [name for name, tree in others.items() if any(jnp.shape(x)[:1] == (size,) for x in jax.tree.leaves(tree))]
    if unclear:
        raise ValueError(
            f"Query sets have {size} examples and {size} classes, so it is unclear whether {unclear} belong to "
            'examples or to classes. Put values of examples into "x", as a dict, and give values of classes an extra '
            "leading axis of size 1."
        )


def _scored(name: str, method: AdaptFn, score_fn: Callable) -> Callable:
    """Returns a function that computes the scores [T + 1] and the outputs for one episode."""

    def run(key, support, query):
        seen = {k: v for k, v in query.items() if k != "y"}
        outputs = method(key, support, seen)
        # If there are as many query examples as classes, [Q, W] could also be [steps, Q].
        of_one = query["y"].shape[:1] + query["class_mask"].shape if "class_mask" in query else query["y"].shape
        if jnp.ndim(outputs) < 2 or outputs.shape[1] != len(query["y"]) or outputs.shape == of_one:
            raise ValueError(
                f"The method {name!r} must return outputs [steps + 1, {len(query['y'])}, ...], for each number of "
                f"adaptation steps and each query example; got shape {jnp.shape(outputs)}. Without steps, return "
                "`outputs[None]`; with steps and one number for each example, return `outputs[..., None]`."
            )
        return jax.vmap(lambda one: score_fn(one, query))(outputs), outputs

    return run


def _blank(query: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sets every other example of a chunk of query sets [B, Q, ...] to zero."""
    size = query["y"].shape[1]

    def without(x):
        odd = (jnp.arange(size) % 2 == 1).reshape(1, -1, *[1] * (x.ndim - 2))
        return jnp.where(odd, jnp.zeros_like(x), x)

    kept = ("y", "mask")
    return {k: x if k in kept else _of_rows(without, k, x, size, axis=1) for k, x in query.items()}


def _differ(outputs: jax.Array, again: jax.Array, query: dict[str, jax.Array]) -> bool:
    """Returns whether outputs [B, T + 1, Q, ...] of examples that `_blank` kept differ by more than rounding."""
    real = np.asarray(query["mask"])[:, ::2] > 0
    both = [np.moveaxis(np.asarray(o, np.float64), 1, 2)[:, ::2] for o in (outputs, again)]  # [B, Q/2, T + 1, ...]
    if "class_mask" in query and both[0].shape[3:] == query["class_mask"].shape[1:]:
        # Outputs of classes that an episode lacks are often large numbers, next to which all others look equal.
        among = np.asarray(query["class_mask"])[:, None, None] > 0
        both = [np.where(among, o, np.nan) for o in both]
    # Step by step, and episode by episode: next to a step or an episode that diverges, all others look small.
    for before, after in zip(*(np.moveaxis(o, 2, 0) for o in both), strict=True):
        if not np.array_equal(np.isfinite(before[real]), np.isfinite(after[real])):
            return True
        pairs = [
            [np.where(np.isfinite(o), o, 0).reshape(len(o), -1) for o in (b[r], a[r])]
            for b, a, r in zip(before, after, real, strict=True)
        ]
        # Compare with the spread of most examples' outputs: an offset that all share, or one outlier, would otherwise
        # hide a difference. Also compare with the rounding error of each example.
        spreads = [float(np.quantile(abs(b - np.median(b, axis=0)), 0.9)) if b.size else 0.0 for b, _ in pairs]
        usual = float(np.median(np.array(spreads)))
        for (b, a), spread in zip(pairs, spreads, strict=True):
            rounding = 1e-5 * abs(b).max(axis=1, initial=0, keepdims=True)
            if np.any(abs(b - a) > np.maximum(1e-3 * (spread or usual), rounding)):  # a single example has no spread
                return True
    return False
