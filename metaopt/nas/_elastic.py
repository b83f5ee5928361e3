"""Supernets over sizes: they have the weights of the largest network; smaller networks use slices of these weights.

A convolution has candidates k for its window, c for its channels and d for its depth. Under mixing weights w it
computes:

    W̄ = (Σ_k w_k 1[|position| ≤ k/2]) ⊙ W                the center of the largest window
    h_l = Σ_c w_c 1[channel < c] ⊙ relu(norm_c(W̄ * h_{l−1} + b))
    output = Σ_d w_d h_d

The mixture over windows is one convolution, since convolutions are linear in W. norm_c is the normalization of the
network with c channels:

- "batch": each channel has its own statistics. b is left out, because subtracting the mean removes it. (Its gradient
  would be rounding noise, which Adam amplifies.) The mask comes after the normalization, which would undo an earlier
  mask.
- "layer": the mean and variance are over the first c channels only.

At one-hot weights, masked channels are exact zeros, so their rows in the next W do not matter. The supernet then equals
the small network, whose parameters are slices.

**Masks save no compute during the search.** Every step costs as much as a step of the largest network at its full
depth, whatever w is. Only the discrete network is cheaper. More candidates for windows and depths cost nothing extra.
Candidates for widths cost one mask, or with "layer" one normalization for each candidate.

Sources: for masks, Wan et al., CVPR 2020, https://arxiv.org/abs/2004.05565; for windows, Stamoulis et al., 2019,
https://arxiv.org/abs/1904.02877; for depths, Cai et al., ICLR 2020, https://arxiv.org/abs/1908.09791
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.nas import _ops
from metaopt.nas._specs import ElasticLayer, ElasticNetwork, Genotype, check_elastic, check_single_path


class Placed(NamedTuple):
    """A layer at its place in the network.

    Attributes:
      name: name of the layer; "head" is the linear layer to the outputs.
      layer: its sizes.
      spatial: spatial shape of its input.
      in_width: candidates for the channels of its input.
      in_choice: name of the choice among these candidates; None if there is only one.
      flat: whether this linear layer uses the positions of its input as features.
    """

    name: str
    layer: ElasticLayer
    spatial: tuple[int, ...]
    in_width: tuple[int, ...]
    in_choice: str | None
    flat: bool

    @property
    def out_spatial(self) -> tuple[int, ...]:
        return () if self.flat else tuple(-(-n // self.layer.stride) for n in self.spatial)

    def choices(self) -> dict[str, str]:
        """Size -> the name of its choice, for sizes with several candidates; "in" is the width of the input."""
        own_choices = {s: f"{self.name}.{s}" for s in ("kernel", "width", "depth") if len(getattr(self.layer, s)) > 1}
        return {**({"in": self.in_choice} if self.in_choice else {}), **own_choices}

    def sized(self, sizes: Mapping[str, int]) -> "Placed":
        """The same layer with one candidate for each size in `sizes`."""
        fields = {s: (sizes[s],) for s in ("width", "kernel", "depth") if s in sizes}
        small = self._replace(layer=self.layer._replace(**fields))
        return small._replace(in_width=(sizes["in"],), in_choice=None) if "in" in sizes else small


def placed(network: ElasticNetwork, in_shape: Sequence[int]) -> list[Placed]:
    """All layers with the shapes of their inputs, the head last."""
    check_elastic(network)
    *spatial, channels = in_shape
    # The input of the next layer, as in `Placed`: its spatial shape, the candidates for its channels, the name of the
    # choice among them, and whether a "flatten" layer came just before.
    spatial, width, choice, flat = tuple(spatial), (channels,), None, False
    layers = []
    head = ElasticLayer("linear", (network.num_outputs,))
    for name, layer in [*network.layers.items(), ("head", head)]:
        if layer.kind in ("conv", "max_pool", "avg_pool", "flatten"):
            if flat:
                raise ValueError(
                    f"{name!r} is a {layer.kind!r} layer after a 'flatten'; only 'linear' layers can follow it."
                )
            if not 1 <= len(spatial) <= 3:
                raise ValueError(
                    f"{name!r} is {layer.kind!r}, which needs one to three spatial axes; its input has the shape "
                    f"{(*spatial, *width[-1:])}. Use only 'linear' for rows of a table, as in `mlp_space`."
                )
        if layer.kind == "flatten":
            flat = True
            continue
        place = Placed(name, layer, spatial, width, choice, flat)
        layers.append(place)
        spatial, flat = place.out_spatial, False
        if layer.width:
            width = layer.width
            choice = f"{name}.width" if len(width) > 1 else None
    if sum(place.name == "head" for place in layers) > 1:
        raise ValueError(
            "A layer is called 'head', which is the name of the layer to the outputs; give it another name."
        )
    return layers


# ---- One layer ------------------------------------------------------------------------------------------------------


def num_keys(place: Placed) -> int:
    return place.layer.depth[-1] if place.layer.width else 0


def init_layer(place: Placed, keys: jax.Array) -> list[dict[str, jax.Array]]:
    """The parameters at the largest sizes, one entry for each repetition of the layer."""
    if not place.layer.width:
        return []
    params, width = [], max(place.layer.width)
    for i in range(place.layer.depth[-1]):
        in_width = place.in_width[-1] if i == 0 else width
        if place.layer.kind == "conv":
            window = (place.layer.kernel[-1],) * len(place.spatial)
        else:
            window = (math.prod(place.spatial) if place.flat and i == 0 else 1,)
        w = _ops.uniform(keys[i], (*window, in_width, width), math.prod(window) * in_width)
        params.append({"w": w} if place.layer.norm == "batch" else {"w": w, "b": jnp.zeros(width)})
    return params


def slice_layer(place: Placed, small: Placed, params: list[dict[str, jax.Array]]) -> list[dict[str, jax.Array]]:
    """Slices the parameters of `small`, which has one candidate per size, out of the parameters of `place`."""
    if not place.layer.width:
        return []
    (width,), (depth,), (in_width,) = small.layer.width, small.layer.depth, small.in_width
    sliced = []
    for i, p in enumerate(params[:depth]):
        w = p["w"][..., : in_width if i == 0 else width, :width]
        if place.layer.kind == "conv":
            kernel = small.layer.kernel[0]
            rim = (place.layer.kernel[-1] - kernel) // 2
            w = w[(slice(rim, rim + kernel),) * len(place.spatial)]
        sliced.append({"w": w} | {name: b[:width] for name, b in p.items() if name == "b"})
    return sliced


def apply_layer(
    place: Placed, params, x: jax.Array, weights: Mapping[str, jax.Array], remat: bool = False
) -> jax.Array:
    """Applies a layer under the weights [candidates] of its choices; a size without weights has its largest value."""
    layer, last = place.layer, place.name == "head"
    if not layer.width:
        return _pool(layer.kind, layer.stride, x)
    if last and not place.flat:
        x = x.mean(tuple(range(1, x.ndim - 1)))
    kernel, width, depth = (weights.get(f"{place.name}.{size}") for size in ("kernel", "width", "depth"))
    width_masks = np.arange(layer.width[-1])[None] < np.array(layer.width)[:, None]  # [candidates, channels]

    def apply_once(p, x, first):
        if layer.kind == "conv":
            w = p["w"] if kernel is None else p["w"] * _window(kernel, layer.kernel, len(place.spatial))
            y = _ops.convolve(x, w, stride=layer.stride if first else 1)
        elif first and place.flat:
            y = jnp.einsum("npc,pcd->nd", x.reshape(x.shape[0], -1, x.shape[-1]), p["w"])
        else:
            y = x @ p["w"][0]
        y = y + p["b"].reshape((1,) * (y.ndim - 1) + (-1,)) if "b" in p else y
        if last:
            return y
        broadcast = lambda mask: mask.reshape((1,) * (y.ndim - 1) + (-1,))
        if layer.norm == "layer" and width is not None:
            parts = [jax.nn.relu(_layer_norm(y, broadcast(jnp.asarray(m, y.dtype)))) for m in width_masks]
            return jnp.tensordot(width, jnp.stack(parts), 1)
        if layer.norm:
            y = _ops.normalized(y) if layer.norm == "batch" else _layer_norm(y, jnp.ones_like(y[:1]))
        y = jax.nn.relu(y)
        return y if width is None else y * broadcast(width @ jnp.asarray(width_masks, y.dtype))

    outputs = []
    for i, p in enumerate(params):
        run = lambda p, x, first=i == 0: apply_once(p, x, first)
        x = (jax.checkpoint(run) if remat else run)(p, x)
        outputs.append(x)
    if depth is None:
        return x
    return jnp.tensordot(depth, jnp.stack([outputs[d - 1] for d in layer.depth]), 1)


def _window(weights: jax.Array, sizes: tuple[int, ...], spatial: int) -> jax.Array:
    """[window..., 1, 1]: for each position, the total weight of the windows that contain it."""
    axis_distance = abs(np.arange(sizes[-1]) - sizes[-1] // 2)
    distance = np.max(np.stack(np.meshgrid(*[axis_distance] * spatial, indexing="ij")), 0)
    inside = np.stack([distance <= size // 2 for size in sizes], -1)
    return (jnp.asarray(inside, weights.dtype) @ weights)[..., None, None]


def _layer_norm(y: jax.Array, mask: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Normalizes over the channels that the mask [1..., C] keeps; other channels are 0."""
    num = mask.sum(-1, keepdims=True)
    centered = (y - (y * mask).sum(-1, keepdims=True) / num) * mask
    return centered * jax.lax.rsqrt((centered**2).sum(-1, keepdims=True) / num + epsilon)


