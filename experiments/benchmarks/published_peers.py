"""hypertorch on its own examples. rules.py runs it, in a separate environment (install_peers.sh).

The data, λ and counts are from published.py, in a file. Inner steps, rules and optimizers are hypertorch's. It writes
hypergradients next to that file, and prints the rest as one line of JSON.
"""

import importlib
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from turns import medians


class Example:
    """The data that published.py saved: tensors by name, λ, T and K."""

    def __init__(self, file: str):
        saved = {name: torch.tensor(value) for name, value in np.load(file).items()}
        self.num_steps, self.k = int(saved.pop("T")), int(saved.pop("K"))
        self.names = [name for name in saved if name.startswith("hp_")]
        self.hyperparams = [saved[name].requires_grad_() for name in self.names]
        self.data = saved

    def fresh(self) -> list[torch.Tensor]:
        """Returns λ, with its gradients reset."""
        for leaf in self.hyperparams:
            leaf.grad = None
        return self.hyperparams

    def hypergradients(self) -> list[torch.Tensor]:
        return [leaf.grad.clone() for leaf in self.hyperparams]


def trajectory(step, start, hyperparams, num_steps, **options) -> list:
    states = [start]
    for _ in range(num_steps):
        states.append(step(states[-1], hyperparams, **options))
    return states


def logistic(hg, example):
    d, num_steps, k = example.data, example.num_steps, example.k
    values = []

    def valid_loss(params, hyperparams):
        values.append(F.binary_cross_entropy_with_logits(d["x_valid"] @ params[0], d["y_valid"]))
        return values[-1]

    def train_loss(params, hyperparams):
        w = params[0]
        return F.binary_cross_entropy_with_logits(d["x"] @ w, d["y"]) + 0.5 * (hyperparams[0] * w**2).sum()

    step = hg.GradientDescent(train_loss, 0.1)
    zeros = lambda: [torch.zeros(d["x"].shape[1]).requires_grad_()]

    def reverse(last):
        def call(hyperparams):
            states = trajectory(step, zeros(), hyperparams, num_steps)
            hg.reverse(states[-last - 1 :], hyperparams, [step] * last, valid_loss)

        return call

    def solved(solver):
        def call(hyperparams):
            solver(trajectory(step, zeros(), hyperparams, num_steps)[-1], hyperparams, k, step, valid_loss)

        return call

    def to_the_end(num_outer):
        hyperparams = [example.hyperparams[0].detach().clone().requires_grad_()]
        optimizer = torch.optim.SGD(hyperparams, lr=1.0, momentum=0.9)
        for _ in range(num_outer):
            optimizer.zero_grad()
            reverse(k)(hyperparams)
            optimizer.step()
            hyperparams[0].data.clamp_(min=1e-8)
        return values[-1].item()

    return {
        "reverse, the last K steps": reverse(k),
        "reverse, all T steps": reverse(num_steps),
        "fixed_point": solved(hg.fixed_point),
        "CG": solved(hg.CG),
    }, to_the_end


def equilibrium(hg, example):
    d, num_steps, k = example.data, example.num_steps, example.k
    place = {name: i for i, name in enumerate(example.names)}

    def dynamics(state, hyperparams):
        a, b, c = (hyperparams[place[name]] for name in ("hp_a", "hp_b", "hp_c"))
        return [torch.tanh(state[0] @ a + d["x"] @ b + c)]

    def loss(state, hyperparams):
        return F.cross_entropy(
            state[0] @ hyperparams[place["hp_out"]] + hyperparams[place["hp_out_bias"]], d["y"].long()
        )

    def rule(solver):
        def call(hyperparams):
            start = [torch.zeros(len(d["x"]), hyperparams[place["hp_a"]].shape[0])]
            state = trajectory(dynamics, start, hyperparams, num_steps)[-1]
            if solver is hg.reverse_unroll:
                solver(state, hyperparams, loss)
            else:
                solver(state, hyperparams, k, dynamics, loss)

        return call

    return {name: rule(getattr(hg, name)) for name in ("reverse_unroll", "fixed_point", "CG_normaleq")}, None


