"""Runs the experiment: `python experiments/hyperparameters/gaussian_process`."""

from experiments import script
from experiments.hyperparameters.gaussian_process.main import main

if __name__ == "__main__":
    script.run(main)
