"""Trains DenseNets on digits, CIFAR, Tiny ImageNet or a folder of images, with the paper's recipe by default.

    python examples/train.py --config examples/configs/digits.yaml
    python examples/train.py --dataset cifar10 --download --variant A+B+C --output runs/cifar10
    torchrun --nproc-per-node 4 examples/train.py --dataset cifar10 --batch-size 16

What it writes lies in --output: checkpoints, best.safetensors, metrics.csv, loss.png, accuracy.png, summary.json, and
events for `tensorboard --logdir runs`. Killed at any moment, the same command with --resume goes on as if nothing had
happened.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch
from training import checkpoint, datasets, run_folder
from training.engine import Trainer
from training.files import replace_file
from training.libraries import PACKAGES, library
from training.loader import statistics
from training.options import parse
from training.plots import draw_run
from training.processes import Processes, start
from training.script import run_script
from training.splits import check_splits, write_splits
from training.summary import summarize, summary_line


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code."""
    return run_script(lambda argv: run(parse(argv, __doc__)), argv, "; the same command with --resume goes on")


def run(options: argparse.Namespace) -> dict:
    """Trains, tests the best weights, and returns what summary.json holds.

    Raises:
        UserError: anything that the user can mend.
    """
    set_up(options)
    processes = start(options)
    found = run_folder.open_run(options, processes)
    processes.barrier()  # nobody writes before all have looked
    dataset = load_data(options, processes)
    data = describe(dataset, options, processes, found)
    trainer = Trainer(options, processes, dataset, data)
    if processes.main:
        run_folder.write_description(options, processes, data)
        if found is None:
            write_splits(options.output / run_folder.SPLITS, dataset, options)
    if found is not None:
        trainer.restore(found)
    trainer.train()
    result = summarize(trainer, trainer.test())
    if processes.main:
        replace_file(options.output / run_folder.SUMMARY, json.dumps(result, indent=1))
        draw_run(options.output, trainer.state.rows, f"{data.name}, {options.variant}")
        print(summary_line(result, options.output))
    processes.close()
    return result


def set_up(options: argparse.Namespace) -> None:
    """Libraries, threads and algorithms, before anything is computed."""
    for module in PACKAGES:
        library(module)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def load_data(options: argparse.Namespace, processes: Processes) -> datasets.DataSet:
    """The data set; the main process downloads it while the others wait."""
    if processes.main:
        dataset = datasets.load(options)
    processes.barrier()
    return dataset if processes.main else datasets.load(options)


def describe(
    dataset: datasets.DataSet, options: argparse.Namespace, processes: Processes, found: checkpoint.Checkpoint | None
) -> run_folder.DataDescription:
    """Mean and deviation of the training images, or those that the resumed run began with.

    Raises:
        UserError: the data are not those of the resumed run.
    """
    if found is not None:
        check_splits(options.output / run_folder.SPLITS, dataset, options)
        return run_folder.read_data_description(options.output)
    mean, std = statistics(dataset, options.data_in, options.workers)
    return run_folder.DataDescription(dataset.name, dataset.classes, dataset.channels, dataset.image_size, mean, std)


if __name__ == "__main__":
    sys.exit(main())
