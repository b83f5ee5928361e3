"""The largest model and the longest training run whose hypergradient fits into 16 and 80 GiB, by checkpoint policy.

A transformer is trained with Adam for T steps, and each layer is recomputed in the loss. λ is the rate and a penalty
for each layer. `hypergrad.unrolled` is compiled for shapes without data, and nothing is run. Its memory is that of the
arguments, the results and the temporary values, as the compiler states it.

For a width w, memory is close to a linear function of w, w², and the products of each with the number of stored steps.
For each policy, this function is fitted to four or six compiled programs, of two widths and two or three T. The fit
then gives the answers. For each T, it gives the largest width among multiples of 64. For each of two widths, it gives
the largest T with two significant digits. For each policy, the programs of two answers are also compiled, and their
memory is compared with the prediction.

    python experiments/benchmarks/capacity.py            # minutes; writes experiments/results/capacity.md
    python experiments/benchmarks/capacity.py --smoke    # two minutes; prints only
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
    print(f"{remat}, width {width}, T = {num_steps}: {sum(parts) / 2**30:.3f} GiB", flush=True)
    return sum(parts) / 2**30


def sizes_of(model: Model, width: int) -> dict[str, tuple[int, ...]]:
    per_layer = {"qkv": (width, 3 * width), "mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    return {"embed": (VOCABULARY, width), **{name: (model.layers, *sizes) for name, sizes in per_layer.items()}}


def millions(model: Model, width: int) -> float:
    return sum(math.prod(sizes) for sizes in sizes_of(model, width).values()) / 1e6


def size_text(model: Model, width: int) -> str:
    """Returns the millions of parameters as a text, with one decimal, or with two digits if they are few."""
    number = millions(model, width)
    return f"{number:.1f} M" if number >= 0.1 else f"{number:.2g} M"


def features(width: int, num_steps: int, remat: str) -> np.ndarray:
    """Returns the quantities in which the memory is linear.

    Activations grow with the width, and weights with its square. "none" and "step" store values of all T steps, "sqrt"
    those of about 2√T, and "grads" both.
    """
    branches = math.ceil(math.sqrt(num_steps))
    stored = {"none": [num_steps], "step": [num_steps], "sqrt": [branches + num_steps // branches]}
    stored["grads"] = stored["step"] + stored["sqrt"]
    return np.outer([width, width**2], [1, *stored[remat]]).ravel().astype(float)


def fitted(
    memory: Callable[[int, int], float], remat: str, widths: Sequence[int], num_steps: Sequence[int]
) -> Callable[[int, int], float]:
    """Fits the memory to programs of two widths and of as many T as `features` needs.

    Args:
      memory: `(width, num_steps) -> GiB`; each call is a compilation.
      remat: the policy.
      widths: two widths.
      num_steps: three values of T; only "grads" needs the last one.

    Returns:
      `(width, num_steps) -> GiB`.
    """
    chosen = num_steps[: len(features(1, 1, remat)) // 2]
    programs = [(width, steps) for width in widths for steps in chosen]
    rows = np.stack([features(*program, remat) for program in programs])
    scale = rows.max(0)
    coefficients = np.linalg.solve(rows / scale, [memory(*program) for program in programs]) / scale
    return lambda width, num_steps: float(features(width, num_steps, remat) @ coefficients)


def largest(memory: Callable[[int], float], candidates: Sequence[int], budget: float) -> int:
    """Returns the largest candidate whose memory fits, or 0."""
    return max((number for number in candidates if memory(number) <= budget), default=0)


def two_digits(limit: int) -> list[int]:
    """Returns the numbers below `limit` with at most two significant digits."""
    numbers = {digits * 10**zeros for zeros in range(len(str(limit))) for digits in range(1, 100)}
    return sorted(number for number in numbers if number < limit)


class Grid(NamedTuple):
    """The questions, and the programs from which the answers are predicted."""

    model: Model
    policies: Sequence[str]
    budgets: Sequence[float]
    num_steps: Sequence[int]  # of the first table
    widths: Sequence[int]  # of the second table, and of the fits
    fit_steps: Sequence[int]
    all_widths: Sequence[int]
    all_steps: Sequence[int]


def answers(grid: Grid) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Returns the rows of three tables: the largest widths, the largest T, and the checks of the predictions."""
    by_steps, by_width, checks = [], [], []
    for remat in grid.policies:
        memory = functools.partial(gib, grid.model, remat=remat)
        fit = fitted(memory, remat, grid.widths, grid.fit_steps)
        programs = []
        for steps in grid.num_steps:
            of_width = lambda width: fit(width, steps)  # noqa: B023
            widths = [largest(of_width, grid.all_widths, budget) for budget in grid.budgets]
            named = [f"{size_text(grid.model, w)}, width {w}" if w else "none" for w in widths]
            by_steps.append([str(steps), f'`"{remat}"`', *named])
            programs.append((widths[-1], steps))
        for width in grid.widths:
            of_steps = lambda steps: fit(width, steps)  # noqa: B023
            horizons = [largest(of_steps, grid.all_steps, budget) for budget in grid.budgets]
            longest = [f"{t:,}" if t else "none" for t in horizons]
            by_width.append([size_text(grid.model, width), f'`"{remat}"`', *longest])
            programs.append((width, horizons[0]))
        # The largest model at the first T, and the longest run of the largest model.
        for width, steps in (programs[0], programs[-1]):
            if width and steps:
                both = memory(width, steps), fit(width, steps)
                error = f"{100 * (both[1] / both[0] - 1):+.2f}"
                checks.append([f'`"{remat}"`', str(width), f"{steps:,}", *(f"{value:.3f}" for value in both), error])
    first, second = (sorted(rows, key=lambda row: _number(row[0])) for rows in (by_steps, by_width))
    return first, second, checks


def listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def _number(text: str) -> float:
    return float(text.split()[0])


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
    if options.smoke:
        widths, steps = range(16, 257, 16), two_digits(1000)
        grid = Grid(Model(2, 8, 2), ("none", "sqrt"), (1 / 32,), (16,), (16, 64), (4, 25, 64), widths, steps)
    else:
        widths, steps = range(64, 16385, 64), two_digits(10**8)
        grid = Grid(Model(12, 256, 8), POLICIES, BUDGETS, (16, 1024), (256, 1024), (16, 1024, 256), widths, steps)
    first, second, checks = answers(grid)
    model, header = grid.model, [f"{budget:g} GiB" for budget in grid.budgets]
    text = "\n\n".join(
        [
            f"A transformer of {model.layers} layers with 4 heads, {model.batch} sequences of {model.length} tokens, "
            f"{VOCABULARY} tokens in the vocabulary, trained with Adam in float32; each layer is recomputed in the "
            "loss. Programs are compiled for CPU from shapes, and nothing is run. Memory is that of arguments, results "
            "and temporary values by `compiled.memory_analysis()`.",
            "The largest model, in millions of parameters:",
            script.table(["T", "`remat`", *header], first),
            "The largest T, of two digits:",
            script.table(["parameters", "`remat`", *header], second),
            'These are predictions of a fit to four compiled programs for each policy (`"grads"`: six), of the widths '
            f'{listed(grid.widths)} and T = {listed(grid.fit_steps[:2])} (`"grads"`: {grid.fit_steps[2]} too). For two '
            "answers of each policy, the program was compiled, and compared with the prediction:",
            script.table(["`remat`", "width", "T", "compiled, GiB", "predicted, GiB", "error, %"], checks),
            '`remat="offload"` is missing: XLA\'s compiler for CPUs does not move values to another memory, and '
            "`unrolled` then raises an error.",
        ]
    )
    script.publish(__file__, "The largest model and horizon", text, options, picture="The largest model by policy")
    if not options.smoke:
        draw(first, options.out / "capacity.png")


if __name__ == "__main__":
    script.run(main)
