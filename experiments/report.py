"""What results are written with: tables in Markdown, means with their spread, the line that says what made them."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

import metaopt

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def spread(values, digits: int = 3) -> str:
    """Mean ± standard deviation; of one value, ± 0."""
    values = np.asarray(values, float)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"


def provenance(script: str) -> str:
    """The line that says what made a result: `script` is the caller's `__file__`."""
    command = " ".join([f"python experiments/{Path(script).name}", *sys.argv[1:]])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"`{command}`, {time.process_time():.0f} processor seconds on {jax.default_backend()}, {cores} core(s); Python "
        f"{platform.python_version()}, JAX {jax.__version__}, optax {optax.__version__}, metaopt {metaopt.__version__}."
    )
