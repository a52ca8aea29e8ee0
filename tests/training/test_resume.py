"""A run that was cut off goes on as if nothing had happened, and nothing half written is ever taken for whole."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import train
import training_cases as cases
from training import checkpoint, engine, options, run_folder
from training.errors import UserError

RUN = ["--lr", "0.05", "--epochs", "2"]  # of 39 steps


def assert_same_run(folder, other):
    """Assert that weights, optimizer, generators, losses and best epoch are equal, bit by bit."""
    assert cases.weights(folder) == cases.weights(other)
    assert cases.rows(folder) == cases.rows(other)
    assert cases.scalars(folder, "train/loss") == cases.scalars(other, "train/loss")
    one, two = (checkpoint.load(run / "checkpoints") for run in (folder, other))
    for saved in (one, two):
        for key in ("seconds", "waited", "peak_memory", "train_seconds", "rows", "best"):
            del saved["state"][key]
    for key in ("weights", "optimizer", "generators"):
        torch.testing.assert_close(one.pop(key), two.pop(key), rtol=0, atol=0)
    assert one == two


def interrupt_at(monkeypatch, step):
    """Press Ctrl-C before step number `step`."""
    take_step = engine.Trainer._step

    def interrupted(self, batches):
        if self.state.step == step - 1:
            raise KeyboardInterrupt
        take_step(self, batches)

    monkeypatch.setattr(engine.Trainer, "_step", interrupted)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of RUN that is not cut off, with checkpoints every 5 steps."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    cases.train(folder, *RUN, "--checkpoint-steps", 5)
    return folder


@pytest.fixture
def half(complete, tmp_path, monkeypatch):
    """A run like `complete`, but cut off before step 50: with checkpoints of steps 40 and 45."""
    folder = tmp_path / "half"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 50)
        assert train.main([*cases.SMALL, *RUN, "--checkpoint-steps", "5", "--output", str(folder)]) == 130
    assert cases.checkpoints(folder) == ["step-00000040", "step-00000045"]
    return folder


def resume(folder, *arguments):
    return train.main([*cases.SMALL, *RUN, "--checkpoint-steps", "5", "--output", str(folder), "--resume", *arguments])


def snapshot(folder):
    """Return the content of all checkpoints."""
    return {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}


def assert_refused(capsys, folder, *messages, arguments=()):
    """Assert that the run is not resumed, that the message is complete, and that its checkpoints are untouched."""
    content = snapshot(folder)
    assert resume(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages) and "Traceback" not in error, error
    assert snapshot(folder) == content and not cases.temporary_files(folder)


OPTIONS = {
    "fused": [],
    "plain dropout": ["--variant", "vanilla"],
    "checkpointed": ["--variant", "A+B", "--efficient", "checkpoint"],
    "accumulation": ["--accumulate", "3", "--clip-norm", "1"],
    "bf16": ["--amp", "bf16"],
    "fp16 with a scaler": ["--amp", "fp16"],
    "channels last": ["--channels-last", "--log-steps", "7"],
    "worker processes": ["--data-in", "workers", "--workers", "1", "--flip"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_run_is_the_uninterrupted_one(options, tmp_path, monkeypatch):
    """Cut off within the second epoch, between two checkpoints."""
    options = [*RUN, "--checkpoint-steps", "4", *options]
    steps = 13 if "--accumulate" in options else 39
    cases.train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, steps + 10)
        assert train.main([*cases.SMALL, *options, "--output", str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut" / "summary.json").exists()
    cases.train(tmp_path / "cut", *options, "--resume")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_limit_of_steps_is_no_difference_in_the_end(complete, tmp_path, capsys):
    """Two ends within an epoch: the rows and best weights that they add do not survive the next start."""
    for limit, epochs in ((13, 1), (39, 1), (44, 2), (78, 2)):
        arguments = ["--limit-steps", str(limit)] if limit < 78 else []
        assert resume(tmp_path / "run", *arguments) == 0
        assert len(cases.rows(tmp_path / "run")) == epochs
    assert_same_run(tmp_path / "run", complete)
    assert capsys.readouterr().out.count("test accuracy") == 4


def test_finished_run_can_be_finished_again(complete, tmp_path):
    shutil.copytree(complete, tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").unlink()
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", complete)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL twice, SIGTERM once; each at any moment after the next checkpoint has been written."""
    options = ["--lr", "0.05", "--epochs", "9", "--checkpoint-steps", "3"]
    cases.train(tmp_path / "whole", *options)
    folder = tmp_path / "killed"
    arguments = [*cases.SMALL, *options, "--output", folder, "--resume"]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        newest = cases.checkpoints(folder)[-1:]
        command = cases.command("train.py", *arguments)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while cases.checkpoints(folder)[-1:] == newest and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == (-number if number == signal.SIGKILL else 143), error
        if number == signal.SIGTERM:
            assert "terminated; the same command with --resume goes on" in error and "Traceback" not in error
            assert not cases.temporary_files(folder)
    assert not (folder / "summary.json").exists()
    time.sleep(1)  # TensorBoard orders its files by the second in which they were begun
    cases.train(folder, *options, "--resume")
    assert_same_run(folder, tmp_path / "whole")
    assert not cases.temporary_files(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_writer_holds_its_lock(tmp_path, monkeypatch, number):
    """It waits until all scalars of the step are handed over: after a lock that is left in the middle nothing ever ends."""
    from torch.utils.tensorboard import SummaryWriter

    add, handed_over = SummaryWriter.add_scalar, []

    def interrupted(self, tag, value, step):
        if step == 50:
            signal.raise_signal(number)
        add(self, tag, value, step)
        handed_over.append((tag, step))

    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupted)
    assert train.main([*cases.SMALL, *RUN, "--output", str(tmp_path)]) == 128 + number
    assert handed_over[-2:] == [("train/loss", 50), ("train/learning_rate", 50)]


def test_two_newest_are_kept_and_temporary_ones_deleted(half):
    unfinished = half / "checkpoints" / ".step-00000050.tmp"  # of a process that was killed while writing
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert resume(half) == 0
    assert cases.checkpoints(half) == ["step-00000075", "step-00000078"]
    assert not cases.temporary_files(half)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_damaged_checkpoint(half, complete, capsys):
    """One bit is flipped, one byte cut off, or a file missing; and what the message says to do helps."""
    newest = half / "checkpoints" / "step-00000045"
    for damage in (flip, truncate, Path.unlink):
        for name in ("model.safetensors", "state.pt", "manifest.json"):
            content = (newest / name).read_bytes()
            damage(newest / name)
            assert_refused(capsys, half, str(newest / name), f"delete the folder {newest}", "step-00000040")
            (newest / name).write_bytes(content)
    flip(newest / "model.safetensors")
    shutil.rmtree(newest)
    assert resume(half) == 0
    assert_same_run(half, complete)


def test_no_other_checkpoint_to_go_on_from(half, capsys):
    shutil.rmtree(half / "checkpoints" / "step-00000040")
    flip(half / "checkpoints" / "step-00000045" / "state.pt")
    assert_refused(capsys, half, "start from the beginning")


def test_no_room_for_a_checkpoint(half, complete, monkeypatch, capsys):
    """The disk fills up at the second file."""
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:  # metrics.csv, best.safetensors and the three descriptions have been written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_refused(capsys, half, "could not be written: No space left on device")
    assert resume(half) == 0
    assert_same_run(half, complete)


def test_file_size_limit(half, complete, capsys):
    """The system cuts a write short: the limit is below the size of a checkpoint, above that of all else."""
    limit = (half / "checkpoints" / "step-00000045" / "state.pt").stat().st_size - 1000
    assert limit > (half / "best.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    path = half / "checkpoints" / "step-00000050"
    try:
        assert_refused(capsys, half, f"{path} could not be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resume(half) == 0
    assert_same_run(half, complete)


@pytest.mark.parametrize("change", ["--lr 0.1", "--depth 16", "--variant A+B", "--batch-size 16", "--epochs 3"])
def test_other_mathematics(complete, change, capsys):
    assert_refused(capsys, complete, *change.split(), "when the run in", arguments=change.split())


def test_every_option_is_either_fixed_or_free():
    """A new option has to be put on one side."""
    free = "data download data_in workers efficient keep_bottleneck device threads compile cuda_graph channels_last "
    free += "deterministic config output resume limit_steps checkpoint_steps log_steps"
    assert sorted(vars(options.parse([]))) == sorted([*options.FIXED, *free.split()])


def test_other_data(half, capsys):
    """The splits of the run are checked, not only the options that they follow from."""
    path = half / "splits.json"
    path.write_text(path.read_text().replace("[0, ", "[", 1))
    assert_refused(capsys, half, "splits.json")


def test_other_devices_and_speeds_may_be_chosen(half):
    """The fused implementation may be replaced by the plain one, logging and workers may change: the run ends well."""
    assert resume(half, "--efficient", "plain", "--log-steps", "3", "--data-in", "memory", "--channels-last") == 0
    assert len(cases.rows(half)) == 2


def test_folder_with_a_run(half, capsys):
    content = snapshot(half)
    assert train.main([*cases.SMALL, *RUN, "--output", str(half)]) == 2
    assert f"{half} already holds a run: add --resume" in capsys.readouterr().err
    assert snapshot(half) == content


def test_resume_without_a_run_starts_one(tmp_path, complete):
    assert resume(tmp_path / "new") == 0
    assert_same_run(tmp_path / "new", complete)


def test_checkpoint_of_a_bad_state_is_not_written(half, monkeypatch, capsys):
    """A weight becomes infinite in a step whose own loss was still finite, and a checkpoint is due."""
    take_step = engine.Trainer._step

    def spoiled(self, batches):
        take_step(self, batches)
        if self.state.step == 49:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(engine.Trainer, "_step", spoiled)
    message = "a weight is infinite or not a number after step 50, in epoch 2"
    assert_refused(capsys, half, message, "step-00000045")


def test_checkpoints_hold_plain_values_and_the_names_of_the_model(complete):
    """Weights load into the plain model, the rest without running code."""
    from densenet_ext import DenseNetBC

    found = checkpoint.load(complete / "checkpoints")
    model = DenseNetBC.variant("A+B", depth=10, growth_rate=4, num_classes=10, in_channels=1)
    model.load_state_dict(found["weights"])
    state = torch.load(checkpoint.paths(complete / "checkpoints")[-1] / "state.pt", weights_only=True)
    assert state["options"]["lr"] == 0.05 and state["state"]["step"] == 78
    with pytest.raises(UserError, match="not the folder of a run"):
        run_folder.read_run(complete / "checkpoints", "best", "cpu")
