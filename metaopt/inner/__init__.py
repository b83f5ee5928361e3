"""Training of the inner parameters, with any loss, any optax factory and any module."""

from metaopt.inner._cpu import im2col
from metaopt.inner._loop import loop, problem, run, step
from metaopt.inner._losses import cross_entropy
from metaopt.inner._modules import Model, from_linen, from_nnx
from metaopt.inner._piecewise import piecewise
from metaopt.inner._samplers import Sampler, minibatch
from metaopt.inner._weighted import weighted

__all__ = [
    "Model",
    "Sampler",
    "cross_entropy",
    "from_linen",
    "from_nnx",
    "im2col",
    "loop",
    "minibatch",
    "piecewise",
    "problem",
    "run",
    "step",
    "weighted",
]
