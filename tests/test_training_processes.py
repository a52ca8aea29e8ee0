"""train.py in two processes: they do what one process does with the same samples."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_cases as cases

for name in ("sklearn", "safetensors", "tensorboard", "yaml"):
    pytest.importorskip(name)

import train  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from train_in_float64 import build_in_float64  # noqa: E402
from training import engine  # noqa: E402

TRAIN = Path(__file__).with_name("train_in_float64.py")
# No masks: each process draws its own. Small steps: rounding is not to be amplified by a wild start.
NET = "--variant B --drop-rate 0 --depth 10 --growth-rate 4 --se-reduction 2".split()
RECIPE = "--image-size 16 --lr 0.02 --epochs 2 --limit-steps 4 --log-steps 1 --threads 1".split()
WEIGHTS = "checkpoints/step-00000004/model.safetensors"
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def run_alone(folder, monkeypatch, *options):
    """train.py in this process, in float64."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "build", build_in_float64)
        assert train.main(arguments(folder, *options)) == 0


def run(folder, *options):
    """train.py in two processes as a user would start them, in float64."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *torchrun, TRAIN, *arguments(folder, *options)]
    path = os.pathsep.join(filter(None, [str(cases.EXAMPLES), os.environ.get("PYTHONPATH")]))
    environment = {**cases.environment(), "PYTHONPATH": path}
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def arguments(folder, *options):
    return [*NET, *RECIPE, "--output", str(folder), *options]


def results(folder):
    """Weights, running statistics among them, and the rows of metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return load_file(folder / WEIGHTS), rows


def is_running_statistic(name):
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process, plain, with batches of 16."""
    folder = tmp_path_factory.mktemp("whole")
    run_alone(folder, pytest.MonkeyPatch(), "--efficient", "plain", "--batch-size", "16")
    return folder


def test_synchronized_statistics_equal_the_whole_batch(tmp_path, whole, capsys):
    """Two processes of 8 with SyncBatchNorm are one of 16: weights, running statistics, losses and accuracies."""
    run(tmp_path, "--efficient", "fused", "--batch-size", "8", "--sync-bn")
    (weights, rows), (want, want_rows) = results(tmp_path), results(whole)
    torch.testing.assert_close(weights, want, **TOLERANCE)
    for row, want_row in zip(rows, want_rows, strict=True):
        for name in ("epoch", "steps", "train_loss", "validation_loss"):
            assert float(row[name]) == pytest.approx(float(want_row[name]), rel=1e-6), name
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2

    assert train.main(arguments(tmp_path, "--efficient", "fused", "--batch-size", "8", "--sync-bn", "--resume")) == 2
    assert "the number of processes is 1 now and was 2" in capsys.readouterr().err


def test_separate_statistics_equal_accumulated_halves(tmp_path, whole, monkeypatch):
    """Without SyncBatchNorm each process normalizes its own 8: the gradient is that of one process that takes one 8
    after the other. Only the running statistics, which see the halves one by one there, may differ."""
    run(tmp_path / "two", "--efficient", "fused", "--batch-size", "8")
    run_alone(tmp_path / "one", monkeypatch, "--efficient", "fused", "--batch-size", "8", "--accumulate", "2")
    (weights, rows), (want, want_rows) = results(tmp_path / "two"), results(tmp_path / "one")
    other, _ = results(whole)
    trained = [name for name in weights if not is_running_statistic(name)]
    torch.testing.assert_close({n: weights[n] for n in trained}, {n: want[n] for n in trained}, **TOLERANCE)
    assert float(rows[0]["train_loss"]) == pytest.approx(float(want_rows[0]["train_loss"]), rel=1e-6)
    with pytest.raises(AssertionError):  # the tolerance tells halves from the whole
        torch.testing.assert_close({n: weights[n] for n in trained}, {n: other[n] for n in trained}, **TOLERANCE)


def test_synchronized_statistics_of_the_plain_network_need_a_gpu(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--efficient", "plain", "--sync-bn", "--device", "cpu")) == 2
    assert "--efficient fused serves CPUs too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
