"""gpu.py's training steps and kernels on a simulated device: rows, errors, verdicts and tables."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from bench import results
from bench.agreement import error_limit
from bench.gpu import kernels, report, steps, targets
from bench.gpu.groups import GROUPS, choose_groups
from bench.implementations import ON_GPU
from bench.kernel_cases import tiny_cases
from bench.networks import build_batch, build_model
from bench.roofline import STORAGE_BYTES, op_bytes
from bench.runner.journal import Findings, Journal
from decisions import CLEAR, clearness

CIFAR = "cifar float32 64"


@pytest.fixture
def measure(device, journal):
    """Measures implementations of one group; returns their rows, and what else was found."""

    def measure(*names, variant="A+B", journal=journal):
        groups = choose_groups("cpu", variant, (CIFAR,), names, tiny=True)
        steps.measure(device, groups, journal, time.monotonic() + 300)
        found = Findings(journal.path)
        return {row["implementation"]: row for row in found.rows_with("implementation")}, found

    return measure


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ops_take_the_arguments(case, dtype, device):
    ceilings = {"bandwidth": 1e9, "products": {"float32": 1e9, "bfloat16": 1e9}}
    for op in case.ops:
        row = kernels.measure_op(device, op, case.size, dtype, ceilings, runs=1)
        assert row["bytes"] == op_bytes(op, case.size, STORAGE_BYTES[dtype])
        assert row["of_floor"] == row["floor_seconds"] / row["seconds"]


def test_kernels_out_of_time(device, journal):
    kernels.measure(device, journal, time.monotonic() - 1)
    found = Findings(journal.path)
    assert found.rows == {}
    assert found.facts["ceilings"]["bandwidth"] > 0
    assert "out of time" in found.notes[0]


def test_op_that_fails_is_a_row(device, journal, monkeypatch):
    def measure_op(device, op, *_, **__):
        if op == "append":
            raise RuntimeError("no such kernel\nand more")
        return {"seconds": 1.0}

    monkeypatch.setattr(kernels, "measure_op", measure_op)
    kernels.measure(device, journal, time.monotonic() + 60)
    rows = [row for row in Findings(journal.path).rows.values() if row["op"] == "append"]
    assert [row["error"] for row in rows] == ["RuntimeError: no such kernel"] * 2


def test_shares_add_up():
    assert sum(g.share for g in choose_groups("cpu")) == pytest.approx(1)
    chosen = choose_groups("cpu", words=("densenet121",))
    assert [g.net for g in chosen] == ["densenet121"] * 2
    assert sum(g.share for g in chosen) == pytest.approx(1)
    assert {name for g in GROUPS for name in g.implementations} == set(ON_GPU)


@pytest.mark.parametrize(("net", "variant", "parameters"), [("densenet121", "A+B", 7978856), ("cifar", "", 800032)])
def test_specs_are_the_published_networks(net, variant, parameters):
    """DenseNet-121 is torchvision's, whatever the variant of the other."""
    group = {g.net: g for g in choose_groups("cpu", variant)}[net]
    spec = group.spec_of("plain")
    assert sum(p.numel() for p in build_model(spec).parameters()) == parameters
    assert spec.batch_size == group.batch_size
    if net == "cifar":
        assert (spec.depth, spec.growth_rate, spec.size) == (100, 12, 32)


def test_steps_write_rows_and_agree(device, measure, tmp_path):
    groups = choose_groups("cpu", words=(CIFAR,), tiny=True)
    for random in (True, False):  # else an agreement would be a matter of the instruction set
        spec = replace(groups[0].spec_of("plain"), random=random)
        assert clearness(build_model(spec), build_batch(spec)[0]) > CLEAR
    names = ("plain", "fused", "fused-graph", "checkpoint")
    rows, found = measure(*names)
    assert set(rows) == set(names)
    assert found.rows[f"{CIFAR} agreement"]["agrees"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["rounds"] > 0 for row in rows.values())
    assert rows["plain"]["first_loss"] == pytest.approx(rows["fused"]["first_loss"], rel=1e-4)
    counted = Journal(tmp_path / "profile.jsonl")
    steps.count_kernels(device, groups, counted, time.monotonic() + 60)
    assert Findings(counted.path).rows[f"{CIFAR} fused"]["launches"] > 10


def test_wrong_gradients_are_not_timed(measure, monkeypatch):
    monkeypatch.setattr(steps, "check_on_gpu", lambda spec_of: {"agrees": False})
    rows, _ = measure("plain", "fused")
    assert "seconds" in rows["plain"]
    assert rows["fused"]["error"] == "gradients disagree: not timed"


def test_out_of_memory_is_a_result(measure, monkeypatch):
    def fail(step, run=steps.GpuStep.run):
        if step.spec.implementation == "checkpoint":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(step)

    monkeypatch.setattr(steps.GpuStep, "run", fail)
    rows, _ = measure("plain", "checkpoint", variant="")
    assert rows["checkpoint"]["error"] == "out of memory"
    assert rows["plain"]["rounds"] > 0


def test_capture_that_fails_is_left_to_another_process(device, journal, measure, monkeypatch):
    """The steps that were ready are timed; this process ends, and the next goes on behind the graph."""

    def capture(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    names = ("plain", "fused-graph", "fused-kept-channels-last")
    monkeypatch.setattr(device, "capture", capture)
    with pytest.raises(RuntimeError, match="capturing"):
        measure(*names, variant="")
    rows = Findings(journal.path).rows
    assert rows[f"{CIFAR} plain"]["rounds"] > 0
    assert "capturing" in rows[f"{CIFAR} fused-graph"]["error"]
    rows, _ = measure(*names, variant="", journal=Journal(journal.path))
    assert rows["fused-kept-channels-last"]["seconds"] > 0


def test_out_of_memory_beside_others_leaves_the_others(device, journal):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    (group,) = choose_groups("cpu", "", (CIFAR,), tiny=True)
    run = steps.GroupRun(device, journal, group, time.monotonic() + 60)
    run.time({"plain": (lambda: None, 2), "fused": (fail, 1)})
    rows = Findings(journal.path).rows
    assert rows[f"{CIFAR} plain"]["steps_a_round"] == 2
    assert "out of memory" in rows[f"{CIFAR} fused"]["error"]


def test_error_limit():
    assert error_limit(1e-6) == pytest.approx(1e-3, rel=0.01)
    assert error_limit(0.1) == pytest.approx(0.301)
    assert error_limit(0.4) == 0.9
    assert not float("nan") <= error_limit(0.4)


def made_up_rows():
    figures = [
        ("densenet121", "bfloat16", 256, "plain", 90.0, 9e9),
        ("densenet121", "bfloat16", 256, "plain-channels-last", 44.0, 9e9),
        ("densenet121", "bfloat16", 256, "compile-channels-last", 25.0, 8e9),
        ("densenet121", "bfloat16", 256, "fused", 30.0, 1e9),
        ("densenet121", "bfloat16", 256, "fused-channels-last", 20.0, 1e9),
        ("cifar", "float32", 64, "plain", 30.0, 2000e6),
        ("cifar", "float32", 64, "checkpoint", 40.0, 400e6),
        ("cifar", "float32", 64, "fused", 14.0, 200e6),
        ("cifar", "float32", 64, "fused-graph", 10.0, 210e6),
        ("cifar", "float32", 64, "compile-channels-last", None, None),
    ]
    rows = []
    for net, dtype, batch, implementation, ms, peak in figures:
        row = {"net": net, "dtype": dtype, "batch_size": batch, "implementation": implementation}
        row |= {"variant": "A+B", "size": 32}
        times = ms and {"seconds": ms / 1e3, "seconds_20": ms / 1.1e3, "seconds_80": ms / 0.9e3, "rounds": 5}
        memory = {"peak_bytes": peak, "kept_bytes": peak}
        rows.append(row | (times | memory if ms else {"error": "out of memory"}))
    return rows


def test_targets():
    found = {t["name"]: (t["found"], t["verdict"]) for t in targets.evaluate(made_up_rows(), 3e12, 45e9)}
    assert found == {
        "DenseNet-121 bf16: times faster than plain": (pytest.approx(2.2), "reached"),
        "DenseNet-121 bf16: times faster than torch.compile": (pytest.approx(1.25), "missed"),
        "DenseNet-121 bf16: times the byte roofline": (pytest.approx(0.020 / 0.015), "reached"),
        "CIFAR batch 64 fp32: CUDA graph, times faster than plain": (pytest.approx(3), "reached"),
        "CIFAR batch 64 bf16: CUDA graph, times faster than plain": (None, "not measured"),
        "CIFAR fp32: plain peak over fused peak": (pytest.approx(10), "reached"),
        "CIFAR fp32: checkpoint peak over fused peak": (pytest.approx(2), "missed"),
    }


def test_tables_and_files(tmp_path):
    kernel = {"op": "append", "case": "cifar 8x8", "dtype": "float32", "seconds": 1e-5, "seconds_20": 9e-6}
    kernel |= {"seconds_80": 2e-5, "host_seconds": 1e-5, "bytes": 1e6, "flops": 0, "floor_seconds": 1e-6}
    failed = {"op": "head", "case": "x", "dtype": "y", "error": "no"}
    errors = {"outputs": 1e-6, "gradients": 1e-4}
    found = {
        "benchmark": "gpu",
        "machine": {"name": "NVIDIA Example"},
        "build": {"status": 0, "seconds": 60.0, "out_of_time": False},
        "tests": {"status": 1, "seconds": 9.0, "out_of_time": False, "passed": 5, "failed": 1, "failures": ["a::b: c"]},
        "sanitizer": {"memcheck": {"said": "0 errors", "tests": "4 passed"}, "racecheck": {"skipped": "not there"}},
        "steps": made_up_rows(),
        "agreement": {f"{CIFAR} agreement": dict.fromkeys(report.AGREEMENT, errors) | {"agrees": True}},
        "kernels": [kernel | {"of_floor": 0.1, "bound": "bytes"}, failed],
        "ceilings": {"bandwidth": 4.3e12, "products": {"bfloat16": 7e14}},
        "targets": targets.evaluate(made_up_rows()),
        "notes": ["steps: out of time before the last"],
    }
    results.write_json(tmp_path / "x.json", found)
    assert json.loads((tmp_path / "x.json").read_text()) == found
    text = (tmp_path / "x.md").read_text()
    assert text.startswith("# Training on NVIDIA Example")
    line = next(line for line in text.splitlines() if line.startswith("| fused, images channels last "))
    assert re.split(r" *\| *", line)[2:6] == ["20.00", "18.18-22.22", "2.20x", ""]
    for expected in ("out of memory", "missed", "4300 GB/s", "| append", "a::b: c", "0 errors (4 passed)", "not there"):
        assert expected in text
    assert not list(tmp_path.glob("*.new"))
