"""The network of a run."""

import argparse

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_ext import DenseNetBC
from training.errors import UserError
from training.processes import Processes

EFFICIENT = {"plain": False, "checkpoint": "checkpoint", "fused": "fused"}
_OVERRIDES = ("drop_rate", "drop_channel", "se_reduction")  # None: as the variant has it


def build(options: argparse.Namespace, num_classes: int, channels: int) -> DenseNetBC:
    """The variant that the options name, with what they change of it, for images of so many channels.

    Raises:
        UserError: the network cannot be built so.
    """
    overrides = {name: getattr(options, name) for name in _OVERRIDES if getattr(options, name) is not None}
    if options.efficient is not None:
        overrides["efficient"] = EFFICIENT[options.efficient]
    try:
        return DenseNetBC.variant(
            options.variant,
            growth_rate=options.growth_rate,
            depth=options.depth,
            compression=options.compression,
            num_classes=num_classes,
            bn_size=options.bn_size,
            drop_channel_position=options.drop_channel_position,
            keep_bottleneck=options.keep_bottleneck,
            small_inputs=options.small_inputs,
            in_channels=channels,
            **overrides,
        )
    except ValueError as error:
        raise UserError(f"there is no such network: {error}") from error


def implementation(model: DenseNetBC) -> str:
    """'plain', 'checkpoint' or 'fused'."""
    return next(name for name, value in EFFICIENT.items() if value == model.efficient)


def prepare(model: DenseNetBC, options: argparse.Namespace, processes: Processes) -> DenseNetBC:
    """The model on the process's device, in the memory format of the options.

    Raises:
        UserError: --sync-bn where PyTorch's own SyncBatchNorm would have to serve on a CPU.
    """
    if options.sync_bn and processes.device.type == "cpu" and model.efficient != "fused":
        raise UserError(
            f"--sync-bn with the {implementation(model)} implementation needs GPUs, as PyTorch's SyncBatchNorm does; "
            "--efficient fused serves CPUs too"
        )
    memory_format = torch.channels_last if options.channels_last else torch.preserve_format
    return model.to(processes.device, memory_format=memory_format)


def distribute(model: DenseNetBC, options: argparse.Namespace, processes: Processes) -> nn.Module:
    """What averages gradients, and with --sync-bn the model's batch statistics, over the processes; the model itself where
    there is one.
    """
    if processes.world_size == 1:
        return model
    network = DistributedDataParallel(model, [processes.device] if processes.device.type == "cuda" else None)
    if (
        options.sync_bn
    ):  # afterwards, since it lets nobody wrap such norms on a CPU; parameters and buffers stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return network
