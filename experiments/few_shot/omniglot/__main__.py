"""Runs the experiment: `python experiments/few_shot/omniglot`."""

from experiments import script
from experiments.few_shot.omniglot.main import main

if __name__ == "__main__":
    script.run(main)
