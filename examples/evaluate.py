"""Print loss and accuracy of a trained network on one split of its data set.

python examples/evaluate.py runs/digits-A+B+C-seed0
python examples/evaluate.py runs/cifar10 --split validation --weights last --output last.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training import run_folder
from training.checkpoint import replace_file
from training.cli import Number, make_run_parser, run_script
from training.data.loader import Loader
from training.data.sets import load
from training.processes import Processes
from training.step import evaluate

TOP = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit code."""
    parser = make_run_parser(__doc__)
    add = parser.add_argument
    add("--split", choices=("test", "validation", "train"), default="test", help="train: without augmentation")
    add("--data", type=Path, metavar="FOLDER", help="where the data set lies, if not where it was")
    add("--batch-size", type=Number(int, at_least=1), help="that of the training by default")
    add("--output", type=Path, metavar="FILE.json", help="also write the figures there")
    return run_script(lambda: run(parser.parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Print the figures.

    Raises:
        UserError: anything that the user can mend.
    """
    options = run_folder.read_options(arguments.run, arguments.device)
    options.data = arguments.data or options.data
    options.batch_size = arguments.batch_size or options.batch_size
    processes = Processes.alone(options.device)
    data = run_folder.read_data_description(arguments.run)
    model = run_folder.read_model(arguments.run, arguments.weights, options, data, processes)
    dataset = load(options)
    run_folder.check_splits(arguments.run, dataset, options)
    loader = Loader(dataset, arguments.split, options, processes, data.mean, data.std, augment=False)
    result = evaluate(model, loader, processes, options.amp, TOP)
    loader.close()
    figures = {
        "run": str(arguments.run),
        "weights": arguments.weights,
        "split": arguments.split,
        "images": len(dataset.splits[arguments.split]),
        "loss": result["loss"],
        "accuracy": result["accuracy"],
    }
    print(
        f"{figures['run']}, {figures['weights']} weights, {figures['images']} images of the split {figures['split']}:"
    )
    print(f"loss      {figures['loss']:8.4f}")
    print(f"accuracy  {figures['accuracy']:8.2f} %")
    if len(data.classes) > TOP:
        figures[f"top{TOP}_accuracy"] = result["top_accuracy"]
        print(f"top {TOP}     {result['top_accuracy']:8.2f} %")
    if arguments.output is not None:
        replace_file(arguments.output, json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())
