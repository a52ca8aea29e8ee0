"""The options of train.py: the command line over a YAML file over the paper's recipe."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from densenet_ext.drop_channel import POSITIONS
from densenet_ext.models import VARIANTS
from training.cli import Number, depth, make_parser
from training.data.sets import LOADERS
from training.errors import UserError, explain, library

EPOCHS = {"tiny-imagenet": 180, "digits": 30}  # the paper's 300 for all others

# A run is resumed only with the values of these options that it was started with: they change its mathematics.
FIXED = (
    "dataset image_size pad flip split_seed "
    "variant depth growth_rate compression bn_size drop_rate drop_channel drop_channel_position se_reduction small_inputs "
    "epochs batch_size lr momentum nesterov dampening weight_decay lr_milestones lr_gamma accumulate clip_norm seed "
    "amp sync_bn"
).split()
_NOT_WRITTEN = ("config", "resume")
_FLAG = argparse.BooleanOptionalAction


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Return all options; only image_size and flip may be None, which leaves them to the data set.

    Args:
        argv: the command line without the program; sys.argv's if None.

    Raises:
        UserError: something in the --config file is wrong, or options exclude each other.
        SystemExit: anything else on the command line is wrong; code 2, after argparse's own message.
    """
    parser = build_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.config is not None:
        options = parser.parse_args([*_read_config(options.config, parser), *argv])
    if options.epochs is None:
        options.epochs = EPOCHS.get(options.dataset, 300)
    if options.device is None:
        options.device = default_device()
    if options.output is None:
        options.output = Path("runs", f"{options.dataset}-{options.variant}-seed{options.seed}")
    _check_device(options.device)
    _check_together(options)
    return options


def to_yaml(options: argparse.Namespace) -> str:
    """Return what --config reads to get the same options."""
    values = {name: value for name, value in vars(options).items() if name not in _NOT_WRITTEN}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return library("yaml").safe_dump(plain, sort_keys=False, default_flow_style=None)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = make_parser(description)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="options by name; the command line wins")
    _add_data(parser.add_argument_group("data").add_argument)
    _add_network(parser.add_argument_group("network").add_argument)
    _add_recipe(parser.add_argument_group("training; defaults are the paper's recipe").add_argument)
    _add_machine(parser.add_argument_group("machine").add_argument)
    _add_run(parser.add_argument_group("run").add_argument)
    return parser


def _add_data(add) -> None:
    add("--dataset", choices=LOADERS, default="digits")
    add("--data", type=Path, metavar="FOLDER", help="where the data set lies or is downloaded to; ./data by default")
    add("--download", action=_FLAG, default=False, help="fetch the data set if it is missing")
    add("--image-size", type=Number(int, at_least=8), help="pixels a side; the data set's own, or 32, by default")
    add("--pad", type=Number(int, at_least=0), default=4, help="pixels on each side before the random crop")
    add("--flip", action=_FLAG, help="mirror images at random; the data set's own default: all but digits do")
    add("--data-in", choices=("auto", "memory", "workers"), default="auto", help="decoded data on the device, or not")
    add("--workers", type=Number(int, at_least=0), default=4, help="processes that decode images")
    add("--split-seed", type=Number(int, at_least=0, less_than=2**31), default=0, help="of what is held out")


def _add_network(add) -> None:
    of_variant = "; the variant's own by default"
    add("--variant", choices=VARIANTS, default="A+B+C", help="A: Drop-Channel, B: squeeze-and-excitation, C: fused")
    add("--depth", type=depth, default=100, help="6n + 4")
    add("--growth-rate", type=Number(int, at_least=1), default=12)
    add("--compression", type=Number(float, more_than=0, at_most=1), default=0.5)
    add("--bn-size", type=Number(int, at_least=1), default=4, help="bottlenecks in units of the growth rate")
    add("--drop-rate", type=Number(float, at_least=0, less_than=1), help="of single values" + of_variant)
    add("--drop-channel", type=Number(float, at_least=0, less_than=1), help="of whole channels" + of_variant)
    add("--drop-channel-position", choices=POSITIONS, default="pre_norm")
    add("--se-reduction", type=Number(int, at_least=1), help="of squeeze-and-excitation" + of_variant)
    add("--efficient", choices=("plain", "checkpoint", "fused"), help="implementation" + of_variant)
    add("--keep-bottleneck", action=_FLAG, default=False, help="fused: faster backward, more memory")
    add("--small-inputs", action=_FLAG, default=True, help="3x3 stem; otherwise 7x7 of stride 2 and a max pool")


