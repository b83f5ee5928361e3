"""The benchmarks run, and their tables have the measured values."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


def rows(text):
    """The cells of every line of the Markdown tables in `text`."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def smoke(script, *arguments):
    """What `script --smoke` prints."""
    # Half the seconds of compiling; memory is ordered as it is with all optimizations.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(FOLDER / script), "--smoke", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def load(script, monkeypatch):
    """A script as a module; its neighbors are found, as they are when it runs."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", FOLDER / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_smoke_of_unroll():
    printed = smoke("unroll.py")
    cost = {row[1]: row for row in rows(printed) if row[0] == "16"}
    assert list(cost) == ["plain training", '`"none"`', '`"step"`', '`"sqrt"`']
    memory = {name: float(row[4]) for name, row in cost.items()}
    assert memory['`"none"`'] > memory['`"step"`'] > memory['`"sqrt"`'] > memory["plain training"] > 0
    assert float(cost['`"none"`'][5]) == 1 and float(cost["plain training"][3]) == 1
    speed = {row[0]: float(row[1]) for row in rows(printed) if row[0].split()[0] in ("all", "chunks", "Python")}
    assert len(speed) == 3 and min(speed.values()) > 0
    assert "--smoke` with Python" in printed


@pytest.mark.slow
def test_smoke_of_anil():
    printed = smoke("anil.py")
    by_program = {(row[0], row[2]): row for row in rows(printed) if row[0] in ("dense", "conv4")}
    programs = ("by hand: features first", "metaopt", "at every step")
    assert list(by_program) == [(model, program) for model in ("dense", "conv4") for program in programs]
    assert all(float(row[5]) == 1 for (_, program), row in by_program.items() if program.startswith("by hand"))
    assert all(float(row[8]) < 1e-3 for row in by_program.values()) and "; all below 0.001" in printed


@pytest.mark.slow
def test_smoke_of_rules():
    # This environment has no torch: the table says why there are no numbers of other libraries.
    printed = smoke("rules.py", "--peers", sys.executable)
    cost = {row[1]: row for row in rows(printed) if row[0] == "4"}
    names = ["plain training", "by hand: step", "reverse, none", "mixed, step", "forward, two λ"]
    reason = "other libraries (failed, exit 1: ModuleNotFoundError: No module named 'torch')"
    assert list(cost) == [*names, reason] and set(cost[reason][2:]) == {""}
    ms, mib = ({name: float(cost[name][column]) for name in names} for column in (2, 8))
    assert min(ms.values()) > 0 and mib["reverse, none"] > mib["mixed, step"] > mib["plain training"] > 0
    assert cost["mixed, step"][4].startswith("3.7 ") and cost["forward, two λ"][4].startswith("4.5 ")
    assert float(cost["reverse, none"][9]) == 1 and float(cost["plain training"][3]) == 1
    assert float(cost["plain training"][5]) == 1 < float(cost["mixed, step"][5]) < float(cost["forward, two λ"][5])
    assert float(cost["by hand: step"][10]) == 0 and 0 < float(cost["mixed, step"][10]) < 1e-3
    # One solve, and example weights: as computed by hand.
    others = {row[1]: row for row in rows(printed) if row[0] in ("3", "")}
    for name in ("implicit, cg", "mixed product, `inner.weighted`"):
        assert float(others[name][2]) > 0 and float(others[name][7]) < 1e-3
    assert float(others["mixed product, `inner.weighted`"][4]) < 3.2
    assert "; all of metaopt and of JAX are below 0.001." in printed and "--peers PYTHON` with Python" in printed
    # hypertorch's examples, which need data that may be absent.
    examples = {row[3]: row for row in rows(printed) if row[0] == "logistic regression, 3 penalties"}
    reason = " (hypertorch failed, exit 1: ModuleNotFoundError: No module named 'torch')"
    names = ("reverse, the last K steps", "reverse, all T steps", "fixed_point", "CG")
    assert [name.removesuffix(reason) for name in examples] == list(names)
    assert all(float(row[4]) > 0 and row[5] == "" for row in examples.values())
    assert "to its end, 3 outer steps by the first rule: metaopt" in printed


@pytest.mark.slow
def test_smoke_of_maml():
    printed = smoke("maml.py", "--peers", sys.executable)  # no torch here
    cost = {tuple(row[:3]): row[3:] for row in rows(printed) if row[0] == "2"}
    reason = "other libraries (failed, exit 1: ModuleNotFoundError: No module named 'torch')"
    for name in ("by hand: JAX, unrolled", "by hand: JAX, scan", "metaopt"):
        for many in ("1", "3"):
            ms, ratio, _, error, seconds = cost["2", name, many]
            assert float(ms) > 0 and float(ratio) > 0 and float(seconds) > 0 and float(error) < 1e-3
    assert ("2", reason, "") in cost
    assert "; all below 0.001." in printed and "--peers PYTHON --smoke` with Python" in printed


def architecture_rows(printed):
    """The table of a part of architecture.py: name -> its other cells."""
    return {row[0]: row[1:] for row in rows(printed) if row[0] and row[0] != "---"}


@pytest.mark.slow
def test_smoke_of_architecture():
    measured = architecture_rows(smoke("architecture.py", "--only", "cost", "tasks", "memory"))
    ratios = {name: float(row[0]) for name, row in measured.items()}
    central, forward, exact = (
        next(name for name in ratios if name.startswith(f"DARTS, second order by {method}"))
        for method in ("central", "forward", "differentiation")
    )
    assert 1 < ratios["DARTS, first order"] < ratios[central] < 10
    operations = {name: float(measured[name][3]) for name in (central, forward, exact)}
    # A gradient fewer; and a second derivative costs more than the difference of two.
    assert operations[forward] + 0.5 < operations[central] < operations[exact]
    assert all(measured[name][1].split()[0] == "4.4" for name in operations)
    unrolled = [name for name in ratios if name.startswith("unrolled over 2")]
    assert len(unrolled) == 3 and all(measured[name][1].split()[0] == "3.2" for name in unrolled)
    many = [name for name in ratios if name.startswith("16 tasks, ")]
    assert len(many) == 4 and all(measured[name][1].split()[0] == "16" for name in many)
    flat = next(name for name in ratios if name.startswith("implicit"))
    assert ratios[flat] == pytest.approx(1, abs=0.01) and measured[flat][1] == "1.01 reached"
    assert len(measured) == 11 + 5 + 2 and all(float(row[2]) >= 0 for row in measured.values())  # seconds to compile


@pytest.mark.slow
def test_smoke_of_architecture_compiled_alone():
    printed = smoke("architecture.py", "--only", "large")
    measured = architecture_rows(printed)
    assert list(measured) == [
        "seconds to compile a plain step",
        "seconds to compile DARTS, first order",
        "the peak of a plain step, MiB",
        "partial channels, K = 4, the peak over the dense one",
        "the peak of DARTS, first order, MiB",
    ]
    step, dense, _, partial, _ = (float(row[0]) for row in measured.values())
    assert 0 < step < 60 and 0 < dense < 60 and 0 < partial < 0.9
    assert measured["seconds to compile a plain step"][1] == "60 reached"
    assert "--smoke --only large` with Python" in printed and " work ran when it began" in printed


def test_the_page_of_architecture_says_no_number_twice(tmp_path, monkeypatch):
    script = load("architecture", monkeypatch)
    monkeypatch.setattr(script, "RESULT", tmp_path / "architecture.md")

    def run(value, *only):
        for name in only:
            monkeypatch.setitem(script.PARTS, name, lambda *_, name=name: [[f"of {name}", value, "", "1"]])
        monkeypatch.setattr(sys, "argv", ["architecture.py", "--only", *only])
        script.main()
        return script.RESULT.read_text()

    first = run("60.77", *script.TITLES)
    assert first.count("60.77") == 4 and "earlier" not in first
    second = run("34.25", "memory", "large")
    seconds_of = {row[0]: row[1] for row in rows(second) if row[0].startswith("of ")}
    assert seconds_of == {"of cost": "60.77", "of tasks": "60.77", "of memory": "34.25", "of large": "34.25"}
    # The text names the parts that were not measured, and has no measured number that a table could contradict.
    text = second.partition("\n## ")[0]
    assert all((f'"{title}"' in text) == (name in ("cost", "tasks")) for name, title in script.TITLES.items())
    for title in script.TITLES.values():
        text = text.replace(f'"{title}"', "")
    assert not re.findall(r"\d[.,]\d", text)
    assert second.count("--only memory large` with Python") == 2 and second.count("--only cost tasks") == 2


@pytest.mark.slow
def test_smoke_of_suggest():
    pytest.importorskip("optuna")
    cost = {tuple(row[:4]): row[4:] for row in rows(smoke("suggest.py")) if row[3:4] == ["10"] and len(row) == 8}
    parts = ("", ", deep kernels", ", suggest(X, y)", ", under Optuna")
    names = [(f"metaopt, {domain}{part}", "ei") for part in parts for domain in ("candidates", "gradient")]
    assert [key[:2] for key in cost] == [*names, ("Optuna TPE", "")] and all(
        0 < float(ms[0]) <= float(ms[1]) for ms in cost.values()
    )


@pytest.mark.once
def test_hypergradients_that_disagree_are_seen(monkeypatch):
    script = load("rules", monkeypatch)
    expected = {"rate": np.float32(100), "decay": {"in": np.array([1.0, 2.0]), "out": np.float32(-1)}}
    off = {**expected, "decay": {**expected["decay"], "out": np.float32(-1.01)}}
    assert script.error(expected, expected) == 0
    assert script.error(off, expected) == pytest.approx(0.01, rel=1e-3)
    assert np.isnan(script.error({**expected, "rate": np.nan}, expected))
    assert script.error({"rate": 100.0, "decay": 2.0}, expected) == 0  # one penalty for all

    rows = [script.Row("plain training", 1.0, mib=1.0), script.Row("wrong", 2.0, error=np.nan)]
    monkeypatch.setattr(script, "ours", lambda *args: (rows, expected))
    monkeypatch.setattr(script, "lines", lambda num_steps, rows: [])
    for name in ("implicit_rows", "weights_rows"):
        monkeypatch.setattr(script, name, lambda *args: ([], []))
    monkeypatch.setattr(sys, "argv", ["rules.py", "--smoke"])
    with pytest.raises(SystemExit, match="T=4, wrong: nan"):
        script.main()


def test_the_table_says_which_floors_are_reached(monkeypatch):
    script = load("rules", monkeypatch)
    rows = [
        script.Row("plain training", 10.0, mib=1.0),
        script.Row("by hand: step", 20.0, mib=2.0, error=0.0),
        script.Row("reverse, none", 30.0, floor=2.75, operations=3.5, mib=8.0, error=1e-6),
        script.Row("mixed, step", 44.0, floor=3.7, by_hand="by hand: step", mib=2.0, error=1e-6),
        script.Row("torch", 20.0, "torch", error=None),
        script.Row("higher", 88.0, "torch", error=1e-5),
        script.Row("TorchOpt", reason="failed"),
    ]
    printed = {line[1]: line[2:] for line in script.lines(64, rows)}
    assert printed["reverse, none"] == ["30.0", "3.00", "2.75 reached", "3.50", "", "", "8.00", "1.000", "1e-06", ""]
    assert printed["mixed, step"] == ["44.0", "4.40", "3.7 no", "", "2.20", "", "2.00", "0.250", "1e-06", ""]
    assert printed["by hand: step"][5] == "0.45"
    assert printed["higher"] == ["88.0", "4.40", "", "", "", "2.00", "", "", "1e-05", ""]
    assert printed["TorchOpt (failed)"] == [""] * 10


@pytest.mark.slow
def test_smoke_of_conv4():
    table = [row for row in rows(smoke("conv4.py")) if len(row) == 7 and row[0] not in ("program", "---")]
    assert [row[0] for row in table] == 2 * ["metaopt", "naive: JAX, vmap", "JAX, unrolled"]  # pooling, strides
    assert all(float(row[1]) > 0 and float(row[6]) < 1e-2 for row in table)


HLO = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main {
  %a = (f32[], f32[8,3]{1,0}, /*index=2*/bf16[5]{0}) all-reduce(%x), replica_groups=mesh['tasks'=2,'rows'=4] {'tasks'}
  %b = s32[1,16]{1,0} all-gather(%z), replica_groups=[2,4]<=[8], dimensions={1}
  %c = f32[7]{0} reduce-scatter(%z), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %d = f32[] all-reduce(%z), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%sum
}
"""


