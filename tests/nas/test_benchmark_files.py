"""Readers of published files, on files that are written here by other means than the readers'."""

import base64
import bz2
import collections
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

import metaopt
from metaopt import nas
from metaopt.nas import _named_spaces, _nas_bench_101

# ---- NAS-Bench-101 --------------------------------------------------------------------------------------------------


def crc32c(data):
    """Bit by bit, as the polynomial says (the reader has a table)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def framed(data):
    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(number):
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def metrics(evaluations, parameters, total):
    """A ModelMetrics, as its .proto says: 1 repeated evaluations, 2 int32, 3 double; fields may come in any order."""
    message = b"\x10" + varint(parameters)
    for epoch, seconds, train, valid, test in evaluations:
        doubles = b"".join(bytes([8 * i + 1]) + struct.pack("<d", v) for i, v in enumerate((epoch, seconds, train), 1))
        doubles += b"\x32" + varint(200) + b"/" * 200  # checkpoint_path
        doubles += b"".join(bytes([8 * i + 1]) + struct.pack("<d", v) for i, v in ((5, test), (4, valid)))
        message += b"\x0a" + varint(len(doubles)) + doubles
    return message + b"\x19" + struct.pack("<d", total)


def row(name, epochs, bits, ops, seconds, valid, test):
    halves = [(0, 0.0, 0.1, 0.1, 0.1), (epochs / 2, seconds / 2, 0.4, 0.3, 0.2), (epochs, seconds, 0.99, valid, test)]
    message = base64.b64encode(metrics(halves, 8_555_530, 2 * seconds)).decode()
    return json.dumps([name, epochs, bits, ",".join(["input", *ops, "output"]), message]).encode()


CONV3, CONV1, POOL = _named_spaces.NAS_BENCH_101_PRIMITIVES
ROWS = [
    row("a", 12, "010001000", [POOL], 30.0, 0.80, 0.79),
    row("a", 12, "010001000", [POOL], 32.0, 0.82, 0.81),
    row("b", 12, "0100" + "0010" + "0001" + "0000", [CONV3, CONV1], 60.0, 0.9, 0.89),
    row("a", 108, "010001000", [POOL], 300.0, 0.91, 0.90),
    row("b", 108, "0100" + "0010" + "0001" + "0000", [CONV3, CONV1], 600.0, 0.95, 0.94),
    row("c", 108, "0100", [], 100.0, 0.5, 0.4),
]


def test_nas_bench_101(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283  # the published check value
    file = tmp_path / "nasbench.tfrecord"
    file.write_bytes(b"".join(map(framed, ROWS)))
    table = nas.read_nas_bench_101(file, verify=True)
    assert table.fidelities == (12 / 108, 1.0) and table.encodings.shape == (3, 26)
    np.testing.assert_allclose(table.valid[:, 0], [[0.19, 0.09], [0.1, 0.05], [np.nan, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(table.test[:, 0], [0.1, 0.06, 0.6], rtol=1e-6)
    np.testing.assert_allclose(table.cost[:, 0], [[31, 300], [60, 600], [np.nan, 100]])
    graphs = [_nas_bench_101.nas_bench_101_graph(encoding) for encoding in table.encodings]
    assert graphs[1] == nas.Graph(
        ((0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)), ("input", CONV3, CONV1, "output")
    )
    assert [g.ops[1:-1] for g in graphs] == [(POOL,), (CONV3, CONV1), ()]
    outcome, cost = table.query(table.encodings[0], "cifar10", 12 / 108)
    assert outcome == pytest.approx(0.19) and cost == 31

    kept = tmp_path / "kept"
    metaopt.save(kept, table)
    (tmp_path / "kept.tmp").mkdir()  # the temporary file of another process
    metaopt.save(kept, table)
    (tmp_path / "kept.tmp").rmdir()
    loaded = metaopt.load(kept)
    assert kept in tmp_path.iterdir() and not list(tmp_path.glob("kept*.*"))  # by the name that was given
    for name, value in table._asdict().items():
        if name != "query":
            np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.query(table.encodings[1], "cifar10") == table.query(table.encodings[1], "cifar10")
    with open(kept, "wb") as file:
        np.savez(file, name="x", header=np.frombuffer(b'{"format": "metaopt.benchmark", "version": 1}', np.uint8))
    with pytest.raises(ValueError, match="it lacks 'tasks'"):
        metaopt.load(kept)
    kept.write_bytes(kept.read_bytes()[:-30])
    with pytest.raises(ValueError, match="is not a file that .*: .*File is not a zip file"):
        metaopt.load(kept)


def test_nas_bench_101_that_is_damaged(tmp_path):
    whole = b"".join(map(framed, ROWS))
    file = tmp_path / "nasbench.tfrecord"

    def refused(data, message, **options):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            nas.read_nas_bench_101(file, **options)

    refused(whole[:-7], "truncated in its last record")
    refused(whole + b"abc", "is not a TFRecord file, or is damaged at byte")
    refused(b"[1, 2]" * 10, "is not a TFRecord file, or is damaged at byte 0")
    position = whole.index(b'"a"')
    refused(whole[:position] + b'"A' + whole[position + 2 :], "does not match its checksum", verify=True)
    refused(framed(b"{}"), "has a record that is not of NAS-Bench-101")
    refused(framed(json.dumps(["a", 12, "0100", "input,output", "AAA"]).encode()), "has a record that is not of")
    refused(b"", "is empty")
    refused(framed(row("a", 12, "010001000", ["conv5x5"], 1.0, 1.0, 1.0)), "not in the space of NAS-Bench-101")
    refused(framed(row("a", 12, "0100", [POOL], 1.0, 1.0, 1.0)), "not in the space of NAS-Bench-101")


# ---- NAS-Bench-201 --------------------------------------------------------------------------------------------------

CELLS = ("|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|",) + (
    "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|",
)


def run_201(name, seed, epochs, accuracy):
    """A trial as the benchmark keeps it; validation accuracy is `accuracy`, that of the test sets one less."""
    evals = {}
    for i in range(epochs):
        now = accuracy if i == epochs - 1 else 10.0
        evals |= {f"x-valid@{i}": now, f"x-test@{i}": now - 1, f"ori-test@{i}": now - 1}
    times = collections.OrderedDict((i, 2.5) for i in range(epochs))
    flop = np.float64(15.6)  # a number of numpy's among plain ones
    return {"name": name, "seed": seed, "epochs": epochs, "eval_acc1es": evals, "train_times": times, "flop": flop}


def infos_201(index):
    def results(epochs, seeds):
        runs = {}
        for name, accuracy in (
            ("cifar10-valid", 80.0),
            ("cifar10", 85.0),
            ("cifar100", 60.0),
            ("ImageNet16-120", 30.0),
        ):
            for seed in seeds:
                runs[name, seed] = run_201(name, seed, epochs, accuracy + index + (seed == 888) + epochs / 100)
        return {"arch_index": index, "arch_str": CELLS[index], "all_results": runs, "dataset_seed": {}}

    return results(12, [777]), results(200, [777, 888])


def check_201(table):
    assert table.tasks == ("cifar10", "cifar100", "ImageNet16-120") and table.fidelities == (0.06, 1.0)
    np.testing.assert_array_equal(table.encodings, [[3, 2, 1, 0, 0, 4], [0] * 6])
    valid = np.array([[[80.12, 82.5], [60.12, 62.5], [30.12, 32.5]]])
    np.testing.assert_allclose(100 - table.valid, np.concatenate([valid, valid + 1]), rtol=1e-5)
    np.testing.assert_allclose(100 - table.test, [[86.5, 61.5, 31.5], [87.5, 62.5, 32.5]], rtol=1e-5)
    np.testing.assert_allclose(table.cost, np.broadcast_to([30.0, 500.0], (2, 3, 2)))


@pytest.mark.parametrize("form", ["directory", "pbz2", "old pth", "new pth"])
def test_nas_bench_201(form, tmp_path):
    if form == "directory":
        for index in (0, 1):
            infos = dict(zip(("12", "200"), infos_201(index), strict=True))
            (tmp_path / f"{index:06d}.pickle.pbz2").write_bytes(bz2.compress(pickle.dumps(infos, 4)))
        (tmp_path / "meta.pickle.pbz2").write_bytes(b"not read")
        return check_201(nas.read_nas_bench_201(tmp_path))
    short, long = ("12", "200") if form == "pbz2" else ("less", "full")
    infos = {index: dict(zip((short, long), infos_201(index), strict=True)) for index in (1, 0)}
    whole = {"meta_archs": list(CELLS), "arch2infos": infos, "evaluated_indexes": {0, 1}}
    file = tmp_path / ("nats.pickle.pbz2" if form == "pbz2" else "nas.pth")
    if form == "pbz2":
        file.write_bytes(bz2.compress(pickle.dumps(whole, 4)))
    elif form == "old pth":
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, whole, [])
        file.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("nas/data.pkl", pickle.dumps(whole, 2))
            archive.writestr("nas/version", "3")
    check_201(nas.read_nas_bench_201(file))


def test_tensors_are_empty_shells(tmp_path):
    torch = pytest.importorskip("torch")
    infos = {index: dict(zip(("less", "full"), infos_201(index), strict=True)) for index in (0, 1)}
    infos[0]["less"]["weights"] = {"w": torch.ones(3), "p": torch.nn.Parameter(torch.ones(2))}
    for new in (False, True):
        torch.save({"arch2infos": infos}, tmp_path / "nas.pth", _use_new_zipfile_serialization=new)
        check_201(nas.read_nas_bench_201(tmp_path / "nas.pth"))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


class Reduced:
    def __init__(self, *how):
        self.how = how

    def __reduce__(self):
        return self.how


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [Evil(), {"arch2infos": {0: Evil()}}, print, io.StringIO]
    for number, bad in enumerate(calls):
        file = tmp_path / f"{number}.pth"
        file.write_bytes(pickle.dumps(bad))
        with pytest.raises(
            ValueError, match=r"The file names (posix|nt|builtins|io|_io)\.\w+, which is not a supported class"
        ):
            nas.read_nas_bench_201(file)
    assert not (tmp_path / "evil").exists()
    # A type that hides a pointer. Attributes that a file sets on a function do not remain after reading.
    pointer = (np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
    (tmp_path / "pointer.pth").write_bytes(
        pickle.dumps(Reduced(np._core.multiarray.scalar, (Reduced(*pointer), b"\x01" * 8)))
    )
    with pytest.raises(ValueError, match="not one of NumPy's integers and floats"):
        nas.read_nas_bench_201(tmp_path / "pointer.pth")
    payload = Reduced(np._core.multiarray.scalar, (np.dtype("f8"), b"\x00" * 8))
    (tmp_path / "number.pth").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="has no results"):
        nas.read_nas_bench_201(tmp_path / "number.pth")
    for data, message in [(b"abc", "can be read, or is damaged"), (pickle.dumps([1]), "has no results")]:
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            nas.read_nas_bench_201(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"arch2infos": {0: {"less": {}}}}))
    with pytest.raises(ValueError, match=r"has no results of NAS-Bench-201: it lacks"):
        nas.read_nas_bench_201(tmp_path / "x.pth")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("nas/data.pkl", pickle.dumps([1] * 99, 2))
    cut = bytearray(whole.getvalue())
    cut[60:80] = bytes(20)  # inside the member: its checksum is another
    for data, message in [
        (bytes(cut), "or is damaged: .*Bad CRC-32"),
        (b"PK\x05\x06" + bytes(18), "without one data.pkl"),
    ]:
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            nas.read_nas_bench_201(tmp_path / "x.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no files such as"):
        nas.read_nas_bench_201(tmp_path / "empty")


# ---- NAS-Bench-301 --------------------------------------------------------------------------------------------------

PREFIX = "NetworkSelectorDatasetInfo:darts:"
# Its normal cell is the first of the published configurations, its reduction cell, too.
CONFIGURATION = {
    **{"edge_normal_0": "skip_connect", "edge_normal_1": "sep_conv_3x3", "edge_normal_3": "dil_conv_5x5"},
    **{"edge_normal_4": "avg_pool_3x3", "inputs_node_normal_3": "1_2", "edge_normal_7": "dil_conv_5x5"},
    **{"edge_normal_8": "sep_conv_3x3", "inputs_node_normal_4": "2_3", "edge_normal_9": "dil_conv_3x3"},
    **{"edge_normal_10": "dil_conv_3x3", "inputs_node_normal_5": "0_1", "edge_reduce_0": "dil_conv_3x3"},
    **{"edge_reduce_1": "skip_connect", "edge_reduce_2": "max_pool_3x3", "edge_reduce_3": "dil_conv_5x5"},
    **{"inputs_node_reduce_3": "0_1", "edge_reduce_6": "dil_conv_3x3", "edge_reduce_7": "avg_pool_3x3"},
    **{"inputs_node_reduce_4": "1_2", "edge_reduce_9": "sep_conv_3x3", "edge_reduce_11": "sep_conv_3x3"},
    **{"inputs_node_reduce_5": "0_2", "layers": 8, "init_channels": 32},
}


def write_301(file, valid, test, seconds, **changes):
    settings = {PREFIX + name: value for name, value in {**CONFIGURATION, **changes}.items()}
    log = {"optimized_hyperparamater_config": settings, "test_accuracy": test, "runtime": seconds}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**log, "info": [{"val_accuracy": valid}], "budget": 97}))


def genotype_301(table, row):
    configuration = dict(zip(table.dims, table.encodings[row].tolist(), strict=True))
    return nas.genotype_from_configuration(nas.darts_space(), configuration)


def test_nas_bench_301(tmp_path):
    write_301(tmp_path / "rs" / "results_0.json", 90.0, 91.0, 5_000.0)
    write_301(tmp_path / "de" / "results_1.json", 92.0, 92.0, 7_000.0)
    write_301(tmp_path / "de" / "results_2.json", 80.0, 81.0, 3_000.0, edge_normal_0="max_pool_3x3")
    write_301(tmp_path / "de" / "results_3.json", 10.0, 10.0, 1.0, layers=20)  # another network
    table = nas.read_nas_bench_301(tmp_path)
    rows = np.argsort(table.valid[:, 0, 0])
    np.testing.assert_allclose(table.valid[rows, 0, 0], [9.0, 20.0])
    np.testing.assert_allclose(table.test[rows, 0], [8.5, 19.0])
    np.testing.assert_allclose(table.cost[rows, 0, 0], [6_000.0, 3_000.0])
    genotype, other = (genotype_301(table, row) for row in rows)
    assert genotype["normal"] == (
        *((0, 2, "skip_connect"), (1, 2, "sep_conv_3x3"), (1, 3, "dil_conv_5x5"), (2, 3, "avg_pool_3x3")),
        *((2, 4, "dil_conv_5x5"), (3, 4, "sep_conv_3x3"), (0, 5, "dil_conv_3x3"), (1, 5, "dil_conv_3x3")),
    )
    assert genotype["reduce"][-2:] == ((0, 5, "sep_conv_3x3"), (2, 5, "sep_conv_3x3"))
    nas.discrete(nas.darts_space(), genotype)
    assert other["normal"][0] == (0, 2, "max_pool_3x3") and other["normal"][1:] == genotype["normal"][1:]
    assert (table.encodings.max(0) < np.array(table.num_choices)).all() and len(table.dims) == 22
    with pytest.raises(ValueError, match="no files results_"):
        nas.read_nas_bench_301(tmp_path / "nowhere")
    (tmp_path / "results_9.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results_9.json is not a log of NAS-Bench-301: it lacks"):
        nas.read_nas_bench_301(tmp_path)
