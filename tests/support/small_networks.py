"""Small networks in float64, a step of a module, and its comparison with that of the plain implementation."""

import torch
from torch import nn

from densenet_ext import DenseNetBC

EFFICIENT = ("checkpoint", "fused")
SMALL = {"growth_rate": 3, "block_config": (2, 3, 2), "num_classes": 5, "bn_size": 2}
EVERYTHING = {"drop_rate": 0.2, "drop_channel": 0.3, "se_reduction": 2}
LAYER = "features.denseblock1.denselayer2"


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def network(efficient=False, **options):
    torch.manual_seed(0)
    model = DenseNetBC(**{**SMALL, **options}, efficient=efficient).double()
    for norm in norms(model):  # neither the identity nor symmetric
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    return model


def images(samples=4, size=(9, 8), dtype=torch.double, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, *size, generator=generator, dtype=torch.double).to(dtype)


def watch(model, path=f"{LAYER}.norm1"):
    """Register a hook that does nothing, but wants the module to be called."""
    model.get_submodule(path).register_forward_hook(lambda *args: None)


def step(module, x=None, forward=None):
    """Output, gradients of the input (a tensor or several) and of the parameters, and running statistics."""
    x = images() if x is None else x
    leaves = [part.requires_grad_() for part in (x if isinstance(x, list) else [x])]
    y = (module if forward is None else forward)(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)).sum().backward()
    gradients = [t.grad for t in (*leaves, *module.parameters()) if t.requires_grad]
    return [y, *gradients, *module.buffers()]


def assert_equal_plain(run, implementations=EFFICIENT, tolerance=1e-9):
    """run(efficient) gives the same for these implementations as for the plain one."""
    want = run(False)
    for efficient in implementations:
        torch.testing.assert_close(run(efficient), want, rtol=tolerance, atol=tolerance)
