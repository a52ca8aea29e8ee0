"""gpu.py: deadlines of its parts, what its checks say, and a rehearsal of the whole."""

import os
import re
import subprocess
import sys
import time

import gpu
import pytest
import torch
from bench import ROOT, results
from bench.gpu import checks
from bench.gpu import run as gpu_run
from bench.roofline import FORMULAS
from bench.runner.journal import Findings
from bench.runner.process import Process


@pytest.fixture
def run_of(tmp_path):
    """A run with these words on its command line, simulated unless told."""

    def run_of(*words, simulate=("--simulate", "cpu")):
        args = gpu.parse_arguments([*simulate, "--output", str(tmp_path / "x.json"), *words])
        return gpu_run.Run(args, tmp_path)

    return run_of


def test_checks_leave_time_for_the_measurements(run_of):
    run = run_of("--time-limit", "460")
    for part in ("build", "tests"):
        assert run.limit(part) == gpu_run.LIMITS[part]
    run.end = time.monotonic() + 230  # a long build
    assert 0 <= run.limit("tests") <= 230 - sum(gpu_run.RESERVED.values())
    assert run.limit("steps") > gpu_run.RESERVED["steps"]
    run.end = time.monotonic() - 1
    assert run.limit("kernels") == 0


def test_parts_left_out_get_no_time(run_of):
    run = run_of("--parts", "tests,kernels", "--time-limit", "100")
    assert 100 - run.limit("tests") < 20
    assert not run.wants("steps")


def test_part_without_time_is_a_note(run_of):
    run = run_of()
    run.end = time.monotonic() + 1
    run.measure("steps", gpu_run.read_steps)
    assert run.results["notes"][1:] == ["steps: out of time"]


def test_nothing_is_compiled_in_too_little_time(run_of, tmp_path, monkeypatch):
    """The compiler would take what is left and have nothing to show; steps are told that nothing was compiled."""
    monkeypatch.setattr(gpu_run, "Worker", lambda *_: pytest.fail("a compiler was started"))
    run = run_of("--parts", "compile,steps", "--time-limit", "200", simulate=())
    run.check()
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


def test_failed_build_leaves_results(tmp_path):
    """The files are written where nothing is built, too."""
    found = {"benchmark": "gpu", "machine": {"name": "NVIDIA Example", "driver": "1"}, "notes": []}
    found["build"] = {"status": 1, "seconds": 3.0, "out_of_time": False}
    results.write_json(tmp_path / "x.json", found)
    assert "failed with status 1" in (tmp_path / "x.md").read_text()


def test_folder_name():
    assert gpu_run.slug("NVIDIA GeForce RTX 3060") == "nvidia-geforce-rtx-3060"


def finished(tmp_path, text, status=0):
    script = f"import sys; print({text!r}); sys.exit({status})"
    return Process([sys.executable, "-c", script], tmp_path / "log", 60).wait()


def test_summary_of_tests(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_error(broken): pass\n"
    )
    command = checks.tests_command("test", paths=[str(tmp_path / "test_a.py")])
    found = checks.tests_summary(Process(command, tmp_path / "log", 60, checks.TESTS_ENVIRONMENT).wait())
    assert (found["passed"], found["failed"], found["skipped"], found["status"]) == (1, 2, 1, 1)
    assert [text.split("::")[1] for text in found["failures"]] == [
        "test_bad: assert 1 == 2",
        "test_error: ValueError: broken",
    ]


def test_verbose_output_of_several_processes():
    """It was ended in the middle, so it has no summary."""
    text = "[gw3] [ 12%] PASSED tests/test_a.py::test_b[x-1] \n[gw0] [ 13%] FAILED tests/test_a.py::test_c \n"
    failures = ["tests/test_a.py::test_c"]
    assert checks.read_verbose(text) == {"passed": 1, "failed": 1, "skipped": 0, "failures": failures}


REFUSED = "========= Error: Device not supported"
SANITIZED = {  # output: (exit status, errors, last words of the tool, of the tests)
    "ERROR SUMMARY: 0 errors": (0, 0, "0 errors", "4 passed, 9 deselected"),
    "ERROR SUMMARY: 1 error": (0, 1, "1 error", "4 passed, 9 deselected"),
    "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)": (
        *(0, 2, "2 hazards displayed (1 error, 1 warning)", "4 passed, 9 deselected"),
    ),
    REFUSED: (1, None, None, None),  # no clean run
}


@pytest.mark.parametrize("said", SANITIZED)
def test_sanitizer_summary(said, tmp_path):
    status, *expected = SANITIZED[said]
    text = f"========= COMPUTE-SANITIZER\n...\n4 passed, 9 deselected in 3.21s\n========= {said}"
    found = checks.sanitizer_summary(finished(tmp_path, said if said == REFUSED else text, status))
    assert [found["errors"], found["said"], found["tests"]] == expected
    assert ("output" in found) == (found["errors"] != 0)
    assert said != REFUSED or found["output"] == [REFUSED]


def test_sanitized_selections_select():
    """On the CPU, where the names differ in the device alone."""
    commands = [checks.sanitizer_command("sanitizer", tool, "cpu") for tool in checks.SANITIZED]
    arguments = [[*command[command.index("pytest") + 1 :], "--collect-only"] for command in commands]
    code = f"import pytest\nfor arguments in {arguments}: pytest.main(arguments)"  # one process, which takes seconds
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    counts = [int(count) for count in re.findall(r"(\d+)/\d+ tests collected", done.stdout)]
    assert len(counts) == len(commands) and all(20 < count < 300 for count in counts)


SIMULATED = "DENSENET_EXT_LIBRARY" in os.environ


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(SIMULATED, reason="this is the simulated device")),
        pytest.param("simt", marks=pytest.mark.skipif(not SIMULATED, reason="the simulated device is not built")),
    ],
)
def test_rehearsal(run_process, tmp_path, device):
    names = ("plain", "fused-graph", "compile-channels-last")
    _, found = run_process("gpu.py", "--simulate", device, "--groups", "cifar float32 64", "--implementations",
                           ",".join(names), "--time-limit", 170, option="--output")  # fmt: skip
    assert found["build"] == {"skipped": "simulated: skipped"}
    assert found["tests"]["failed"] == 0 < found["tests"]["passed"]
    assert all("error" not in row for row in found["kernels"])
    assert {row["op"] for row in found["kernels"]} == set(FORMULAS)
    assert {row["implementation"] for row in found["steps"]} == set(names)
    assert all(row["seconds"] > 0 for row in found["steps"])
    assert all(row["launches"] >= 0 for row in found["steps"] if not row["implementation"].startswith("compile"))
    assert found["agreement"]["cifar float32 64 agreement"]["agrees"]
    assert len(found["targets"]) == 7
    text = (tmp_path / "results.md").read_text()
    for name in ("Targets", "Training steps", "Kernels", "Build and tests"):
        assert f"## {name}" in text
