"""Damaged and hostile files: a reader raises a clear error or returns a valid object, in bounded time and memory."""

import base64
import bz2
import contextlib
import gzip
import importlib
import io
import json
import math
import pickle
import random
import re
import sqlite3
import struct
import time
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from tfrecords import field, framed, masked, varint

import metaopt
import metaopt._cli
from metaopt import _files, automl, base, blackbox, evaluation, nas, predictors, spaces, tasks, transforms
from metaopt.blackbox import _surrogates
from metaopt.nas.search import _cell_encoder, _score_prior
from metaopt.training import _checkpoints

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SPACE = {"rate": spaces.interval(1e-3, 1.0, log=True), "op": spaces.choice(["a", "b"]), "rest": [spaces.fixed(0.5)]}
NUM_FILES, FEW_FILES = 1000, 80  # over all readers
SECONDS, MEGABYTES = 5.0, 60  # limits of processor time and memory for one file of some kilobytes


class Case(NamedTuple):
    """A reader and how its files are written.

    Attributes:
      write: `(folder) -> None`.
      read: `(folder) -> object`.
      kind: the type of the object, or of the items of a list.
      numbers: of the object: "finite", "missing" if they may be NaN, "infinite" if they may be infinite, or "any".
      share: of the files, in comparison with the other readers.
    """

    write: Any
    read: Any
    kind: Any
    numbers: str = "finite"
    share: float = 1.0


# ---- Files in the forms of others, byte by byte ---------------------------------------------------------------------


def records_of(content):
    """The records of a TFRecord file."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def example(image, label):
    """A `tf.train.Example`."""
    values = {"image": field(1, field(1, image)), "label": field(3, field(1, varint(label)))}
    return field(1, b"".join(field(1, field(1, n.encode()) + field(2, content)) for n, content in values.items()))


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def cell_101(name, epochs, bits, ops, seconds, valid):
    doubles = lambda epoch, value: b"".join(
        bytes([8 * i + 1]) + struct.pack("<d", x) for i, x in enumerate((epoch, seconds, value, value, value), 1)
    )
    message = b"".join(field(1, doubles(epoch, valid)) for epoch in (0, epochs))
    return json.dumps([name, epochs, bits, ",".join(["input", *ops, "output"]), base64.b64encode(message).decode()])


def infos_201(index):
    cell = "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|"

    def results(epochs):
        sets = ("x-valid", "x-test", "ori-test")
        evals = {f"{name}@{i}": 50.0 + i for i in (0, epochs - 1) for name in sets}
        run = {"epochs": epochs, "eval_acc1es": evals, "train_times": {i: np.float64(2.5) for i in range(2)}}
        names = ("cifar10-valid", "cifar10", "cifar100", "ImageNet16-120")
        return {"arch_index": index, "arch_str": cell, "all_results": {(name, 777): run for name in names}}

    return {"less": results(12), "full": results(200), "12": results(12), "200": results(200)}


def write_meta_dataset(folder):
    for k in range(3):
        (folder / f"{k}.tfrecords").write_bytes(b"".join(framed(example(png(10 * k + i), k)) for i in range(2)))
    spec = {"name": "toy", "file_pattern": "{}.tfrecords", "class_names": {str(k): f"c{k}" for k in range(3)}}
    spec |= {"superclasses_per_split": {"TRAIN": 2, "VALID": 0, "TEST": 0}, "classes_per_superclass": {"0": 2, "1": 1}}
    (folder / "dataset_spec.json").write_text(json.dumps(spec))


def write_images(folder):
    for i, form in enumerate(("PNG", "JPEG", "GIF", "BMP", "TIFF")):
        (folder / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8))
        image.save(folder / "images" / f"class{i % 2}" / f"{i}.{form.lower()}")


def write_tfds(folder):
    records = b"".join(framed(example(png(10 * k), k)) for k in range(3))
    (folder / "toy-all_classes.tfrecord-00000-of-00001").write_bytes(records)
    spec = {"name": "toy", "class_names": {str(k): f"c{k}" for k in range(3)}}
    graph = [
        {"wn_id": "n", "children_ids": ["c0", "c1", "c2"]},
        *({"wn_id": f"c{k}", "children_ids": []} for k in range(3)),
    ]
    slices = {"v1": {"train": {str(k): [k, k + 1] for k in range(3)}}}
    specs = {"v1": {**spec, "split_subgraphs": {"TRAIN": graph, "VALID": [], "TEST": []}}}
    (folder / "metadata.json").write_text(json.dumps({"dataset_specs": specs, "relative_class_slices": slices}))


def write_301(folder):
    prefix = "NetworkSelectorDatasetInfo:darts:"
    settings = {f"{prefix}layers": 8, f"{prefix}init_channels": 32}
    for kind in ("normal", "reduce"):
        settings |= {f"{prefix}edge_{kind}_{i}": "skip_connect" for i in range(14)}
        settings |= {f"{prefix}inputs_node_{kind}_{node}": "0_1" for node in (3, 4, 5)}
    log = {"optimized_hyperparamater_config": settings, "test_accuracy": 91.0, "runtime": 5e3}
    (folder / "results_0.json").write_text(json.dumps({**log, "info": [{"val_accuracy": 90.0}]}))


# ---- metaopt's own files --------------------------------------------------------------------------------------------


def write_predictor(folder):
    predictor = predictors.ensemble(predictors.mlp(SPACE, 2, num_hidden=3), 2)
    metaopt.save(folder / "g.npz", predictors.TrainedPredictor(predictor, predictor.init(KEY)))


def write_meta_optimizer(folder):
    kernel = _surrogates.Kernel(*map(jax.numpy.zeros, (3, (), ())))
    trials = [_surrogates.TaskTrials(RNG.uniform(size=(4, 3)), RNG.uniform(size=4)) for _ in range(2)]
    surrogate = _surrogates.surrogate(trials, kernel, trials[0].x, features=RNG.normal(size=(2, 2)))
    evidence: Any = SimpleNamespace(num_records=8, effective_tasks=1.5)
    functions: Any = dict.fromkeys(("predict", "portfolio", "suggest", "searcher", "outcomes"))
    data: Any = {"surrogate": surrogate, "cost_surrogate": None, "space": SPACE, "candidates": None}
    metaopt.save(folder / "g.npz", blackbox.MetaOptimizer(**functions, **data, evidence=evidence))


def write_cell_searcher(folder):
    candidates, encoder = [{"e": "a"}, {"e": "b"}, {"e": "c"}], _cell_encoder.cell_encoder(3, 2, width=4, num_layers=1)
    scores = _score_prior.score_prior([(np.eye(3), (1.0,))], RNG.normal(size=(3, 4)))
    prior = scores._replace(own=np.ones(3 + 4))  # three entries, and the width of the encoder
    fields: Any = dict.fromkeys(nas.CellSearcher._fields)
    fields |= {"encoder": encoder, "ops": ("a", "b", "c"), "candidates": candidates, "prior": prior}
    fields |= {"encoded": RNG.normal(size=(1, 3, 4)), "slope": np.ones(()), "center": np.ones(0), "scale": np.ones(0)}
    fields["meta_params"] = jax.vmap(encoder.init)(jax.random.split(KEY, 1))
    metaopt.save(folder / "h.npz", nas.CellSearcher(**fields))


H = predictors.mlp(SPACE, 2, num_hidden=3)
META: Any = SimpleNamespace(settings={"search": {"network": {"cells": 1}}, "h": H.config}, hyperparams=H.init)


def write_evaluation(folder):
    scores = {"m": {"u": RNG.uniform(size=(3, 2)), "v": RNG.uniform(size=(2, 2))}}
    sizes = {"u": np.ones(3), "v": np.ones(2, int)}
    compared = evaluation.Evaluation(scores, sizes, sizes, {"m": True}, True, {"u": np.ones(3)}, "accuracy")
    metaopt.save(folder / "scores.npz", compared)


def write_auto_classifier(folder):
    x, y = RNG.normal(size=(40, 2)), np.arange(40) % 2
    options: dict[str, Any] = {"models": ("lightgbm",), "preset": "instant", "time_limit": None, "verbose": False}
    metaopt.save(folder / "model.npz", automl.AutoClassifier(**options).fit(x, y))


def write_auto_regressor(folder):
    options: dict[str, Any] = {"models": ("linear",), "preset": "instant", "time_limit": None, "verbose": False}
    x = RNG.normal(size=(40, 2))
    metaopt.save(folder / "model.npz", automl.AutoRegressor(**options).fit(x, x[:, 0] + RNG.normal(size=40)))


def write_auto_clusterer(folder):
    x = RNG.normal(size=(40, 2)) + 9 * (np.arange(40) % 2)[:, None]
    metaopt.save(folder / "model.npz", automl.AutoClusterer(3, algorithms=("kmeans", "mixture"), n_jobs=1).fit(x))


def write_tabular_model(folder):
    x = RNG.normal(size=(30, 2))
    table = tasks.prepare({"a": x[:, 0], "b": x[:, 1], "y": ["no", "yes"] * 15}, "y", test_fraction=0.0)
    network = automl.tabular_network(num_steps=2, num_members=2, num_hidden=3)
    hyperparams = spaces.default(network.space)
    params = automl.train(network, KEY, hyperparams, automl.tabular_task(table))
    model = automl.TabularModel(params, hyperparams, table.encoder, table.columns, table.classes)
    metaopt.save(folder / "model.npz", model)


def write_network(folder):
    network = nas.Network({}, (nas.Layer("linear", 4), nas.Layer("norm_relu", 4)), num_outputs=2)
    supernet = nas.supernet(network, (3,), ops=nas.BLOCKS)
    trained = nas.trained_network(supernet, supernet.init(KEY), {"x": RNG.normal(size=(8, 3))})
    metaopt.save(folder / "network.npz", trained)


def write_benchmark(folder):
    write_101(folder)
    metaopt.save(folder / "b.npz", nas.read_nas_bench_101(folder / "nasbench.tfrecord"))
    (folder / "nasbench.tfrecord").unlink()


def write_101(folder):
    cells = [
        ("a", 12, "010001000", ["conv3x3-bn-relu"], 30.0, 0.8),
        ("a", 108, "010001000", ["conv3x3-bn-relu"], 300.0, 0.9),
    ]
    lines = [*cells, ("c", 108, "0100", [], 100.0, 0.5)]
    (folder / "nasbench.tfrecord").write_bytes(b"".join(framed(cell_101(*line).encode()) for line in lines))


TREE = {"w": np.arange(6.0).reshape(2, 3), "step": np.array(7), "key": KEY}
SETTINGS = {"name": "toy"}


def write_checkpoint(folder):
    checkpoints = _checkpoints.Checkpoints(folder / "run", SETTINGS)
    checkpoints.save(1, TREE, {"loss": 0.5})
    checkpoints.close()


def read_checkpoint(folder):
    checkpoints = _checkpoints.Checkpoints(folder / "run", SETTINGS)
    try:
        saved = checkpoints.restore()
        return None if saved is None else saved.tree(TREE)
    finally:
        checkpoints.close()


def write_store(folder):
    record = base.Record("t", {"rate": 0.1, "op": "a"}, 0.25, 1.0, 3.5)
    blackbox.append_records(folder / "trials.db", [record._replace(trial=i) for i in range(20)])


def read_recovered(folder):
    blackbox.recover_records(folder / "trials.db", folder / "new.db")
    return blackbox.read_records(folder / "new.db")


def write_csv(folder, compress=False):
    lines = ["x,color,y"] + [f"{i % 7}.5,{'rgb'[i % 3]},{'yes' if i % 2 else 'no'}" for i in range(60)]
    content = "\n".join(lines).encode()
    (folder / ("t.csv.gz" if compress else "t.csv")).write_bytes(gzip.compress(content) if compress else content)


def arrays(name, **content):
    return lambda folder: np.savez_compressed(folder / f"{name}.npz", **content)


def text_file(name, content):
    return lambda folder: (folder / name).write_text(content)


PYTREE = {"rates": [np.float32(0.5), np.ones(3)], "w": np.ones((2, 3), np.float16), "key": KEY, "count": np.int32(3)}
HPOB = {"5860": {"d": {"X": [[0.1, 0.2], [0.5, 0.25]], "y": [[0.75], [0.5]]}}}
ENCODER = tasks.fit_encoder({"n": [1, "2,000", None], "w": ["a", "a", "b"], "t": ["2020-01-01", "2021-02-03", ""]})
SPLIT = tasks.Split({"train": {"omniglot": {"classes": ["a", "b"]}}, "test": {"omniglot": {"rows": [4, 5]}}})
COSTS = nas.CostTable(0.5, (nas.CostTerm((("cell", 0),), np.arange(3.0)),), "ms")
GENOTYPE: Any = {"cell": ((0, 1, "a"), (1, 2, "b"))}


def read_space(folder):
    try:
        document = json.loads((folder / "space.json").read_bytes())
    except (ValueError, RecursionError):
        raise ValueError("the caller's own error") from None
    space = spaces.from_json(document)
    return jax.tree.leaves(spaces.default(space)) if spaces.num_dims(space) < 1000 else []


def write_pickles(folder, form):
    if form == "folder":
        return (folder / "000000.pickle.pbz2").write_bytes(bz2.compress(pickle.dumps(infos_201(0), 4)))
    whole = {"arch2infos": {0: infos_201(0)}, "set": {1, 2}, "number": 2**70}
    if form == "old":
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, whole)
        return (folder / "nas.pth").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with zipfile.ZipFile(folder / "nas.pth", "w") as archive:
        archive.writestr("nas/data.pkl", pickle.dumps(whole, 2))


SOURCE, BENCHMARK = tasks.Source, nas.Benchmark
CASES = {
    "predictor": Case(write_predictor, lambda f: metaopt.load(f / "g.npz"), predictors.TrainedPredictor),
    "meta optimizer": Case(write_meta_optimizer, lambda f: metaopt.load(f / "g.npz"), blackbox.MetaOptimizer),
    "cell searcher": Case(write_cell_searcher, lambda f: metaopt.load(f / "h.npz"), nas.CellSearcher),
    "meta architecture": Case(
        lambda f: metaopt.save(f / "h.npz", nas.TrainedMetaArchitecture(META, H.init(KEY))),
        lambda f: metaopt.load(f / "h.npz", meta=META),
        nas.TrainedMetaArchitecture,
    ),
    "evaluation": Case(
        write_evaluation, lambda f: metaopt.load(f / "scores.npz"), evaluation.Evaluation, numbers="any"
    ),
    "pytree": Case(
        lambda f: metaopt.save(f / "tree.npz", PYTREE),
        lambda f: metaopt.load(f / "tree.npz", like=PYTREE),
        dict,
        numbers="infinite",
    ),
    "trained network": Case(
        write_network,
        lambda f: metaopt.load(f / "network.npz", ops=nas.BLOCKS),
        nas.TrainedNetwork,
    ),
    "learned optimizer": Case(
        lambda f: metaopt.save(f / "w.npz", transforms.init_learned(KEY)),
        lambda f: metaopt.load(f / "w.npz"),
        transforms.LearnedWeights,
    ),
    "benchmark": Case(write_benchmark, lambda f: metaopt.load(f / "b.npz"), BENCHMARK, numbers="missing"),
    "checkpoint": Case(write_checkpoint, read_checkpoint, (dict, type(None)), share=0.8),
    "space": Case(text_file("space.json", json.dumps(spaces.to_json(SPACE))), read_space, list, "any", share=2),
    "network": Case(
        lambda f: metaopt.save(f / "n.json", nas.nas_bench_201_space()),
        lambda f: metaopt.load(f / "n.json"),
        nas.Network,
    ),
    "network of sizes": Case(
        lambda f: metaopt.save(f / "n.json", nas.mlp_space(2, widths=(2, 4), depths=(1, 2))),
        lambda f: metaopt.load(f / "n.json"),
        nas.ElasticNetwork,
    ),
    "genotype": Case(
        text_file("g.json", nas.genotype_to_text(GENOTYPE)),
        lambda f: nas.genotype_from_text((f / "g.json").read_text(errors="replace")),
        dict,
    ),
    "costs": Case(
        lambda f: metaopt.save(f / "c.json", COSTS),
        lambda f: metaopt.load(f / "c.json"),
        nas.CostTable,
    ),
    "split": Case(
        lambda f: metaopt.save(f / "split.json", SPLIT), lambda f: metaopt.load(f / "split.json"), tasks.Split
    ),
    "encoder": Case(
        lambda f: metaopt.save(f / "encoder.json", ENCODER),
        lambda f: metaopt.load(f / "encoder.json"),
        tasks.TableEncoder,
    ),
    "HPO-B": Case(
        text_file("hpob.json", json.dumps(HPOB)),
        lambda f: blackbox.from_hpob(f / "hpob.json", "5860"),
        base.Record,
        numbers="missing",  # costs are not known
    ),
    "CSV of the command": Case(
        write_csv, lambda f: metaopt._cli._read(next(f.glob("*.csv"))).shape[0], int, numbers="any", share=0.5
    ),
    "CSV": Case(write_csv, lambda f: tasks.from_csv_folder(f, "y", min_rows=2), tasks.Table, numbers="missing"),
    "CSV.gz": Case(
        lambda f: write_csv(f, compress=True),
        lambda f: tasks.from_csv_folder(f, "y", min_rows=2),
        tasks.Table,
        numbers="missing",
    ),
    "store": Case(
        write_store, lambda f: blackbox.read_records(f / "trials.db"), base.Record, numbers="missing", share=2
    ),
    "recovered store": Case(write_store, read_recovered, base.Record, numbers="missing"),
    "Meta-Dataset": Case(
        write_meta_dataset, lambda f: tasks.from_meta_dataset(f, part="train", size=2), SOURCE, share=2
    ),
    "images": Case(write_images, lambda f: tasks.from_image_folder(f / "images", size=2, channels=3), SOURCE),
    "tfds": Case(write_tfds, lambda f: tasks.from_meta_dataset(f, part="train", size=2, check=True), SOURCE),
    "NAS-Bench-101": Case(
        write_101, lambda f: nas.read_nas_bench_101(f / "nasbench.tfrecord"), BENCHMARK, numbers="missing", share=2
    ),
    "NAS-Bench-201": Case(
        lambda f: write_pickles(f, "folder"), lambda f: nas.read_nas_bench_201(f), BENCHMARK, numbers="missing", share=2
    ),
    "NAS-Bench-201, old": Case(
        lambda f: write_pickles(f, "old"), lambda f: nas.read_nas_bench_201(f / "nas.pth"), BENCHMARK, numbers="missing"
    ),
    "NAS-Bench-201, new": Case(
        lambda f: write_pickles(f, "new"), lambda f: nas.read_nas_bench_201(f / "nas.pth"), BENCHMARK, numbers="missing"
    ),
    "auto_classifier": Case(
        write_auto_classifier, lambda f: metaopt.load(f / "model.npz"), automl.AutoClassifier, share=0.5
    ),
    "auto_regressor": Case(
        write_auto_regressor, lambda f: metaopt.load(f / "model.npz"), automl.AutoRegressor, share=0.5
    ),
    "auto_clusterer": Case(
        write_auto_clusterer, lambda f: metaopt.load(f / "model.npz"), automl.AutoClusterer, share=0.5
    ),
    "tabular_model": Case(
        write_tabular_model, lambda f: metaopt.load(f / "model.npz"), automl.TabularModel, numbers="missing", share=0.5
    ),
    "NAS-Bench-301": Case(write_301, lambda f: nas.read_nas_bench_301(f), BENCHMARK, numbers="missing"),
}
PATHLESS = ("space", "network", "genotype", "costs")  # their readers take text or values, and no path


# ---- Mutations ------------------------------------------------------------------------------------------------------


def flip(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


def block(data, rng):
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 8, 64, 512)))


def zeros(data, rng):
    start, end = block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def twice(data, rng):
    start, end = block(data, rng)
    return data[:end] + data[start:]


RAW = (
    flip,
    zeros,
    twice,
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: data + bytes(rng.randrange(256) for _ in range(rng.choice((1, 100)))),
)


def raw(data, rng):
    return rng.choice(RAW)(data, rng) if data else b"\x00"


def nested(depth):
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = (None, True, -1, 0, 3, 2**31, 2**62, 10**30, 10**400, 1e308, 0.5, "", "x" * 1000, "1", "é\ud800", [], {}, [[]])
RAW_VALUES = ("NaN", "Infinity", "1e999", "[" * 3000 + "]" * 3000, "[" * 100_000, '{"a":' * 50 + "1" + "}" * 50)


def change_json(data, rng):
    """Another value somewhere, or a key less."""
    value = json.loads(data)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places:
        return b"[]"
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
        return json.dumps(value).encode()
    if rng.random() < 0.3:
        node[key] = "a place that is nowhere else"
        return json.dumps(value).replace('"a place that is nowhere else"', rng.choice(RAW_VALUES)).encode()
    old, node[key] = node[key], rng.choice(VALUES)
    if isinstance(old, int | float) and rng.random() < 0.3:
        node[key] = rng.choice((old + 1, -old, old * 1_000_000_007, float(old), str(old), [old]))
    # Python writes integers of any length, and reads those of 4,300 digits.
    return json.dumps(value).encode()


DTYPES = (
    b"'<f8'",
    b"'<f4'",
    b"'>f8'",
    b"'<f2'",
    b"'<i8'",
    b"'|b1'",
    b"'<c16'",
    b"'<U3'",
    b"'|O'",
    b"'<U999999999'",
    b"'<m8'",
)
SHAPES = (
    b"()",
    b"(1,)",
    b"(3,)",
    b"(2, 3)",
    b"(268435456,)",
    b"(0, 1000000000)",
    b"(-1,)",
    b"(9999999999, 9999999999)",
)


def change_array(data, rng):
    """Another type, shape or content of an array."""
    start = 10 if data[6] == 1 else 12
    end = data.index(b"\n") + 1
    header, content, kind = data[start:end], data[end:], rng.randrange(4)
    if kind == 0:
        header = re.sub(rb"'[^']*'(?=, 'fortran)", lambda _: rng.choice(DTYPES), header)
    elif kind == 1:
        header = re.sub(rb"\([^)]*\)", lambda _: rng.choice(SHAPES), header)
    elif content and kind == 2 and b"f8" in header:
        changed = np.frombuffer(content, "<f8").copy()
        changed[rng.randrange(len(changed))] = rng.choice((math.nan, math.inf, 1e300, -1.0))
        content = changed.tobytes()
    elif content:
        content = raw(content, rng)
    return data[: start - 2] + struct.pack("<H", len(header)) + header + content


def change_zip(data, rng):
    """Another array, header or member; the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names, kind = list(members), rng.randrange(8)
    name = rng.choice(names)
    if kind == 0 and len(names) > 1:
        other = rng.choice(names)
        members[name], members[other] = members[other], members[name]
    elif kind == 1:
        del members[name]
    elif kind == 2:
        members[rng.choice((name + "x", "extra.npy", "a/b/c.npy", "x" * 3000 + ".npy"))] = members[name]
    elif "header.npy" in members and kind < 6:
        stream = io.BytesIO()
        content = change_json(np.load(io.BytesIO(members["header.npy"])).tobytes(), rng)
        np.save(stream, np.frombuffer(content, np.uint8))
        members["header.npy"] = stream.getvalue()
    else:
        members[name] = change_array(members[name], rng) if name.endswith(".npy") else raw(members[name], rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def change_records(data, rng):
    """Another record, in a frame whose checksums are right."""
    records = list(records_of(data))
    i = rng.randrange(len(records))
    if records[i][:1] == b"[" and rng.random() < 0.5:
        records[i] = change_json(records[i], rng)
    else:
        records[i] = raw(records[i], rng)
    return b"".join(map(framed, records))


def mutate(path, rng):
    data, end = path.read_bytes(), path.suffix
    inside = {".npz": change_zip, ".json": change_json}.get(end)
    inside = change_records if "tfrecord" in path.name else inside
    if end in (".gz", ".pbz2"):
        compression = gzip if end == ".gz" else bz2
        inside = lambda data, rng: compression.compress(raw(compression.decompress(data), rng))
    if end == ".pth" and data[:2] == b"PK":
        inside = change_zip
    path.write_bytes(inside(data, rng) if inside is not None and rng.random() < 0.7 else raw(data, rng))


# ---- Valid objects and clear errors ---------------------------------------------------------------------------------


def check_valid(value, numbers):
    if isinstance(value, np.ndarray | jax.Array):
        assert value.dtype != object
        if jax.numpy.issubdtype(value.dtype, np.floating):
            array = np.asarray(value, np.float64)
            assert numbers in ("infinite", "any") or not np.isinf(array).any()
            assert numbers in ("missing", "any") or not np.isnan(array).any()
    elif isinstance(value, float):
        check_valid(np.array(value), numbers)
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            check_valid(child, numbers)


def test_every_kind_of_file_is_among_them():
    importlib.import_module("metaopt.automl._saved")  # registers its types when they are used
    kinds = {case.kind for case in CASES.values()}
    with pytest.raises(TypeError, match="it saves") as error:
        metaopt.save("never", object())
    types = str(error.value).split("it saves ")[1].split(", and ")[0].split(", ")
    assert set(types) <= {kind.__name__ for kind in kinds if isinstance(kind, type)}


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    """Reader -> a folder with its files, which it reads."""
    folders = {}
    for name, case in CASES.items():
        folders[name] = folder = tmp_path_factory.mktemp("valid")
        case.write(folder)
    return folders


def copied(folder, to):
    to.mkdir()
    for file in sorted(folder.rglob("*")):
        target = to / file.relative_to(folder)
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    return to


def outcome(name, folder):
    """Reads; the error, if it is a clear one, or None."""
    case = CASES[name]
    try:
        value = case.read(folder)
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, FileNotFoundError, OSError) or getattr(error, "filename", None), repr(error)
        assert len(str(error)) < 3000
        assert name in PATHLESS or str(folder) in str(error) or "no file could be used" in str(error), repr(error)
        return error
    items = value if isinstance(value, list) and case.kind is not list else [value]
    assert all(isinstance(item, case.kind) for item in items), value
    check_valid(value, case.numbers)
    return None