def _add_recipe(add) -> None:
    add("--epochs", type=Number(int, at_least=1), help="300; tiny-imagenet 180, digits 30")
    add("--batch-size", type=Number(int, at_least=1), default=64, help="of one process")
    add("--lr", type=Number(float, more_than=0), default=0.1, help="initial learning rate of SGD")
    add("--momentum", type=Number(float, at_least=0, less_than=1), default=0.9)
    add("--nesterov", action=_FLAG, default=True)
    add("--dampening", type=Number(float, at_least=0, at_most=1), default=0.0)
    add("--weight-decay", type=Number(float, at_least=0), default=1e-4)
    fraction = Number(float, more_than=0, less_than=1)
    add("--lr-milestones", type=fraction, nargs="*", default=[0.5, 0.75], help="fractions of the epochs")
    add("--lr-gamma", type=Number(float, more_than=0, at_most=1), default=0.1, help="factor at each milestone")
    add("--accumulate", type=Number(int, at_least=1), default=1, help="batches whose gradients make one step")
    add("--clip-norm", type=Number(float, more_than=0), help="largest norm of the gradient; no limit by default")
    add("--seed", type=Number(int, at_least=0, less_than=2**31), default=0, help="of weights, masks, order, crops")


def _add_machine(add) -> None:
    add("--device", help="cpu, cuda or cuda:N; cuda if there is one by default")
    add("--threads", type=Number(int, at_least=1), help="of a CPU; PyTorch's choice by default")
    add("--amp", choices=("bf16", "fp16"), help="mixed precision; fp16 scales the loss, which costs a wait a step")
    add("--compile", action=_FLAG, default=False, help="torch.compile")
    add("--cuda-graph", action=_FLAG, default=False, help="record forward and backward once and replay them")
    add("--channels-last", action=_FLAG, default=False)
    add("--deterministic", action=_FLAG, default=False, help="only algorithms that give the same bits every time")
    add("--sync-bn", action=_FLAG, default=False, help="batch statistics over all processes")


def _add_run(add) -> None:
    add("--output", type=Path, metavar="FOLDER", help="of the run; runs/DATASET-VARIANT-seedSEED by default")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output, if there is one")
    add("--limit-steps", type=Number(int, at_least=1), help="end the training after so many steps in all")
    add("--checkpoint-steps", type=Number(int, at_least=1), help="also write checkpoints every so many steps")
    add("--log-steps", type=Number(int, at_least=1), default=10, help="steps between readings of the loss")


def _read_config(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Return the content of a file as a command line that `parser` takes."""
    yaml = library("yaml")
    with explain(OSError, UnicodeDecodeError, yaml.YAMLError, what=f"--config {path} cannot be read"):
        content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path} holds a {type(content).__name__}; it must hold lines of the form 'option: value'"
        )
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    parser.exit_on_error = False
    arguments = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1, 0)[0]
            raise UserError(f"{path}: {key} is no option; the nearest one is {near}")
        try:
            words = _command_line(value, actions[name])
            parser.parse_args(words)
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: {key} is {value!r}; {error.message}") from error
        arguments += words
    parser.exit_on_error = True
    return arguments


def _command_line(value, action: argparse.Action) -> list[str]:
    """Return the words that give an option the value that stands in a file."""
    option = action.option_strings[0]
    if value is None and action.default is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentError(None, "it must be true or false")
        return [option] if value else action.option_strings[1:]  # --no-...
    if action.nargs == "*":
        if not isinstance(value, list):
            raise argparse.ArgumentError(None, "it must be a list, such as [0.5, 0.75]")
        return [option, *map(str, value)]
    return [f"{option}={value}"]


def _check_device(name: str) -> None:
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise UserError(f"--device is {name!r}; it may be cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r}; PyTorch sees {torch.cuda.device_count()} GPUs here; cpu always works")


def _check_together(options: argparse.Namespace) -> None:
    """Refuse options that are right alone and wrong together."""
    if options.nesterov and (options.momentum == 0 or options.dampening != 0):
        raise UserError(
            f"--nesterov needs momentum and no dampening; --momentum is {options.momentum}, --dampening is "
            f"{options.dampening}: add --no-nesterov"
        )
    if options.lr_milestones != sorted(options.lr_milestones):
        raise UserError(f"--lr-milestones is {options.lr_milestones}; it must be in ascending order")
    if options.cuda_graph and not options.device.startswith("cuda"):
        raise UserError(f"--cuda-graph needs a GPU; --device is {options.device!r}")
    if options.cuda_graph and options.compile:
        raise UserError("--cuda-graph and --compile exclude each other: leave one of them out")