def test_collective_operations_are_read_from_a_compiled_program(monkeypatch):
    script = load("scaling", monkeypatch)
    assert script.collectives(HLO) == [
        ("all-reduce", 4 + 96 + 10, 2, 4),
        ("all-gather", 64, 4, 1),
        ("reduce-scatter", 2 * 28, 2, 4),
        ("all-reduce", 4, 2, 2),
    ]
    with pytest.raises(RuntimeError, match="in a loop"):
        script.collectives(HLO.replace("add(%a", "all-reduce(%a"))


def test_an_all_reduce_takes_a_ring_within_and_a_ring_between_islands_of_chips(monkeypatch):
    script = load("scaling", monkeypatch)
    chip = script.Chip("", 1.0, 1.0, island=8, fast=1e9, slow=1e8)
    monkeypatch.setattr(script, "NETWORK", 0.5)
    seconds = lambda kind, num, stride=1: script.network_seconds(script.Collective(kind, 8e6, num, stride), chip)
    # 2 (n - 1) / n of 8 MB at 0.5 GB/s, and 1 µs for each hop.
    assert seconds("all-reduce", 4) == pytest.approx(2 * 3 / 4 * 8e6 / 5e8 + 6e-6)
    assert seconds("all-gather", 4) == pytest.approx(3 / 4 * 8e6 / 5e8 + 3e-6)
    # An eighth of it goes around 4 islands at 0.05 GB/s, and 5 µs for each hop.
    inside = 2 * 7 / 8 * 8e6 / 5e8 + 14e-6
    assert seconds("all-reduce", 32) == pytest.approx(inside + 2 * 3 / 4 * 1e6 / 5e7 + 30e-6)
    assert seconds("all-reduce", 2, stride=8) == pytest.approx(8e6 / 5e7 + 10e-6)  # both on other islands
    assert seconds("all-reduce", 1) == 0


