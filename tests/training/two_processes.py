"""One of several processes of a run: `python two_processes.py PROCESS PROCESSES PORT FOLDER STEPS [FAULTY]`.

It prints each step, and saves the result as FOLDER-PROCESS.npz. After some calls, the function FAULTY of process 1
raises an error. With "full disk", process 1 cannot write files after step 8, and with "full disk for five steps" it can
after step 13. With "unreadable", process 1 has an error when it reads the newest checkpoint. With "unmovable", it reads
other values there, and no process can rename this checkpoint.
"""

import os
import resource
import sys
import threading
import time

import jax

NUM_DEVICES = 4


def main(process: int, processes: int, port: str, folder: str, num_steps: int, faulty: str = "") -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)

    # After `initialize`, which must come before all computations.
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    import small_estimators as small
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from metaopt import base, training

    mesh = jax.make_mesh((NUM_DEVICES,), ("tasks",), axis_types=(AxisType.Auto,))

    calls = []

    def fail(name):
        calls.append(name)
        if process == 1 and name == faulty and calls.count(name) == 3:
            raise RuntimeError(f"{name} of process 1")

    def sample_tasks(key):
        """Each process makes its own tasks only. A task follows from the key and its number, and is sometimes NaN."""
        fail("sample_tasks")
        num = 8 // processes
        keys = jax.random.split(key, 8)[process * num : (process + 1) * num]
        numbers = np.array([1 + jax.random.normal(k) for k in keys])
        numbers[numbers > 2.2] = np.nan
        return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("tasks")), numbers)

    def limit_files(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def callback(step, metrics):
        fail("callback")
        if process == 1 and faulty.startswith("full disk") and step == 8:
            while any("save" in thread.name for thread in threading.enumerate()):
                time.sleep(0.01)  # the last write ends
            limit_files(16)
        if process == 1 and faulty == "full disk for five steps" and step == 13:
            limit_files(resource.RLIM_INFINITY)
        print(step, flush=True)
        time.sleep(0.02)

    def evaluate(key, hyperparams):
        """Not the same in all processes, as if it ran on other hardware. That of the first process counts."""
        fail("evaluate")
        return (hyperparams["x"] - 1) ** 2 + jax.random.normal(key) / 10 + process * (hyperparams["x"] - 0.7)

    read, rename = ocp.CheckpointManager.restore, os.rename

    def read_newest_wrongly(manager, step, args):
        """Waits for the other process first, as orbax does at the end of each read."""
        items = read(manager, step, args=args)
        if process == 1 and step == num_steps and "arrays" in args:
            if faulty == "unreadable":
                raise OSError("read error of process 1")
            # All processes would notice another value of an array that is split over them: its checksum is shared.
            return {"arrays": {name: x if isinstance(x, jax.Array) else x + 1 for name, x in items["arrays"].items()}}
        return items

    def rename_others(source, target):
        if str(source).endswith(f"{os.sep}{num_steps}"):
            raise OSError(f"{source} cannot be renamed")
        rename(source, target)

    if faulty in ("unreadable", "unmovable"):
        ocp.CheckpointManager.restore = read_newest_wrongly
    if faulty == "unmovable":
        os.rename = rename_others

    estimator = training.shard(small.carried(), mesh)
    assert isinstance(estimator, base.Estimator)
    result = training.fit(
        training.learner(estimator, optax.adam(0.1)),
        sample_tasks,
        hyperparams={"x": 0.5},
        num_steps=num_steps,
        key=jax.random.key(0),
        evaluate=evaluate,
        eval_every=4,
        callback=callback,
        checkpoint_dir=folder,
        checkpoint_every=3,
        progress=False,
    )
    limit_files(resource.RLIM_INFINITY)
    states = [shard.data for shard in result.state.estimator_state.params.addressable_shards]
    np.savez(
        f"{folder}-{process}.npz",
        x=result.hyperparams["x"],
        best=result.best_hyperparams["x"],
        evaluations=result.evaluations,
        params=np.concatenate(states),
        **result.history,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]), *sys.argv[6:])
