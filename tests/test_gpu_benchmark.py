"""The GPU benchmark without a GPU: its formulas, deadlines, records and verdicts, and a rehearsal of the whole."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from decisions import CLEAR, clearness

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_device  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_report  # noqa: E402
import gpu_steps  # noqa: E402
import gpu_targets  # noqa: E402
import gpu_worker  # noqa: E402
import harness  # noqa: E402
import roofline  # noqa: E402
from journal import Findings, Journal  # noqa: E402
from peers import PEERS  # noqa: E402

IMAGENET = roofline.Architecture((6, 12, 24, 16), 32, 224, 64, small_inputs=False, classes=1000)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "part.jsonl")


@pytest.fixture
def device():
    return gpu_device.open_device(simulated=True)


# ---- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", roofline.FORMULAS)
def test_printed_formula_is_the_one_computed(op):
    size = roofline.Size(2, 6, 4, channels=24, bottleneck=32, growth=8, outputs=12)
    names = {"M": 48, "N": 2, "C": 24, "K2": 32, "k": 8, "O": 12, "e": 2, "a": 4}
    text = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", roofline.FORMULAS[op])
    assert roofline.op_bytes(op, size, 2) == eval(text, names)


@pytest.mark.parametrize("op", ["bottleneck_forward", "bottleneck_backward", "conv3x3_forward", "conv3x3_backward"])
def test_operations_are_those_of_the_products(op):
    """2 M C K2, or 9 times 2 M K2 k: once forward, twice backward (gradients of the input and of the weight)."""
    size = roofline.Size(3, 5, 7, channels=24, bottleneck=16, growth=4)
    once = 2 * 105 * (24 * 16 if op.startswith("bottleneck") else 9 * 16 * 4)
    assert roofline.op_flops(op, size) == once * (2 if op.endswith("backward") else 1)


def test_what_computing_an_earlier_bottleneck_again_adds():
    """b is written and the earlier layer's weight read; x is there already. Its product is one more."""
    size = roofline.Size(3, 5, 7, channels=24, bottleneck=16, growth=4)
    joint = replace(size, earlier=20)
    added = roofline.op_bytes("bottleneck_backward", joint, 2) - roofline.op_bytes("bottleneck_backward", size, 2)
    assert added == 105 * 16 * 2 + 16 * 20 * 4
    added = roofline.op_flops("bottleneck_backward", joint) - roofline.op_flops("bottleneck_backward", size)
    assert added == roofline.op_flops("bottleneck_forward", replace(size, channels=20))


def test_bytes_of_a_step_are_near_what_was_designed_for():
    """DenseNet-121, batch 256, bfloat16: 51 to 60 GB with a stem of PyTorch's operators, of which the fused one saves a
    part, and with x read again for every recomputed convolution; without those less."""
    whole = roofline.step_bytes(IMAGENET, 256, 2)
    assert 40e9 < whole < 50e9
    assert roofline.step_bytes(IMAGENET, 256, 2, keep_bottleneck=True) < whole
    assert roofline.step_bytes(IMAGENET, 128, 2) < 0.51 * whole
    assert 1.9 * whole < roofline.step_bytes(IMAGENET, 256, 4) < 2 * whole


def test_floor_is_the_longer_of_bytes_and_operations():
    assert roofline.floor_seconds(100, 1, bandwidth=10, rate=1) == 10
    assert roofline.floor_seconds(10, 30, bandwidth=10, rate=2) == 15


# ---- kernels -----------------------------------------------------------------------------------------------------------


def test_cases_cover_every_op_and_fit_their_buffers():
    for tiny in (False, True):
        cases = gpu_kernels.choose_cases(tiny)
        assert {op for case in cases for op in case.ops} == set(roofline.FORMULAS)
        for case in cases:
            assert case.size.channels + case.size.growth <= case.size.total


