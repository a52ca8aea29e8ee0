"""Options of the training tool: ranges, files of options, and options that exclude each other."""

import sys

import pytest
import train
import training_cases as cases
from training import options
from training.cli import Number, depth
from training.errors import REQUIRED, UserError
from training.processes import Processes, start


def numeric_options():
    actions = options.build_parser()._actions
    return [action for action in actions if isinstance(action.type, Number) or action.type is depth]


def outside(kind):
    """Return values just outside the range of a numeric option, and some that are no number at all."""
    if kind is depth:
        return ["many", "nan", "inf", "4", "41", "40.0"]
    step = 1 if kind.kind is int else 1e-3
    beyond = {"at least": -step, "at most": step, "more than": 0, "less than": 0}
    bounds = [str(bound + beyond[words]) for words, bound in kind.bounds.items()]
    return ["many", "nan", "inf", *bounds, *(["1.5"] if kind.kind is int else [])]


@pytest.mark.parametrize("action", numeric_options(), ids=lambda action: action.dest)
def test_numbers_out_of_range(action, tmp_path, capsys):
    """On the command line and in a file, the message names the option, the value, and what it may be."""
    option = action.option_strings[0]
    for value in outside(action.type):
        with pytest.raises(SystemExit) as end:
            options.parse([f"{option}={value}"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and option in error and repr(value) in error and "it must be" in error
        config = tmp_path / "config.yaml"
        config.write_text(f"{action.dest}: {[value] if action.nargs else value}\n")
        with pytest.raises(UserError, match=rf"config.yaml: {action.dest} is .*it must be"):
            options.parse(["--config", str(config)])


CONFIGS = {
    "learning-rte: 1": "learning-rte is no option; the nearest one is",
    "dept: 40": "dept is no option; the nearest one is depth",
    "depth: [40]": "depth is .40.; .*it must be 6n",
    "depth:": "depth is None; .*it must be 6n",
    "nesterov: 1": "nesterov is 1; it must be true or false",
    "variant: C": "variant is 'C'; .*choose from 'vanilla', 'A', 'B'",
    "dataset: mnist": "dataset is 'mnist'; .*choose from 'digits', 'cifar10'",
    "image-size: 0": "image-size is 0; '0' is not valid; it must be an integer, at least 8",
    "amp: 16": "amp is 16; .*choose from 'bf16', 'fp16'",
    "lr-milestones: 0.5": "lr-milestones is 0.5; it must be a list",
    "seed: true": "seed is True; 'True' is not valid; it must be an integer",
    "- depth": "holds a list; it must hold lines of the form",
    "depth: {": "cannot be read",
    None: "cannot be read",  # there is no file
}


@pytest.mark.parametrize("content", CONFIGS)
def test_mistakes_in_a_config(content, tmp_path):
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_text(content + "\n")
    with pytest.raises(UserError, match=CONFIGS[content]) as raised:
        options.parse(["--config", str(path)])
    assert str(path) in str(raised.value)


def test_order_of_options(tmp_path):
    """The command line wins over the file, the file over the defaults; a written file reads back as the same options."""
    path = tmp_path / "my.yaml"
    path.write_text("growth-rate: 24\nlr: 1e-2\nnesterov: false\nlr_milestones: [0.3]\nclip-norm: 1\n")
    found = options.parse(["--config", str(path), "--lr", "0.5", "--dataset", "cifar100"])
    expected = dict(growth_rate=24, lr=0.5, nesterov=False, lr_milestones=[0.3], clip_norm=1, depth=100, epochs=300)
    assert {name: vars(found)[name] for name in expected} == expected
    assert str(found.output) == "runs/cifar100-A+B+C-seed0"
    path.write_text(options.to_yaml(found))
    again = options.parse(["--config", str(path)])
    assert {**vars(again), "config": None} == {**vars(found), "config": None}


TOGETHER = {
    "--nesterov needs momentum": ["--momentum", "0"],
    "--dampening is 0.5": ["--dampening", "0.5"],
    "--lr-milestones is .* ascending": ["--lr-milestones", "0.5", "0.2"],
    "--cuda-graph needs a GPU": ["--cuda-graph", "--device", "cpu"],
    "PyTorch sees . GPUs": ["--device", "cuda:9"],
    "it may be cpu, cuda or cuda:N": ["--device", "tpu"],
}


@pytest.mark.parametrize("message", TOGETHER)
def test_options_that_exclude_each_other(message):
    with pytest.raises(UserError, match=message):
        options.parse(TOGETHER[message])


def assert_refused(folder, capsys, message, *arguments):
    """Assert that train.py refuses to start and leaves no folder, so that the corrected command needs no --resume."""
    assert train.main([*cases.SMALL, "--output", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


MISTAKES = {
    "PyTorch's SyncBatchNorm": ["--sync-bn", "--variant", "A+B"],
    "--accumulate is 40; it may be at most 39": ["--accumulate", "40"],
    "make --batch-size smaller": ["--batch-size", "2000"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_leave_no_folder(message, tmp_path, capsys):
    assert_refused(tmp_path / "run", capsys, message, *MISTAKES[message])


PACKAGES = {"yaml": "pyyaml", "safetensors.torch": "safetensors", "torch.utils.tensorboard": "tensorboard"}


@pytest.mark.parametrize("module", REQUIRED)
def test_library_that_is_not_installed(module, tmp_path, monkeypatch, capsys):
    """It is missed before the training and not at its first checkpoint."""
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(tmp_path / "run", capsys, f"pip install {PACKAGES[module]}")


def test_environment_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, WORLD_SIZE.*torchrun"):
        start(options.parse([]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start(options.parse(["--device", "cpu"])) == Processes.alone("cpu")
