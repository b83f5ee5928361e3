"""Runs the experiment: `python experiments/recommend`."""

from experiments import script
from experiments.recommend.main import main

if __name__ == "__main__":
    script.run(main)