@pytest.mark.slow
def test_smoke_of_scaling():
    printed = smoke("scaling.py")
    by_devices = {(row[0], row[1]): row for row in rows(printed) if len(row) == 10}
    flops = lambda *name: float(by_devices[name][4]) / float(by_devices[name][5])  # as in the traced program
    assert flops("strong", "1") == pytest.approx(4 * flops("weak", "1"), rel=0.2)  # printed with two digits
    assert flops("weak", "8") == pytest.approx(flops("weak", "1"), rel=0.2)
    assert all(0.8 < float(by_devices[name][5]) < 1.2 for name in by_devices if name[1] in "18")
    # The sum of hypergradients, shaped like λ, is all that travels along the axis of tasks: 14,337 numbers.
    assert by_devices["weak", "8"][7] == f"{4 * 14_337 / 2**20:.3f}" and by_devices["weak", "1"][7] == "0.000"
    assert float(by_devices["strong", "8"][7]) > 0.1  # the gradient of each inner step travels along the rows


def test_the_largest_number_that_fits(monkeypatch):
    script = load("capacity", monkeypatch)
    candidates = script.two_digits(10**6)
    assert candidates[:3] == [1, 2, 3] and candidates[98:101] == [99, 100, 110] and candidates[-1] == 990_000
    memory = lambda number: 3 + 0.01 * number**1.5
    assert script.largest(memory, candidates, 80) == 380 and memory(390) > 80 >= memory(380)
    assert script.largest(memory, candidates, 3.005) == 0
    assert script.largest(memory, candidates, 1e12) == 990_000


