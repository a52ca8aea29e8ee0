"""examples/train.py with a network of float64, for tests that compare runs: in float32 a rectifier may decide otherwise."""

import sys

import torch
import train
from training import engine
from training.model import build


def build_in_float64(*arguments):
    """Build the network of a run in float64; it takes the images of float32 that the loader gives."""
    model = build(*arguments).double()
    model.register_forward_pre_hook(lambda _, images: images[0].to(torch.float64))
    return model


if __name__ == "__main__":
    engine.build = build_in_float64
    sys.exit(train.main())