@pytest.mark.parametrize("case", gpu_kernels.choose_cases(tiny=True), ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ops_take_the_arguments(case, dtype, device):
    found = {"bandwidth": 1e9, "products": {"float32": 1e9, "bfloat16": 1e9}}
    for op in case.ops:
        row = gpu_kernels.measure_op(device, op, case.size, dtype, found, runs=1)
        assert row["bytes"] == roofline.op_bytes(op, case.size, roofline.STORAGE_BYTES[dtype])
        assert row["of_floor"] == row["floor_seconds"] / row["seconds"]


def test_kernels_out_of_time(device, journal):
    gpu_kernels.measure(device, journal, time.monotonic() - 1, tiny=True)
    found = Findings(journal.path)
    assert found.rows == {}
    assert found.facts["ceilings"]["bandwidth"] > 0
    assert "out of time" in found.notes[0]


def test_op_that_fails_is_a_row(device, journal, monkeypatch):
    def measure_op(device, op, *_, **__):
        if op == "append":
            raise RuntimeError("no such kernel\nand more")
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu_kernels, "measure_op", measure_op)
    gpu_kernels.measure(device, journal, time.monotonic() + 60, tiny=True)
    rows = [row for row in Findings(journal.path).rows.values() if row["op"] == "append"]
    assert [row["error"] for row in rows] == ["RuntimeError: no such kernel"] * 2


# ---- journals and processes --------------------------------------------------------------------------------------------


def test_journal_survives_the_process(journal):
    assert journal.begin("a", net="cifar")
    journal.row("a", seconds=1.0)
    journal.row("a", seconds=2.0, rounds=3)
    journal.begin("b", allow=7, net="densenet121")
    with open(journal.path, "a") as file:
        file.write('{"row": "b", "val')  # killed while it wrote
    found = Findings(journal.path)
    assert (found.current, found.allow, found.cell) == ("b", 7, {"net": "densenet121"})
    assert found.rows == {"a": {"seconds": 2.0, "rounds": 3}}
    again = Journal(journal.path)
    assert not again.begin("a")
    assert not again.begin("b")
    assert again.begin("c")


def test_process_is_ended_at_its_limit(tmp_path):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    process = gpu_checks.Process(sleeping, tmp_path / "log", limit=0.3).wait()
    assert time.monotonic() - started < 20
    assert process.summary()["out_of_time"]
    assert process.summary()["status"] != 0


def test_process_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "GRACE", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    process = gpu_checks.Process([sys.executable, "-c", deaf], tmp_path / "log", limit=2).wait()
    assert process.summary()["status"] == -9
    assert process.tail() == ["on"]


class Scripted(gpu_worker.Worker):
    """A worker that runs a script in place of a benchmark; sys.argv[1] is its journal."""

    script = ""

    def command(self, seconds):
        head = f"import sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from journal import Journal\n"
        return [sys.executable, "-c", head + f"journal = Journal({str(self.journal)!r})\n" + self.script]

    def run_to_end(self):
        end = time.monotonic() + 60
        while not self.poll():
            assert time.monotonic() < end
            time.sleep(0.05)
        return Findings(self.journal)


def scripted(folder, script, monkeypatch):
    monkeypatch.setattr(Scripted, "script", script)
    return Scripted("steps", SimpleNamespace(), folder, 60, {})


def test_worker_that_dies_is_followed_by_one_that_goes_on(tmp_path, monkeypatch):
    script = """
for cell in "abc":
    if journal.begin(cell, net="cifar"):
        if cell == "b":
            sys.exit("illegal memory access")
        journal.row(cell, seconds=1.0)
"""
    found = scripted(tmp_path, script, monkeypatch).run_to_end()
    died = {"net": "cifar", "error": "the process stopped"}
    assert found.rows == {"a": {"seconds": 1.0}, "b": died, "c": {"seconds": 1.0}}
    assert found.notes == ["steps: a process stopped in 'b': illegal memory access"]


