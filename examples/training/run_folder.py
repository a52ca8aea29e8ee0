"""The folder of a run: it describes what a run needs to be repeated, resumed, evaluated."""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from densenet_ext import DenseNetBC, info
from training import checkpoint
from training.checkpoint import explain_writing, replace_file
from training.data.sets import DataSet
from training.errors import UserError, explain, library
from training.model import build, prepare
from training.options import FIXED, default_device, parse, to_yaml
from training.processes import Processes

CONFIG, DATA, ENVIRONMENT, SPLITS = "config.yaml", "data.json", "environment.json", "splits.json"
BEST, CHECKPOINTS, METRICS, SUMMARY = "best.safetensors", "checkpoints", "metrics.csv", "summary.json"


@dataclass
class DataDescription:
    """A description of the data for the users of a trained network, as data.json holds it."""

    name: str
    classes: list[str]
    channels: int
    image_size: int
    mean: list[float]  # of each channel, of pixels in 0..1, as is std
    std: list[float]


def open_run(options: argparse.Namespace, processes: Processes) -> dict | None:
    """Return the checkpoint from which the run goes on; None where it starts.

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
    for name, value in fixed_options(options, processes).items() if found is not None else ():
        started_with = found["options"][name]
        if started_with != value:
            option = f"--{name.replace('_', '-')}" if name != "processes" else "the number of processes"
            raise UserError(
                f"{option} is {value!r} now and was {started_with!r} when the run in {folder} began: "
                "resume with the same value, or start a run in another --output"
            )
    return found


def fixed_options(options: argparse.Namespace, processes: Processes) -> dict:
    """Return what may not change on resuming, as plain values."""
    return {**{name: getattr(options, name) for name in FIXED}, "processes": processes.world_size}


def write_description(options: argparse.Namespace, processes: Processes, data: DataDescription) -> None:
    """Write config.yaml, environment.json and data.json."""
    folder = options.output
    with explain_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_temporary(folder / CHECKPOINTS)
    replace_file(folder / CONFIG, to_yaml(options))
    replace_file(folder / ENVIRONMENT, json.dumps(_environment(processes), indent=1))
    replace_file(folder / DATA, json.dumps(vars(data), indent=1))


def write_splits(folder: Path, dataset: DataSet, options: argparse.Namespace) -> None:
    """Write which image belongs to which split: splits.json."""
    replace_file(folder / SPLITS, json.dumps(_describe_splits(dataset, options)))


def check_splits(folder: Path, dataset: DataSet, options: argparse.Namespace) -> None:
    """Raise UserError unless the splits of `dataset` are those that `write_splits` wrote when the run began."""
    path, remedy = folder / SPLITS, "the run cannot be resumed"
    with explain(OSError, ValueError, what=f"{path} cannot be read", remedy=remedy):
        written = json.loads(path.read_text())
    for key, value in _describe_splits(dataset, options).items():
        old = written.get(key) if isinstance(written, dict) else None
        if old != value:
            shown = "" if key == "indices" else f": {old} then, {value} now"
            raise UserError(
                f"the run began with other data than there are now: '{key}' in {path} differs{shown}. "
                "Give the --dataset, --data and --split-seed of that run, or another --output"
            )


def _describe_splits(dataset: DataSet, options: argparse.Namespace) -> dict:
    return {
        "dataset": dataset.name,
        "split_seed": options.split_seed,
        "images": len(dataset.images),
        "classes": len(dataset.classes),
        "counts": {name: len(indices) for name, indices in dataset.splits.items()},
        "indices": {name: indices.tolist() for name, indices in dataset.splits.items()},
    }


def read_description(folder: Path) -> DataDescription:
    """Return what write_description wrote of the data."""
    path, remedy = folder / DATA, "restore it, or start a run in another --output"
    with explain(OSError, ValueError, TypeError, what=f"{path} cannot be read", remedy=remedy):
        return DataDescription(**json.loads(path.read_text()))


def read_run(folder: Path, weights: str, device: str | None) -> tuple[argparse.Namespace, DataDescription, DenseNetBC]:
    """Return options, data and network of a finished or running run, on `device` or, if it is None, the best one here.

    Args:
        folder: of the run.
        weights: 'best', 'last', or a file.
        device: cpu, cuda, cuda:N.

    Raises:
        UserError: something in the folder is missing or damaged, or the weights are those of another network.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    device = device or default_device()
    options = parse(["--config", str(folder / CONFIG), "--device", device, "--no-cuda-graph", "--no-compile"])
    data = read_description(folder)
    model = build(options, len(data.classes), data.channels)
    try:
        model.load_state_dict(_read_weights(folder, weights))
    except RuntimeError as error:
        raise UserError(f"the weights are those of another network: {str(error).splitlines()[1].strip()}") from error
    return options, data, prepare(model, options, Processes.alone(options.device))


def _read_weights(folder: Path, which: str) -> dict[str, Tensor]:
    if which == "last":
        found = checkpoint.load(folder / CHECKPOINTS)
        if found is None:
            raise UserError(f"{folder} has no checkpoint yet: --weights last needs one")
        return found["weights"]
    path = folder / BEST if which == "best" else Path(which)
    kinds = (OSError, library("safetensors").SafetensorError)
    with explain(*kinds, what=f"the weights {path} cannot be read", remedy="--weights may be best, last or a file"):
        return checkpoint.parse_weights(path.read_bytes())


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
