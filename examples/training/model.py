"""The network of a run."""

import argparse

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_ext import DenseNetBC
from training.errors import UserError, explain
from training.processes import Processes

# Arguments of the network; None leaves them to the variant.
ARGUMENTS = (
    "depth growth_rate compression bn_size drop_rate drop_channel drop_channel_position se_reduction efficient "
    "keep_bottleneck small_inputs"
).split()


def build(options: argparse.Namespace, num_classes: int, channels: int) -> DenseNetBC:
    """Build the variant that the options name, with their changes of it, for images of so many channels.

    Raises:
        UserError: the network cannot be built so.
    """
    arguments = {name: getattr(options, name) for name in ARGUMENTS if getattr(options, name) is not None}
    if options.efficient == "plain":
        arguments["efficient"] = False
    with explain(ValueError, what="there is no such network"):
        return DenseNetBC.variant(options.variant, num_classes=num_classes, in_channels=channels, **arguments)


def implementation(model: DenseNetBC) -> str:
    """Return 'plain', 'checkpoint' or 'fused'."""
    return model.efficient or "plain"


def prepare(model: DenseNetBC, options: argparse.Namespace, processes: Processes) -> DenseNetBC:
    """Move the model to the process's device, in the memory format of the options.

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
    """Wrap the model to average gradients, and with --sync-bn its batch statistics, over the processes, if there are several."""
    if processes.world_size == 1:
        return model
    network = DistributedDataParallel(model, [processes.device] if processes.device.type == "cuda" else None)
    if options.sync_bn:  # after the wrapping, which refuses such norms on a CPU; parameters and buffers stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return network
