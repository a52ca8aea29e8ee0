"""Classes that a trained network sees in images.

python examples/predict.py runs/my-flowers rose.jpg tulip.png --top 5
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from training import run_folder
from training.augment import Normalise
from training.errors import UserError
from training.evaluation import autocast
from training.model import build, prepare
from training.processes import Processes
from training.ranges import Number
from training.script import run_script
from training.sources import read_image


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts as the command line says; returns the exit code."""
    return run_script(lambda argv: run(parse(argv)), argv)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder that train.py wrote")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="its largest centred square is resized as in training")
    add("--top", type=Number(int, at_least=1), default=3, help="classes for each image")
    add("--weights", default="best", help="best (default), last, or a safetensors file")
    add("--device", help="cpu, cuda or cuda:N; cuda if there is one by default")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each image and class: file, class, probability.

    Raises:
        UserError: anything that the user can mend; images that can be read are served first.
    """
    options = run_folder.read_options(arguments.run, arguments.device)
    data = run_folder.read_data_description(arguments.run)
    model = build(options, len(data.classes), data.channels)
    run_folder.load_weights(model, run_folder.read_weights(arguments.run, arguments.weights))
    processes = Processes.alone(options.device)
    model = prepare(model, options, processes).eval()
    normalise = Normalise(data.mean, data.std, processes.device, torch.float32)
    width = max(len(str(path)) for path in arguments.images)
    failed = []
    for path in arguments.images:
        try:
            image = read_image(path, data.image_size, data.channels)
        except UserError as error:
            failed.append(str(error))
            continue
        probabilities = probabilities_of(model, normalise(image[None].to(processes.device)), options.amp)
        best = probabilities.topk(min(arguments.top, len(data.classes)))
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{path!s:<{width}}  {data.classes[label]:<20} {100 * probability:6.2f} %")
    if failed:
        raise UserError("\nerror: ".join(failed))


@torch.no_grad()
def probabilities_of(model: nn.Module, image: Tensor, amp: str | None) -> Tensor:
    """[classes] for a normalised image [1, C, S, S]."""
    with autocast(image.device, amp):
        return model(image).float().softmax(1)[0].cpu()


if __name__ == "__main__":
    sys.exit(main())