@pytest.mark.filterwarnings("ignore:The checkpoint of step")
# Reads of orbax that fail may leave others unfinished.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_files", [FEW_FILES, pytest.param(NUM_FILES, marks=pytest.mark.once)])
def test_damaged_files_give_a_clear_error_or_a_valid_object(num_files, name, valid_files, tmp_path):
    assert outcome(name, copied(valid_files[name], tmp_path / "whole")) is None
    total = sum(case.share for case in CASES.values())
    number, rng, errors = math.ceil(num_files * CASES[name].share / total), random.Random(name), 0
    tracemalloc.start(1)
    try:
        for i in range(number):
            folder = copied(valid_files[name], tmp_path / str(i))
            files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
            mutate(rng.choice(files), rng)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                errors += outcome(name, folder) is not None
            except BaseException as error:
                error.add_note(f"{name}, file {i}")
                raise
            assert time.process_time() - start < SECONDS, i
            assert tracemalloc.get_traced_memory()[1] - before < MEGABYTES * 2**20, i
    finally:
        tracemalloc.stop()
    assert errors > 0 or num_files == FEW_FILES  # the mutations reach the reader


# ---- Bombs: small files that took hours, or gigabytes ---------------------------------------------------------------


def cost(call):
    """The error of a call, the seconds of the processor, and the megabytes that it took at most."""
    tracemalloc.start(1)
    start = time.process_time()
    try:
        with pytest.raises(ValueError) as caught:
            call()
        return str(caught.value), time.process_time() - start, tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def tfds_with(folder, data):
    write_tfds(folder)
    (folder / "toy-all_classes.tfrecord-00000-of-00001").write_bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (framed(b"\xff" * 300_000 + b"\x01"), "more than 10 bytes"),  # a tag
        (
            framed(field(1, field(1, field(1, b"n") + field(2, field(3, field(1, b"\xff" * 300_000 + b"\x01")))))),
            "10 bytes",
        ),
        (struct.pack("<Q", 2**40) + masked(struct.pack("<Q", 2**40)) + b"few bytes", "is truncated in its last record"),
        (struct.pack("<Q", 2**64 - 1) + masked(struct.pack("<Q", 2**64 - 1)), "is truncated in its last record"),
    ],
    ids=["tag", "packed", "2^40", "2^64"],
)
def test_integers_and_records_of_a_tfrecord_end_where_they_must(data, message, tmp_path):
    tfds_with(tmp_path, data)
    error, seconds, megabytes = cost(lambda: tasks.from_meta_dataset(tmp_path, part="train", size=2))
    assert message in error and seconds < 1 and megabytes < 20, (error[:500], seconds, megabytes)


