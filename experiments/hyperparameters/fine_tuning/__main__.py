"""Runs the experiment: `python experiments/hyperparameters/fine_tuning`."""

from experiments import script
from experiments.hyperparameters.fine_tuning.main import main

if __name__ == "__main__":
    script.run(main)