def test_worker_that_stands_still_is_replaced(tmp_path, monkeypatch):
    script = """
if journal.begin("a", allow=1):
    time.sleep(60)
journal.begin("b")
journal.row("b", seconds=1.0)
"""
    found = scripted(tmp_path, script, monkeypatch).run_to_end()
    assert found.rows == {"a": {"error": "the process stood still for 1 s"}, "b": {"seconds": 1.0}}


def test_worker_that_cannot_start_is_tried_once(tmp_path, monkeypatch):
    worker = scripted(tmp_path, "raise ImportError('no library')", monkeypatch)
    assert worker.run_to_end().notes == ["steps: a process stopped in 'None': ImportError: no library"]
    assert worker.starts == 1


# ---- deadlines ---------------------------------------------------------------------------------------------------------


def arguments(*words, output="x.json"):
    return gpu.parse_arguments(["--simulate", "cpu", "--output", output, *words])


def test_checks_leave_time_for_the_measurements(tmp_path):
    run = gpu.Run(arguments("--time-limit", "460"), tmp_path)
    assert run.limit("build") == gpu.LIMITS["build"]
    assert run.limit("tests") == gpu.LIMITS["tests"]
    run.end = time.monotonic() + 230  # a long build
    kept = sum(gpu.KEPT_FOR.values())
    assert 0 <= run.limit("tests") <= 230 - kept
    assert run.limit("steps") > gpu.KEPT_FOR["steps"]
    run.end = time.monotonic() - 1
    assert run.limit("kernels") == 0


def test_parts_left_out_get_no_time(tmp_path):
    run = gpu.Run(arguments("--parts", "tests,kernels", "--time-limit", "100"), tmp_path)
    assert 100 - run.limit("tests") < 20
    assert not run.wants("steps")


def test_part_without_time_is_a_note(tmp_path):
    run = gpu.Run(arguments(output=str(tmp_path / "x.json")), tmp_path)
    run.end = time.monotonic() + 1
    gpu.measure(run, "steps", gpu.read_steps)
    assert run.results["notes"][1:] == ["steps: out of time"]


def test_nothing_is_compiled_in_too_little_time(tmp_path, monkeypatch):
    """The compiler would take what is left and have nothing to show; steps are then told that nothing was compiled."""
    monkeypatch.setattr(gpu, "Worker", lambda *_: pytest.fail("a compiler was started"))
    args = gpu.parse_arguments(
        ["--output", str(tmp_path / "x.json"), "--parts", "compile,steps", "--time-limit", "200"]
    )
    run = gpu.Run(args, tmp_path)
    gpu.check(run)
    assert run.results["notes"] == ["compile: not enough time for anything"]
    assert Findings(tmp_path / "compile.jsonl").rows == {} and (tmp_path / "compile.jsonl").exists()


def test_rehearsal_needs_an_output(capsys):
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--simulate"])
    assert "--output" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU.*--simulate"):
        gpu.main()


# ---- tests and compute-sanitizer ---------------------------------------------------------------------------------------


def finished(tmp_path, text, status=0):
    script = f"import sys; print({text!r}); sys.exit({status})"
    return gpu_checks.Process([sys.executable, "-c", script], tmp_path / "log", 60).wait()


def test_junit_summary(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_error(broken): pass\n"
    )
    junit = tmp_path / "junit.xml"
    command = gpu_checks.tests_command(junit, "test", paths=[str(tmp_path / "test_a.py")])
    process = gpu_checks.Process(command, tmp_path / "log", 60).wait()
    found = gpu_checks.tests_summary(process, junit)
    assert (found["passed"], found["failed"], found["skipped"], found["status"]) == (1, 2, 1, 1)
    assert "test_bad: assert 1 == 2" in found["failures"][0]
    junit.unlink()
    again = gpu_checks.tests_summary(process, junit)  # as where pytest was killed
    assert (again["passed"], again["failed"], again["skipped"]) == (1, 2, 1)