NPZ = {
    "predictor": "g.npz",
    "meta optimizer": "g.npz",
    "cell searcher": "h.npz",
    "meta architecture": "h.npz",
    "evaluation": "scores.npz",
    "pytree": "tree.npz",
    "trained network": "network.npz",
    "learned optimizer": "w.npz",
    "benchmark": "b.npz",
}


def rewritten(file, change):
    """Changes the arrays of an `.npz`, without a checksum that is wrong."""
    with np.load(file) as data:
        content = dict(data)
    change(content)
    with open(file, "wb") as stream:
        np.savez_compressed(stream, **content)


@pytest.mark.parametrize("name", NPZ)
def test_an_array_of_zeros_that_fills_the_memory_is_not_unpacked(name, valid_files, tmp_path):
    folder = copied(valid_files[name], tmp_path / "bomb")
    file = folder / NPZ[name]

    def fill(content):
        array = next(array for array in content if array != "header")
        content[array] = np.zeros(60 * 2**20, np.uint8)

    rewritten(file, fill)
    assert file.stat().st_size < 100_000
    error, seconds, megabytes = cost(lambda: CASES[name].read(folder))
    assert "its arrays would take" in error and seconds < 2 and megabytes < 20, (error, seconds, megabytes)


@pytest.mark.parametrize("name", NPZ)
def test_an_array_that_states_another_size_than_it_has_is_not_read(name, valid_files, tmp_path):
    folder = copied(valid_files[name], tmp_path / "liar")
    with zipfile.ZipFile(folder / NPZ[name]) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    victim = next(member for member in members if member != "header.npy")
    members[victim] = re.sub(rb"\([^)]*\)", b"(1, 268435456)", members[victim], count=1)
    with zipfile.ZipFile(folder / NPZ[name], "w") as archive:
        for member, content in members.items():
            start = 10 if member == victim else len(content)
            header = content[start : content.index(b"\n") + 1]
            archive.writestr(member, content[: start - 2] + struct.pack("<H", len(header)) + content[start:])
    error, seconds, megabytes = cost(lambda: CASES[name].read(folder))
    assert "bytes, which do not fit" in error and seconds < 2 and megabytes < 20, (error, seconds, megabytes)