def test_the_fit_of_memory_is_exact_for_memory_of_its_form(monkeypatch):
    script = load("capacity", monkeypatch)
    stored = {"none": lambda t: 5 * t, "step": lambda t: 3 * t, "sqrt": lambda t: 6 * t**0.5}
    stored["grads"] = lambda t: t + stored["sqrt"](t)
    for remat in script.POLICIES:
        memory = lambda width, steps: 2e-6 * width * (7 + width * (1 + stored[remat](steps)))  # noqa: B023
        fit = script.fitted(memory, remat, (256, 1024), (16, 1024, 256))
        assert fit(4096, 6400) == pytest.approx(memory(4096, 6400), rel=1e-9)  # √6400 is an integer


@pytest.mark.slow
def test_smoke_of_capacity():
    table = [row for row in rows(smoke("capacity.py")) if any(cell.startswith('`"') for cell in row[:2])]
    widths, steps, checks = table[:2], table[2:6], table[6:]
    assert [row[1] for row in widths] == ['`"none"`', '`"sqrt"`'] and len(checks) == 4
    assert 0 < float(widths[0][2].split()[0]) < float(widths[1][2].split()[0])
    for none, sqrt in (steps[:2], steps[2:]):
        assert int(none[2].replace(",", "")) < int(sqrt[2].replace(",", ""))
    assert all(abs(float(row[5])) < 20 for row in checks)


@pytest.mark.slow
def test_smoke_of_overhead():
    printed = smoke("overhead.py")
    cost = {row[0]: row[1:] for row in rows(printed)}
    assert float(cost["bare loop"][0]) > 0 and 0.5 < float(cost["`fit`, all sinks"][1]) < 50
    assert 0 < float(cost["a JSONL file"][0]) < 100
    assert "Sinks: a JSONL file" in printed and len(printed.split("all pairs: ")[1].split(". The")[0].split(",")) == 3
