"""Runs the experiment: `python experiments/architecture/nas_bench_201`."""

from experiments import script
from experiments.architecture.nas_bench_201.main import main

if __name__ == "__main__":
    script.run(main)
