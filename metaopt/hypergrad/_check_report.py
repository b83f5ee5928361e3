"""What `check` reports: the results of the leaves, the verdict, and the conclusions in words."""

from typing import NamedTuple


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Formats rows of text as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


class LeafCheck(NamedTuple):
    """The result of the check of one leaf of λ.

    Attributes:
      path: the leaf's place in λ.
      norm: the norm of the hypergradient's leaf.
      hypergrad: the hypergradient's slope along a direction within the leaf.
      finite_difference: the slope of F along the same direction.
      uncertainty: how far `finite_difference` may be from the true slope, due to truncation, rounding and kinks.
      relative_error: the part of |hypergrad − finite_difference| above `uncertainty`, divided by the larger slope.
      standard_error: the standard error of the mean slope of a rule with random estimates; 0 for other rules.
      status: "right", "wrong", "zero" (the hypergradient is zero up to rounding, and F is flat), "dead" (the
        hypergradient is zero, and F is not flat), "inconclusive" (finite differences cannot decide) or "not finite".
      note: why the leaf is inconclusive, that a kink of F was avoided, or that F jumps; else "".
    """

    path: str
    norm: float
    hypergrad: float
    finite_difference: float
    uncertainty: float
    relative_error: float
    standard_error: float
    status: str
    note: str


class Check(NamedTuple):
    """The result of `check`; `print` shows it as a table.

    Attributes:
      kind: the estimator's kind.
      verdict: "passed" (the hypergradient keeps the promise of its kind), "failed" (it does not), or "inconclusive"
        (nothing is wrong, but finite differences could not decide everything). `message` states how to decide it.
      value: F(λ).
      leaves: one `LeafCheck` per leaf of λ.
      cosine: the cosine between hypergradient and finite differences over random directions in the whole of λ, in
        [−1, 1].
      metasmoothness: in [−1, 1]. Near 1, the slope of F keeps its sign at a distance of `radius`. Near 0, the slope at
        λ does not predict the effect of a step of that size.
      float32_operations: the operations that could not run in float64, such as callbacks. They limit the accuracy.
      message: the conclusions from the numbers.
    """

    kind: str
    verdict: str
    value: float
    leaves: list[LeafCheck]
    cosine: float
    metasmoothness: float
    float32_operations: list[str]
    message: str

    @property
    def passed(self) -> bool:
        """Whether the verdict is "passed"; false if the check is inconclusive."""
        return self.verdict == "passed"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("leaf", "|hypergradient|", "slope", "finite difference", "uncertainty", "relative error", "")
        ]
        for leaf in self.leaves:
            numbers = (leaf.norm, leaf.hypergrad, leaf.finite_difference, leaf.uncertainty, leaf.relative_error)
            rows.append((leaf.path, *(f"{x:.3e}" for x in numbers), leaf.status))
        verdict = self.verdict if self.passed else self.verdict.upper()
        head = f"{verdict}: {self.kind} estimator at F = {self.value:.6g}"
        tail = f"cosine {self.cosine:.4f}, metasmoothness {self.metasmoothness:.3f}. {self.message}"
        return "\n".join([head, aligned(rows), tail])


def verdict(kind: str, leaves: list[LeafCheck], uphill: str) -> str:
    """Whether the hypergradient keeps the promise of its kind."""
    statuses = {leaf.status for leaf in leaves}
    if kind == "pseudo":
        return "failed" if "not finite" in statuses else "passed"
    if statuses & {"not finite", "dead"}:
        return "failed"
    if kind == "biased":
        flat = statuses == {"zero"}
        return "passed" if uphill == "yes" or flat else "failed" if uphill == "no" else "inconclusive"
    return "failed" if "wrong" in statuses else "inconclusive" if "inconclusive" in statuses else "passed"


def advice(
    kind: str, leaves: list[LeafCheck], uphill: str, metasmoothness: float, float32_operations: list[str], rtol: float
) -> str:
    sentences = []
    paths = {s: ", ".join(x.path for x in leaves if x.status == s) for s in {leaf.status for leaf in leaves}}
    if "not finite" in paths:
        sentences.append(
            f"The hypergradient of {paths['not finite']}, or F, is not finite: `hypergrad.diagnose` says why."
        )
    if "dead" in paths:
        sentences.append(
            f"F depends on {paths['dead']}, and the hypergradient does not: look for a stop_gradient, a cast to "
            "integers, a random mask, or a rule that does not differentiate through the leaf."
        )
    if "zero" in paths:
        sentences.append(f"F does not depend on {paths['zero']} here.")
    if "wrong" in paths and kind in ("exact", "unbiased"):
        sentences.append(f"It is not the derivative of F: {paths['wrong']}.")
    if "wrong" in paths and kind == "biased":
        sentences.append(f"The relative errors of {paths['wrong']} show the bias of the rule.")
        opposite = [x.path for x in leaves if x.status == "wrong" and x.hypergrad * x.finite_difference < 0]
        if opposite:
            sentences.append(f"The hypergradient of {', '.join(opposite)} has the wrong sign: compare the two slopes.")
    if kind == "biased" and uphill != "yes" and set(paths) != {"zero"}:
        sentences.append(_NOT_UPHILL[uphill])
    sentences += [_inconclusive(leaf) for leaf in leaves if leaf.status == "inconclusive"]
    sentences += [f"{leaf.path}: {leaf.note}." for leaf in leaves if leaf.status in ("right", "dead") and leaf.note]
    if metasmoothness < 0.5:
        sentences.append(
            "F is rough at this radius: smaller outer steps, a smaller inner rate, fewer inner steps, or "
            "`hypergrad.evolution`."
        )
    if float32_operations:
        sentences.append(f"Computed in float32, so that `rtol` is {rtol:g}: {'; '.join(float32_operations)}.")
    return " ".join(sentences) or "No problem was found."


_NOT_UPHILL = {
    "no": "The hypergradient does not point uphill.",
    "rough": "F is too rough to decide whether the hypergradient points uphill.",
    "noisy": "The estimates are too noisy to decide whether the hypergradient points uphill. Increase `num_samples`.",
}


def _inconclusive(leaf: LeafCheck) -> str:
    """One sentence about an inconclusive leaf, with a way to decide it."""
    size = max(abs(leaf.hypergrad), abs(leaf.finite_difference), 1e-300)
    hidden = (leaf.uncertainty + 3 * leaf.standard_error) / size
    remedy = "check at another λ" if "kink" in leaf.note else "give a larger `rtol`, or another `epsilon`"
    if "standard errors" in leaf.note:
        remedy = "give a larger `num_samples`"
    return f"{leaf.path} is inconclusive: {leaf.note}; relative errors up to {hidden:.2g} are hidden, so {remedy}."
