"""Searches for architectures, and what is done with their results."""