def imaml(hg, example):
    d, num_steps, k = example.data, example.num_steps, example.k
    num_tasks = len(d["x_x"])
    images = {part: d[part + "_x"].reshape(num_tasks, -1, 1, 28, 28) for part in "xq"}  # one channel
    # Kernels in torch's layout, as in λ of hypertorch's example.
    example.hyperparams = [
        (leaf.detach().permute(3, 2, 0, 1).contiguous() if leaf.ndim == 4 else leaf.detach()).requires_grad_()
        for leaf in example.hyperparams
    ]

    def logits(params, x):
        w = dict(zip(example.names, params, strict=True))
        for i in range(4):
            x = F.max_pool2d(F.relu(F.conv2d(x, w[f"hp_conv{i}"], w[f"hp_bias{i}"], padding=1)), 2)
            x = F.batch_norm(x, None, None, w[f"hp_scale{i}"], w[f"hp_shift{i}"], training=True)
        return x.flatten(1) @ w["hp_out"] + w["hp_out_bias"]

    def rule(solver, own_step):
        def call(hyperparams):
            for task in range(num_tasks):

                def train_loss(params, hyperparams, task=task):
                    apart = sum(((h - p) ** 2).sum() for h, p in zip(hyperparams, params, strict=True))
                    return F.cross_entropy(logits(params, images["x"][task]), d["x_y"][task].long()) + 0.5 * 2.0 * apart

                def valid_loss(params, hyperparams, task=task):
                    return F.cross_entropy(logits(params, images["q"][task]), d["q_y"][task].long()) / num_tasks

                step = hg.GradientDescent(train_loss, 0.1)
                start = [p.detach().clone().requires_grad_() for p in hyperparams]
                params = trajectory(step, start, hyperparams, num_steps, create_graph=False)[-1]
                solver(params, hyperparams, k, step if own_step else hg.GradientDescent(train_loss, 1.0), valid_loss)

        return call

    return {"CG": rule(hg.CG, False), "fixed_point": rule(hg.fixed_point, True)}, None


def text(hg, example):
    d, num_steps, k = example.data, example.num_steps, example.k
    features = len(example.hyperparams[0])
    x = {}
    for part in "xq":
        index = torch.stack([d[part + "_row"], d[part + "_column"]]).long()
        x[part] = torch.sparse_coo_tensor(index, d[part + "_value"], (len(d[part + "_y"]), features)).coalesce()

    def log_loss(params, part):
        return F.cross_entropy(x[part] @ params[0], d[part + "_y"].long())

    def train_loss(params, hyperparams):
        return log_loss(params, "x") + 0.5 * (torch.exp(hyperparams[0])[:, None] * params[0] ** 2).mean()

    step = hg.HeavyBall(train_loss, 10.0, 0.9)

    def call(hyperparams):
        start = step.get_opt_params([torch.zeros(features, 2).requires_grad_()])
        params = trajectory(step, start, hyperparams, num_steps, create_graph=False)[-1][:1]
        hg.CG(params, hyperparams, k, hg.GradientDescent(train_loss, 1.0), lambda p, h: log_loss(p, "q"))

    return {"CG": call}, None


EXAMPLES = {"logistic": logistic, "equilibrium": equilibrium, "imaml": imaml, "text": text}


def main() -> None:
    name, file, threads, repetitions, seconds, num_outer, clock = sys.argv[1:]
    clock = getattr(time, clock)
    torch.set_num_threads(int(threads))
    hypertorch = importlib.import_module("hypergrad")
    if not hasattr(hypertorch, "reverse"):
        raise ModuleNotFoundError("the installed `hypergrad` is another library")
    example = Example(file)
    rules, to_the_end = EXAMPLES[name](hypertorch, example)
    calls = {rule: lambda call=call: call(example.fresh()) for rule, call in rules.items()}
    hypergradients = {}
    for rule, call in calls.items():
        call()
        for leaf, value in zip(example.names, example.hypergradients(), strict=True):
            if name == "imaml" and value.ndim == 4:
                value = value.permute(2, 3, 1, 0)
            hypergradients[f"{rule}/{leaf}"] = value.numpy()
    np.savez(file + ".found.npz", **hypergradients)
    answer = {"ms": {r: 1e3 * s for r, s in medians(calls, int(repetitions), float(seconds), clock).items()}}
    if to_the_end and int(num_outer):
        begin = clock()
        answer["value"] = to_the_end(int(num_outer))
        answer["seconds"] = clock() - begin
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
