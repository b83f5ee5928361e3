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
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from metaopt import _checks, base, tasks
from metaopt._progress import Report, report_progress
from metaopt.evaluation import Evaluation
from metaopt.few_shot._scores import HIGHER_IS_BETTER, accuracy
from metaopt.few_shot._transductive import blank, differ, of_rows


class AdaptFn(Protocol):
    def __call__(self, key: jax.Array, support: dict[str, jax.Array], query: dict[str, jax.Array]) -> jax.Array:
        """Returns outputs [T + 1, Q, ...] after 0..T steps on the support set, for a query set without labels."""
        ...


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

    The query examples of an episode are shuffled; all leaves with the leading axis Q are shuffled together.

    Args:
      methods: name -> `(key, support, query) -> outputs` [T + 1, Q, ...], after 0..T steps, such as a result of
        `adapted`.
      samplers: source -> `key -> Episode`. A single function is the source "episodes".
      key: the key of the episodes; every method gets the same keys.
      num_episodes: E, the number of episodes from each source; 600 is usual.
      each: U, if there is a fixed number of tasks (users, patients). Samplers are then `(key, number) -> Episode`, such
        as `tasks.user_episodes`. Every number in 0..U-1 is evaluated once, so E = U, and `num_episodes` is ignored. If
        a few users were drawn with replacement instead, they would count as many users, and the intervals would be too
        narrow.
      chunk_size: the number of episodes that run at once, at least 1.
      score_fn: `(outputs after one step [Q, ...], query) -> []`.
      higher_is_better: False if the score is an error. It is known for `accuracy`, `mean_squared_error` and
        `mean_absolute_error`, and required for all other scores.
      progress: None reports episodes and compilations on standard error. In a terminal or notebook it shows a bar.
        Elsewhere it prints a line every 10 s and for compilations of 2 s or more. True also prints a line at the end of
        a short evaluation; False reports nothing.

    Returns:
      An `evaluation.Evaluation`, for `evaluation.leaderboard`, `evaluation.paired_differences` and the other functions
      there.

    Raises:
      ValueError: if `higher_is_better` is missing and the score is unknown.
      ValueError: if a sampler draws users with replacement or has fewer than `each`, or if a label is not one of its
        episode's classes.
      ValueError: at trace time, if a sampler returns a batch of episodes.
      ValueError: at trace time, if outputs have no axis of steps or a shape that the score does not take.
      ValueError: at trace time, if there are Q classes and a leaf could belong to either examples or classes.
    """
    samplers = samplers if isinstance(samplers, Mapping) else {"episodes": samplers}
    if higher_is_better is None:
        higher_is_better = next((better for fn, better in HIGHER_IS_BETTER.items() if fn is score_fn), None)
        if higher_is_better is None:
            raise ValueError(
                "`higher_is_better` must be given for your own `score_fn`: True for a score such as accuracy, False "
                "for an error."
            )
    num_episodes = num_episodes if each is None else each
    jitted = {name: jax.jit(jax.vmap(_scored(name, method, score_fn))) for name, method in methods.items()}
    transductive = dict.fromkeys(methods, False)
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in methods}
    ways, shots, marks = ({} for _ in range(3))
    total = num_episodes * len(samplers)
    with report_progress(total, progress, "{work}", unit="episode", work="drawing episodes") as report:
        run = _Run(jitted, num_episodes, min(chunk_size, num_episodes), each is not None, report, set())
        for i, (source, sample) in enumerate(samplers.items()):
            # The key depends on the source's name, so adding another source before it changes nothing.
            source_key = jax.random.fold_in(key, zlib.crc32(str(source).encode()))
            unknown = [name for name in methods if not transductive[name]]  # a later source may show it
            judged = _judge_source(run, source, sample, source_key, unknown, num_episodes * i)
            num_users = len(np.unique(judged.numbers["users"]))
            if each is not None and num_users < each:
                raise ValueError(
                    f"`each` must be the number of users: the sampler of {source!r} has {num_users}, so with "
                    f"each={each} some users count more than once, and confidence intervals are too narrow."
                )
            ways[source], shots[source], marks[source] = (judged.numbers[name] for name in ("ways", "shots", "marks"))
            transductive |= judged.transductive
            for name in methods:
                scores[name][source] = judged.scores[name]
    return Evaluation(scores, ways, shots, transductive, higher_is_better, marks, _name(score_fn))


class _Run(NamedTuple):
    """The parts of a call of `evaluate_episodes` that all sources share."""

    methods: Mapping[str, Any]  # jitted; they take a chunk of episodes
    num_episodes: int
    chunk_size: int
    by_number: bool  # whether samplers take the number of a user
    report: Report
    compiled: set  # names of methods with the types of their arguments


class _Judged(NamedTuple):
    """The results of one source.

    Attributes:
      scores: method -> [E, T + 1].
      numbers: "ways", "shots", "marks" and "users" of the episodes, each [E].
      transductive: method -> whether it is transductive, for the methods of which this was unknown.
    """

    scores: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    transductive: dict[str, bool]


def _judge_source(
    run: _Run, source: str, sample: Callable, key: jax.Array, unknown: Sequence[str], num_before: int
) -> _Judged:
    """Scores all methods on the episodes of one source, after `num_before` episodes of other sources."""
    # Separate keys for drawing episodes, for the methods and for the order of query examples.
    num_episodes, chunk_size = run.num_episodes, run.chunk_size
    draw_keys, method_keys, order_keys = (jax.random.split(k, num_episodes) for k in jax.random.split(key, 3))
    # A `Partial` is an argument of the program. If the sampler is one (`tasks.episodes`), its data are arguments, too,
    # and not constants of the program.
    sample = sample if isinstance(sample, Partial) else Partial(sample)
    draw = jax.jit(jax.vmap(functools.partial(_shuffled, run.by_number), in_axes=(None, 0, 0, 0)))
    scores: dict[str, list[np.ndarray]] = {name: [] for name in run.methods}
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("ways", "shots", "marks", "users")}
    transductive = {}
    for done in range(0, num_episodes, chunk_size):
        # The last chunk repeats some earlier episodes, so that all chunks have one shape and one compiled program.
        start = min(done, num_episodes - chunk_size)
        chunk, new_episodes = slice(start, start + chunk_size), slice(done - start, None)
        user_numbers = jnp.arange(num_episodes)[chunk]
        support, query, chunk_numbers = draw(sample, draw_keys[chunk], order_keys[chunk], user_numbers)
        _checks.check_task_labels("episode", {"support": support, "query": query})
        for i, (name, method) in enumerate(run.methods.items()):
            _compile_once(run, name, (method_keys[chunk], support, query))
            score, outputs = method(method_keys[chunk], support, query)
            scores[name].append(np.asarray(score)[new_episodes])
            if start == 0 and name in unknown:
                outputs_of_blank = method(method_keys[chunk], support, blank(query))[1]
                transductive[name] = differ(outputs, outputs_of_blank, query)
            # Progress: after i of M methods, the episodes of this chunk count as i / M.
            num_done = num_before + done + (i + 1) / len(run.methods) * len(scores[name][-1])
            run.report(num_done, work=f"{source}: {name}")
        num_ways = np.asarray(support["class_mask"]).sum(axis=1) if "class_mask" in support else np.ones(chunk_size)
        chunk_numbers |= {"ways": num_ways, "shots": np.asarray(support["mask"]).sum(axis=1) / num_ways}
        for name, values in chunk_numbers.items():
            numbers[name].append(np.asarray(values)[new_episodes])
    joined = lambda parts: {name: np.concatenate(chunks) for name, chunks in parts.items()}
    return _Judged(joined(scores), joined(numbers), transductive)


def _compile_once(run: _Run, name: str, args: tuple) -> None:
    """Compiles a method for arguments of new shapes. JAX keeps the result for the following call."""
    kind = name, str(jax.eval_shape(lambda *args: args, *args))
    if kind not in run.compiled:
        with run.report.compiling(name):
            run.methods[name].trace(*args).lower().compile()
        run.compiled.add(kind)


def _name(function: Callable) -> str:
    if isinstance(function, functools.partial):  # its arguments are in the name, because they change the score
        arguments = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_name(function.func)}({', '.join(arguments)})" if arguments else _name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _shuffled(
    by_number: bool, sample: Callable, draw_key: jax.Array, order_key: jax.Array, number: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the support set, the query set in random order, and a dict with the user and a mark of the episode.

    The random order of the real query examples hides their classes. The mark is a number computed from all data of the
    episode. `evaluation.join_evaluations` compares marks to see whether two evaluations used the same episodes.
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
    query = {name: of_rows(lambda x: x[order], name, leaf, size) for name, leaf in query.items()}
    leaves = [x for x in jax.tree.leaves((support, query)) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    flat = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])
    finite = jnp.clip(jnp.nan_to_num(flat, posinf=1, neginf=-1), -1e30, 1e30)  # keeps the sum finite, too
    mark = jnp.mean(finite * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32)))
    return support, query, {"users": user, "marks": mark}


def _check_episode(episode: tasks.Episode) -> None:
    """Raises ValueError if a sampler returns something other than one episode, such as a batch of episodes."""
    for name, part in zip(("support", "query"), episode, strict=False):
        if jnp.ndim(part["mask"]) != 1 or jnp.shape(part["y"])[:1] != jnp.shape(part["mask"]):
            shapes = f"{jnp.shape(part['mask'])} and {jnp.shape(part['y'])}"
            raise ValueError(
                'A sampler must return one episode, with "mask" [N], a number for each row, and "y" [N, ...]; in the '
                f"{name} set they are {shapes}. Batches are only for training: pass the sampler of single episodes."
            )


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
        shape_of_one_step = query["y"].shape
        if "class_mask" in query:
            shape_of_one_step = query["y"].shape[:1] + query["class_mask"].shape
        if jnp.ndim(outputs) < 2 or outputs.shape[1] != len(query["y"]) or outputs.shape == shape_of_one_step:
            raise ValueError(
                f"The method {name!r} must return outputs [steps + 1, {len(query['y'])}, ...], for each number of "
                f"adaptation steps and each query example; got shape {jnp.shape(outputs)}. Without steps, return "
                "`outputs[None]`; with steps and one number for each example, return `outputs[..., None]`."
            )
        return jax.vmap(lambda one: score_fn(one, query))(outputs), outputs

    return run
