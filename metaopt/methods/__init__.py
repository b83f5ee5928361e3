"""Named compositions of the contract, with no numerics of their own."""

from metaopt.methods._fine_tune import FineTuned, fine_tune

__all__ = ["FineTuned", "fine_tune"]
