"""The largest model and the longest training run whose hypergradient fits into 16 and 80 GiB, by checkpoint policy.

A transformer is trained with Adam for T steps, and each layer is recomputed in the loss. λ is the rate and a penalty
for each layer. `hypergrad.unrolled` is compiled for shapes without data, and nothing is run. Its memory is that of the
arguments, the results and the temporary values, as the compiler states it.

For each T and policy, a search finds the largest width, among multiples of 64. For each of two models, it finds the
largest T of two digits. All figures are of compiled programs: the largest one fits, and the next one does not.

    python experiments/benchmarks/capacity.py            # minutes; writes experiments/results/capacity.md
    python experiments/benchmarks/capacity.py --smoke    # seconds; prints only
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import numpy as np

from experiments import script
from metaopt import base, hypergrad

POLICIES = ("none", "step", "grads", "sqrt")
BUDGETS = (16, 80)  # GiB
VOCABULARY = 64  # of `cases.transformer`


class Model(NamedTuple):
    layers: int
    length: int
    batch: int


@functools.cache
def gib(model: Model, width: int, num_steps: int, remat: str) -> float:
    """Returns the memory of one hypergradient."""
    case = cases.transformer(model.layers, 8, model.length, model.batch)  # its loss takes the sizes from the parameters
    shape = lambda *sizes, dtype=np.float32: jax.ShapeDtypeStruct(sizes, dtype)
    params = {name: shape(*sizes) for name, sizes in sizes_of(model, width).items()}
    tokens = {"x": shape(model.batch, model.length + 1, dtype=np.int32)}
    train = {"params": params, "rows": tokens, "order": shape(num_steps, model.batch, dtype=np.int32)}
    hyperparams = jax.tree.map(lambda x: shape(*np.shape(x)), case.hyperparams)
    problem = cases.problem_of(case, layerwise=True)
    estimator = hypergrad.unrolled(problem, num_steps=num_steps, remat=remat)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(estimator.estimate).lower(hyperparams, base.Task(train, tokens), key)
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    memory = program.memory_analysis()
    parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(parts) / 2**30


def sizes_of(model: Model, width: int) -> dict[str, tuple[int, ...]]:
    per_layer = {"qkv": (width, 3 * width), "mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    return {"embed": (VOCABULARY, width), **{name: (model.layers, *sizes) for name, sizes in per_layer.items()}}


def millions(model: Model, width: int) -> float:
    return sum(math.prod(sizes) for sizes in sizes_of(model, width).values()) / 1e6


def largest(
    memory: Callable[[int], float], candidates: Sequence[int], budget: float, guess: float, power: float
) -> int:
    """Returns the largest candidate that fits, or 0. `memory` increases.

    Args:
      memory: the memory of a candidate; each call is a compilation.
      candidates: increasing.
      budget: in the unit of `memory`.
      guess: the first candidate, up to rounding.
      power: the expected exponent of the memory as a power of the candidate, for the second one.

    Returns:
      The candidate. The next candidate was compiled too, and does not fit, unless it is the last one.
    """
    low, high, known = -1, len(candidates), {}
    place = int(np.searchsorted(candidates, guess))
    while high - low > 1:
        place = min(max(place, low + 1), high - 1)
        known[place] = memory(candidates[place])
        low, high = (place, high) if known[place] <= budget else (low, place)
        # A power law through the two points that are nearest to the budget.
        nearest = sorted(known, key=lambda i: abs(math.log(known[i] / budget)))[:2]
        if len(nearest) == 2:
            ratios = [math.log(values[nearest[0]] / values[nearest[1]]) for values in (known, candidates)]
            power = max(ratios[0] / ratios[1], 0.1)
        target = candidates[nearest[0]] * (budget / known[nearest[0]]) ** (1 / power)
        place = int(np.searchsorted(candidates, target, side="right")) - 1
    return candidates[low] if low >= 0 else 0


def two_digits(limit: int) -> list[int]:
    """Returns the numbers below `limit` of at most two digits, and zeros behind them."""
    numbers = {digits * 10**zeros for zeros in range(len(str(limit))) for digits in range(1, 100)}
    return sorted(number for number in numbers if number < limit)


def cell(value: int, memory: Callable[[int], float], text: str) -> str:
    return f"{text} ({memory(value):.2f} GiB)" if value else "none"


def models(model: Model, horizons: Sequence[int], widths: Sequence[int], budgets: Sequence[float]) -> list[list[str]]:
    """Returns rows of the first table: the largest widths."""
    rows = []
    for num_steps in horizons:
        for remat in POLICIES:
            memory = lambda width: gib(model, width, num_steps, remat)  # noqa: B023
            found = [largest(memory, widths, budget, widths[len(widths) // 8], 2) for budget in budgets]
            named = [cell(w, memory, f"{millions(model, w):.1f} M, width {w}") for w in found]
            rows.append([str(num_steps), f'`"{remat}"`', *named])
    return rows


def horizons(model: Model, widths: Sequence[int], limit: int, budgets: Sequence[float]) -> list[list[str]]:
    """Returns rows of the second table: the largest T."""
    rows = []
    for width in widths:
        for remat in POLICIES:
            memory = lambda num_steps: gib(model, width, num_steps, remat)  # noqa: B023
            found = [largest(memory, two_digits(limit), budget, 100, 1) for budget in budgets]
            rows.append(
                [f"{millions(model, width):.1f} M", f'`"{remat}"`', *(cell(t, memory, f"{t:,}") for t in found)]
            )
    return rows


def draw(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Draws the largest models of the first table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(BUDGETS), figsize=(8, 3.2), sharey=True, layout="constrained")
    for column, (budget, axes) in enumerate(zip(BUDGETS, panels, strict=True)):
        for remat in POLICIES:
            chosen = [(int(row[0]), row[2 + column]) for row in rows if row[1] == f'`"{remat}"`']
            shown = {steps: float(text.split()[0]) for steps, text in chosen if text != "none"}
            axes.loglog(list(shown), list(shown.values()), "o-", label=f'"{remat}"')
        axes.set(title=f"{budget} GiB", xlabel="inner steps")
    panels[0].set_ylabel("largest model, millions of parameters")
    panels[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = script.parser(__doc__).parse_args()
    model = Model(1, 8, 2) if options.smoke else Model(12, 256, 8)
    budgets = (1 / 256,) if options.smoke else BUDGETS
    steps, widths = ((8,), range(16, 257, 16)) if options.smoke else ((16, 1024), range(64, 16385, 64))
    sizes = (16,) if options.smoke else (256, 1024)
    first = models(model, steps, widths, budgets)
    second = horizons(model, sizes, 1000 if options.smoke else 10**8, budgets)
    header = [f"{budget:g} GiB" for budget in budgets]
    text = "\n\n".join(
        [
            f"A transformer of {model.layers} layers with 4 heads, {model.batch} sequences of {model.length} tokens, "
            f"{VOCABULARY} tokens in the vocabulary, trained with Adam in float32; each layer is recomputed in the "
            "loss. In parentheses: the memory of this program.",
            "The largest model, in millions of parameters:",
            script.table(["T", "`remat`", *header], first),
            "The largest T, of two digits:",
            script.table(["parameters", "`remat`", *header], second),
            '`remat="offload"` is missing: XLA\'s compiler for CPUs does not move values to another memory, and '
            "`unrolled` then raises an error.",
        ]
    )
    script.publish(__file__, "The largest model and horizon", text, options, picture="The largest model by policy")
    if not options.smoke:
        draw(first, options.out / "capacity.png")


if __name__ == "__main__":
    script.run(main)
