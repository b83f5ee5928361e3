"""Composable optax transforms: any of them differentiable at zero gradients."""

from metaopt.transforms._differentiable import differentiable

__all__ = ["differentiable"]