def test_verbose_output_of_several_processes():
    text = "[gw3] [ 12%] PASSED tests/test_a.py::test_b[x-1] \n[gw0] [ 13%] FAILED tests/test_a.py::test_c \n"
    assert gpu_checks.read_verbose(text) == {
        "passed": 1,
        "failed": 1,
        "skipped": 0,
        "failures": ["tests/test_a.py::test_c"],
    }


@pytest.mark.parametrize(
    ("said", "errors"),
    [
        ("ERROR SUMMARY: 0 errors", 0),
        ("ERROR SUMMARY: 1 error", 1),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2),
    ],
)
def test_sanitizer_summary(said, errors, tmp_path):
    text = f"========= COMPUTE-SANITIZER\n...\n4 passed, 9 deselected in 3.21s\n========= {said}"
    found = gpu_checks.sanitizer_summary(finished(tmp_path, text))
    assert (found["errors"], found["said"], found["tests"]) == (
        errors,
        said.split(": ", 1)[1],
        "4 passed, 9 deselected",
    )
    assert ("output" in found) == (errors != 0)


def test_sanitizer_that_refuses_the_device_is_no_clean_run(tmp_path):
    found = gpu_checks.sanitizer_summary(finished(tmp_path, "========= Error: Device not supported", status=1))
    assert found["errors"] is None
    assert found["output"] == ["========= Error: Device not supported"]


def test_sanitized_selections_select(tmp_path):
    """On the CPU, where the names differ in the device alone."""
    commands = [gpu_checks.sanitizer_command("sanitizer", tool, "cpu") for tool in gpu_checks.SANITIZED]
    arguments = [[*command[command.index("pytest") + 1 :], "--collect-only"] for command in commands]
    code = f"import pytest\nfor arguments in {arguments}: pytest.main(arguments)"  # one process, which takes seconds
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    counts = [int(count) for count in re.findall(r"(\d+)/\d+ tests collected", done.stdout)]
    assert len(counts) == len(commands) and all(20 < count < 300 for count in counts)


# ---- training steps ----------------------------------------------------------------------------------------------------


def test_shares_add_up():
    assert sum(g.share for g in gpu_steps.choose_groups()) == pytest.approx(1)
    chosen = gpu_steps.choose_groups(["densenet121"])
    assert [g.net for g in chosen] == ["densenet121"] * 2
    assert sum(g.share for g in chosen) == pytest.approx(1)
    assert all(name in PEERS for g in gpu_steps.GROUPS for name in g.implementations)


def test_specs_are_the_published_networks(device):
    groups = {g.net: g for g in gpu_steps.GROUPS}
    model = harness.build_model(gpu_steps.make_spec(groups["densenet121"], "fused", device, "A+B", tiny=False))
    assert sum(p.numel() for p in model.parameters()) == 7978856  # torchvision's densenet121
    cifar = gpu_steps.make_spec(groups["cifar"], "plain", device, "", tiny=False)
    assert sum(p.numel() for p in harness.build_model(cifar).parameters()) == 800032
    assert (cifar.depth, cifar.growth_rate, cifar.size) == (100, 12, 32)


def test_steps_write_rows_and_agree(device, journal):
    names = ("plain", "fused", "fused-graph", "checkpoint")
    masked = gpu_steps.make_spec(gpu_steps.choose_groups(["cifar float32 64"])[0], "plain", device, "A+B", tiny=True)
    for spec in (masked, replace(masked, random=False)):  # else an agreement would be a matter of the instruction set
        assert clearness(harness.build_model(spec), harness.build_batch(spec)[0]) > CLEAR
    gpu_steps.measure(device, journal, time.monotonic() + 300, True, "A+B", ["cifar float32 64"], names)
    gpu_steps.count_kernels(
        device, Journal(journal.path.with_name("p")), time.monotonic() + 60, True, "A+B", ["float32 64"]
    )
    found = Findings(journal.path)
    rows = {row["implementation"]: row for row in found.rows.values() if "implementation" in row}
    assert set(rows) == set(names)
    assert found.rows["cifar float32 64 agreement"]["agrees"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["rounds"] > 0 for row in rows.values())
    assert rows["plain"]["first_loss"] == pytest.approx(rows["fused"]["first_loss"], rel=1e-4)
    counted = Findings(journal.path.with_name("p")).rows
    assert counted["cifar float32 64 fused"]["launches"] > 10


