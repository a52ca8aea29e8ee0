"""A class is proved by the attributes and methods that its forward reads: another value is another proof."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from converted_networks import assert_equal, build, images, pair, step
from torch import nn

from densenet_ext import DenseLayerSpec, convert, set_fallback

densenet = pytest.importorskip("torchvision").models.densenet
SPEC = DenseLayerSpec(returns="concatenation")


@pytest.fixture(autouse=True)
def silent():
    """Falling back is what many of these networks must do."""
    with set_fallback("silent"):
        yield


class Parts(nn.Module):
    """A dense layer whose subclasses do something with its new channels."""

    def __init__(self, channels, option=None):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.keep(option)

    def keep(self, option):
        self.option = option

    def forward(self, x):
        y = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, self.change(y)], 1)


class Scaled(Parts):
    def change(self, y):
        return self.option * y


class PrivatelyScaled(Parts):
    def keep(self, option):
        self._option = option

    def change(self, y):
        return self._option * y


class ScaledByAnEntry(Parts):
    def change(self, y):
        return self.option[0] * y


class WithFunction(Parts):
    def change(self, y):
        return self.option(y)


def nothing(y):
    return y


@pytest.mark.parametrize(
    ("layer", "neutral", "other"),
    [
        (Scaled, 1.0, 3.0),
        (Scaled, torch.tensor(1.0), torch.tensor(3.0)),
        (PrivatelyScaled, 1, 3),
        (ScaledByAnEntry, (1, 0), (3, 0)),
        (ScaledByAnEntry, [1, 0], [3, 0]),
        (ScaledByAnEntry, {0: 1}, {0: 3}),
        (WithFunction, nothing, torch.tanh),
    ],
    ids=["number", "tensor", "private", "tuple", "list", "dictionary", "function"],
)
def test_each_value_of_an_attribute_is_proved(layer, neutral, other):
    """The first layer has a value with which it is a dense layer; another one has not, or gets one later."""
    torch.manual_seed(0)
    plain = nn.Sequential(layer(6, neutral), layer(10, other), layer(14, neutral)).double()
    converted = copy.deepcopy(plain)
    report = convert(converted, layers={layer: SPEC})
    assert list(report.fused) == ["0", "2"] and list(report.left_alone) == ["1"]
    x = torch.randn(2, 6, 5, 7, dtype=torch.double)
    assert_equal(step(converted, x), step(plain, x))
    for model in (plain, converted):
        model[2].keep(other)
    assert_equal(step(converted, x), step(plain, x))


class DropsEarlier(Parts):
    """Its dropout comes before the second convolution, which shows only if the rate is not 0."""

    drop_rate = 0.0

    def keep(self, option):
        self.drop_rate = 0.0

    def forward(self, x):
        y = self.conv1(self.relu1(self.norm1(x)))
        y = F.dropout(y, self.drop_rate, self.training)
        return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], 1)


class DropsEarlierByAModule(Parts):
    def keep(self, option):
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        y = self.dropout(self.conv1(self.relu1(self.norm1(x))))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], 1)


class StoresItsOutput(Parts):
    def change(self, y):
        self.stored = y
        return y


class CountsInAnAttribute(Parts):
    def keep(self, option):
        self.calls = 0

    def change(self, y):
        self.calls += 1
        return y


@pytest.mark.parametrize(
    ("layer", "names", "reason"),
    [
        (DropsEarlier, {"drop_rate": "drop_rate"}, "in training mode the output differs"),
        (DropsEarlierByAModule, {"dropout": "dropout"}, "in training mode the output differs"),
        (StoresItsOutput, {}, "it assigns the attribute stored"),
        (CountsInAnAttribute, {}, "it assigns the attribute calls"),
    ],
)
def test_layer_that_does_something_else_is_left_alone(layer, names, reason):
    report = convert(
        nn.Sequential(layer(6), layer(10)), layers={layer: DenseLayerSpec(**names, returns="concatenation")}
    )
    assert not report.fused and len(report.left_alone) == 2
    assert all(reason in why for why in report.left_alone.values())


def louder(kind, method):
    original = getattr(kind, method)
    return lambda self, *args: 2 * original(self, *args)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (densenet._DenseLayer, "forward"),
        (densenet._DenseLayer, "bn_function"),
        (densenet._DenseBlock, "forward"),
        (densenet._Transition, "forward"),
        (densenet.DenseNet, "forward"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_method_of_a_class_is_replaced(monkeypatch, kind, method, first):
    plain = build("torchvision")
    converted = copy.deepcopy(plain)
    if not first:
        assert len(convert(converted).fused) == 2
    monkeypatch.setattr(kind, method, louder(kind, method))
    if first:
        convert(converted)
    assert_equal(step(converted, images()), step(plain, images()))


@pytest.mark.parametrize(
    ("path", "method"),
    [("", "forward"), ("", "forward_features"), ("features.denseblock1.denselayer1", "bottleneck_fn")],
)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_method_of_one_module_is_replaced(path, method, first):
    plain = build("timm")
    converted = copy.deepcopy(plain)
    assert len(convert(build("timm") if first else converted).fused) == 2  # the class is proved, in any case
    for model in (plain, converted):
        module = model.get_submodule(path)
        setattr(module, method, types.MethodType(louder(type(module), method), module))
    if first:
        convert(converted)
        assert all(p.grad is None for p in converted.parameters())
    assert_equal(step(converted, images()), step(plain, images()))


@pytest.mark.parametrize("path", ["features.denseblock1", "features.transition1", "features"])
def test_class_with_a_call_of_its_own(path):
    plain = build("torchvision")
    module = plain.get_submodule(path)
    module.__class__ = type("Louder", (type(module),), {"__call__": louder(type(module), "__call__")})
    converted = copy.deepcopy(plain)
    assert convert(converted).fused
    assert_equal(step(converted, images()), step(plain, images()))


class CallsMore(nn.Module):
    """A network like torchvision's, with a module before its features that may be replaced."""

    def __init__(self, model):
        super().__init__()
        self.features, self.classifier, self.before = model.features, model.classifier, nn.Identity()

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(self.before(x))), 1).flatten(1))


