"""The hypergradient of rules.py in other libraries. rules.py runs it, in a separate environment (install_peers.sh).

Initial weights, rows of every step and λ are the same; rules.py saves them in a file. It prints times, memory and
hypergradients as one line of JSON. A library that is missing or fails gets a row with the reason.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from turns import medians

B1, B2 = 0.9, 0.999  # every library's defaults
COMPILED_STEPS = 4  # torch.compile unrolls the loop: its compile time grows with T


def mlp(params, batch):
    hidden = F.relu(F.relu(batch["x"] @ params["in"]) @ params["hidden"])
    return F.cross_entropy(hidden @ params["out"], batch["y"])


def conv(params, batch):
    x = batch["x"]
    for i in range(3):
        x = F.relu(F.conv2d(x, params[f"conv{i}"], stride=1 if i == 0 else 2, padding=1))
    return F.cross_entropy(x.mean((2, 3)) @ params["out"], batch["y"])


def transformer(params, batch):
    heads = 4

    def normalize(x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    tokens, labels = batch["x"][:, :-1], batch["x"][:, 1:]
    x = params["embed"][tokens]
    b, s, d = x.shape
    causal = torch.tril(torch.ones(s, s, dtype=torch.bool))
    for qkv, mix, up, down in zip(*(params[name] for name in ("qkv", "mix", "up", "down")), strict=True):
        q, k, v = (normalize(x) @ qkv).reshape(b, s, heads, 3 * d // heads).chunk(3, -1)
        scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(d // heads)
        scores = scores.masked_fill(~causal, -1e9)
        x = x + torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).reshape(b, s, d) @ mix
        x = x + F.gelu(normalize(x) @ up, approximate="tanh") @ down
    logits = normalize(x) @ params["embed"].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


LOSSES = {"mlp": mlp, "conv": conv, "transformer": transformer}


class Problem:
    """The tensors that rules.py saved."""

    def __init__(self, model: str, file: str):
        trees = {"params": {}, "train": {}, "valid": {}, "decay": {}}
        saved = np.load(file)
        for name in set(saved) - {"order", "rate", "eps"}:
            tree, _, leaf = name.partition("/")
            value = saved[name]
            if model == "conv" and value.ndim == 4:  # to torch's layout
                value = value.transpose(3, 2, 0, 1) if tree == "params" else value.transpose(0, 3, 1, 2)
            value = torch.tensor(np.ascontiguousarray(value))
            trees[tree][leaf] = value if value.is_floating_point() else value.long()
        self.loss = LOSSES[model]
        self.params, self.train, self.valid, self.decay = trees.values()
        self.names = sorted(self.params)
        self.eps = float(saved["eps"])
        self.rate = torch.tensor(float(saved["rate"]))
        self.order = torch.tensor(saved["order"]).long()

    def hyperparams(self) -> list[torch.Tensor]:
        """Returns λ as a list, for differentiation: the rate, then the penalties in the order of `names`."""
        return [leaf.clone().requires_grad_() for leaf in (self.rate, *(self.decay[name] for name in self.names))]

    def weights(self) -> list[torch.Tensor]:
        return [self.params[name].clone().requires_grad_() for name in self.names]

    def batch(self, step: int) -> dict:
        return {name: leaf[self.order[step]] for name, leaf in self.train.items()}

    def valid_loss(self, params: list) -> torch.Tensor:
        return self.loss(dict(zip(self.names, params, strict=True)), self.valid)

    def train_loss(self, params: list, hyperparams: list, batch: dict) -> torch.Tensor:
        penalties = 0.0
        for weight, decay in zip(params, hyperparams[1:], strict=True):
            penalties = penalties + (decay * (weight**2).flatten(decay.ndim).sum(-1)).sum()
        return self.loss(dict(zip(self.names, params, strict=True)), batch) + penalties


class Net(torch.nn.Module):
    """The losses of the problem as a module, for libraries that need one."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        for name in problem.names:
            self.register_parameter(name, torch.nn.Parameter(problem.params[name].clone()))

    def forward(self, hyperparams=None, batch=None):
        params = [getattr(self, name) for name in self.problem.names]
        if batch is None:
            return self.problem.valid_loss(params)
        return self.problem.train_loss(params, hyperparams, batch)


