"""Runs the experiment: `python experiments/architecture/architecture_tables`."""

from experiments import script
from experiments.architecture.architecture_tables.main import main

if __name__ == "__main__":
    script.run(main)
