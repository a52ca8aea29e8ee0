"""A run that was cut off goes on as if nothing had happened, and nothing half written is ever taken for whole."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
import training_cases as cases

for name in ("sklearn", "safetensors", "tensorboard", "yaml"):
    pytest.importorskip(name)

import train  # noqa: E402
from training import checkpoint, engine, run_folder  # noqa: E402
from training.errors import UserError  # noqa: E402

RUN = ["--lr", "0.05", "--epochs", "2"]  # of 39 steps


def assert_same_run(folder, other):
    """Weights, optimizer, generators, losses and best epoch are the same, bit by bit."""
    assert cases.weights(folder) == cases.weights(other)
    assert cases.rows(folder) == cases.rows(other)
    assert cases.scalars(folder, "train/loss") == cases.scalars(other, "train/loss")
    one, two = (checkpoint.load(run / "checkpoints").state for run in (folder, other))
    for saved in (one, two):
        for key in ("seconds", "waited", "peak_memory", "train_seconds", "rows", "best"):
            del saved["state"][key]
    for key in ("optimizer", "generators"):
        torch.testing.assert_close(one.pop(key), two.pop(key), rtol=0, atol=0)
    assert one == two


def interrupt_at(monkeypatch, step):
    """Ctrl-C before step number `step`."""
    take_step = engine.Trainer._step

    def interrupted(self, batches):
        if self.state.step == step - 1:
            raise KeyboardInterrupt
        take_step(self, batches)

    monkeypatch.setattr(engine.Trainer, "_step", interrupted)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of RUN that was not cut off, with checkpoints every 5 steps."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    cases.train(folder, *RUN, "--checkpoint-steps", 5)
    return folder


@pytest.fixture
def half(complete, tmp_path, monkeypatch):
    """The same run, cut off before step 50: checkpoints of steps 40 and 45."""
    folder = tmp_path / "half"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 50)
        assert train.main([*cases.SMALL, *RUN, "--checkpoint-steps", "5", "--output", str(folder)]) == 130
    assert cases.checkpoints(folder) == ["step-00000040", "step-00000045"]
    return folder


def resume(folder, *arguments):
    return train.main([*cases.SMALL, *RUN, "--checkpoint-steps", "5", "--output", str(folder), "--resume", *arguments])


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
    for limit in ([], [44], [39], [13])[::-1]:
        assert resume(tmp_path / "run", *(["--limit-steps", str(limit[0])] if limit else [])) == 0
        assert len(cases.rows(tmp_path / "run")) == (2 if not limit or limit[0] > 39 else 1)
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
        before = cases.checkpoints(folder)
        process = subprocess.Popen(
            cases.command("train.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            while cases.checkpoints(folder)[-1:] == before[-1:] and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(number)
            error = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 143, error
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
    left = half / "checkpoints" / ".step-00000050.tmp"  # of a process that was killed while writing
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert resume(half) == 0
    assert cases.checkpoints(half) == ["step-00000075", "step-00000078"]
    assert not cases.temporary_files(half)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def test_damaged_checkpoint(half, complete, capsys):
    """One flipped bit, one byte too few, or a missing file; and what the message says to do helps."""
    newest = half / "checkpoints" / "step-00000045"
    for damage in (flip, truncate, remove):
        for name in ("model.safetensors", "state.pt", "manifest.json"):
            content = (newest / name).read_bytes()
            damage(newest / name)
            assert resume(half) == 2
            error = capsys.readouterr().err
            assert str(newest / name) in error and f"delete the folder {newest}" in error and "step-00000040" in error
            (newest / name).write_bytes(content)
    flip(newest / "model.safetensors")
    shutil.rmtree(newest)
    assert resume(half) == 0
    assert_same_run(half, complete)


def test_no_other_checkpoint_to_go_on_from(half, capsys):
    shutil.rmtree(half / "checkpoints" / "step-00000040")
    flip(half / "checkpoints" / "step-00000045" / "state.pt")
    assert resume(half) == 2
    assert "start from the beginning" in capsys.readouterr().err


def snapshot(folder):
    return {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}


def test_no_room_for_a_checkpoint(half, complete, monkeypatch, capsys):
    """The disk fills up at the second file."""
    before = snapshot(half)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:  # metrics.csv, best.safetensors and the three descriptions have been written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert resume(half) == 2
    error = capsys.readouterr().err
    assert "could not be written: No space left on device" in error and "Traceback" not in error
    assert snapshot(half) == before and not cases.temporary_files(half)
    assert resume(half) == 0
    assert_same_run(half, complete)


def test_file_size_limit(half, complete, capsys):
    """A write that the system cuts short: the limit is below the size of a checkpoint, above that of all else."""
    before = snapshot(half)
    limit = (half / "checkpoints" / "step-00000045" / "state.pt").stat().st_size - 1000
    assert limit > (half / "best.safetensors").stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        assert resume(half) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    error = capsys.readouterr().err
    assert f"{half / 'checkpoints' / 'step-00000050'} could not be written: File too large" in error
    assert snapshot(half) == before and not cases.temporary_files(half)
    assert resume(half) == 0
    assert_same_run(half, complete)


@pytest.mark.parametrize(
    "change", [["--lr", "0.1"], ["--depth", "16"], ["--variant", "A+B"], ["--batch-size", "16"], ["--epochs", "3"]]
)
def test_other_mathematics(complete, change, capsys):
    assert resume(complete, *change) == 2
    error = capsys.readouterr().err
    assert change[0] in error and change[1] in error and "when the run in" in error


def test_every_option_is_either_fixed_or_known_to_be_free():
    """A new option has to be put on one side."""
    free = {"data", "download", "data_in", "workers", "efficient", "keep_bottleneck", "device", "threads", "compile"}
    free |= {"cuda_graph", "channels_last", "deterministic", "config", "output", "resume", "limit_steps"}
    free |= {"checkpoint_steps", "log_steps"}
    options = vars(run_folder.parse([]))
    assert set(options) == set(run_folder.FIXED) | free
    assert not set(run_folder.FIXED) & free


def test_other_data(half, capsys):
    """The splits of the run are checked, not only the options that they follow from."""
    path = half / "splits.json"
    path.write_text(path.read_text().replace("[0, ", "[", 1))
    assert resume(half) == 2
    assert "splits.json" in capsys.readouterr().err


def test_other_devices_and_speeds_may_be_chosen(half):
    """The fused implementation may be replaced by the plain one, logging and workers may change: the run ends well."""
    assert resume(half, "--efficient", "plain", "--log-steps", "3", "--data-in", "memory", "--channels-last") == 0
    assert len(cases.rows(half)) == 2


def test_folder_with_a_run(half, capsys):
    before = snapshot(half)
    assert train.main([*cases.SMALL, *RUN, "--output", str(half)]) == 2
    assert f"{half} already holds a run: add --resume" in capsys.readouterr().err
    assert snapshot(half) == before


def test_resume_without_a_run_starts_one(tmp_path, complete):
    assert resume(tmp_path / "new") == 0
    assert_same_run(tmp_path / "new", complete)


def test_checkpoint_of_a_bad_state_is_not_written(half, monkeypatch, capsys):
    """A weight becomes infinite in a step whose own loss was still finite, and a checkpoint is due."""
    before = snapshot(half)
    take_step = engine.Trainer._step

    def spoiled(self, batches):
        take_step(self, batches)
        if self.state.step == 49:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(engine.Trainer, "_step", spoiled)
    assert resume(half) == 2
    error = capsys.readouterr().err
    assert "a weight is infinite or not a number after step 50, in epoch 2" in error and "step-00000045" in error
    assert snapshot(half) == before


def test_checkpoints_hold_plain_values_and_the_names_of_the_model(complete):
    """Weights load into the plain model, the rest without running code."""
    from densenet_ext import DenseNetBC

    found = checkpoint.load(complete / "checkpoints")
    model = DenseNetBC.variant("A+B", depth=10, growth_rate=4, num_classes=10, in_channels=1)
    model.load_state_dict(found.weights)
    state = torch.load(found.path / "state.pt", weights_only=True)
    assert state["options"]["lr"] == 0.05 and state["state"]["step"] == 78
    with pytest.raises(UserError, match="not the folder of a run"):
        run_folder.read_options(complete / "checkpoints")
