"""Windows of Shakespeare, of which half are corrupted."""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import script
from experiments.hyperparameters import transformer

KINDS = ("clean", "shuffled", "repeated", "other source")
MESSAGES = "sms_spam.tsv.gz"
GAP = 10_000  # characters between texts


class Pool(NamedTuple):
    """Windows to choose from.

    Attributes:
      windows: [N, L + 1] int32, numbers of characters.
      kind: [N], index into `KINDS`. No method reads it, except for the oracle.
    """

    windows: np.ndarray
    kind: np.ndarray


class Texts(NamedTuple):
    """The texts of a seed.

    Attributes:
      pool: the windows from which weights are learned.
      unseen: as many windows of other text, with other corruptions. They are only scored, and models are trained on
        them.
      valid, test: [V, L + 1] and [M, L + 1], clean windows.
    """

    pool: Pool
    unseen: Pool
    valid: np.ndarray
    test: np.ndarray


def load(seed: int, settings) -> Texts:
    """Returns texts that follow one another with gaps, at a place that depends on the seed."""
    folder = Path(__file__).parent
    alphabet, codes = transformer.read_text(folder)
    rng = np.random.default_rng(seed)
    length = settings.context + 1
    sizes = [settings.num_windows, settings.num_windows, settings.num_valid, settings.num_test]
    start = int(rng.integers(len(codes) - sum(sizes) * length - len(sizes) * GAP))
    rows = []
    for size in sizes:
        rows.append(codes[start : start + size * length].reshape(size, length).astype(np.int32))
        start += size * length + GAP
    messages = read_messages(folder, alphabet)
    order = rng.permutation(len(messages))
    halves = [other_windows([messages[i] for i in half], length) for half in np.array_split(order, 2)]
    pools = [corrupted(rng, clean, other) for clean, other in zip(rows[:2], halves, strict=True)]
    return Texts(*pools, *rows[2:])


def read_messages(folder: Path, alphabet: np.ndarray) -> list[np.ndarray]:
    """Returns SMS messages as numbers of Shakespeare's characters. Other characters are left out."""
    lines = gzip.decompress(script.data_file(folder, MESSAGES).read_bytes()).splitlines(keepends=True)
    messages = [np.frombuffer(line.partition(b"\t")[2], np.uint8) for line in lines]
    return [np.searchsorted(alphabet, message[np.isin(message, alphabet)]) for message in messages]


def other_windows(messages: list[np.ndarray], length: int) -> np.ndarray:
    text = np.concatenate(messages)
    return text[: len(text) // length * length].reshape(-1, length).astype(np.int32)


def corrupted(rng: np.random.Generator, clean: np.ndarray, other: np.ndarray) -> Pool:
    """Returns a pool whose half is corrupted, in random order. The three kinds have equal shares."""
    num, length = clean.shape
    share = num // 6
    kind = np.repeat(np.arange(4), [num - 3 * share, share, share, share])[rng.permutation(num)]
    windows = clean.copy()
    for i in np.flatnonzero(kind == 1):
        windows[i] = rng.permutation(clean[i])
    for i in np.flatnonzero(kind == 2):
        piece = clean[i, : rng.integers(2, 7)]
        windows[i] = np.resize(piece, length)
    windows[kind == 3] = other[rng.permutation(len(other))[:share]]
    return Pool(windows, kind)
