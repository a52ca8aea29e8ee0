"""Loss and accuracy of a trained network on one split of its data set.

python examples/evaluate.py runs/digits-A+B+C-seed0
python examples/evaluate.py runs/cifar10 --split validation --weights last --output last.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training import datasets, run_folder
from training.evaluation import evaluate
from training.files import replace_file
from training.loader import Loader
from training.model import build, prepare
from training.processes import Processes
from training.ranges import Number
from training.script import run_script
from training.splits import check_splits

TOP = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates as the command line says; returns the exit code."""
    return run_script(lambda argv: run(parse(argv)), argv)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    add("--split", choices=("test", "validation", "train"), default="test", help="train: without augmentation")
    add("--weights", default="best", help="best (default), last, or a safetensors file")
    add("--data", type=Path, metavar="FOLDER", help="where the data set lies, if not where it was")
    add("--device", help="cpu, cuda or cuda:N; cuda if there is one by default")
    add("--batch-size", type=Number(int, at_least=1), help="that of the training by default")
    add("--output", type=Path, metavar="FILE.json", help="also write the figures there")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict:
    """Prints and returns the figures.

    Raises:
        UserError: anything that the user can mend.
    """
    options = run_folder.read_options(arguments.run, arguments.device)
    options.data = arguments.data or options.data
    weights = run_folder.read_weights(arguments.run, arguments.weights)
    data = run_folder.read_data_description(arguments.run)
    dataset = datasets.load(options)
    check_splits(arguments.run / run_folder.SPLITS, dataset, options)
    processes = Processes.alone(options.device)
    model = build(options, len(data.classes), data.channels)
    run_folder.load_weights(model, weights)
    loader = Loader(
        dataset,
        arguments.split,
        batch_size=arguments.batch_size or options.batch_size,
        device=options.device,
        mean=data.mean,
        std=data.std,
        seed=options.seed,
        train=False,
        data_in=options.data_in,
        workers=options.workers,
        channels_last=options.channels_last,
    )
    result = evaluate(prepare(model, options, processes), loader, processes, options.amp, TOP)
    loader.close()
    figures = {"run": str(arguments.run), "weights": arguments.weights, "split": arguments.split}
    figures |= {"images": len(dataset.splits[arguments.split]), "loss": result["loss"], "accuracy": result["accuracy"]}
    if len(data.classes) > TOP:
        figures[f"top{TOP}_accuracy"] = result["top_accuracy"]
    show(figures)
    if arguments.output is not None:
        replace_file(arguments.output, json.dumps(figures, indent=1))
    return figures


def show(figures: dict) -> None:
    print(
        f"{figures['run']}, {figures['weights']} weights, {figures['images']} images of the split {figures['split']}:"
    )
    print(f"loss      {figures['loss']:8.4f}")
    print(f"accuracy  {figures['accuracy']:8.2f} %")
    if f"top{TOP}_accuracy" in figures:
        print(f"top {TOP}     {figures[f'top{TOP}_accuracy']:8.2f} %")


if __name__ == "__main__":
    sys.exit(main())
