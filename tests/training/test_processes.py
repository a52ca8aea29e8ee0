"""train.py in two processes: they do what one process does with the same samples."""

import csv
import os
import sys

import pytest
import torch
import train
import train_in_float64
import training_cases as cases
from training import engine

# No masks: each process draws its own. Small steps: rounding is not to be amplified by a wild start.
NET = "--variant B --drop-rate 0 --depth 10 --growth-rate 4 --se-reduction 2".split()
RECIPE = "--image-size 16 --lr 0.02 --epochs 2 --limit-steps 4 --log-steps 1 --threads 1".split()
WEIGHTS = "checkpoints/step-00000004/model.safetensors"
HALVES = ["--efficient", "fused", "--batch-size", "8"]
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


def arguments(folder, *options):
    return [*NET, *RECIPE, "--output", str(folder), *options]


def results(folder):
    """Return the weights, running statistics among them, and the rows of metrics.csv."""
    from safetensors.torch import load_file

    with open(folder / "metrics.csv", newline="") as file:
        return load_file(folder / WEIGHTS), list(csv.DictReader(file))


def run_alone(folder, *options):
    """Run train.py in this process, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "build", train_in_float64.build_in_float64)
        assert train.main(arguments(folder, *options)) == 0
    return results(folder)


def run_two(folder, *options):
    """Run train.py in two processes as a user would start them, in float64."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    path = os.pathsep.join(filter(None, [str(cases.EXAMPLES), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *torchrun, train_in_float64.__file__, *arguments(folder, *options)]
    done = cases.start(*command, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return results(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and rows of one process, plain, with batches of 16."""
    return run_alone(tmp_path_factory.mktemp("whole"), "--efficient", "plain", "--batch-size", "16")


def test_synchronized_statistics_equal_the_whole_batch(tmp_path, whole, capsys):
    """Two processes of 8 with SyncBatchNorm are one of 16: weights, running statistics, losses and accuracies."""
    (weights, rows), (want, want_rows) = run_two(tmp_path, *HALVES, "--sync-bn"), whole
    torch.testing.assert_close(weights, want, **TOLERANCE)
    for row, want_row in zip(rows, want_rows, strict=True):
        for name in ("epoch", "steps", "train_loss", "validation_loss"):
            assert float(row[name]) == pytest.approx(float(want_row[name]), rel=1e-6), name
    assert cases.summary(tmp_path)["processes"] == 2

    assert train.main(arguments(tmp_path, *HALVES, "--sync-bn", "--resume")) == 2
    assert "the number of processes is 1 now and was 2" in capsys.readouterr().err


def test_separate_statistics_equal_accumulated_halves(tmp_path, whole):
    """Without SyncBatchNorm each process normalizes its own 8: the gradient is that of one process that takes one 8
    after the other. Only the running statistics, which see the halves one by one there, may differ."""
    weights, rows = run_two(tmp_path / "two", *HALVES)
    want, want_rows = run_alone(tmp_path / "one", *HALVES, "--accumulate", "2")

    def trained(weights):
        return {name: tensor for name, tensor in weights.items() if "running_" not in name and "num_" not in name}

    torch.testing.assert_close(trained(weights), trained(want), **TOLERANCE)
    assert float(rows[0]["train_loss"]) == pytest.approx(float(want_rows[0]["train_loss"]), rel=1e-6)
    with pytest.raises(AssertionError):  # the tolerance tells halves from the whole
        torch.testing.assert_close(trained(weights), trained(whole[0]), **TOLERANCE)


def test_synchronized_statistics_of_the_plain_network_need_a_gpu(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--efficient", "plain", "--sync-bn", "--device", "cpu")) == 2
    assert "--efficient fused serves CPUs too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