def test_network_that_calls_more_modules():
    plain = CallsMore(build("torchvision"))
    converted = copy.deepcopy(plain)
    assert len(convert(converted).fused) == 2
    for model in (plain, converted):
        model.before = nn.Tanh()
    assert_equal(step(converted, images()), step(plain, images()))


def test_another_classifier_in_the_way_of_timm():
    """reset_classifier changes attributes that forward does not read."""
    plain, converted = pair("timm")
    for model in (plain, converted):
        torch.manual_seed(4)
        model.reset_classifier(3)
        model.double()
    with set_fallback("error"):
        assert_equal(step(converted, images()), step(plain, images()))


@pytest.mark.parametrize("rate", [1, True, torch.tensor(0.3)])
def test_rates_of_any_type(rate):
    plain, converted = pair("torchvision")
    for model in (plain, converted):
        model.features.denseblock1.denselayer2.drop_rate = rate
    assert_equal(step(converted, images()), step(plain, images()))


class Sliced(nn.Module):
    """It stands in the place of a layer of torchvision's, or of a convolution."""

    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, list) else x
        return 1.5 * x[:, :4]


def replace(path, make):
    return lambda model: model.set_submodule(path, make())


def cut_last_norm(model):
    del model.features.norm5
    model.features.add_module("relu5", nn.Softplus())


CHANGES = {
    "a layer that is not converted": replace(
        "features.denseblock1.denselayer2", lambda: densenet._DenseLayer(10, 4, 2, 0.0).double()
    ),
    "another module in a layer's place": replace("features.denseblock1.denselayer2", Sliced),
    "a convolution without a weight": replace(
        "features.denseblock2.denselayer1.conv1", lambda: nn.Sequential(nn.Conv2d(7, 8, 1)).double()
    ),
    "a convolution that has no weight yet": replace(
        "features.denseblock1.denselayer1.conv1", lambda: nn.LazyConv2d(8, 1, bias=False, dtype=torch.double)
    ),
    "another end of the features": cut_last_norm,
    "features that end in a block": lambda model: model.features.__delattr__("norm5"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_replaced_after_the_conversion(change):
    """Outputs alone are compared: torchvision's in-place ReLU may not follow a block whose backward needs its output."""
    results = []
    for model in pair("torchvision"):
        torch.manual_seed(4)
        CHANGES[change](model)
        with torch.no_grad():
            results.append([model(images())])
        results[-1] += [model(images()).detach(), *model.buffers()]  # with a graph the last blocks keep more
    assert_equal(results[1], results[0])