def _pool(kind: str, stride: int, x: jax.Array) -> jax.Array:
    window = (1, *[stride] * (x.ndim - 2), 1)
    padding = [(0, -n % size) for n, size in zip(x.shape, window, strict=True)]
    if kind == "max_pool":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, padding)
    total = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, padding)
    return total(x) / total(jnp.ones((1, *x.shape[1:-1], 1), x.dtype))


# ---- The network ----------------------------------------------------------------------------------------------------


def elastic_functions(network: ElasticNetwork, in_shape: tuple[int, ...], *, single_path: bool, remat: bool):
    """`init`, `apply`, `features` and `head` of a `Supernet`, and `(params, small) -> params` of a discrete network."""
    layers, cells = placed(network, in_shape), network.cells

    def init(key):
        keys, used, params = jax.random.split(key, sum(map(num_keys, layers))), 0, {}
        for place in layers:
            params[place.name] = init_layer(place, keys[used : used + num_keys(place)])
            used += num_keys(place)
        return params

    def features(params, weights, x, drop_path=None):
        if drop_path is not None:
            raise ValueError(
                "`drop_path` drops edges, but a network of sizes has no edges. Use another regularization."
            )
        rows = {} if weights is None else _rows(cells, weights, x.dtype, single_path)
        outputs = []
        for place in layers[:-1]:
            x = apply_layer(place, params[place.name], x, rows, remat)
            outputs.append(x)
        return outputs or [x]

    def head(params, last):
        return apply_layer(layers[-1], params["head"], last, {}, remat)

    def apply(params, weights, x, drop_path=None):
        return head(params, features(params, weights, x, drop_path)[-1])

    def sliced(params, discrete):
        small = placed(discrete, in_shape)
        return {a.name: slice_layer(a, b, params[a.name]) for a, b in zip(layers, small, strict=True)}

    return init, apply, features, head, sliced


def _rows(cells, weights: Mapping[str, Any], dtype, single_path: bool) -> dict[str, jax.Array]:
    """Choice -> its weights [candidates]."""
    rows = {}
    for name, cell in cells.items():
        if single_path:
            check_single_path(name, weights[name])
        w = jnp.asarray(weights[name], dtype).reshape(len(cell.edges[0].ops))
        if single_path:  # other candidates have no gradient, as if they did not run
            w = w * jax.nn.one_hot(jnp.argmax(jnp.abs(w)), w.size, dtype=dtype)
        rows[name] = w
    return rows


def chosen(network: ElasticNetwork, genotype: Genotype) -> ElasticNetwork:
    """The network with the sizes of a genotype, which must be a genotype of this network."""
    layers = dict(network.layers)
    for choice, ((_, _, size),) in genotype.items():
        name, _, size_name = choice.rpartition(".")
        layers[name] = layers[name]._replace(**{size_name: (int(size),)})
    return network._replace(layers=layers)
