"""Runs the experiment: `python experiments/hyperparameters/data_weighting`."""

from experiments import script
from experiments.hyperparameters.data_weighting.main import main

if __name__ == "__main__":
    script.run(main)
