"""Runs the experiment: `python experiments/blackbox/auto_random_forest`."""

from experiments import script
from experiments.blackbox.auto_random_forest.main import main

if __name__ == "__main__":
    script.run(main)
