"""Things that users do to a network. Each gave wrong results once; the right values are plain PyTorch's."""

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from small_networks import EFFICIENT, LAYER, assert_equal_plain, images, network, step, watch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from densenet_ext import EfficientDenseBlock, EfficientDenseLayer, _patches, set_fallback

IMPLEMENTATIONS = (False, *EFFICIENT)

pytestmark = pytest.mark.filterwarnings("ignore:using the plain implementation:UserWarning")


@pytest.fixture(autouse=True)
def fallback_warns(fixed_state):
    set_fallback("warn")


@pytest.mark.parametrize("efficient", IMPLEMENTATIONS)
def test_a_watched_step_leaves_nothing_behind(efficient):
    """No object may hold itself in a cycle: all are freed without the garbage collector."""
    block = EfficientDenseBlock(3, 4, 3, efficient=efficient)
    left = []
    for layer in block.layers:
        for part in (layer.norm1, layer.conv1, layer):
            part.register_forward_hook(lambda module, args, output: left.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(2, 4, 8, 8, requires_grad=True)
        block(x).sum().backward()
        assert [ref() for ref in left] == [None] * 9
    finally:
        gc.enable()


NAMES = [
    "x",
    "features.conv0.weight",
    "features.denseblock1.denselayer1.conv1.weight",
    "features.transition1.norm.weight",
    "features.denseblock2.denselayer2.norm2.bias",
    "features.norm5.weight",
]


@pytest.mark.parametrize("first", NAMES)
def test_no_second_derivative_is_silently_missing(first):
    """Plain has all second derivatives. With allow_unused, a path that is missing in the graph would give None."""
    model = network("fused")
    for second in NAMES:
        named = {**dict(model.named_parameters()), "x": images().requires_grad_()}
        (grad,) = torch.autograd.grad(model(named["x"]).square().sum(), named[first], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.square().sum(), named[second], allow_unused=True)


def test_jvp_by_two_backward_passes_is_refused():
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.jvp(network("fused").eval(), images(), torch.ones_like(images()))


def test_forward_mode_over_backward_is_refused():
    x = images().requires_grad_()
    y = network("fused")(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_nested_vmap_over_backward():
    def run(efficient):
        x = images().requires_grad_()
        y = network(efficient).eval()(x)
        vectors = torch.randn(2, 3, *y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(3))
        gradient = torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])
        return [torch.func.vmap(gradient)(vectors)]

    assert_equal_plain(run)


@pytest.mark.parametrize("path", [f"{LAYER}.norm1", f"{LAYER}.norm2", "features.denseblock1.denselayer1.norm1"])
def test_a_hook_that_writes_into_its_input(path):
    def run(efficient):
        model = network(efficient)
        watch(model)
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0].clamp_(-1, 1), None)[1])
        return step(model)

    assert_equal_plain(run)


@pytest.mark.parametrize("efficient", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["conv1", "conv2", "norm1", "norm2"])
@pytest.mark.parametrize("watched", [True, False])
def test_a_weight_written_to_before_backward_is_noticed(efficient, name, watched):
    """Backward of a layer that it computes again raises the error that autograd raises for tensors that it keeps."""
    model = network(efficient)
    if watched:
        watch(model)
    y = model(images())
    with torch.no_grad():
        model.get_submodule(f"{LAYER}.{name}").weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_that_are_attributes_and_change():
    """Backward uses the weights of its forward, not later ones. MAML's fast weights change in this way."""

    def run(efficient):
        model = network(efficient)
        conv = model.get_submodule(f"{LAYER}.conv1")
        weight = conv.weight.detach().clone().requires_grad_()
        del conv.weight
        conv.weight = weight
        first = model(images())
        conv.weight = weight * 1.5
        (first.square().sum() + model(images()).square().sum()).backward()
        return [weight.grad, *[p.grad for p in model.parameters()]]

    assert_equal_plain(run)


@pytest.mark.parametrize("training", [True, False])
def test_two_threads_train_one_checkpointed_network(training):
    model = network("checkpoint").train(training)
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}

    def train(_):
        model(images()).square().sum().backward()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(10)))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert model.get_submodule(f"{LAYER}.norm1").num_batches_tracked == (10 if training else 0)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_who_manages_saved_tensors_sees_those_of_watched_layers(efficient):
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    watch(layer, "norm1")
    seen, x = [], torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        layer(x)
    assert torch.Size((2, 4, 6, 6)) in seen and torch.Size((2, 12, 6, 6)) in seen
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        layer(x).sum().backward()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).sum().backward()


def test_function_modes_see_the_functions():
    class Halved(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 0.5 * result if function is F.conv2d else result

    def run(efficient):
        model = network(efficient)
        with Halved():
            return step(model)

    assert_equal_plain(run)


@pytest.mark.filterwarnings("error")
def test_a_default_device_is_no_reason_to_fall_back():
    with torch.device("cpu"):
        network("fused")(images()).sum().backward()


class Scaled(nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is F.conv2d else result


@pytest.mark.parametrize("path", [f"{LAYER}.conv1", "features.transition1.conv"])
def test_parameters_that_are_a_subclass(path):
    def run(efficient):
        model = network(efficient).requires_grad_(False)
        conv = model.get_submodule(path)
        conv.weight = Scaled(conv.weight.detach(), requires_grad=False)
        return [model(images())]

    assert_equal_plain(run)
    model = EfficientDenseLayer(4, 3, efficient="fused")
    model.conv2.weight = Scaled(model.conv2.weight.detach())
    with pytest.warns(UserWarning, match="has a parameter that is a Scaled"):
        set_fallback("warn")
        model(torch.randn(2, 4, 6, 6))


def test_a_wrapper_subclass_and_a_hook():
    def run(efficient):
        model = network(efficient)
        watch(model)
        y = model(TwoTensor(images(), images()))
        y.sum().backward()
        return [y.a, *[p.grad.a if isinstance(p.grad, TwoTensor) else p.grad for p in model.parameters()]]

    assert_equal_plain(run)


@pytest.mark.parametrize("watched", _patches._WATCHED, ids=[f"{o.__name__}.{n}" for o, n in _patches._WATCHED])
def test_whatever_is_replaced_is_reported(watched, monkeypatch):
    owner, name = watched
    original = getattr(owner, name)
    model = network("fused", small_inputs=False, se_reduction=1)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    set_fallback("error")
    with pytest.raises(RuntimeError, match=f"{owner.__name__}.{name} was replaced"):
        model(images(size=(40, 40)))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d])
def test_call_of_a_class_replaced(kind, monkeypatch):
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args: 0.7 * original(self, *args))
    assert_equal_plain(lambda efficient: step(network(efficient, small_inputs=False), images(size=(40, 40))))


def test_dropout_of_torch_replaced(monkeypatch):
    """A user who makes dropout drop in evaluation, too, expects it of this layer as of any other."""

    def run(efficient):
        return [network(efficient, drop_rate=0.3).eval()(images())]

    (usual,) = run(False)
    monkeypatch.setattr(F, "dropout", lambda x, p, training: 0.5 * x)
    assert_equal_plain(run)
    assert not torch.allclose(run(False)[0], usual)


def test_an_empty_block_and_a_part_that_is_none():
    def empty(efficient):
        model = network(efficient, block_config=(2, 2), num_init_features=6)
        model.features.denseblock1.clear()
        model.features.transition1 = nn.Sequential()
        model.features.denseblock2.clear()
        model.features.norm5 = nn.BatchNorm2d(6).double()
        model.classifier = nn.Linear(6, 4).double()
        torch.nn.init.constant_(model.classifier.weight, 0.1)
        torch.nn.init.zeros_(model.classifier.bias)
        return step(model)

    assert_equal_plain(empty)
    for efficient in IMPLEMENTATIONS:
        model = network(efficient)
        model.features.transition1.pool = None
        with pytest.raises(TypeError, match="not callable"):
            model(images())
        layer = EfficientDenseLayer(4, 3, se_reduction=1, efficient=efficient)
        del layer.se
        assert layer(torch.randn(2, 4, 6, 6)).shape == (2, 3, 6, 6)


def test_a_transition_whose_weight_is_3x3():
    """A convolution's attributes need not fit its weight: plain convolves with the weight that is there."""

    def run(efficient):
        model = network(efficient)
        conv = model.features.transition1.conv
        torch.manual_seed(2)
        conv.weight = nn.Parameter(torch.randn(*conv.weight.shape[:2], 3, 3, dtype=torch.double))
        return step(model)

    assert_equal_plain(run)


@pytest.mark.parametrize("efficient", IMPLEMENTATIONS)
def test_dropout_of_everything(efficient):
    """The constructor refuses drop_rate 1, but it may be set later; torch.nn.functional.dropout gives zeros."""
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    layer.drop_rate = 1.0
    y = layer(torch.randn(2, 4, 6, 6, requires_grad=True))
    y.sum().backward()
    assert y.count_nonzero() == 0 and layer.conv2.weight.grad.count_nonzero() == 0


def test_copies_of_a_network_under_a_hook_are_independent():
    model = network("fused")
    watch(model)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(step(other), step(model), rtol=0, atol=0)
