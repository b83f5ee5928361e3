"""The gradient of conv4.py in PyTorch. conv4.py runs it, in a separate environment (install_peers.sh).

It prints processor milliseconds and gradients as one line of JSON. A program that fails gets a row with the reason.
"""

import functools
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from turns import medians


def load(file: str):
    saved = np.load(file)
    params = {}
    for name in (n for n in saved.files if n.startswith("params/")):
        x = saved[name].transpose(3, 2, 0, 1) if saved[name].ndim == 4 else saved[name]  # HWIO to OIHW
        params[name] = torch.tensor(np.ascontiguousarray(x))
    part = lambda p: (torch.tensor(saved[f"{p}/x"])[:, :, None], torch.tensor(saved[f"{p}/y"]).long())
    return params, part("train"), part("valid")


def by_hand(x, scale, shift):
    """Batch normalization in elementary operations.

    Under torch.func, the second derivative of the fused one is inaccurate.
    """
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * scale[None, :, None, None] + shift[None, :, None, None]


def fused(x, scale, shift):
    return F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)


STRIDED = sys.argv[-1] == "stride"


def loss(params: dict, x: torch.Tensor, y: torch.Tensor, blocks: int, normalize=fused) -> torch.Tensor:
    for i in range(blocks):
        name = f"params/block{i}"
        x = F.conv2d(x, params[f"{name}/w"], padding=1, stride=2 if STRIDED else 1)
        x = F.relu(normalize(x, params[f"{name}/scale"], params[f"{name}/shift"]))
        x = x if STRIDED else F.max_pool2d(x, 2)
    x = x.mean((2, 3)) if STRIDED else x.permute(0, 2, 3, 1).flatten(1)
    return F.cross_entropy(x @ params["params/head/w"] + params["params/head/b"], y)


def with_autograd(params, train, valid, blocks, rate):
    """Computes the gradient with a loop over tasks."""
    weights = {name: p.clone().requires_grad_() for name, p in params.items()}

    def gradient():
        total = 0.0
        for i in range(len(train[0])):
            grads = torch.autograd.grad(
                loss(weights, train[0][i], train[1][i], blocks), list(weights.values()), create_graph=True
            )
            adapted = {n: p - rate * g for (n, p), g in zip(weights.items(), grads, strict=True)}
            total = total + loss(adapted, valid[0][i], valid[1][i], blocks)
        grads = torch.autograd.grad(total / len(train[0]), list(weights.values()))
        return dict(zip(weights, grads, strict=True))

    return gradient


def with_func(params, train, valid, blocks, rate, normalize=by_hand):
    def one(params, sx, sy, qx, qy):
        grads = torch.func.grad(loss)(params, sx, sy, blocks, normalize)
        return loss({n: p - rate * grads[n] for n, p in params.items()}, qx, qy, blocks, normalize)

    batched = torch.func.vmap(one, in_dims=(None, 0, 0, 0, 0))
    gradient = torch.func.grad(lambda params: batched(params, *train, *valid).mean())
    return lambda: gradient(params)


PROGRAMS = {
    "PyTorch, a loop over tasks": with_autograd,
    "torch.func, vmap": with_func,
    "torch.func, vmap, fused": functools.partial(with_func, normalize=fused),
}


def main() -> None:
    file, blocks, rate, threads, repetitions, _ = sys.argv[1:]
    torch.set_num_threads(int(threads))
    setting = load(file)
    rows, calls = {}, {}
    for name, make in PROGRAMS.items():
        rows[name] = {"name": name}
        try:
            gradient = make(*setting, int(blocks), float(rate))
            results = {}
            for leaf, g in gradient().items():
                _, layer, part = leaf.split("/")
                g = g.permute(2, 3, 1, 0) if g.ndim == 4 else g
                results.setdefault(layer, {})[part] = g.tolist()
            rows[name]["gradient"] = results
            calls[name] = gradient
        except Exception as error:  # a peer may fail: the table states the reason
            rows[name]["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, seconds in medians(calls, int(repetitions), clock=time.process_time).items():
        rows[name]["ms"] = 1e3 * seconds
    print(json.dumps({"rows": list(rows.values()), "versions": f"torch {torch.__version__}"}))


if __name__ == "__main__":
    main()
