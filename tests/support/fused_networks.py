"""Small networks that run fused, in float64: built by this package, or another library's after `convert`."""

import pytest
import torch
from converted_networks import with_statistics

from densenet_ext import DenseNetBC, convert

SMALL = {"growth_rate": 8, "block_config": (2, 3, 2), "bn_size": 2, "num_classes": 5}


def _built():
    return DenseNetBC(**SMALL, num_init_features=16, small_inputs=False, se_reduction=2, efficient="fused")


def _torchvision():
    return pytest.importorskip("torchvision").models.DenseNet(**SMALL, num_init_features=16)


def _timm():
    return pytest.importorskip("timm.models.densenet").DenseNet(**SMALL)


def _monai():
    sizes = {name: SMALL[name] for name in ("growth_rate", "block_config", "bn_size")}
    return pytest.importorskip("monai.networks.nets").DenseNet(2, 3, SMALL["num_classes"], init_features=16, **sizes)


MAKERS = {"built": _built, "torchvision": _torchvision, "timm": _timm, "MONAI": _monai}


def fused_network(name):
    """Return one of MAKERS, with norms that are neither the identity nor symmetric, in training mode."""
    torch.manual_seed(0)
    model = with_statistics(MAKERS[name]().double())
    if name != "built":
        assert not convert(model).left_alone
    return model
