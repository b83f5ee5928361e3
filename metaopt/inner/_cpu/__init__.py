"""Convolutions and pooling in forms that XLA compiles to fast code on CPU, also inside of loops."""

from metaopt.inner._cpu._im2col import im2col as im2col
from metaopt.inner._cpu._im2col import rewrite as rewrite
