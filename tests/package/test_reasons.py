"""The fused implementation notices and names changes that it would ignore, and lets the modules compute them."""

import copy

import pytest
import torch
from small_networks import LAYER, images, network, step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from densenet_ext import EfficientDenseBlock, EfficientDenseLayer, set_fallback

OPTIONS = {"se_reduction": 2, "drop_channel": 0.1}


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


# peft has such a class: its name is that of PyTorch's.
Conv2d = type(
    "Conv2d", (nn.Conv2d,), {"forward": lambda self, x: 2 * nn.Conv2d.forward(self, x), "__module__": "adapters"}
)


class MyLayer(EfficientDenseLayer):
    def forward(self, inputs):
        return 3 * super().forward(inputs)


def hook(method):
    def change(model, path):
        getattr(model.get_submodule(path), method)(lambda *args: None)

    return change


def replace(make):
    def change(model, path):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(path)))

    return change


def set_attribute(name, value):
    return lambda model, path: setattr(model.get_submodule(path), name, value)


def new_forward(model, path):
    module = model.get_submodule(path)
    original = module.forward
    module.forward = lambda *args: 2 * original(*args)


def my_norm(old):
    new = MyNorm(old.num_features).double()
    new.load_state_dict(old.state_dict())
    return new


def my_layer(old):
    new = copy.deepcopy(old)
    new.__class__ = MyLayer
    return new


def adapted(old):
    new = copy.deepcopy(old)
    new.__class__ = Conv2d
    return new


def strided(old):
    return nn.Conv2d(old.in_channels, old.out_channels, 3, padding=2, dilation=2, bias=False).double()


def biased(old):
    return nn.Conv2d(old.in_channels, old.out_channels, 1).double()


# Each entry: the change, the path of the module, and a part of the reason that follows the path.
CHANGES = [
    (hook("register_forward_hook"), f"{LAYER}.norm1", "forward hook"),
    (hook("register_forward_pre_hook"), f"{LAYER}.conv1", "forward hook"),
    (hook("register_full_backward_hook"), f"{LAYER}.norm2", "backward hook"),
    (hook("register_full_backward_pre_hook"), f"{LAYER}.conv2", "backward hook"),
    (hook("register_forward_hook"), f"{LAYER}.se.fc1", "forward hook"),
    (hook("register_forward_hook"), f"{LAYER}.se", "forward hook"),
    (hook("register_forward_hook"), f"{LAYER}.drop_channel", "forward hook"),
    (hook("register_forward_hook"), LAYER, "forward hook"),
    (hook("register_forward_hook"), "features.denseblock1", "forward hook"),
    (hook("register_full_backward_hook"), "features.denseblock1", "backward hook"),
    (hook("register_forward_hook"), "features.transition1", "forward hook"),
    (hook("register_forward_hook"), "features.transition1.norm", "forward hook"),
    (hook("register_forward_hook"), "features.transition1.conv", "forward hook"),
    (hook("register_forward_hook"), "features.norm5", "forward hook"),
    (hook("register_forward_hook"), "features", "forward hook"),
    (new_forward, f"{LAYER}.conv2", "forward was replaced"),
    (replace(my_norm), f"{LAYER}.norm1", "is a MyNorm, not a BatchNorm2d"),
    (replace(my_norm), "features.norm5", "is a MyNorm, not a BatchNorm2d"),
    (replace(lambda old: nn.GroupNorm(1, old.num_features).double()), f"{LAYER}.norm2", "is a GroupNorm"),
    (replace(lambda old: nn.Identity()), "features.transition1.norm", "is a Identity"),
    (replace(my_layer), LAYER, "is a MyLayer"),
    (replace(lambda old: Double()), f"{LAYER}.drop_channel", "is a Double"),
    (replace(strided), f"{LAYER}.conv2", "padding is"),
    (replace(adapted), f"{LAYER}.conv2", "is a adapters.Conv2d, not a Conv2d"),
    (replace(biased), f"{LAYER}.conv1", "has a bias"),
    (replace(biased), "features.transition1.conv", "has a bias"),
    (set_attribute("padding_mode", "circular"), f"{LAYER}.conv2", "padding_mode is circular"),
    (set_attribute("drop_rate", 0.3), LAYER, "has drop_rate 0.3, the first layer 0.0"),
    (lambda m, p: weight_norm(m.get_submodule(p)), f"{LAYER}.conv1", "forward hook"),
    (lambda m, p: parametrizations.weight_norm(m.get_submodule(p)), f"{LAYER}.conv1", "is a ParametrizedConv2d"),
    (
        lambda m, p: parametrize.register_parametrization(m.get_submodule(p), "weight", Double()),
        f"{LAYER}.norm1",
        "Param",
    ),
    (lambda m, p: prune.random_unstructured(m.get_submodule(p), "weight", 0.3), f"{LAYER}.conv2", "forward hook"),
]


