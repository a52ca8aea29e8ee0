"""Selective activation checkpointing of dense layers, by torch.utils.checkpoint's own means."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from densenet_ext import EfficientDenseLayer
from densenet_ext._snapshot import Snapshot


def checkpoint_selectively(model):
    """`model` with dense layers that keep the convolutions' outputs and compute all the rest again in backward.

    It is the memory-efficient DenseNet without computing a convolution twice.
    """
    for layer in model.modules():
        if isinstance(layer, EfficientDenseLayer):
            layer.forward = partial(_forward, layer, layer.forward)
    return model


def _forward(layer, plain, inputs):
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    if not torch.is_grad_enabled():
        return plain(inputs)
    # Without a copy for recomputation the running statistics would take in every batch twice.
    snapshot = Snapshot(layer, [name for name, part in layer._modules.items() if part is not None])
    call = plain

    @contextmanager
    def recomputation(context):
        nonlocal call
        call = partial(
            type(layer).forward, snapshot.module()
        )  # outside of the context, which knows forward's ops alone
        with context:
            yield

    def contexts():
        forward, again = create_selective_checkpoint_contexts(_keep_convolutions)
        return forward, recomputation(again)

    return checkpoint(lambda *x: call(x), *inputs, use_reentrant=False, context_fn=contexts)


def _keep_convolutions(context, op, *args, **kwargs):
    convolution = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE
