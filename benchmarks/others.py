"""Implementations that are not this package's: torchvision's network, and selective activation checkpointing."""

from contextlib import contextmanager

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from densenet_ext import EfficientDenseLayer
from densenet_ext._snapshot import Snapshot


def torchvision_network(spec):
    """torchvision's DenseNet, with a CIFAR stem for small inputs: layer for layer DenseNetBC's, written by others."""
    import torchvision

    if spec.variant not in ("", "vanilla"):
        raise ValueError(
            f"variant is {spec.variant!r}; torchvision has neither Drop-Channel nor squeeze-and-excitation"
        )
    stem = 2 * spec.growth_rate
    model = torchvision.models.DenseNet(
        spec.growth_rate,
        spec.layers,
        stem,
        drop_rate=0.2 if spec.variant == "vanilla" and spec.random else 0.0,
        num_classes=spec.num_classes,
        memory_efficient=spec.implementation.startswith("torchvision-efficient"),
    )
    if spec.small_inputs:
        model.features.conv0 = torch.nn.Conv2d(3, stem, 3, padding=1, bias=False)
        for name in ("norm0", "relu0", "pool0"):
            delattr(model.features, name)
    return model


def checkpoint_selectively(model):
    """`model` with dense layers that keep the convolutions' outputs and compute all the rest again in backward.

    The memory-efficient DenseNet without computing a convolution twice, by torch.utils.checkpoint's own means.
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
        then, call = (
            Snapshot(self.layer, [name for name, part in self.layer._modules.items() if part is not None]),
            self.plain,
        )

        @contextmanager
        def recomputation(context):
            nonlocal call
            twin = then.module()  # outside of the context, which knows the ops of forward alone
            call = lambda x: type(self.layer).forward(twin, x)  # noqa: E731
            with context:
                yield

        def contexts():
            forward, again = create_selective_checkpoint_contexts(_keep_convolutions)
            return forward, recomputation(again)

        return checkpoint(lambda *x: call(x), *inputs, use_reentrant=False, context_fn=contexts)


def _keep_convolutions(context, op, *args, **kwargs):
    kept = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