WEIGHTS = ["predictor", "meta optimizer", "cell searcher", "meta architecture", "trained network", "learned optimizer"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("fault", ["NaN", "infinite", "float64 only", "integer", "complex", "boolean"])
@pytest.mark.once
def test_weights_are_finite_floating_point_numbers(name, fault, valid_files, tmp_path):
    folder = copied(valid_files[name], tmp_path / "weights")
    not_weights = ("header", "max_shown", "sorted_features", "statistics")
    changed = []

    def change(content):
        array = next(n for n, x in content.items() if x.size and not any(part in n for part in not_weights))
        changed.append(array)
        numbers = {"NaN": math.nan, "infinite": -math.inf, "float64 only": 1e39}
        if fault in numbers:
            content[array] = content[array].astype(np.float64)
            content[array].flat[0] = numbers[fault]
        else:
            content[array] = content[array].astype({"integer": int, "complex": complex, "boolean": bool}[fault])

    rewritten(folder / NPZ[name], change)
    with pytest.raises(ValueError) as caught:
        CASES[name].read(folder)
    error = str(caught.value)
    assert NPZ[name] in error and re.search("finite|floating-point|has shape .* and type", error), error
    assert changed[0] in error or repr(changed[0])[1:-1] in error or changed[0].split("/")[-1] in error, error


def with_pickle(content, suffix):
    def write(folder):
        (folder / f"nas{suffix}").write_bytes(content)
        return lambda: nas.read_nas_bench_201(folder / f"nas{suffix}")

    return write


def nested_key(depth):
    """A dict whose key is a tuple of the same two tuples, and so on: its hash takes 2**depth steps."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return b"\x80\x04}N" + pairs + b"Ns."


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (with_pickle(b"\x80\x02}r" + struct.pack("<I", 2**24) + b".", ".pth"), "has no results of NAS-Bench-201"),
        (with_pickle(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"few", ".pth"), "is larger than allowed"),
        (with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 2**27) + b"few", ".pth"), "is not supported"),
        (
            with_pickle(b"\x80\x02\x8b" + struct.pack("<I", 10_000) + bytes(10_000) + b".", ".pth"),
            "is larger than allowed",
        ),
        (with_pickle(nested_key(20), ".pth"), "A key must be a string or a number"),
        (with_pickle(bz2.compress(bytes(2**26)), ".pickle.pbz2"), "unpacks to more than"),
    ],
    ids=["memo", "text", "bytearray", "integer", "hash", "bz2"],
)
def test_pickles_take_memory_in_proportion_to_their_length(write, message, tmp_path):
    error, seconds, megabytes = cost(write(tmp_path))
    assert message in error and seconds < 2 and megabytes < 25, (error, seconds, megabytes)


def png_of(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_an_image_that_states_more_bytes_than_it_has_takes_no_memory_for_them(tmp_path):
    (tmp_path / "a").mkdir()
    content = png(7)
    start = content.index(b"IDAT") - 4
    (tmp_path / "a" / "x.png").write_bytes(content[:start] + struct.pack(">I", 2**31 - 1) + content[start + 4 :])
    tracemalloc.start(1)
    try:
        assert (tasks.from_image_folder(tmp_path, size=2).x == 7).all()  # all pixels are there
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("side", [8_500, 20_000])
def test_images_of_too_many_pixels_are_not_unpacked(side, tmp_path):
    tfds_with(tmp_path, framed(example(png_of(side, side), 0)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(png_of(side, side))
    for load_images in (
        lambda: tasks.from_meta_dataset(tmp_path, part="train", size=2),
        lambda: tasks.from_image_folder(tmp_path, size=2),
    ):
        error, seconds, megabytes = cost(load_images)
        assert str(tmp_path) in error and "pixels" in error and seconds < 1 and megabytes < 20, error


def test_a_compressed_table_of_zeros_is_not_unpacked(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(bytes(2**26), compresslevel=9))
    error, seconds, megabytes = cost(lambda: tasks.from_csv_folder(tmp_path, "y"))
    assert "t.csv.gz" in error and "unpacks to more than" in error and seconds < 2 and megabytes < 40, (
        seconds,
        megabytes,
    )


BIG = 10**9


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"type": "real", "default": 0.0, "scale": 1.0, "shape": [BIG]}, "at most 16777216 entries; it has 1000000000"),
        ({"type": "real", "default": 0.0, "scale": 1.0, "shape": [BIG] * 9}, "at most 16777216 entries"),
        ({"type": "simplex", "num": BIG, "default": None, "shape": []}, "cannot be read"),
        ({"type": "simplex", "num": BIG, "shape": []}, "cannot be read"),
        ({"type": "fixed", "value": 10**400, "dtype": "float32"}, "cannot be read"),
        (nested(900), "A node must be a container"),
    ],
)
def test_spaces_that_fill_the_memory_are_rejected(document, message):
    for place in (document, {"type": "list", "items": [document]}):
        error, seconds, megabytes = cost(lambda place=place: spaces.from_json({"version": 1, "space": place}))
        assert message in error and len(error) < 1000 and seconds < 1 and megabytes < 20, error


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": 1, "genotype": NaN}', "1e999"])
def test_json_of_genotypes_is_finite_and_not_too_deep(text):
    with pytest.raises(ValueError, match="This is not JSON that"):
        nas.genotype_from_text(text)


def test_specifications_state_no_more_classes_than_they_name(tmp_path):
    write_meta_dataset(tmp_path)
    file = tmp_path / "dataset_spec.json"
    spec = json.loads(file.read_text())
    flat = {name: value for name, value in spec.items() if "superclass" not in name}
    for changed in (
        spec | {"classes_per_superclass": {"0": BIG, "1": 1}},
        flat | {"classes_per_split": {"TRAIN": BIG}},
        flat | {"classes_per_split": {"TRAIN": -1}},
    ):
        file.write_text(json.dumps(changed))
        error, seconds, megabytes = cost(lambda: tasks.from_meta_dataset(tmp_path, part="train", size=2))
        assert "dataset_spec.json is not a specification" in error and seconds < 1 and megabytes < 20, error


def test_a_table_of_nas_bench_101_has_few_numbers_of_epochs(tmp_path):
    lines = (cell_101(str(i), i + 1, "0100", [], 1.0, 0.5) for i in range(300))
    (tmp_path / "nasbench.tfrecord").write_bytes(b"".join(framed(line.encode()) for line in lines))
    with pytest.raises(ValueError, match="more than 10 different numbers of epochs"):
        nas.read_nas_bench_101(tmp_path / "nasbench.tfrecord")


def test_a_store_has_a_table_and_no_view_without_end(tmp_path):
    file = tmp_path / "trials.db"
    write_store(tmp_path)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        columns = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(records)"))
        connection.execute("DROP TABLE records")
        numbers = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers)"
        row = "n, '', 't', '{}', 0.0, 1.0, 0.0, 0, 'COMPLETE', n, ''"
        connection.execute(f"CREATE VIEW records({columns}) AS {numbers} SELECT {row} FROM numbers")
    with pytest.raises(ValueError, match="trials.db is not a file of records: `records` is a view"):
        blackbox.read_records(file)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.npz"
    metaopt.save(path, transforms.init_learned(KEY))
    before = path.read_bytes()
    with pytest.raises(RuntimeError), _files.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["w.npz"]


def test_arrays_of_another_byte_order_are_read(tmp_path):
    path = tmp_path / "w.npz"
    weights = transforms.init_learned(KEY)
    metaopt.save(path, weights)
    rewritten(
        path, lambda content: content.update({k: x.astype(x.dtype.newbyteorder(">")) for k, x in content.items()})
    )
    for loaded, expected in zip(*map(jax.tree.leaves, (metaopt.load(path), weights)), strict=True):
        np.testing.assert_array_equal(loaded, expected)
        assert loaded.dtype.isnative
