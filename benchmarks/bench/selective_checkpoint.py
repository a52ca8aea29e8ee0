"""Selective activation checkpointing of dense layers, by torch.utils.checkpoint's own means."""

from contextlib import contextmanager

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
            layer.forward = _Selective(layer)
    return model


class _Selective:
    def __init__(self, layer):
        self.layer, self.plain = layer, layer.forward

    def __call__(self, inputs):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        if not torch.is_grad_enabled():
            return self.plain(inputs)
        # Without a copy for recomputation the running statistics would take in every batch twice.
        snapshot = Snapshot(self.layer, [name for name, part in self.layer._modules.items() if part is not None])
        call = self.plain

        @contextmanager
        def recomputation(context):
            nonlocal call
            twin = snapshot.module()  # outside of the context, which knows the ops of forward alone
            call = lambda x: type(self.layer).forward(twin, x)  # noqa: E731
            with context:
                yield

        def contexts():
            forward, again = create_selective_checkpoint_contexts(_keep_convolutions)
            return forward, recomputation(again)

        return checkpoint(lambda *x: call(x), *inputs, use_reentrant=False, context_fn=contexts)


def _keep_convolutions(context, op, *args, **kwargs):
    convolution = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE
