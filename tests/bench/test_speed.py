"""speed.py: right implementations are timed, all others are rows that say why not; targets; the sweep of batches."""

import csv
import time

import pytest
import torch
from bench import results, steps
from bench.implementations import EAGER, IMPLEMENTATIONS
from bench.networks import Spec
from bench.runner.journal import Findings, Journal
from bench.speed import report as speed_report
from bench.speed import run as speed_run
from bench.workloads import find
from torch.utils.flop_counter import FlopCounterMode


def measure(journal, name, implementations, rounds=1, seconds=300.0, dtype="float32"):
    """Rows of the implementations in one tiny workload, measured in this process."""
    deadline = time.monotonic() + seconds
    speed_run.measure(journal, [name], implementations, deadline, dtype=dtype, rounds=rounds, tiny=True)
    return {row["implementation"]: row for row in Findings(journal.path).rows_with("implementation")}


def report(journal):
    return speed_report.body(speed_report.results_of({"default": Findings(journal.path)}, {}))


@pytest.mark.parametrize("name", ["cifar-ab", "densenet121", "bc190-inference"])
def test_eager_implementations_are_right_and_timed(journal, name):
    """Each has figures, or a reason to be left out; none is in both or in neither."""
    rows = measure(journal, name, EAGER)
    left_out = Findings(journal.path).facts[f"left out {name}"]
    assert rows.keys() | left_out.keys() == set(EAGER) and not rows.keys() & left_out.keys()
    for implementation, row in rows.items():
        if not (implementation.startswith("torchvision") and "error" in row and "No module" in row["error"]):
            assert row["rounds"] == 1 and row["peak_bytes"] > 0, row
            assert row["errors"]["outputs"] < 1e-4  # its gradients are float32's, which the side of one rectifier moves
            if row["training"] and implementation != "plain":
                assert max(row["float64_errors"][kind] for kind in speed_run.COMPARED) < 1e-9
                parts = [row[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
                assert sum(parts) == pytest.approx(row["seconds"])


def test_limits_in_the_rows(journal):
    """Operations are those that torch counts for the plain network; the ratios are time over time."""
    rows = measure(journal, "cifar", ["plain", "fused"], rounds=2)
    step = steps.new_step(find("cifar", tiny=True), "plain")
    with FlopCounterMode(display=False) as counter:
        step.forward().backward()
    rates = Findings(journal.path).facts["rates cifar"]
    for row in rows.values():
        assert row["flops"] == counter.get_total_flops()
        assert row["of_arithmetic"] == pytest.approx(row["seconds"] / (row["flops"] / rates["flops"]))
        assert row["of_bytes"] == pytest.approx(row["seconds"] / (row["bytes"] / rates["bytes"]))


def wrong_network(self, build=Spec.new_network):
    def scale_gradient(module, inputs, output):
        output.register_hook(lambda grad: 1.5 * grad)

    model = build(self)
    if self.implementation == "checkpoint":
        model.features.transition1.register_forward_hook(scale_gradient)
    return model


@pytest.mark.parametrize("in_float64", [True, False], ids=["in float64", "in the step"])
def test_wrong_gradients_are_reported(journal, monkeypatch, in_float64):
    """By the check on two images; and where that is left out, as for compiled ones, by the one of the timed step."""
    monkeypatch.setattr(Spec, "new_network", wrong_network)
    if not in_float64:
        monkeypatch.setattr(speed_run.WorkloadRun, "examine", lambda self: {})
    rows = measure(journal, "cifar", ["plain", "checkpoint", "fused"])
    assert rows["checkpoint"]["error"].startswith("wrong: ") and "gradients differ" in rows["checkpoint"]["error"]
    assert "seconds" not in rows["checkpoint"]
    assert rows["fused"]["rounds"] == rows["plain"]["rounds"] == 1
    assert "- checkpoint: wrong: " in report(journal)


def test_running_statistics_taken_in_twice_are_a_remark(journal):
    """torchvision's memory_efficient updates them in its recomputation too: its gradients are right all the same."""
    pytest.importorskip("torchvision")
    rows = measure(journal, "cifar", ["plain", "torchvision-efficient", "selective"])
    assert rows["torchvision-efficient"]["errors"]["running statistics"] > 0.01
    assert rows["selective"]["errors"]["running statistics"] < 1e-6
    text = report(journal)
    assert "- torchvision-efficient: running statistics differ" in text
    assert "- selective: running statistics differ" not in text


def test_implementation_that_fails_has_a_row(journal, monkeypatch):
    """It may raise anything anywhere; the others are measured."""

    class Failing(steps.TimedStep):
        def forward(self):
            raise IndexError("the compiler is out of registers\nand more")

    def new_step(workload, name, state=None, build=steps.new_step):
        return Failing(workload.spec_of("plain"), state) if name == "compile" else build(workload, name, state)

    monkeypatch.setattr(speed_run, "new_step", new_step)
    rows = measure(journal, "cifar", ["compile", "plain", "fused"])
    assert rows["compile"]["error"] == "IndexError: the compiler is out of registers"
    assert rows["plain"]["rounds"] == rows["fused"]["rounds"] == 1
    text = report(journal)
    assert "- compile: IndexError: the compiler is out of registers" in text and "| failed" in text


def test_implementation_that_killed_its_process_has_a_row(journal):
    """The next process leaves it out, and prepares the others again, whose steps went with the first."""
    journal.begin("cifar reference")
    journal.row("cifar reference")
    for name in ("plain", "checkpoint"):
        journal.begin(f"cifar {name}", implementation=name, workload="cifar", training=True, layout="contiguous")
        if name == "plain":
            journal.row("cifar plain", implementation="plain", seconds=1.0, rounds=0)
    journal.died("the process stopped")
    rows = measure(Journal(journal.path), "cifar", ["plain", "checkpoint", "fused"])
    assert rows["checkpoint"]["error"] == "the process stopped"
    assert rows["plain"]["rounds"] == rows["fused"]["rounds"] == 1


def test_out_of_time_is_a_row(journal):
    rows = measure(journal, "cifar", ["plain", "fused"], seconds=0.0)
    assert [row["error"] for row in rows.values()] == ["out of time"] * 2


def test_half_type_is_compared_with_float32(journal):
    rows = measure(journal, "cifar", ["plain", "fused"], dtype="bfloat16")
    types = {name: row["dtype"] for name, row in rows.items()}
    assert types == {"plain": "bfloat16", "fused": "bfloat16", "fused-float32": "float32"}
    assert rows["fused"]["bytes"] < rows["fused-float32"]["bytes"]
    assert all(row["rounds"] == 1 for row in rows.values())


def test_implementations_are_compiled_apart():
    """Dynamo would give one the code of another whose backend is equal."""
    compilers = [steps.new_compiler(traits) for traits in IMPLEMENTATIONS.values() if traits.runner == "compile"]
    assert len(set(compilers)) == len(compilers)


def row(name, seconds, **more):
    values = {"allocator": "default", "workload": "cifar", "implementation": name, "seconds": seconds, "rounds": 1}
    return values | {"peak_bytes": 149e6, "of_arithmetic": 1.6, "faster": 1.2 / seconds} | more


def test_targets_are_held_against_the_fastest_right_implementation():
    rows = [row("plain", 3.0), row("compile", 1.2), row("checkpoint", 0.5, error="wrong: gradients", rounds=0)]
    rows += [row("fused", 0.39), row("fused-kept", 0.375)]
    assert speed_report.fastest_other(rows)["implementation"] == "compile"
    assert {t["name"].split(": ")[1]: t["verdict"] for t in speed_report.targets(rows)} == {
        "fused against the fastest peer, compile": "reached",  # 3.1 of 3.0
        "fused-kept against the fastest peer, compile": "missed",  # 3.2 of 3.3
        "fused over the arithmetic's time": "reached",
        "fused peak MB": "reached",
    }
    assert speed_report.targets(rows, capability="avx512") == speed_report.targets(rows)
    assert [t["wanted"] for t in speed_report.targets(rows, capability="avx2")] == [">= 1.5", ""]
    half = speed_report.targets([*rows, row("fused-float32", 0.6)], dtype="bfloat16")
    assert half[-1]["found"] == pytest.approx(0.6 / 0.39) and half[-1]["verdict"] == "reached"


def test_speed(run_process, tmp_path):
    """Both allocators, each in a process; Markdown, JSON, CSV, plot; the ratios are of the times beside them."""
    names, lesser = ("plain", "plain-channels-last", "fused", "fused-kept"), []
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        lesser = ["--capability", "avx2"]  # reaches torch and the kernels of the processes that measure
    lines, picture = tmp_path / "speed.csv", tmp_path / "speed.png"
    text, found = run_process("speed.py", "--quick", "--workloads", "cifar,cifar-inference", "--implementations",
                              ",".join(names), "--threads", 1, "--csv", lines, "--plot", picture, *lesser)  # fmt: skip
    rows = found["rows"]
    assert len(rows) == 2 * (4 + 3)
    for allocator in ("default", "keep-pages"):
        machine = found["facts"][allocator]["machine"]
        assert ("malloc" in machine) == (allocator == "keep-pages")
        assert machine["threads"] == "1"
        if lesser:
            assert (machine["instruction_set"], machine["kernels"]) == ("AVX2", "avx2")
        for workload in ("cifar", "cifar-inference"):
            chosen = [r for r in rows if (r["allocator"], r["workload"]) == (allocator, workload)]
            fastest = min(r["seconds"] for r in chosen if not r["implementation"].startswith("fused"))
            assert [r["faster"] for r in chosen] == pytest.approx([fastest / r["seconds"] for r in chosen])
            assert {r["rounds"] for r in chosen} == {2}
    faster = {(r["allocator"], r["workload"], r["implementation"]): r["faster"] for r in rows}
    against = next(t for t in found["targets"] if t["name"].startswith("cifar, default malloc: fused against"))
    assert against["found"] == faster["default", "cifar", "fused"]
    assert "## Tiny: DenseNet-BC(100, k=12), batch 4 of 16x16, float32, training, default malloc" in text
    assert "left out: fused-kept: differs in what is kept for backward" in text
    with open(lines, newline="") as file:
        assert [float(line["seconds"]) for line in csv.DictReader(file)] == [r["seconds"] for r in rows]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert text.strip().endswith(results.report_of(found).body(found).strip())


def test_sweep_of_batches_and_threads(run):
    _, found = run("speed.py", "--sweep", "--quick", "--batch-sizes", "2,8,16", "--threads", "1,2", "--rounds", 2)
    rows = {(r["batch_size"], r["threads"]): r for r in found["rows"]}
    assert rows.keys() == {(size, threads) for size in (2, 8, 16) for threads in (1, 2)}
    least = min(rows[size, 1]["seconds"] / size for size in (8, 16))  # 2 is not among those that shall be flat
    assert rows[2, 1]["over_least"] == pytest.approx(rows[2, 1]["seconds"] / 2 / least)
    assert rows[16, 2]["speedup"] == pytest.approx(rows[16, 1]["seconds"] / rows[16, 2]["seconds"])
    assert found["title"] == find("cifar", tiny=True).title
