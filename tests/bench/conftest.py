"""Journals, the simulated device, and benchmarks as a user starts them, on tiny sizes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from bench import BENCHMARKS
from bench.environment import HUGE_PAGES
from bench.gpu.device import open_device
from bench.runner.journal import Journal

import densenet_ext


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "default.jsonl")


@pytest.fixture
def device():
    return open_device(simulated=True)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, which has torch loaded already; returns its output and its results.

    No command may start over: that would be the end of the tests.
    """

    def restarted(*_):
        raise AssertionError("the command replaced the process")

    monkeypatch.setattr(os, "execve", restarted)
    for name, value in HUGE_PAGES.items():
        monkeypatch.setenv(name, value)

    def run(script, *arguments):
        path, file = BENCHMARKS / script, tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments), "--json", str(file)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


@pytest.fixture
def run_process(tmp_path):
    """Runs a command in a process of its own, which takes the package that is tested; returns output and results."""

    def run(script, *arguments, option="--json"):
        path = [str(Path(densenet_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        file = tmp_path / "results.json"
        command = [sys.executable, BENCHMARKS / script, *arguments, option, file]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads(file.read_text())

    return run
