"""The paper's optimizer: SGD whose learning rate falls at fixed fractions of the epochs."""

import argparse
from collections.abc import Iterable

import torch
from torch import nn


def make_optimizer(parameters: Iterable[nn.Parameter], options: argparse.Namespace) -> torch.optim.SGD:
    """SGD with Nesterov momentum, all parameters at once; weight decay on all of them."""
    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        dampening=options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=True,
    )


def learning_rate(options: argparse.Namespace, epoch: int) -> float:
    """lr * gamma^(milestones passed) in the epoch of number `epoch`, the first one being 0."""
    passed = sum(epoch >= milestone * options.epochs for milestone in options.lr_milestones)
    return options.lr * options.lr_gamma**passed
