"""Omniglot: new characters from one or five drawings, by the MAML family and its usual baselines.

Methods are trained on background characters, rotated by 0, 90, 180 and 270 degrees. 64 other characters, not rotated,
select the λ of each training. The scores are on episodes of evaluation characters, which are the same for all methods:
5 or 20 ways, 1 or 5 shots, and Lake's 20 one-shot runs. The official split has other alphabets in the evaluation set.
The usual random split has 1,200 characters for training. Pixel prototypes (the nearest class mean by cosine) are the
baseline that every method must beat.

    python experiments/omniglot.py                   # conv4-64 on 28 × 28: hours; a GPU is of use
    python experiments/omniglot.py --small           # three blocks of 16 filters on 14 × 14: for one processor core;
                                                     # methods with a head for each number of ways only have five
    python experiments/omniglot.py --split random --methods MAML "prototypical networks"
    python experiments/omniglot.py --smoke           # seconds; prints only

The number of inner steps at test is chosen by validation, for each number of shots. If a method learns a head, it has a
training for each number of shots (with --small, only for one shot). The lower picture has the accuracy after 0 to 10
inner steps, for any number of steps in training.

Main observations in the committed results, at full size, with minutes of a core for a training: prototypical networks
reach most of the accuracy in the literature. MAML with the batch's statistics reaches less, especially with 20 ways.
With --small, a minute for a training, all methods except CAVIA are ahead of pixel prototypes with 5 ways and one shot.
The largest gains are those of class means in feature space. Fine-tuning from them is next, and then MAML, with ten
inner steps at test after three in training.

A training is saved in the folder that `--work` names, with the split and its scores, separately for each version of the
code. If it was stopped, call the script again with the same arguments, and it continues from there. Omniglot is read
from the folder that METAOPT_DATA names. Results go to experiments/results/omniglot.md and .png, or omniglot_small.md
and .png.
"""

import functools
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import script

import metaopt
from metaopt import evaluation, few_shot, hypergrad, inner, plots, tasks, training

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
LITERATURE = {(5, 1): 0.987, (5, 5): 0.999, (20, 1): 0.958, (20, 5): 0.989}  # MAML, transductive, the random split
ONE_SHOT = "Lake's 20 runs"
SEED = ", seed "
SPREAD = "; after the semicolon, the standard deviation over seeds"


class Scale(NamedTuple):
    size: int = 28
    filters: int = 64
    blocks: int = 4
    steps: int = 20_000  # of prototypical networks; other methods take a share of it
    tasks: int = 16  # per step, of five ways; a quarter as many of twenty
    episodes: int = 600
    checks: int = 10  # validations per training
    inner_steps: int = 1  # of MAML and of the methods with MAML's T
    test_steps: int = 5  # at most; the number is chosen by validation
    over_steps: int = 10  # inner steps in the curves


SMALL = Scale(size=14, filters=16, blocks=3, steps=400, tasks=8, checks=5, inner_steps=3, test_steps=10)
SMOKE = Scale(size=7, filters=2, blocks=2, steps=2, tasks=4, episodes=2, checks=1, test_steps=2, over_steps=2)


class Trained(NamedTuple):
    methods: dict[int, Callable]  # shots at test -> (key, support, query) -> outputs
    curve: dict[int, float]  # outer step -> validation accuracy
    test_steps: dict[int, int]  # shots at test -> inner steps
    over_steps: Callable | None  # the same, with all inner steps of the curves; None without inner steps
    name: str  # of its folder, unique to this training


class Row(NamedTuple):
    make: Callable  # (features, loss, T of MAML) -> Adaptation
    share: float  # share of the outer steps
    ways: bool = True  # whether it needs a separate head for each number of ways
    normalization: str = "support"
    shots: int | None = None  # in training, for any requested number
    at_test: Callable | None = None  # another adaptation, at test
    head: float = 0.0  # standard deviation of the head's weights at the start, times √D
    context: int = 0  # entries of a context vector that scales and shifts the features
    steps: int | None = None  # T, if scales and shifts have a value for each inner step


