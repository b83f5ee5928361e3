"""Runs the experiment: `python experiments/few_shot/small_meta_dataset`."""

from experiments import script
from experiments.few_shot.small_meta_dataset.main import main

if __name__ == "__main__":
    script.run(main)
