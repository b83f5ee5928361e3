"""Options and the seeds of the experiment."""

from pathlib import Path

import jax
import numpy as np

from experiments import script
from experiments.hyperparameters import data_weighting, transformer
from experiments.hyperparameters.data_weighting import methods, report
from experiments.hyperparameters.data_weighting.methods import SMOKE, Scores, Settings
from experiments.hyperparameters.data_weighting.windows import KINDS, Pool, Texts, load

ONLINE = "online, its own model"


def half(score: np.ndarray) -> np.ndarray:
    """Returns the mask of the half with the highest scores."""
    mask = np.zeros(len(score))
    mask[np.argsort(-score, kind="stable")[: len(score) // 2]] = 1
    return mask


def find_scores(texts: Texts, key: jax.Array, settings: Settings, names) -> dict[str, Scores]:
    """Returns the scores by method. With uniform weights and for the oracle, the masks are known."""
    uniform = methods.plain_training(settings, settings.num_steps)(key, {}, methods.all_windows(texts))
    scores_of_methods = {}
    for i, name in enumerate(names):
        scores_of_methods[name] = methods.METHODS[name](texts, jax.random.fold_in(key, i), settings, uniform)
    random = np.asarray(jax.random.uniform(jax.random.fold_in(key, len(names)), (2, settings.num_windows)))
    return {"random half": Scores(*random, 0.0), **scores_of_methods}


def test_loss(params, texts: Texts) -> float:
    return float(methods.losses_of(params, texts.test).mean())


def judge(masks: dict[str, np.ndarray], pool: Pool, texts: Texts, key, settings: Settings) -> dict[str, list[float]]:
    """Returns by mask the test losses of training on the marked windows, without and with the validation text."""
    train = methods.plain_training(settings, settings.num_steps)
    losses = {}
    for name, mask in masks.items():
        data = [methods.marked(pool.windows, texts.valid, mask, with_valid) for with_valid in (0, 1)]
        losses[name] = [test_loss(train(key, {}, d), texts) if d["mask"].any() else np.nan for d in data]
    return losses


def detection(score: np.ndarray | None, kind: np.ndarray) -> list[float]:
    """Returns the AUC of each kind against clean windows, and of all kinds."""
    from sklearn.metrics import roc_auc_score

    if score is None:
        return [float("nan")] * len(KINDS)
    rows = [(kind == 0) | (kind == k) for k in range(1, len(KINDS))] + [np.full(len(kind), True)]
    return [float(roc_auc_score(kind[row] == 0, score[row])) for row in rows]


def run_seed(seed: int, settings: Settings, names=tuple(methods.METHODS)) -> dict[str, dict]:
    """Returns by method: its test losses, detection and cost."""
    texts = load(seed, settings)
    key, judge_key = jax.random.split(jax.random.key(seed))
    scores_of_methods = find_scores(texts, key, settings, names)
    fixed = lambda pool: {"uniform weights": np.ones(len(pool.kind)), "clean windows": (pool.kind == 0).astype(float)}
    masks = fixed(texts.pool) | {name: half(scores.pool) for name, scores in scores_of_methods.items()}
    masks["validation text only"] = np.zeros(settings.num_windows)
    unseen = fixed(texts.unseen) | {n: half(s.unseen) for n, s in scores_of_methods.items() if s.unseen is not None}
    losses = judge(masks, texts.pool, texts, judge_key, settings)
    unseen_losses = judge(unseen, texts.unseen, texts, judge_key, settings)
    plain = methods.plain_flops(texts, key, settings)
    results = {}
    for name, pair in losses.items():
        scores = scores_of_methods.get(name, Scores(masks[name], None, 0.0))
        learned = name in methods.METHODS
        results[name] = {
            "losses": [*pair, unseen_losses.get(name, [np.nan])[0]],
            "auc": detection(scores.pool if learned else None, texts.pool.kind),
            "unseen_auc": detection(scores.unseen if learned else None, texts.unseen.kind),
            "cost": scores.flops / plain,
        }
        if scores.params is not None:
            none = detection(None, texts.pool.kind)
            own = [test_loss(scores.params, texts), np.nan, np.nan]
            cost = scores.flops / plain - 1  # one of its two trainings is that of the judged model
            results[ONLINE] = {"losses": own, "auc": none, "unseen_auc": none, "cost": cost}
    return results


def flat(results: dict[str, dict]) -> dict[str, np.ndarray]:
    """Returns the arrays of a seed, for its file."""
    return {f"{name}:{entry}": np.asarray(v) for name, row in results.items() for entry, v in row.items()}


def nested(arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns the results of a seed from the arrays of its file."""
    results: dict[str, dict] = {}
    for key, array in arrays.items():
        name, _, entry = key.partition(":")
        results.setdefault(name, {})[entry] = array
    return results


def main() -> None:
    parser = script.parser(data_weighting.__doc__, num_seeds=1)
    parser.add_argument("--full", action="store_true", help="three seeds")
    parser.add_argument("--keep", type=Path, default=None, help="folder for finished seeds")
    options = parser.parse_args()
    settings, seeds = (SMOKE, 1) if options.smoke else (Settings(), 3 if options.full else options.seeds)
    folder = Path(__file__).parent
    keep = (
        None
        if options.keep is None or options.smoke
        else script.work_folder(options.keep, folder, transformer.__file__)
    )
    runs = []
    for seed in range(1, seeds + 1):  # seed 0 was seen during development
        make = lambda seed=seed: flat(run_seed(seed, settings))
        runs.append(nested(script.kept(keep, f"seed_{seed}", make)))
        for name, result in runs[-1].items():
            numbers = [*result["losses"], *result["auc"]]
            shown = ", ".join("" if np.isnan(number) else f"{number:.3f}" for number in numbers)
            print(f"seed {seed}: {name}: {shown}; cost {result['cost']:.1f}", flush=True)
    script.publish(folder, "Data weighting for a language model", report.report(runs, settings), options)
    if not options.smoke:
        report.plot(runs, options.out / "data_weighting.png")


if __name__ == "__main__":
    script.run(main)
