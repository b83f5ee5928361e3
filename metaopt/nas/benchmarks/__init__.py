"""Readers and tables of published benchmarks."""
