"""Training of the inner parameters, with any loss, any optax factory and any module."""

from metaopt.inner._im2col import (
    im2col,
)
from metaopt.inner._loop import (
    LoopState,
    loop,
    problem,
    run,
    step,
)
from metaopt.inner._losses import (
    check_labels,
    cross_entropy,
    row_mask,
)
from metaopt.inner._modules import (
    Model,
    from_linen,
    from_nnx,
)
from metaopt.inner._piecewise import (
    piecewise,
)
from metaopt.inner._samplers import (
    Sampler,
    full_batch,
    minibatch,
    num_rows,
    shuffled,
)
from metaopt.inner._weighted import (
    weighted,
)

__all__ = [
    "LoopState",
    "Model",
    "Sampler",
    "check_labels",
    "cross_entropy",
    "from_linen",
    "from_nnx",
    "full_batch",
    "im2col",
    "loop",
    "minibatch",
    "num_rows",
    "piecewise",
    "problem",
    "row_mask",
    "run",
    "shuffled",
    "step",
    "weighted",
]
