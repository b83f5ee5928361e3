"""A small transformer that predicts the next character of Shakespeare, and its text."""

import gzip
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import script

TEXT = "tiny_shakespeare.txt.gz"
NUM_CHARACTERS = 65
HEADS = 2


def read_text(file: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the alphabet as bytes [65], and the text as numbers of characters. `file` is the script that needs it."""
    text = np.frombuffer(gzip.decompress(script.data_file(file, TEXT).read_bytes()), np.uint8)
    return np.unique(text, return_inverse=True)


def init_params(key: jax.Array, context: int, width: int):
    """Returns the parameters of two layers, by group: embeddings, attention and MLP of each layer, output."""
    shapes = {"embed": {"characters": (NUM_CHARACTERS, width), "positions": (context, width)}}
    for layer in (1, 2):
        shapes[f"attention {layer}"] = {"in": (width, 3 * width), "out": (width, width)}
        shapes[f"mlp {layer}"] = {"in": (width, 4 * width), "out": (4 * width, width)}
    shapes["output"] = {"out": (width, NUM_CHARACTERS)}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    weights = [jax.random.normal(k, shape) / math.sqrt(shape[0]) for k, shape in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, weights)
    return {**params, "embed": jax.tree.map(lambda w: w * math.sqrt(w.shape[0] / width), params["embed"])}


def normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def logits(params, x):
    """Returns [rows, positions, alphabet] logits of the next character."""
    h = params["embed"]["characters"][x] + params["embed"]["positions"][None]
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
    for layer in (1, 2):
        attention, mlp = params[f"attention {layer}"], params[f"mlp {layer}"]
        qkv = (normalize(h) @ attention["in"]).reshape(*x.shape, 3, HEADS, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape)
        h = h + mixed @ attention["out"]
        h = h + jax.nn.gelu(normalize(h) @ mlp["in"]) @ mlp["out"]
    return normalize(h) @ params["output"]["out"]


def row_losses(params, rows):
    """Returns the loss of each row of `context` + 1 characters, in nats per character."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, rows[:, :-1]), rows[:, 1:])
    return losses.mean(1)
