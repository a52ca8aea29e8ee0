"""Print the classes that a trained network sees in images.

python examples/predict.py runs/my-flowers rose.jpg tulip.png --top 5
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from training import run_folder
from training.cli import Number, make_run_parser, run_script
from training.data.augment import Normalize
from training.data.images import read_image
from training.errors import UserError
from training.step import autocast


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the command line says; return the exit code."""
    parser = make_run_parser(__doc__)
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="its largest centered square is resized as in training")
    add("--top", type=Number(int, at_least=1), default=3, help="classes for each image")
    return run_script(lambda: run(parser.parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each image and class: file, class, probability.

    Raises:
        UserError: anything that the user can mend; images that can be read are served first.
    """
    options, data, model = run_folder.read_run(arguments.run, arguments.weights, arguments.device)
    model.eval()
    normalize = Normalize(data.mean, data.std, options.device)
    width = max(len(str(path)) for path in arguments.images)
    failed = []
    for path in arguments.images:
        try:
            image = read_image(path, data.image_size, data.channels)
        except UserError as error:
            failed.append(str(error))
            continue
        probabilities = predict(model, normalize(image[None].to(options.device)), options.amp)
        best = probabilities.topk(min(arguments.top, len(data.classes)))
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{path!s:<{width}}  {data.classes[label]:<20} {100 * probability:6.2f} %")
    if failed:
        raise UserError("\nerror: ".join(failed))


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, amp: str | None) -> Tensor:
    """Return the probabilities [classes] of a normalized image [1, C, S, S]."""
    with autocast(image.device, amp):
        return model(image).float().softmax(1)[0].cpu()


if __name__ == "__main__":
    sys.exit(main())
