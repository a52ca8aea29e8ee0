"""Train a DenseNet on digits, CIFAR, Tiny ImageNet or a folder of images, with the paper's recipe by default.

    python examples/train.py --config examples/configs/digits.yaml
    python examples/train.py --dataset cifar10 --download --variant A+B+C --output runs/cifar10
    torchrun --nproc-per-node 4 examples/train.py --dataset cifar10 --batch-size 16

It writes to the folder --output: checkpoints, best.safetensors, metrics.csv, loss.png, accuracy.png, summary.json, and
events for `tensorboard --logdir runs`. Killed at any moment, the same command with --resume goes on as if nothing had
happened.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch
from training import run_folder
from training.checkpoint import replace_file
from training.cli import run_script
from training.data.loader import statistics
from training.data.sets import DataSet, load
from training.engine import Trainer
from training.errors import REQUIRED, library
from training.options import parse
from training.processes import start
from training.records import draw_run, summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    return run_script(lambda: run(parse(argv, __doc__)), "; the same command with --resume goes on")


def run(options: argparse.Namespace) -> dict:
    """Train, test the best weights, and return the content of summary.json.

    Raises:
        UserError: anything that the user can mend.
    """
    set_up(options)
    processes = start(options)
    found = run_folder.open_run(options, processes)
    if processes.main:
        dataset = load(options)
    processes.barrier()  # all have looked into the folder, which the main process writes to, and the data set is here
    if not processes.main:
        dataset = load(options)
    data = describe(dataset, options, found)
    trainer = Trainer(options, processes, dataset, data)
    if processes.main:
        run_folder.write_description(options, processes, data)
        if found is None:
            run_folder.write_splits(options.output, dataset, options)
    if found is not None:
        trainer.restore(found)
    trainer.train()
    result = summarize(trainer, trainer.test())
    if processes.main:
        replace_file(options.output / run_folder.SUMMARY, json.dumps(result, indent=1))
        draw_run(options.output, trainer.state.rows, f"{data.name}, {options.variant}")
        print(
            f"{options.output}: test accuracy {result['test_accuracy']:.2f} %, loss {result['test_loss']:.4f} (weights of "
            f"epoch {result['best_epoch']}, validation loss {result['validation_loss']:.4f}); {result['epochs']} epochs in "
            f"{result['train_seconds']:.0f} s, {result['images_per_second']:.0f} images/s, "
            f"peak memory {result['peak_memory_mb']:.0f} MB"
        )
    processes.close()
    return result


def set_up(options: argparse.Namespace) -> None:
    """Check libraries, and set threads and algorithms, before anything is computed."""
    for module in REQUIRED:
        library(module)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def describe(dataset: DataSet, options: argparse.Namespace, found: dict | None) -> run_folder.DataDescription:
    """Measure mean and deviation of the training images, or read those that the resumed run began with.

    Raises:
        UserError: the data are not those of the resumed run.
    """
    if found is not None:
        run_folder.check_splits(options.output, dataset, options)
        return run_folder.read_description(options.output)
    mean, std = (values.tolist() for values in statistics(dataset, options.data_in, options.workers))
    images = dataset.images
    return run_folder.DataDescription(dataset.name, dataset.classes, images.channels, images.size, mean, std)


if __name__ == "__main__":
    sys.exit(main())
