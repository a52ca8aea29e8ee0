"""Named networks: their sizes are the published ones, and their options are those of DenseNetBC."""

import inspect

import pytest
import torch
from small_networks import images

import densenet_ext
from densenet_ext import DenseNetBC, factories
from densenet_ext.models import VARIANTS

IMAGENET = {  # number of parameters with 1000 classes: torchvision's `num_params`, and MONAI's DenseNet264
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
}
CIFAR = {  # number of parameters with 10 classes, in millions: Huang et al., table 2
    "densenet_bc_100_12": 0.8,
    "densenet_bc_250_24": 15.3,
    "densenet_bc_190_40": 25.6,
}
SIZED = [*IMAGENET, *CIFAR]


def build(name, *args, **options):
    """Build a network whose parameters have shapes and no values: the large ones would take seconds."""
    with torch.device("meta"):
        return getattr(densenet_ext, name)(*args, **options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", IMAGENET)
def test_parameters_of_networks_for_imagenet(name):
    assert parameters(build(name)) == IMAGENET[name]


@pytest.mark.parametrize("name", CIFAR)
def test_parameters_of_networks_for_cifar(name):
    assert round(parameters(build(name, 10)) / 1e6, 1) == CIFAR[name]
    assert build(name).classifier.out_features == 100


def shapes(model):
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in IMAGENET if name != "densenet264"])
def test_state_dict_is_torchvisions(name):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        theirs = getattr(models, name)()
    assert shapes(build(name)) == shapes(theirs)


def test_densenet264_has_as_many_parameters_as_monais():
    networks = pytest.importorskip("monai.networks.nets")
    with torch.device("meta"):
        theirs = networks.DenseNet264(spatial_dims=2, in_channels=1, out_channels=3)
    assert parameters(build("densenet264", 3, in_channels=1)) == parameters(theirs)


@pytest.mark.parametrize("name", SIZED)
def test_options_reach_the_network(name):
    options = {"in_channels": 1, "drop_rate": 0.1, "drop_channel": 0.2, "drop_channel_position": "pre_conv"}
    options |= {"se_reduction": 8, "efficient": True, "keep_bottleneck": True, "eps": 0.1, "momentum": None}
    model = build(name, num_classes=7, **options)
    layer = model.features.denseblock2.denselayer3
    assert (model.features.conv0.in_channels, model.classifier.out_features) == (1, 7)
    assert (layer.drop_rate, layer.drop_channel_rate, layer.drop_channel_position) == (0.1, 0.2, "pre_conv")
    assert layer.se.fc1.out_channels == max(1, layer.conv2.out_channels // 8)
    assert (model.efficient, layer.keep_bottleneck, layer.norm1.eps, layer.norm1.momentum) == ("fused", True, 0.1, None)


def test_a_network_for_imagenet_may_take_small_images():
    model = build("densenet121", 10, small_inputs=True)
    assert model.features.conv0.stride == (1, 1) and not hasattr(model.features, "pool0")


@pytest.mark.parametrize("name", [*SIZED, "hybrid_densenet"])
def test_an_unknown_keyword_is_named(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        build(name, dropout=0.2)


@pytest.mark.parametrize("name", SIZED)
def test_a_size_that_the_name_sets_is_named(name):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'growth_rate'"):
        build(name, growth_rate=8)


def test_annotated_options_are_the_arguments_of_the_network():
    """Type checkers and editors see these names; the functions hand over whatever they get."""
    known = set(inspect.signature(DenseNetBC).parameters)
    assert set(factories.HybridOptions.__annotations__) | set(factories.NetworkOptions.__annotations__) == known
    sizes = {"growth_rate", "depth", "compression", "num_classes", "bn_size", "num_init_features", "block_config"}
    assert set(factories.NetworkOptions.__annotations__) == known - sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_hybrid_densenet_is_the_variant(variant):
    size = {"depth": 10, "growth_rate": 4, "num_classes": 5}
    torch.manual_seed(0)
    ours = densenet_ext.hybrid_densenet(variant, **size).double()
    torch.manual_seed(0)
    want = DenseNetBC.variant(variant, **size).double()
    assert (repr(ours), ours.efficient) == (repr(want), want.efficient)
    x = images()
    torch.testing.assert_close(ours.eval()(x), want.eval()(x), rtol=1e-12, atol=1e-12)


def test_hybrid_densenet_is_all_three_by_default():
    model = build("hybrid_densenet", in_channels=1, num_classes=10)
    assert repr(model) == repr(build("hybrid_densenet", "A+B+C", in_channels=1, num_classes=10))
    assert (model.efficient, model.features.conv0.in_channels, model.classifier.out_features) == ("fused", 1, 10)
    with pytest.raises(ValueError, match="variant is 'D'; it may be 'vanilla', 'A', 'B'"):
        densenet_ext.hybrid_densenet("D")
