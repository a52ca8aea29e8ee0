"""Print loss and accuracy of a trained network on one split of its data set.

python examples/evaluate.py runs/digits-A+B+C-seed0
python examples/evaluate.py runs/cifar10 --split validation --weights last --output last.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
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
    return run_script(lambda: print_figures(parser.parse_args(argv)))


def print_figures(arguments: argparse.Namespace) -> None:
    """Print the figures.

    Raises:
        UserError: anything that the user can mend.
    """
    run, weights, split = arguments.run, arguments.weights, arguments.split
    options, data, model = run_folder.read_run(run, weights, arguments.device)
    options.data = arguments.data or options.data
    options.batch_size = arguments.batch_size or options.batch_size
    processes = Processes.alone(options.device)
    dataset = load(options)
    run_folder.check_splits(run, dataset, options)
    with closing(Loader(dataset, split, options, processes, data.mean, data.std, augment=False)) as loader:
        result = evaluate(model, loader, processes, options.amp, TOP)
    figures = {"run": str(run), "weights": weights, "split": split, "images": len(dataset.splits[split])}
    figures |= {"loss": result["loss"], "accuracy": result["accuracy"]}
    print(f"{run}, {weights} weights, {figures['images']} images of the split {split}:")
    print(f"loss      {result['loss']:8.4f}")
    print(f"accuracy  {result['accuracy']:8.2f} %")
    if len(data.classes) > TOP:
        figures[f"top{TOP}_accuracy"] = result["top_accuracy"]
        print(f"top {TOP}     {result['top_accuracy']:8.2f} %")
    if arguments.output is not None:
        replace_file(arguments.output, json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())