def adam(state: list, grads: list, rate: torch.Tensor, count, eps: float) -> list:
    """Takes one step of [*params, *mu, *nu] by hand. Gradients are never exactly zero, because of the penalties."""
    n = len(grads)
    params, mu, nu = state[:n], state[n : 2 * n], state[2 * n :]
    mu = [B1 * m + (1 - B1) * g for m, g in zip(mu, grads, strict=True)]
    nu = [B2 * v + (1 - B2) * g**2 for v, g in zip(nu, grads, strict=True)]
    c1, c2 = 1 - B1**count, 1 - B2**count
    moved = [p - rate * (m / c1) / ((v / c2).sqrt() + eps) for p, m, v in zip(params, mu, nu, strict=True)]
    return [*moved, *mu, *nu]


def start(weights: list) -> list:
    return [*weights, *(torch.zeros_like(w) for _ in range(2) for w in weights)]


def plain_optim(problem):
    """Only training: `torch.optim.Adam`."""
    hyperparams = [leaf.detach() for leaf in problem.hyperparams()]

    def call():
        weights = problem.weights()
        optimizer = torch.optim.Adam(weights, lr=float(problem.rate), eps=problem.eps)
        for t in range(len(problem.order)):
            optimizer.zero_grad()
            problem.train_loss(weights, hyperparams, problem.batch(t)).backward()
            optimizer.step()
        with torch.no_grad():
            return problem.valid_loss(weights), None

    return call


def by_func(problem):
    """Returns (λ) -> F(λ), by hand with `torch.func.grad`."""

    def objective(hyperparams):
        state = start([problem.params[name] for name in problem.names])
        n = len(problem.names)
        for t in range(len(problem.order)):
            grads = torch.func.grad(problem.train_loss)(state[:n], hyperparams, problem.batch(t))
            state = adam(state, grads, hyperparams[0], t + 1, problem.eps)
        return problem.valid_loss(state[:n])

    return objective


def with_func(problem):
    leaves = [leaf.detach() for leaf in problem.hyperparams()]
    both = torch.func.grad_and_value(by_func(problem))

    def call():
        grads, value = both(leaves)
        return value, grads

    return call


def plain_compiled(problem):
    """Only training, by hand: one step is compiled."""
    hyperparams = [leaf.detach() for leaf in problem.hyperparams()]
    n = len(problem.names)

    @torch.compile
    def step(state, batch, count):
        grads = torch.func.grad(problem.train_loss)(state[:n], hyperparams, batch)
        return adam(state, grads, hyperparams[0], count, problem.eps)

    def call():
        state = start([problem.params[name] for name in problem.names])
        for t in range(len(problem.order)):
            state = step(state, problem.batch(t), torch.tensor(t + 1.0))
        return problem.valid_loss(state[:n]), None

    return call


def with_compile(problem):
    if len(problem.order) > COMPILED_STEPS:
        raise NotImplementedError(f"the loop is unrolled: not compiled above T = {COMPILED_STEPS}")
    leaves = [leaf.detach() for leaf in problem.hyperparams()]
    both = torch.compile(torch.func.grad_and_value(by_func(problem)))

    def call():
        grads, value = both(leaves)
        return value, grads

    return call


def with_torchopt(problem):
    torchopt = importlib.import_module("torchopt")

    def call():
        net, hyperparams = Net(problem), problem.hyperparams()
        optimizer = torchopt.MetaAdam(net, lr=hyperparams[0], eps=problem.eps)
        for t in range(len(problem.order)):
            optimizer.step(net(hyperparams, problem.batch(t)))
        value = net()
        return value, torch.autograd.grad(value, hyperparams)

    return call


def with_higher(problem):
    higher = importlib.import_module("higher")

    def call():
        net, hyperparams = Net(problem), problem.hyperparams()
        optimizer = torch.optim.Adam(net.parameters(), lr=float(problem.rate), eps=problem.eps)
        with higher.innerloop_ctx(net, optimizer, override={"lr": [hyperparams[0]]}) as (trained, step):
            for t in range(len(problem.order)):
                # higher's Adam adds ε before the bias correction. With this scaled ε, it equals the usual Adam.
                scaled = {"eps": [problem.eps * math.sqrt(1 - B2 ** (t + 1))]}
                step.step(trained(hyperparams, problem.batch(t)), override=scaled)
            value = trained()
            return value, torch.autograd.grad(value, hyperparams)

    return call


def with_hypertorch(problem):
    """Uses hypertorch's `reverse`, which keeps the trajectory and recomputes each step.

    hypertorch has no Adam, so the map is ours.
    """
    hypertorch = importlib.import_module("hypergrad")
    if not hasattr(hypertorch, "reverse"):
        raise ModuleNotFoundError("the installed `hypergrad` is another library")
    n = len(problem.names)

    def update_map(t):
        def step(state, hyperparams, create_graph=True):
            loss = problem.train_loss(state[:n], hyperparams, problem.batch(t))
            grads = torch.autograd.grad(loss, state[:n], create_graph=create_graph)
            return adam(state, grads, hyperparams[0], t + 1, problem.eps)

        return step

    def call():
        hyperparams, values = problem.hyperparams(), []
        maps, history = [update_map(t) for t in range(len(problem.order))], [start(problem.weights())]
        for step in maps:
            moved = step(history[-1], [leaf.detach() for leaf in hyperparams], create_graph=False)
            history.append([leaf.detach().requires_grad_() for leaf in moved])

        def outer(state, hyperparams):
            values.append(problem.valid_loss(state[:n]))
            return values[-1]

        grads = hypertorch.reverse(history, hyperparams, maps, outer, set_grad=False)
        return values[0], grads

    return call


def with_solve(num_products, method):
    """Runs hypertorch's implicit rules after one step of Adam. With its map θ − ∇ℓ, they solve H v = ∇f."""

    def make(problem):
        hypertorch = importlib.import_module("hypergrad")
        if not hasattr(hypertorch, "reverse"):
            raise ModuleNotFoundError("the installed `hypergrad` is another library")
        n = len(problem.names)

        def fixed_point_map(params, hyperparams):
            loss = problem.train_loss(params, [problem.rate, *hyperparams], problem.batch(1))
            grads = torch.autograd.grad(loss, params, create_graph=True)
            return [p - g for p, g in zip(params, grads, strict=True)]

        def call():
            decay = problem.hyperparams()[1:]
            weights, values = problem.weights(), []
            loss = problem.train_loss(weights, [problem.rate, *decay], problem.batch(0))
            grads = torch.autograd.grad(loss, weights)
            moved = adam(start(weights), [g.detach() for g in grads], problem.rate, 1, problem.eps)
            params = [p.detach() for p in moved[:n]]

            def outer(params, hyperparams):
                values.append(problem.valid_loss(params))
                return values[-1]

            solver = getattr(hypertorch, method)
            hypergrads = solver(params, decay, num_products, fixed_point_map, outer, tol=0, set_grad=False)
            return values[0], [None, *hypergrads]

        return call

    return make


PLAIN, PLAIN_COMPILED = "torch: plain training (`optim.Adam`)", "torch.compile: plain training"
ROWS = {  # name: (function, the name of the row whose time it is compared with)
    PLAIN: (plain_optim, PLAIN),
    PLAIN_COMPILED: (plain_compiled, PLAIN_COMPILED),
    "torch.func": (with_func, PLAIN),
    "torch.func, torch.compile": (with_compile, PLAIN_COMPILED),
    "TorchOpt MetaAdam": (with_torchopt, PLAIN),
    "higher": (with_higher, PLAIN),
    "hypertorch reverse": (with_hypertorch, PLAIN),
}


def peak_mib(call) -> float:
    """Returns the largest memory of torch's allocator, minus its memory at the start."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return float(max(np.cumsum(changes), default=0)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=LOSSES)
    parser.add_argument("file")
    parser.add_argument("threads", type=int)
    parser.add_argument("repetitions", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("num_products", type=int, help="of an implicit solve instead of training; 0 trains")
    parser.add_argument("clock", choices=("perf_counter", "process_time"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = Problem(options.model, options.file)
    rows, calls = {}, {}
    functions = ROWS
    if options.num_products:
        functions = {"hypertorch CG": (with_solve(options.num_products, "CG"), PLAIN)}
    for name, (function, against) in functions.items():
        rows[name] = {"name": name, "against": against}
        try:
            begin = time.perf_counter()
            call = function(problem)
            _, grads = call()
            if "compile" in name:
                rows[name]["compile_seconds"] = time.perf_counter() - begin
            if grads is not None:
                decay = {leaf: grad.tolist() for leaf, grad in zip(problem.names, grads[1:], strict=True)}
                rate = {} if grads[0] is None else {"rate": grads[0].item()}
                rows[name]["hypergrad"] = {**rate, "decay": decay}
            rows[name]["mib"] = peak_mib(call)
            calls[name] = call
        except Exception as error:  # a peer may fail: the table states the reason
            rows[name]["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, seconds in medians(calls, options.repetitions, options.seconds, getattr(time, options.clock)).items():
        rows[name]["ms"] = 1e3 * seconds
    versions = [f"torch {torch.__version__}"]
    for package in ("torchopt", "higher"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(json.dumps({"rows": list(rows.values()), "versions": ", ".join(versions)}))


if __name__ == "__main__":
    main()
