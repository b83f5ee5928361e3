"""The outer step of maml.py in other libraries. maml.py runs it, in a separate environment (install_peers.sh).

It prints processor milliseconds per step and gradients as one line of JSON. A library that is missing or fails gets a
row with the reason.
"""

import importlib
import importlib.metadata
import json
import sys
import time

import numpy as np
import torch
from turns import medians

LAYERS = ("hidden0", "hidden1", "out")
NAMES = [(layer, leaf) for layer in LAYERS for leaf in ("w", "b")]


class Setting:
    """The tensors and numbers that maml.py saved."""

    def __init__(self, file: str, num_steps: str, rate: str, outer_rate: str):
        saved = np.load(file)
        tensor = lambda name: torch.tensor(np.ascontiguousarray(saved[name]))
        self.params = [tensor(f"params/{layer}/{leaf}") for layer, leaf in NAMES]
        self.train = [tensor(f"train/{name}") for name in ("x", "y")]
        self.valid = [tensor(f"valid/{name}") for name in ("x", "y")]
        self.num_steps, self.rate, self.outer_rate = int(num_steps), float(rate), float(outer_rate)

    @property
    def num_tasks(self) -> int:
        return len(self.train[0])

    def weights(self) -> list[torch.Tensor]:
        return [p.clone().requires_grad_() for p in self.params]

    def task(self, number: int) -> tuple[list, list]:
        return [x[number] for x in self.train], [x[number] for x in self.valid]


def loss(params: list, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for w, b in zip(params[0:4:2], params[1:4:2], strict=True):
        x = torch.relu(x @ w + b)
    return ((x @ params[4] + params[5] - y) ** 2).mean()


class Net(torch.nn.Module):
    """The network and its loss as a module, for libraries that need one."""

    def __init__(self, params: list):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in params])

    def forward(self, x, y):
        return loss(list(self.weights), x, y)


def stepper(parameters: list, outer_rate: float, backward) -> tuple:
    """Returns (call, gradient): a step of Adam after `backward`, which leaves gradients in `.grad`."""
    optimizer = torch.optim.Adam(parameters, lr=outer_rate)

    def gradient():
        optimizer.zero_grad()
        backward()
        return [p.grad.clone() for p in parameters]

    def call():
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return call, gradient


def with_autograd(setting):
    weights = setting.weights()

    def backward():
        total = 0.0
        for number in range(setting.num_tasks):
            support, query = setting.task(number)
            params = weights
            for _ in range(setting.num_steps):
                grads = torch.autograd.grad(loss(params, *support), params, create_graph=True)
                params = [p - setting.rate * g for p, g in zip(params, grads, strict=True)]
            total = total + loss(params, *query)
        (total / setting.num_tasks).backward()

    return stepper(weights, setting.outer_rate, backward)


def objective_of_func(setting):
    def one(params, support_x, support_y, query_x, query_y):
        for _ in range(setting.num_steps):
            grads = torch.func.grad(loss)(params, support_x, support_y)
            params = [p - setting.rate * g for p, g in zip(params, grads, strict=True)]
        return loss(params, query_x, query_y)

    batched = torch.func.vmap(one, in_dims=(None, 0, 0, 0, 0))
    return lambda params: batched(params, *setting.train, *setting.valid).mean()


def with_func(setting, wrap=lambda function: function):
    weights = setting.weights()
    grads_of = wrap(torch.func.grad(objective_of_func(setting)))

    def backward():
        for p, g in zip(weights, grads_of([p.detach() for p in weights]), strict=True):
            p.grad = g

    return stepper(weights, setting.outer_rate, backward)


def with_compile(setting):
    return with_func(setting, torch.compile)


def with_learn2learn(setting):
    learn2learn = importlib.import_module("learn2learn")
    maml = learn2learn.algorithms.MAML(Net(setting.params), lr=setting.rate)

    def backward():
        total = 0.0
        for number in range(setting.num_tasks):
            support, query = setting.task(number)
            learner = maml.clone()
            for _ in range(setting.num_steps):
                learner.adapt(learner(*support))
            total = total + learner(*query)
        (total / setting.num_tasks).backward()

    return stepper(list(maml.parameters()), setting.outer_rate, backward)


def with_torchopt(setting):
    torchopt = importlib.import_module("torchopt")
    net = Net(setting.params)
    inner = torchopt.MetaSGD(net, lr=setting.rate)

    def backward():
        total = 0.0
        start, start_state = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for number in range(setting.num_tasks):
            support, query = setting.task(number)
            for _ in range(setting.num_steps):
                inner.step(net(*support))
            total = total + net(*query)
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, start_state)
        (total / setting.num_tasks).backward()

    return stepper(list(net.parameters()), setting.outer_rate, backward)


def with_higher(setting):
    higher = importlib.import_module("higher")
    net = Net(setting.params)
    inner = torch.optim.SGD(net.parameters(), lr=setting.rate)

    def backward():
        for number in range(setting.num_tasks):
            support, query = setting.task(number)
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (adapted, optimizer):
                for _ in range(setting.num_steps):
                    optimizer.step(adapted(*support))
                (adapted(*query) / setting.num_tasks).backward()

    return stepper(list(net.parameters()), setting.outer_rate, backward)


PROGRAMS = {
    "torch, a loop over tasks": with_autograd,
    "torch.func, vmap": with_func,
    "torch.func, vmap, torch.compile": with_compile,
    "learn2learn MAML": with_learn2learn,
    "TorchOpt MetaSGD": with_torchopt,
    "higher": with_higher,
}


def main() -> None:
    file, num_steps, rate, outer_rate, threads, repetitions, num_calls = sys.argv[1:]
    torch.set_num_threads(int(threads))
    setting = Setting(file, num_steps, rate, outer_rate)
    rows, calls = {}, {}
    for name, make in PROGRAMS.items():
        rows[name] = {"name": name}
        try:
            call, gradient = make(setting)
            begin = time.perf_counter()
            gradients = dict(zip(NAMES, gradient(), strict=True))
            if "compile" in name:
                rows[name]["compile_seconds"] = time.perf_counter() - begin
            rows[name]["gradient"] = {
                layer: {leaf: gradients[layer, leaf].tolist() for leaf in ("w", "b")} for layer in LAYERS
            }
            call()
            calls[name] = lambda call=call: [call() for _ in range(int(num_calls))]
        except Exception as error:  # a peer may fail: the table states the reason
            rows[name]["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, seconds in medians(calls, int(repetitions), clock=time.process_time).items():
        rows[name]["ms"] = 1e3 * seconds / int(num_calls)
    versions = [f"torch {torch.__version__}"]
    for package in ("learn2learn", "torchopt", "higher"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(json.dumps({"rows": list(rows.values()), "versions": ", ".join(versions)}))


if __name__ == "__main__":
    main()
