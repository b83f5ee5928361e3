"""Objectives that succeed, fail, hang or crash, in a file that the process of a trial can import."""

import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np

from metaopt import blackbox, spaces

SPACE = {
    "x": spaces.interval(-1.0, 1.0),
    "size": spaces.integer(1, 64, log=True),
    "kind": spaces.choice(["a", "b"]),
    "only_b": spaces.active_if(spaces.positive(1e-2), "kind", ["b"]),
}


def quadratic(trial, task):
    """Noisy, from the generators that a trial's process seeds and from the trial's own seed."""
    noise = np.random.default_rng(trial.seed).normal() + np.random.normal()
    return (trial.configuration["x"] - task) ** 2 + trial.configuration["size"] / 100 + noise / 100


def pure(trial, task):
    return (trial.configuration["x"] - task) ** 2 + np.random.default_rng(trial.seed).normal() / 100


def uneven(trial, task):
    """Takes its time, so that trials end in another order than they began."""
    time.sleep(np.random.default_rng(zlib.crc32(repr(trial.configuration).encode())).uniform(0, 0.02))
    return pure(trial, task)


def allocate(trial, task):
    held = []
    for _ in range(100):
        held.append(np.ones(2**23))  # 64 MiB
        time.sleep(0.02)


def allocate_below(trial, task):
    """In a process of the trial's own."""
    subprocess.run([sys.executable, "-c", "import black_boxes; black_boxes.allocate(None, None)"])


class Speechless(Exception):
    def __str__(self):
        raise OSError("no words")

    __float__ = __str__


def misbehave(trial, task):
    if task == "raise":
        raise KeyError("no such column")
    if task == "hang":
        time.sleep(600)
    if task == "exit":
        sys.exit("enough")
    if task == "exit at once":
        os._exit(3)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "prune":
        raise blackbox.Pruned(0.5)
    if task == "prune in words":
        raise blackbox.Pruned("too slow")
    if task == "raise bytes":
        raise FileNotFoundError(os.fsdecode(b"data/\xff.csv"))
    if task == "raise in silence":
        raise Speechless
    if task == "prune in silence":
        raise blackbox.Pruned(Speechless())
    if task == "change":
        return trial.configuration.pop("x") + 0.25
    if task == "fork":
        if not (child := os.fork()):
            return 1.0
        os.waitpid(child, 0)
        return 0.5
    if task == "memory":
        allocate(trial, task)
    if task == "memory below":
        allocate_below(trial, task)
    return {"nan": float("nan"), "inf": float("inf"), "text": "much", "good": 0.25}[task]


def slow(trial, task):
    time.sleep(0.3)
    return quadratic(trial, task)


class KillsWorkers:
    """Ends the process of its worker in trial 3, as if the machine were gone, up to `times` times."""

    def __init__(self, folder, isolated, times=1):
        self.folder, self.isolated, self.times = str(folder), isolated, times

    def __call__(self, trial, task):
        if trial.trial == 3 and (kills := len(os.listdir(self.folder))) < self.times:
            open(f"{self.folder}/{kills}", "x").close()
            os.kill(os.getppid() if self.isolated else os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return pure(trial, task[0])