def test_wrong_gradients_are_not_timed(device, journal, monkeypatch):
    monkeypatch.setattr(gpu_steps, "check_gradients", lambda spec_of: {"agrees": False})
    gpu_steps.measure(device, journal, time.monotonic() + 60, True, "A+B", ["cifar float32 64"], ("plain", "fused"))
    rows = Findings(journal.path).rows
    assert "seconds" in rows["cifar float32 64 plain"]
    assert rows["cifar float32 64 fused"]["error"] == "gradients disagree: not timed"


def test_out_of_memory_is_a_result(device, journal, monkeypatch):
    class Step(gpu_steps.GpuStep):
        def run(self):
            if self.spec.implementation == "checkpoint":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().run()

    monkeypatch.setattr(gpu_steps, "GpuStep", Step)
    gpu_steps.measure(device, journal, time.monotonic() + 60, True, "", ["cifar float32 64"], ("plain", "checkpoint"))
    rows = Findings(journal.path).rows
    assert rows["cifar float32 64 checkpoint"]["error"] == "out of memory"
    assert rows["cifar float32 64 plain"]["rounds"] > 0


def test_capture_that_fails_is_left_to_another_process(device, journal, monkeypatch):
    """What was ready before is timed; then this process ends, and the next goes on behind the graph."""

    def capture(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    names = ("plain", "fused-graph", "fused-kept")
    measure = [device, journal, time.monotonic() + 60, True, "", ["cifar float32 64"], names]
    monkeypatch.setattr(device, "capture", capture)
    with pytest.raises(RuntimeError, match="capturing"):
        gpu_steps.measure(*measure)
    rows = Findings(journal.path).rows
    assert rows["cifar float32 64 plain"]["rounds"] > 0
    assert "capturing" in rows["cifar float32 64 fused-graph"]["error"]
    measure[1] = Journal(journal.path)
    gpu_steps.measure(*measure)
    assert Findings(journal.path).rows["cifar float32 64 fused-kept"]["seconds"] > 0


def test_out_of_memory_beside_others_leaves_the_others(device, journal):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    group = gpu_steps.choose_groups(["cifar float32 64"])[0]
    run = gpu_steps.GroupRun(device, journal, group, time.monotonic() + 60, True, "", None)
    run.time({"plain": gpu_steps.Sample(lambda: None, 2), "fused": gpu_steps.Sample(fail, 1)})
    rows = Findings(journal.path).rows
    assert rows["cifar float32 64 plain"]["steps_a_round"] == 2
    assert "out of memory" in rows["cifar float32 64 fused"]["error"]


def test_error_limit():
    assert gpu_steps.error_limit(1e-6) == pytest.approx(1e-3, rel=0.01)
    assert gpu_steps.error_limit(0.1) == pytest.approx(0.301)
    assert gpu_steps.error_limit(0.4) == 0.9
    assert not float("nan") <= gpu_steps.error_limit(0.4)


# ---- verdicts and tables -----------------------------------------------------------------------------------------------


def made_up_rows():
    def row(net, dtype, batch, implementation, ms, peak):
        keys = {"net": net, "dtype": dtype, "batch_size": batch, "implementation": implementation}
        figures = {"seconds": ms / 1e3, "seconds_20": ms / 1.1e3, "seconds_80": ms / 0.9e3, "rounds": 5}
        return keys | figures | {"peak_bytes": peak, "kept_bytes": peak, "variant": "A+B", "size": 32}

    return [
        row("densenet121", "bfloat16", 256, "plain", 90.0, 9e9),
        row("densenet121", "bfloat16", 256, "plain-channels-last", 44.0, 9e9),
        row("densenet121", "bfloat16", 256, "compile", 25.0, 8e9),
        row("densenet121", "bfloat16", 256, "fused", 30.0, 1e9),
        row("densenet121", "bfloat16", 256, "fused-channels-last", 20.0, 1e9),
        row("cifar", "float32", 64, "plain", 30.0, 2000e6),
        row("cifar", "float32", 64, "checkpoint", 40.0, 400e6),
        row("cifar", "float32", 64, "fused", 14.0, 200e6),
        row("cifar", "float32", 64, "fused-graph", 10.0, 210e6),
        {"net": "cifar", "dtype": "float32", "batch_size": 64, "implementation": "compile", "error": "out of memory"}
        | {"variant": "A+B", "size": 32},
    ]


def test_targets():
    targets = gpu_targets.evaluate(made_up_rows(), 3e12, {"densenet121": IMAGENET})
    found = {t.name: (t.found, t.verdict) for t in targets}
    assert found["DenseNet-121 bf16: times faster than plain"] == (pytest.approx(2.2), "reached")
    assert found["DenseNet-121 bf16: times faster than torch.compile"] == (pytest.approx(1.25), "missed")
    floor = roofline.step_bytes(IMAGENET, 256, 2) / 3e12
    assert found["DenseNet-121 bf16: times the byte roofline"] == (pytest.approx(0.020 / floor), "reached")
    assert found["CIFAR batch 64 fp32: CUDA graph, times faster than plain"] == (pytest.approx(3), "reached")
    assert found["CIFAR batch 64 bf16: CUDA graph, times faster than plain"] == (None, "not measured")
    assert found["CIFAR fp32: plain peak over fused peak"] == (pytest.approx(10), "reached")
    assert found["CIFAR fp32: checkpoint peak over fused peak"] == (pytest.approx(2), "missed")


def test_tables_and_files(tmp_path):
    kernel = {"op": "append", "case": "cifar 8x8", "dtype": "float32", "seconds": 1e-5, "seconds_20": 9e-6}
    kernel |= {"seconds_80": 2e-5, "host_seconds": 1e-5, "bytes": 1e6, "flops": 0, "floor_seconds": 1e-6}
    errors = {"outputs": 1e-6, "gradients": 1e-4}
    results = {
        "machine": {"name": "NVIDIA Example"},
        "build": {"status": 0, "seconds": 60.0, "out_of_time": False},
        "tests": {"status": 1, "seconds": 9.0, "out_of_time": False, "passed": 5, "failed": 1, "failures": ["a::b: c"]},
        "sanitizer": {"memcheck": {"said": "0 errors", "tests": "4 passed"}, "racecheck": {"skipped": "not there"}},
        "steps": made_up_rows(),
        "agreement": {"cifar float32 64 agreement": dict.fromkeys(gpu_report.AGREEMENT, errors) | {"agrees": True}},
        "kernels": [
            kernel | {"of_floor": 0.1, "bound": "bytes"},
            {"op": "head", "case": "x", "dtype": "y", "error": "no"},
        ],
        "ceilings": {"bandwidth": 4.3e12, "products": {"bfloat16": 7e14}},
        "targets": gpu_targets.as_rows(gpu_targets.evaluate(made_up_rows())),
        "notes": ["steps: out of time before the last"],
    }
    gpu_report.write(tmp_path / "x.json", results)
    assert json.loads((tmp_path / "x.json").read_text()) == results
    text = (tmp_path / "x.md").read_text()
    assert text.startswith("# Training on NVIDIA Example")
    line = next(line for line in text.splitlines() if line.startswith("| fused, images channels last "))
    assert re.split(r" *\| *", line)[2:6] == ["20.00", "18.18-22.22", "2.20x", ""]
    for expected in ("out of memory", "MISSED", "4300 GB/s", "| append", "a::b: c", "0 errors (4 passed)", "not there"):
        assert expected in text
    assert not list(tmp_path.glob("*.new"))


def test_failed_build_leaves_results(tmp_path):
    """Where nothing is built, the files are written all the same."""
    results = {"machine": {"name": "NVIDIA Example", "driver": "1"}, "notes": []}
    results["build"] = {"status": 1, "seconds": 3.0, "out_of_time": False}
    gpu_report.write(tmp_path / "x.json", results)
    assert "failed with status 1" in (tmp_path / "x.md").read_text()


def test_file_name():
    assert gpu.slug("NVIDIA GeForce RTX 3060") == "nvidia-geforce-rtx-3060"


# ---- lines that only a GPU runs ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """A CudaDevice over stand-ins that record what is called, in order."""
    calls = []

    def recorder(name, result=None):
        def record(*args, **kwargs):
            calls.append(name)
            return result

        return record

    @contextmanager
    def within(name):
        calls.append(f"{name} {{")
        yield
        calls.append("}")

    event = MagicMock(elapsed_time=lambda other: 250.0, record=recorder("record"), synchronize=recorder("wait"))
    stream = MagicMock(wait_stream=recorder("wait_stream"))
    properties = SimpleNamespace(name="NVIDIA Example", total_memory=80e9, major=9, minor=0, multi_processor_count=132)
    for name, value in {
        "get_device_properties": lambda index: properties,
        "synchronize": recorder("synchronize"),
        "empty_cache": recorder("empty_cache"),
        "reset_peak_memory_stats": recorder("reset"),
        "memory_allocated": recorder("allocated", 100),
        "memory_reserved": recorder("reserved", 1000),
        "max_memory_allocated": recorder("max_allocated", 160),
        "max_memory_reserved": recorder("max_reserved", 1500),
        "Event": lambda enable_timing: event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: within("stream"),
        "CUDAGraph": lambda: MagicMock(replay=recorder("replay")),
        "graph": lambda g, stream: within("graph"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    device = gpu_device.CudaDevice()
    device.calls = calls
    device.recorder = recorder
    return device


def test_capture_follows_the_recipe(cuda):
    """Warm-up on a side stream, gradients None before the capture, and the capture on that stream."""
    replay = cuda.capture(cuda.recorder("step"), cuda.recorder("zero_grad"), warm_up=2)
    before, inside = cuda.calls[: cuda.calls.index("graph {")], cuda.calls[cuda.calls.index("graph {") :]
    assert before == ["wait_stream", "stream {", "step", "step", "}", "wait_stream", "synchronize", "zero_grad"]
    assert inside == ["graph {", "step", "}"]
    replay()
    assert cuda.calls[-1] == "replay"


def test_device_time_is_between_two_events(cuda):
    assert cuda.seconds(cuda.recorder("step")) == 0.25
    assert cuda.calls == ["synchronize", "record", "step", "record", "wait"]


def test_flush_outlasts_the_host(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "_flush_buffer", lambda: cuda.recorder("flush"))
    cuda.seconds_after_flush(cuda.recorder("op"), host_seconds=0.3)
    assert cuda.calls.count("flush") == 2 + 1 + 2  # to warm up, to time it (0.25 s), and for at least twice 0.3 s
    assert cuda.calls[-5:] == ["flush", "record", "op", "record", "wait"]


def test_peak_is_over_what_was_there(cuda):
    assert cuda.peak(cuda.recorder("step")) == (60, 500)
    order = [cuda.calls.index(name) for name in ("empty_cache", "reset", "allocated", "step", "max_allocated")]
    assert order == sorted(order)


def test_kernels_are_counted_without_copies_and_annotations(cuda, monkeypatch):
    def event(name, start, nanoseconds, device=torch.autograd.DeviceType.CUDA, annotation=False):
        values = {"name": name, "start_ns": start, "duration_ns": nanoseconds, "device_type": device}
        values["is_user_annotation"] = annotation
        return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})

    events = [
        event("bottleneck", 100, 4000),
        event("bottleneck", 5000, 2100),  # started early: waits for conv
        event("conv", 4100, 1000),
        event("Memset (Device)", 7000, 500),
        event("Optimizer.step#SGD.step", 0, 9000, annotation=True),
        event("aten::relu", 0, 9000, torch.autograd.DeviceType.CPU),
    ]
    results = MagicMock()
    results.profiler.kineto_results.events.return_value = events

    @contextmanager
    def profile(activities):
        yield results

    monkeypatch.setattr(gpu_device, "profile", profile)
    found = cuda.kernels(cuda.recorder("step"))
    assert (found["launches"], found["busy_seconds"]) == (3, pytest.approx(7e-6))
    assert found["longest_kernels"][0] == {"name": "bottleneck", "launches": 2, "us": 6.0}


def test_device_is_described(cuda):
    described = cuda.describe()
    assert (described["name"], described["capability"]) == ("NVIDIA Example", "9.0")
    assert all(isinstance(value, str) for value in described.values())
    assert described.keys() == gpu_device.open_device(simulated=True).describe().keys()


def test_device_is_lost_where_it_cannot_be_waited_for(cuda, monkeypatch):
    assert not cuda.lost()

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert cuda.lost()


def test_real_events_have_what_is_asked_of_them():
    """The profiler's events of this torch, of which the stand-ins above are copies."""
    from torch._C._autograd import _KinetoEvent

    assert all(hasattr(_KinetoEvent, name) for name in ("name", "duration_ns", "device_type", "is_user_annotation"))
    names = ("graph", "CUDAGraph", "Stream", "Event", "max_memory_reserved", "reset_peak_memory_stats", "empty_cache")
    assert all(hasattr(torch.cuda, name) for name in names)


# ---- rehearsals --------------------------------------------------------------------------------------------------------


def rehearse(tmp_path, *words, environment=None):
    output = tmp_path / "rehearsal.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--output", output, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


def check_rehearsal(results, text):
    assert results["build"] == {"skipped": "simulated: skipped"}
    assert results["tests"]["failed"] == 0 < results["tests"]["passed"]
    assert all("error" not in row for row in results["kernels"])
    assert {row["op"] for row in results["kernels"]} == set(roofline.FORMULAS)
    assert {row["implementation"] for row in results["steps"]} == {"plain", "fused-graph", "compile"}
    assert all(row["seconds"] > 0 for row in results["steps"])
    assert all(row["launches"] >= 0 for row in results["steps"] if row["implementation"] != "compile")
    assert results["agreement"]["cifar float32 64 agreement"]["agrees"]
    assert len(results["targets"]) == 7
    for name in ("Targets", "Training steps", "Kernels", "Build and tests"):
        assert f"## {name}" in text


SMALL = ("--groups", "cifar float32 64", "--implementations", "plain,fused-graph,compile", "--time-limit", "170")


@pytest.mark.slow
@pytest.mark.skipif("DENSENET_EXT_LIBRARY" in os.environ, reason="this is the simulated device")
def test_rehearsal_on_the_cpus_own_kernels(tmp_path):
    check_rehearsal(*rehearse(tmp_path, "--simulate", "cpu", *SMALL))


@pytest.mark.slow
@pytest.mark.skipif("DENSENET_EXT_LIBRARY" not in os.environ, reason="the simulated device is not built")
def test_rehearsal_on_the_simulated_device(tmp_path):
    check_rehearsal(*rehearse(tmp_path, "--simulate", "simt", *SMALL))
