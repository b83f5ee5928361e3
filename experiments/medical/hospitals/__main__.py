"""Runs the experiment: `python experiments/medical/hospitals`."""

from experiments import script
from experiments.medical.hospitals.main import main

if __name__ == "__main__":
    script.run(main)