KEEP: dict[str, Any] = {"rate": 0.4, "keep_support": True}
ROWS = {
    "prototypical networks": Row(lambda f, loss, T: few_shot.prototypical_networks(f), 1, ways=False),
    "ridge head (R2D2)": Row(lambda f, loss, T: few_shot.ridge_head(f), 1, ways=False),
    "Proto-MAML": Row(lambda f, loss, T: few_shot.proto_maml(f, num_steps=1, rate=0.02), 0.5, ways=False),
    "MAML": Row(lambda f, loss, T: few_shot.maml(loss, num_steps=T, **KEEP), 0.5),
    "FOMAML": Row(lambda f, loss, T: few_shot.fomaml(loss, num_steps=T, **KEEP), 0.75),
    "Reptile": Row(
        lambda f, loss, T: few_shot.maml(loss, num_steps=4, rule=hypergrad.reptile, **KEEP | {"rate": 0.2}),
        0.25,
        shots=5,
    ),
    "ANIL": Row(lambda f, loss, T: few_shot.anil(loss, num_steps=T, **KEEP), 0.5),
    # With a head of zeros, nothing else would have a gradient.
    "BOIL": Row(lambda f, loss, T: few_shot.boil(loss, num_steps=T, **KEEP), 0.5, head=1.0),
    "Meta-SGD": Row(lambda f, loss, T: few_shot.meta_sgd(loss, num_steps=T, **KEEP), 0.5),
    "MAML++": Row(
        lambda f, loss, T: few_shot.maml_plus_plus(
            loss,
            num_steps=3,
            rate=0.2,
            multi_step_steps=100,
            leaves_per_step="scale|shift",
            adapt="^(?!.*(scale|shift))",
            keep_support=True,
        ),
        0.25,
        steps=3,
    ),
    "iMAML": Row(
        lambda f, loss, T: few_shot.imaml(
            loss, proximal=1.0, num_steps=5, rate=0.2, solver=hypergrad.cg(num_steps=3), keep_support=True
        ),
        0.25,
    ),
    "CAVIA": Row(
        lambda f, loss, T: few_shot.cavia(loss, num_context=32, num_steps=T, rate=1.0, keep_support=True),
        0.5,
        head=1.0,
        context=32,
    ),
    "fine-tuning": Row(
        lambda f, loss, T: few_shot.pretrained(loss),
        5,  # a step costs a tenth
        ways=False,
        at_test=lambda f: few_shot.proto_maml(f, adapt="^head", num_steps=5, rate=0.1),
    ),
}
# The same with other statistics; the row above uses those of the support set.
ROWS |= {
    f"MAML, {name}": Row(
        lambda f, loss, T, k=keep: few_shot.maml(loss, num_steps=T, **KEEP | {"keep_support": k}), 0.5, True, name
    )
    for name, keep in {"batch": False, "tasknorm": True, "group": False, "layer": False, "none": False}.items()
}


def load(split: str, size: int) -> tuple[dict[str, tasks.Source], dict]:
    """Returns the parts train, valid and test, with images of `size`; and the split."""
    path = script.data_file(__file__, "omniglot.npz").parent
    source = tasks.from_image_sets(["omniglot"], path=path)["omniglot"]
    source = source._replace(x=shrunk(source.x, size))
    whole = tasks.omniglot_split(path)
    if split == "random":
        whole = tasks.split_classes(source, {"train": 1200, "test": 423}, seed=0)
    background = tasks.select(source, whole, "train")[0]
    held = tasks.split_classes(background, {"valid": 64, "train": background.num_classes - 64}, seed=1)
    parts = tasks.Split(held | {"test": whole["test"]})
    sources = {part: tasks.select(source, parts, part)[0] for part in ("train", "valid", "test")}
    return {**sources, "train": tasks.with_rotations(sources["train"])}, parts


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Shrinks [N, 28, 28] to [N, size, size], by means over squares."""
    step = images.shape[1] // size
    return images.reshape(len(images), size, step, size, step).mean((2, 4)).astype(np.uint8)


def pixels(key, support, query):
    """Classifies by the nearest class mean of the images, by cosine."""
    flat = lambda x: x.reshape(len(x), -1)
    center = jax.nn.one_hot(support["y"], len(support["class_mask"])).T @ (
        flat(support["x"]) * support["mask"][:, None]
    )
    return (flat(query["x"]) @ (center / jnp.linalg.norm(center, axis=1, keepdims=True)).T)[None]


def modulated(features: Callable) -> Callable:
    """Multiplies features by 1 + A φ, and adds B φ, with a context vector φ. This is CAVIA's FiLM."""

    def of_context(params, batch):
        scale, shift = jnp.einsum("k,ikd->id", params["context"], params["modulation"])
        return features(params, batch) * (1 + scale[None]) + shift[None]

    return of_context