def changed_step(change, path, efficient):
    """A step of a network that is built anew at every call: some changes cannot be copied."""
    model = network(**OPTIONS)
    change(model, path)
    model.efficient = efficient
    torch.manual_seed(1)
    return step(model)


@pytest.mark.parametrize(
    ("change", "path", "reason"), CHANGES, ids=[f"{p}-{r}".replace(" ", "-") for _, p, r in CHANGES]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_change_is_named_and_honored(change, path, reason):
    with pytest.raises(RuntimeError, match=f"{path}.*{reason}"):
        changed_step(change, path, "fused")
    set_fallback("warn")
    with pytest.warns(UserWarning, match=f"{path}.*{reason}") as caught:
        got = changed_step(change, path, "fused")
    assert sum("efficient='fused'" in str(warning.message) for warning in caught) == 1
    torch.testing.assert_close(got, changed_step(change, path, False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [f"{LAYER}.norm1", LAYER, "features.denseblock1", "features.transition1", "features"])
def test_hooks_are_called(path):
    set_fallback("warn")
    model, seen = network("fused", **OPTIONS), []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.warns(UserWarning):
        model(images())
    assert len(seen) == 1


@pytest.mark.filterwarnings("error")
def test_hooks_on_modules_that_are_called_anyway_cost_nothing():
    model, seen = network("fused", **OPTIONS), []
    for module in (model, model.features.conv0, model.classifier):
        module.register_forward_hook(lambda *args: seen.append(args[0]))
    model(images())
    assert len(seen) == 3


def test_global_hook():
    handle = register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(RuntimeError, match="registered for all modules"):
            EfficientDenseBlock(2, 4, 3, efficient="fused")(torch.randn(2, 4, 8, 8))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda x: x.to("meta"), "no kernels for meta"), (lambda x: TwoTensor(x, x), "is a TwoTensor")],
    ids=["meta", "a subclass with data of its own"],
)
def test_inputs_that_the_kernels_cannot_read(change, reason):
    x = change(torch.randn(2, 4, 8, 8))
    block = EfficientDenseBlock(2, 4, 3, efficient="fused").to(x.device)
    with pytest.raises(RuntimeError, match=reason):
        block(x)
    set_fallback("warn")
    with pytest.warns(UserWarning, match=reason):
        assert block(x).shape == (2, 10, 8, 8)


@pytest.mark.filterwarnings("error")
def test_frozen_parameters_need_no_fallback():
    model = network("fused", **OPTIONS).requires_grad_(False)
    model.classifier.requires_grad_(True)
    model(images()).sum().backward()
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("efficient", ["fused", "checkpoint", False])
def test_a_child_that_nobody_calls_is_reported(efficient):
    set_fallback("warn")
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    layer.dropout = nn.Dropout()
    with pytest.warns(UserWarning, match="does not call its child dropout"):
        layer(torch.randn(2, 4, 6, 6))


@pytest.mark.filterwarnings("error")
def test_a_child_of_a_subclass_is_its_own_matter():
    class Scaled(EfficientDenseLayer):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = nn.Conv2d(3, 3, 1)

        def forward(self, inputs):
            return self.scale(super().forward(inputs))

    Scaled(4, 3)(torch.randn(2, 4, 6, 6))


@pytest.mark.filterwarnings("ignore:using the plain implementation")
@pytest.mark.parametrize("change", ["transition", "block", "append"])
def test_parts_of_transitions_and_blocks_can_be_reached(change):
    """A transition is a Sequential and a block a ModuleDict, as in torchvision's network."""
    set_fallback("warn")
    model, x = network(**OPTIONS).eval(), images()
    unchanged, transition = model(x), model.features.transition1
    if change == "transition":
        assert [name for name, _ in transition.named_children()] == ["norm", "relu", "conv", "pool"]
        assert type(transition[:2]) is nn.Sequential and transition[3] is transition.pool
        transition.pool = nn.Identity()
    elif change == "append":
        transition.append(nn.Tanh())
    else:
        for _, layer in model.features.denseblock1.items():
            layer.relu2 = nn.Tanh()
    results = []
    for model.efficient in (False, "fused"):
        results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(results[0], unchanged)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.filterwarnings("error")
def test_relu_of_either_kind_is_fused(inplace):
    model = network("fused", **OPTIONS, small_inputs=False)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    model(images(size=(40, 40))).sum().backward()
