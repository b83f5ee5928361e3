"""Runs the experiment: `python experiments/optimizers/self_tuning`."""

from experiments import script
from experiments.optimizers.self_tuning.main import main

if __name__ == "__main__":
    script.run(main)
