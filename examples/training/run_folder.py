"""The folder of a run: what it was, from which it can be repeated, resumed, evaluated."""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from densenet_ext import info
from training import checkpoint
from training.errors import UserError
from training.files import readable_errors, replace_file
from training.libraries import library
from training.options import FIXED, parse, to_yaml
from training.processes import Processes

CONFIG, DATA, ENVIRONMENT, SPLITS = "config.yaml", "data.json", "environment.json", "splits.json"
BEST, CHECKPOINTS, SUMMARY = "best.safetensors", "checkpoints", "summary.json"


@dataclass
class DataDescription:
    """What has to be known of the data to use a trained network. mean, std: float64 [channels] of pixels in 0..1."""

    name: str
    classes: list[str]
    channels: int
    image_size: int
    mean: Tensor
    std: Tensor


def open_run(options: argparse.Namespace, processes: Processes) -> checkpoint.Checkpoint | None:
    """The checkpoint from which the run goes on; None where it starts.

    Raises:
        UserError: the folder holds a run and --resume is not given, or that run had other options, or its newest
            checkpoint is damaged.
    """
    folder = options.output
    if not options.resume:
        if (folder / CONFIG).exists() or (folder / CHECKPOINTS).exists():
            raise UserError(f"{folder} already holds a run: add --resume to go on with it, or give another --output")
        return None
    found = checkpoint.load(folder / CHECKPOINTS)
    if found is not None:
        _check_options(options, processes, found)
    return found


def fixed_options(options: argparse.Namespace, processes: Processes) -> dict:
    """What may not change on resuming, as plain values."""
    return {**{name: getattr(options, name) for name in FIXED}, "processes": processes.world_size}


def write_description(options: argparse.Namespace, processes: Processes, data: DataDescription) -> None:
    """config.yaml, environment.json and data.json."""
    folder = options.output
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_temporary(folder / CHECKPOINTS)
    replace_file(folder / CONFIG, to_yaml(options))
    replace_file(folder / ENVIRONMENT, json.dumps(_environment(processes), indent=1))
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(data).items()}
    replace_file(folder / DATA, json.dumps(plain, indent=1))


def read_options(folder: Path, device: str | None = None) -> argparse.Namespace:
    """The options of a finished or running run, for another device if one is given."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    command_line = ["--config", str(folder / CONFIG)]
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return parse([*command_line, "--device", device or default, "--no-cuda-graph", "--no-compile"])


def read_data_description(folder: Path) -> DataDescription:
    """What write_description wrote."""
    path = folder / DATA
    try:
        data = DataDescription(**json.loads(path.read_text()))
        data.mean, data.std = (torch.tensor(values, dtype=torch.float64) for values in (data.mean, data.std))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; `train.py --resume` writes it anew") from error
    return data


def read_weights(folder: Path, which: str) -> dict[str, Tensor]:
    """The weights 'best' or 'last' of a run, or those in the safetensors file `which`."""
    if which == "last":
        found = checkpoint.load(folder / CHECKPOINTS)
        if found is None:
            raise UserError(f"{folder} has no checkpoint yet: --weights last needs one")
        return found.weights
    path = folder / BEST if which == "best" else Path(which)
    library("safetensors.torch")
    from safetensors import SafetensorError

    try:
        return checkpoint.parse_weights(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights {path} cannot be read: {error}; --weights may be best, last or a file") from error


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises UserError where they belong to another network."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights are those of another network: {str(error).splitlines()[1].strip()}") from error


def _check_options(options: argparse.Namespace, processes: Processes, found: checkpoint.Checkpoint) -> None:
    before = found.state["options"]
    for name, now in fixed_options(options, processes).items():
        if before[name] != now:
            option = f"--{name.replace('_', '-')}" if name != "processes" else "the number of processes"
            raise UserError(
                f"{option} is {now!r} now and was {before[name]!r} when the run in {options.output} began: "
                "resume with the same value, or start a run in another --output"
            )


def _environment(processes: Processes) -> dict:
    gpu = processes.device.type == "cuda"
    rows = info.collect()
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "densenet_ext": rows["densenet_ext"],
        "library": rows.get("built with"),
        "device": torch.cuda.get_device_name(processes.device) if gpu else "cpu",
        "cpu": rows["CPU"],
        "instruction_set": rows.get("instruction set"),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size,
    }
