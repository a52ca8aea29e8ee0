"""Small networks of the libraries whose DenseNets `convert` knows, and of the repositories that people copy from.

The latter are written from their descriptions: what their parts are called, and in which order they are computed.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densenet_ext import convert

SIZES = {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2, "num_classes": 5}


def torchvision_network(drop_rate=0.0):
    models = pytest.importorskip("torchvision").models
    return models.DenseNet(**SIZES, num_init_features=6, drop_rate=drop_rate)


def timm_network(drop_rate=0.0, **options):
    timm = pytest.importorskip("timm")
    return timm.models.densenet.DenseNet(**SIZES, proj_drop_rate=drop_rate, **options)


def monai_network(drop_rate=0.0, **options):
    nets = pytest.importorskip("monai").networks.nets
    sizes = {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2, "init_features": 6, "dropout_prob": drop_rate}
    return nets.DenseNet(spatial_dims=2, in_channels=3, out_channels=5, **sizes, **options)


def torchxrayvision_network(drop_rate=0.0):
    models = pytest.importorskip("torchxrayvision").models
    return models.DenseNet(**SIZES, num_init_features=6, drop_rate=drop_rate, in_channels=3)


class KuangliuLayer(nn.Module):
    def __init__(self, channels, growth, width, drop_rate=0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([y, x], 1)


class BearpawLayer(nn.Module):
    def __init__(self, channels, growth, width, drop_rate=0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)
        self.relu, self.dropRate = nn.ReLU(inplace=True), drop_rate

    def forward(self, x):
        y = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        if self.dropRate > 0:
            y = F.dropout(y, self.dropRate, self.training)
        return torch.cat((x, y), 1)


class OpenOODLayer(nn.Module):
    """Dropout also comes after the first convolution."""

    def __init__(self, channels, growth, width, drop_rate=0.0):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1, bias=False)
        self.relu, self.droprate = nn.ReLU(inplace=True), drop_rate

    def drop(self, x):
        return F.dropout(x, self.droprate, training=self.training) if self.droprate > 0 else x

    def forward(self, x):
        y = self.drop(self.conv1(self.relu(self.bn1(x))))
        return torch.cat([x, self.drop(self.conv2(self.relu(self.bn2(y))))], 1)


class PhlippeLayer(nn.Module):
    def __init__(self, channels, growth, width, drop_rate=0.0):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x):
        return torch.cat([self.net(x), x], dim=1)


class WeiaicunzaiLayer(nn.Module):
    def __init__(self, channels, growth, width, drop_rate=0.0):
        super().__init__()
        self.bottle_neck = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, width, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x):
        return torch.cat([x, self.bottle_neck(x)], 1)


class FunctionalTransition(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class WrappedTransition(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.transition = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.AvgPool2d(2, 2))

    def forward(self, x):
        return self.transition(x)


class TransitionWithoutReLU(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.down_sample = nn.Sequential(nn.BatchNorm2d(channels), conv, nn.AvgPool2d(2, 2))

    def forward(self, x):
        return self.down_sample(x)


class WrappedBlock(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class CalledOneByOne(nn.Module):
    """A network whose forward calls blocks and transitions itself, as kuangliu's does."""

    def __init__(self, *parts):
        super().__init__()
        self.conv1, self.dense1, self.trans1, self.dense2, self.bn, self.linear = parts

    def forward(self, x):
        y = self.dense2(self.trans1(self.dense1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.bn(y)), 1).flatten(1))


def assembled(layer, transition, block=nn.Sequential, sequential=True, drop_rate=0.0):
    """A network of two blocks from these classes; its features are one Sequential, or called one by one."""
    channels, growth, width = 6, 4, 8

    def new_block(count):
        nonlocal channels
        layers = [layer(channels + i * growth, growth, width, drop_rate) for i in range(count)]
        channels += count * growth
        return block(layers) if block is WrappedBlock else block(*layers)

    stem, first = nn.Conv2d(3, channels, 3, padding=1, bias=False), new_block(2)
    between, channels = transition(channels, 7), 7
    parts = [stem, first, between, new_block(3), nn.BatchNorm2d(channels)]
    if not sequential:
        return CalledOneByOne(*parts, nn.Linear(channels, 5))
    rest = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(nn.Sequential(*parts), *rest)


def _architecture(*arguments, **options):
    return lambda drop_rate=0.0: assembled(*arguments, **options, drop_rate=drop_rate)


# A function of the rate of dropout, and how many blocks run together with their transition.
NETWORKS = {
    "torchvision": (torchvision_network, 1),
    "timm": (timm_network, 1),
    "MONAI": (monai_network, 1),
    "torchxrayvision": (torchxrayvision_network, 1),
    "kuangliu": (_architecture(KuangliuLayer, FunctionalTransition, sequential=False), 0),
    "new first in a Sequential": (_architecture(KuangliuLayer, FunctionalTransition), 1),
    "phlippe": (_architecture(PhlippeLayer, WrappedTransition, WrappedBlock), 1),
    "weiaicunzai": (_architecture(WeiaicunzaiLayer, TransitionWithoutReLU), 0),
    "bearpaw": (_architecture(BearpawLayer, FunctionalTransition, sequential=False), 0),
    "OpenOOD": (_architecture(OpenOODLayer, FunctionalTransition, WrappedBlock), 1),
}


def build(name, drop_rate=0.0, dtype=torch.double):
    """A network with parameters and statistics that are neither those of a new one nor symmetric."""
    torch.manual_seed(0)
    return with_statistics(NETWORKS[name][0](drop_rate).to(dtype))


def with_statistics(model):
    """The model, with norms that are neither the identity nor symmetric, and have seen batches."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(samples=3, size=(36, 40), dtype=torch.double, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, *size, generator=generator, dtype=torch.double).to(dtype)


def pair(name, drop_rate=0.0, dtype=torch.double):
    """A network and its converted copy."""
    plain = build(name, drop_rate, dtype)
    converted = copy.deepcopy(plain)
    convert(converted)
    return plain, converted


def step(model, x):
    """Output, gradients of the input and the parameters, and buffers after one step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_equal(found, wanted, tolerance=1e-9):
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
