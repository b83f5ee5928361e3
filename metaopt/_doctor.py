"""The command `metaopt doctor`: versions and devices, and a check of a gradient on this machine."""

import importlib.metadata
import platform

_AUTOML_PACKAGES = ("scikit-learn", "pandas", "joblib", "cloudpickle", "skops", "lightgbm", "xgboost")
_MISSING = "is not installed"


def doctor() -> int:
    """Prints versions, devices and the check of a gradient.

    Returns:
      The exit code: 3 if the gradient is wrong.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from metaopt import base, hypergrad, inner

    print(f"Python {platform.python_version()}")
    for package in ("metaopt-jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        print(package, installed_version(package))
    for package in (*_AUTOML_PACKAGES, "catboost"):
        version, extra = installed_version(package), "catboost" if package == "catboost" else "automl"
        print(package, f'{version}; the extra "{extra}" installs it' if version == _MISSING else version)
    names = [dict.fromkeys((device.platform, device.device_kind)) for device in jax.devices()]  # "cpu" is both
    print("devices:", ", ".join(map(" ".join, names)))

    def loss(params, hyperparams, batch):
        x, y = batch
        return jnp.mean((x @ params - y) ** 2) + jnp.exp(hyperparams["log_decay"]) * jnp.sum(params**2)

    x = jax.random.normal(jax.random.key(0), (32, 4))
    task = base.Task((x[:16], x[:16].sum(1)), (x[16:], x[16:].sum(1) + 0.1))
    loop = inner.loop(loss, lambda hyperparams: optax.sgd(0.1), init=lambda *_: jnp.zeros(4))
    problem = inner.problem(loop, lambda params, hyperparams, batch: jnp.mean((batch[0] @ params - batch[1]) ** 2))
    check = hypergrad.check(hypergrad.unrolled(problem, num_steps=20), {"log_decay": jnp.float32(-2.0)}, task)
    print(check)
    return 0 if check.passed else 3


def installed_version(package: str) -> str:
    """Returns the installed version of a package, or that it is not installed.

    The module `xgboost` comes with the package xgboost or xgboost-cpu.

    Args:
      package: its name.
    """
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _MISSING