def num_tasks(scale: Scale, ways: int) -> int:
    return max(1, scale.tasks * 5 // ways)


def train(name: str, ways: int, shots: int, seed: int, parts: dict, scale: Scale, options) -> Trained:
    row = ROWS[name]
    trained_shots = row.shots or shots
    network = few_shot.conv4(
        normalization=row.normalization, num_filters=scale.filters, num_blocks=scale.blocks, num_steps=row.steps
    )
    features = modulated(network.features) if row.context else network.features
    head = few_shot.linear_head(features)
    loss = lambda params, hyperparams, batch: inner.cross_entropy(head(params, batch), batch)
    adaptation = row.make(network.features, loss, scale.inner_steps)
    num = num_tasks(scale, ways)
    if row.at_test is None:
        sample = tasks.episodes(
            parts["train"],
            num_ways=ways,
            num_shots=trained_shots,
            num_query=5,
            disjoint_groups=options.disjoint_drawers,
        )
        draw, outputs = tasks.episode_batches(sample, num), ways
    else:
        draw = tasks.episode_batches(tasks.labelled_batches(parts["train"], 30), num)
        outputs = parts["train"].num_classes
    init_key, head_key, context_key, fit_key = jax.random.split(jax.random.key(seed), 4)
    params = network.init(init_key)
    depth = scale.filters * (scale.size // 2**scale.blocks) ** 2
    drawn_head = row.head * jax.random.normal(head_key, (depth, outputs)) / depth**0.5
    params["head"] = {"w": drawn_head, "b": jnp.zeros(outputs)}
    if row.context:
        shape = (2, row.context, depth)
        params["modulation"] = jax.random.normal(context_key, shape) / row.context**0.5
    if row.ways is False and row.at_test is None:
        del params["head"]  # the support set makes it
    at_test = adaptation if row.at_test is None else row.at_test(network.features)
    most = scale.test_steps if at_test.test_steps else 0
    method = lambda hyperparams, num_steps: few_shot.adapted(at_test, hyperparams, head, num_steps=num_steps)
    drawn = {}
    for k in (1, 5):
        valid = tasks.episodes(
            parts["valid"], num_ways=ways, num_shots=k, num_query=5, disjoint_groups=options.disjoint_drawers
        )
        drawn[k] = tasks.episode_batches(valid, max(2, scale.episodes // 10))(jax.random.key(1))

    @jax.jit
    def right(hyperparams, batch):
        """Returns validation accuracy after 0..`most` steps."""

        def one(support, query):
            seen = {k: v for k, v in query.items() if k != "y"}
            outputs = method(hyperparams, most)(jax.random.key(0), support, seen)
            return jax.vmap(few_shot.accuracy, (0, None))(outputs, query)

        return jax.lax.map(lambda task: one(*task[:2]), batch).mean(0)

    steps = max(scale.checks, int(scale.steps * row.share) // scale.checks * scale.checks)
    optimizer = optax.adam(optax.cosine_decay_schedule(options.rate, steps))
    if name == "Reptile":  # its direction is a distance moved, not a gradient
        optimizer = optax.sgd(optax.cosine_decay_schedule(1.0, steps))
    every = steps // scale.checks
    started = time.monotonic()

    def say(step, metrics):
        if step % every == 0:
            passed = time.monotonic() - started
            print(
                f"[{passed:6.0f} s] {name}, {ways}w{shots}s: {step} of {steps} steps, loss {metrics['value']:.3f}",
                flush=True,
            )

    folder = (
        options.work / f"{name.replace(', ', '_').replace(' ', '-')}_{ways}_{options.split}_{scale.filters}_{steps}"
        f"_{scale.size}_{scale.tasks}_{options.rate:g}_{trained_shots}_{shots}"
        f"{'_disjoint' * options.disjoint_drawers}_{seed}"
    )
    result = training.fit(
        training.learner(lambda step: hypergrad.over_tasks(adaptation.estimator_at(step)), optax.chain(optimizer)),
        draw,
        hyperparams=adaptation.hyperparams(params),
        num_steps=steps,
        key=fit_key,
        evaluate=lambda key, hyperparams: 1 - right(hyperparams, drawn[shots]).max(),
        eval_every=every,
        steps_per_call=min(20, every),
        callback=None if options.smoke else say,
        checkpoint_dir=None if options.smoke else folder.absolute(),
        checkpoint_every=every,
        settings={"inner_steps": scale.inner_steps, "shots": trained_shots, "head": row.head, "context": row.context},
    )
    best, curve = result.best_hyperparams, {i * every: float(1 - x) for i, x in enumerate(result.evaluations)}
    test_steps = {k: int(right(best, batch).argmax()) for k, batch in drawn.items()}
    over_steps = method(best, scale.over_steps) if most else None
    return Trained({k: method(best, num) for k, num in test_steps.items()}, curve, test_steps, over_steps, folder.name)


def one_shot_runs(path: Path, size: int) -> Callable:
    """Returns `(key, number) -> Episode`, one of Lake's 20 runs."""
    data = np.load(path)
    support, query = (
        jnp.asarray(shrunk(data[name].reshape(-1, 28, 28), size).reshape(20, 20, size, size)) / 255
        for name in ("support", "query")
    )
    label = jnp.asarray(data["label"], jnp.int32)

    def sample(key, number):
        whole = {"mask": jnp.ones(20), "class_mask": jnp.ones(20), "num_rows": jnp.int32(20)}
        return tasks.Episode(
            {"x": support[number], "y": jnp.arange(20), **whole}, {"x": query[number], "y": label[number], **whole}
        )

    return sample


def judge(trained: dict[tuple, dict], parts: dict, scale: Scale, options, one_shot: Path | None) -> dict[str, Any]:
    """Returns setting -> evaluation, with all methods on the same episodes.

    `trained` holds the methods with the names of their trainings.
    """
    found = {}
    for (ways, shots), of in trained.items():
        if of:
            num_query = 15 if ways == 5 else 5
            sample = tasks.episodes(
                parts["test"],
                num_ways=ways,
                num_shots=shots,
                num_query=num_query,
                disjoint_groups=options.disjoint_drawers,
            )
            print(f"[{time.process_time():6.0f} s] judging {len(of)} methods, {ways}w{shots}s", flush=True)
            setting = f"{ways}w{shots}s"
            each = [judge_one(name, *one, sample, setting, scale, options) for name, one in of.items()]
            found[setting] = functools.reduce(evaluation.join_evaluations, each)
    if (20, 1) in trained and one_shot is not None:
        runs = one_shot_runs(one_shot, scale.size)
        named = {name: method for name, (method, _) in trained[20, 1].items()}
        found[ONE_SHOT] = few_shot.evaluate_episodes(named, runs, jax.random.key(0), each=20, chunk_size=10)
    return found


def judge_one(
    name: str, method: Callable, training: str, sample: Callable, setting: str, scale: Scale, options
) -> evaluation.Evaluation:
    """Evaluates one method, or loads its saved evaluation."""
    file = options.work / f"{training}_at_{setting}.npz"
    if file.is_file() and not options.smoke:
        return metaopt.load(file)
    key, chunk_size = jax.random.key(2025), min(20, scale.episodes)
    found = few_shot.evaluate_episodes({name: method}, sample, key, num_episodes=scale.episodes, chunk_size=chunk_size)
    if not options.smoke:
        metaopt.save(file, found)
    return found


def judge_over_steps(trained: dict[str, tuple], parts: dict, scale: Scale, options) -> evaluation.Evaluation | None:
    """Returns accuracy over the inner steps, 5w1s; for each method, the mean over its seeds."""
    sample = tasks.episodes(
        parts["test"], num_ways=5, num_shots=1, num_query=15, disjoint_groups=options.disjoint_drawers
    )
    setting = f"5w1s_over_{scale.over_steps}_steps"
    each = [judge_one(name, *one, sample, setting, scale, options) for name, one in trained.items()]
    return joined({"": functools.reduce(evaluation.join_evaluations, each)}, slice(None))[""] if each else None


def of_seeds(evaluation: evaluation.Evaluation) -> dict[str, list[str]]:
    """Returns method -> its trainings in an evaluation. Their names end in their seeds."""
    found: dict[str, list[str]] = {}
    for name in evaluation.scores:
        found.setdefault(name.rpartition(SEED)[0], []).append(name)
    return found


def joined(found: dict[str, evaluation.Evaluation], steps: slice = slice(-1, None)) -> dict[str, evaluation.Evaluation]:
    """Joins the seeds of each method.

    An episode's scores are means over seeds, each after its chosen number of steps.
    """

    def one(of):
        seeds = of_seeds(of)
        mean = lambda source, names: np.mean([of.scores[name][source][..., steps] for name in names], axis=0)
        return of._replace(
            scores={method: {source: mean(source, names) for source in of.sources} for method, names in seeds.items()},
            transductive={method: any(of.transductive[name] for name in names) for method, names in seeds.items()},
        )

    return {setting: one(of) for setting, of in found.items()}


def report(found: dict[str, evaluation.Evaluation], trainings: dict[str, list[Trained]]) -> str:
    """Returns tables of inductive methods, transductive ones with the literature, normalizations, and validation.

    It ends with the missed aims.
    """
    whole = joined(found)
    means = {setting: evaluation.mean_scores(of) for setting, of in whole.items()}

    def cell(name, setting):
        if name not in means[setting]:
            return ""
        ((mean, half),) = means[setting][name].values()
        each = evaluation.mean_scores(found[setting])
        seeds = [mean for training in of_seeds(found[setting])[name] for mean, _ in each[training].values()]
        spread = f"; {100 * np.std(seeds, ddof=1):.1f}" if len(seeds) > 1 else ""
        return f"{100 * mean:.1f} ± {100 * half:.1f}{spread}"

    names = list(dict.fromkeys(name for of in whole.values() for name in of.transductive))
    transductive = {name: any(of.transductive.get(name) for of in whole.values()) for name in names}
    cells = lambda name: [cell(name, setting) for setting in whole]
    plain = [name for name in transductive if not name.startswith("MAML, ")]
    text = script.table(
        ["accuracy, %: inductive", *whole], [[name, *cells(name)] for name in plain if not transductive[name]]
    )
    known = {f"{w}w{s}s": f"{100 * LITERATURE[w, s]:.1f}" for w, s in SETTINGS}
    rows = [[name, *cells(name)] for name, flag in transductive.items() if flag]
    rows.append(["MAML, in the literature (random split)", *(known.get(setting, "") for setting in whole)])
    text += "\n\nWhere the query set's own statistics are used:\n\n"
    text += script.table(["accuracy, %: transductive", *whole], rows)
    normalized = {name: "support" if name == "MAML" else name.removeprefix("MAML, ") for name in transductive}
    normalized = {name: of for name, of in normalized.items() if name.split(", ")[0] == "MAML"}
    if len(normalized) > 1:
        rows = [[of, "transductive" if transductive[n] else "inductive", *cells(n)] for n, of in normalized.items()]
        text += "\n\nMAML, by what its network is normalized by:\n\n"
        text += script.table(["normalization", "", *whole], rows)
    rows = []
    for name, each in trainings.items():
        steps = ["/".join(map(str, one.test_steps.values())) for one in each]
        rows.append([name, str(max(each[0].curve)), ", ".join(steps), " ".join(f"{x:.0f}" for _, x in mean_of(each))])
    text += (
        "\n\nOn the way (validation accuracy with the shots of the training, in %, at equal distances from the first "
        "step to the last, after the number of inner steps that is best there; such numbers of the λ that is taken, "
        "with one shot/five, are those of the tests):"
    )
    text += "\n\n" + script.table(["training", "outer steps", "inner steps at test", "validation"], rows)
    percent = {
        s: {name: 100 * mean for name, of in each.items() for mean, _ in of.values()} for s, each in means.items()
    }
    return text + "\n\n" + missed(percent, [name for name, flag in transductive.items() if flag])


def missed(means: dict[str, dict[str, float]], transductive: Collection[str]) -> str:
    """Lists missed aims, by the digits shown.

    The aims are that every method is above pixel prototypes, and that MAML has the literature's accuracy.

    Args:
      means: setting -> method -> mean accuracy in %.
      transductive: the transductive methods; MAML in the literature is one.
    """
    below: dict[str, list[str]] = {}
    for setting, of in means.items():
        for name, mean in of.items():
            if name != "pixel prototypes" and round(mean, 1) <= round(of["pixel prototypes"], 1):
                below.setdefault(name, []).append(setting)
    text = f"The aim is that every method is above pixel prototypes. Those that are not: {script.listed(below)}."
    for name in transductive:
        if name.split(", ")[0] == "MAML":
            known = [(f"{w}w{s}s", 100 * LITERATURE[w, s]) for w, s in SETTINGS]
            gaps = [f"{means[s][name] - mean:+.1f} ({s})" for s, mean in known if name in means.get(s, {})]
            text += f" {name} minus the literature's MAML on the random split, in points: {', '.join(gaps)}."
    return text


def mean_of(trainings: list[Trained]) -> list[tuple[int, float]]:
    """Returns (outer step, validation accuracy in %), means over the seeds."""
    return [(step, 100 * float(np.mean([one.curve[step] for one in trainings]))) for step in trainings[0].curve]


def draw(
    found: dict[str, evaluation.Evaluation],
    over_steps: evaluation.Evaluation | None,
    trainings: dict[str, list[Trained]],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = joined(found)
    rows = ["ab"] if over_steps is None else ["ab", "cc"]
    figure, panels = plt.subplot_mosaic(
        [[*row] for row in rows], figsize=(13, len(rows) * (0.3 * len(trainings) + 2.5)), layout="constrained"
    )
    left, right = panels["a"], panels["b"]
    for i, (name, each) in enumerate(trainings.items()):
        left.plot(*zip(*mean_of(each), strict=True), "-o" if i < 10 else "--s", markersize=3, color=f"C{i}", label=name)
    left.set(xlabel="outer steps", ylabel="validation accuracy, %")
    left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    setting = next(iter(whole))
    plots.leaderboard(whole[setting], axes=right)
    right.set(xlabel=f"accuracy on unseen characters, {setting}", title="")
    if over_steps is not None:
        below = plots.adaptation_curves(over_steps, axes=panels["c"], ylabel="accuracy on unseen characters, 5w1s")
        below.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = script.parser(__doc__, num_seeds=1)
    parser.add_argument("--small", action="store_true", help="a network and a number of steps for one processor core")
    parser.add_argument("--split", choices=("official", "random"), default="official")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--ways", nargs="+", type=int, choices=(5, 20), default=[5, 20])
    parser.add_argument(
        "--head-ways",
        nargs="+",
        type=int,
        choices=(5, 20),
        help="of methods whose head is learned, a training for each; as --ways, or 5 with --small",
    )
    parser.add_argument(
        "--shots",
        nargs="+",
        type=int,
        choices=(1, 5),
        help="of methods whose head is learned, a training for each; both, or 1 with --small",
    )
    parser.add_argument(
        "--disjoint-drawers",
        action="store_true",
        help="nobody drew on both sides of an episode: harder than in the literature, which does not ask who drew",
    )
    parser.add_argument("--steps", type=int, help="outer steps of prototypical networks")
    parser.add_argument("--tasks", type=int, help="a step, of five ways; a quarter as many of twenty")
    parser.add_argument("--rate", type=float, default=2e-3, help="of the outer Adam, at the start")
    parser.add_argument("--name", help="of the result; omniglot, or omniglot_small")
    parser.add_argument(
        "--work", type=Path, default=Path("omniglot_runs"), help="trainings are kept here, by their code"
    )
    options = parser.parse_args()
    options.work = script.work_folder(options.work, __file__)
    own_head = options.head_ways or ([5] if options.small else options.ways)  # one core has no time for more
    own_shots = sorted(options.shots or ([1] if options.small else [1, 5]))
    options.ways = sorted({*options.ways, *own_head})
    scale = SMOKE if options.smoke else SMALL if options.small else Scale()
    scale = scale._replace(steps=options.steps or scale.steps, tasks=options.tasks or scale.tasks)
    if options.smoke:
        options.methods, options.ways, own_head, options.seeds = ["MAML++", "prototypical networks"], [5], [5], 1
        own_shots = [1]
    parts, split = load(options.split, scale.size)
    if not options.smoke:
        options.work.mkdir(parents=True, exist_ok=True)
        file = options.work / f"split_{options.split}.json"
        if file.is_file() and metaopt.load(file) != split:
            sys.exit(f"The trainings in {options.work} are of another split ({file}): give --work another folder.")
        metaopt.save(file, split)
    settings = [setting for setting in SETTINGS if setting[0] in options.ways]
    plain = f"pixels_{options.split}_{scale.size}{'_disjoint' * options.disjoint_drawers}"
    trained: dict[tuple, dict[str, Any]] = {s: {f"pixel prototypes{SEED}0": (pixels, plain)} for s in settings}
    trainings: dict[str, list[Trained]] = {}
    with_steps: dict[str, tuple] = {}
    for seed in range(options.seeds):
        for name in options.methods:
            row = ROWS[name]
            of_shots = own_shots if row.ways and row.shots is None else own_shots[:1]
            for ways in own_head if row.ways else options.ways[-1:]:
                for shots in of_shots:
                    started = time.process_time()
                    one = train(name, ways, shots, seed, parts, scale, options)
                    label = f"{name}, {ways} ways" + (f", {shots} shot(s)" if len(of_shots) > 1 else "")
                    trainings.setdefault(label, []).append(one)
                    seconds = time.process_time() - started
                    print(f"[{seconds:6.0f} s] {label}, seed {seed}: {np.round([*one.curve.values()], 3)}", flush=True)
                    for tested in settings:
                        same_shots = tested[1] == shots or len(of_shots) == 1
                        if same_shots and (tested[0] == ways or not row.ways):
                            trained[tested][f"{name}{SEED}{seed}"] = one.methods[tested[1]], one.name
                            if tested == (5, 1) and one.over_steps is not None:
                                with_steps[f"{name}{SEED}{seed}"] = one.over_steps, one.name
    one_shot = script.data_file(__file__, "omniglot.npz").parent / "omniglot_oneshot_runs.npz"
    if options.split != "official" or not one_shot.is_file():  # Lake's runs have the official evaluation characters
        one_shot = None
    found = judge(trained, parts, scale, options, one_shot)
    over_steps = judge_over_steps(with_steps, parts, scale, options)
    shares = ", ".join(f"{name} {ROWS[name].share:g}" for name in options.methods)
    drawers = "An episode does not ask who drew an example, as in the literature."
    if options.disjoint_drawers:
        drawers = "Nobody drew on both sides of an episode, which is harder than the literature's episodes."
    with_shots = "Trained with one shot (Reptile five), tested with one and five."
    if len(own_shots) > 1:
        with_shots = "Where a head is learned, trained with as many shots as tested; else with one (Reptile five)."
    text = report(found, trainings) + (
        f"\n\n{scale.episodes} episodes of unseen characters, {options.split} split, the same for all; mean ± 95 % "
        f"over episodes, of the mean over {options.seeds} seed(s){SPREAD if options.seeds > 1 else ''}. {scale.blocks} "
        f"blocks of {scale.filters} filters on {scale.size} × {scale.size} pixels, {scale.steps:,} outer steps of "
        f"{scale.tasks} tasks of five ways, or {num_tasks(scale, 20)} of twenty (fine-tuning: of 30 rows each), of "
        f"which methods take a share: {shares}. Inner steps in training: {scale.inner_steps} of MAML and its kin "
        f"(iMAML 5, Reptile 4, MAML++ 3, Proto-MAML 1), at test at most {scale.test_steps}. {with_shots} "
        f"{drawers} Pixel prototypes see the same images."
    )
    name = options.name or ("omniglot_small" if options.small else "omniglot")
    if not options.smoke:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(found, over_steps, trainings, options.out / f"{name}.png")
    script.publish(__file__, "Omniglot", text, options, name=name)


if __name__ == "__main__":
    script.run(main)
