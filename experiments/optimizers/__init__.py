"""Schedules, optimizers that tune themselves, and learned optimizers."""
