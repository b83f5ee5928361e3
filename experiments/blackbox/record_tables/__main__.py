"""Runs the experiment: `python experiments/blackbox/record_tables`."""

from experiments import script
from experiments.blackbox.record_tables.main import main

if __name__ == "__main__":
    script.run(main)
