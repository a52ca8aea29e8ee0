"""examples/train.py with a float64 network, for tests that compare runs: in float32 rectifiers may decide otherwise."""

import sys

import torch
import train
from training import engine
from training.model import build


def build_in_float64(*arguments):
    """Build the network of a run in float64; it accepts the loader's float32 images."""
    model = build(*arguments).double()
    model.register_forward_pre_hook(lambda _, images: images[0].to(torch.float64))
    return model


if __name__ == "__main__":
    engine.build = build_in_float64
    sys.exit(train.main())
