"""Things that users do to a network. Each gave wrong results once; the right values are plain PyTorch's."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from densenet_ext import DenseNetBC, EfficientDenseBlock, EfficientDenseLayer, _patches, set_fallback

EFFICIENT = (False, "checkpoint", "fused")
SMALL = {"growth_rate": 3, "block_config": (2, 2), "num_classes": 4, "bn_size": 2}
LAYER = "features.denseblock1.denselayer2"

pytestmark = pytest.mark.filterwarnings("ignore:using the plain implementation:UserWarning")


@pytest.fixture(autouse=True)
def fallback_warns(fixed_state):
    set_fallback("warn")


def network(efficient, **options):
    torch.manual_seed(0)
    return DenseNetBC(**SMALL, **options, efficient=efficient).double()


def images(size=8):
    return torch.randn(3, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def results(model, forward=None, x=None):
    x = (images() if x is None else x).requires_grad_()
    y = (model if forward is None else forward)(x)
    y.square().sum().backward()
    return [y, x.grad, *[p.grad for p in model.parameters()], *model.buffers()]


def assert_all_equal_plain(run):
    """Assert that run(efficient) gives the same for all implementations."""
    want = run(False)
    for efficient in EFFICIENT[1:]:
        torch.testing.assert_close(run(efficient), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("efficient", EFFICIENT)
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
        torch.autograd.functional.jvp(network("fused").eval(), images(), torch.ones(3, 3, 8, 8, dtype=torch.double))


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

    assert_all_equal_plain(run)


@pytest.mark.parametrize("path", [f"{LAYER}.norm1", f"{LAYER}.norm2", "features.denseblock1.denselayer1.norm1"])
def test_a_hook_that_writes_into_its_input(path):
    def run(efficient):
        model = network(efficient)
        model.get_submodule(f"{LAYER}.norm1").register_forward_hook(lambda *args: None)
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0].clamp_(-1, 1), None)[1])
        return results(model)

    assert_all_equal_plain(run)


@pytest.mark.parametrize("efficient", EFFICIENT)
@pytest.mark.parametrize("name", ["conv1", "conv2", "norm1", "norm2"])
def test_a_weight_written_to_before_backward_is_noticed(efficient, name):
    model = network(efficient)
    model.get_submodule(f"{LAYER}.norm1").register_forward_hook(lambda *args: None)
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

    assert_all_equal_plain(run)


@pytest.mark.parametrize("training", [True, False])
def test_two_threads_train_one_checkpointed_network(training):
    model = network("checkpoint").train(training)
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}

    def train():
        for _ in range(5):
            model(images()).square().sum().backward()

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert model.get_submodule(f"{LAYER}.norm1").num_batches_tracked == (10 if training else 0)


@pytest.mark.parametrize("efficient", ["checkpoint", "fused"])
def test_who_manages_saved_tensors_sees_those_of_watched_layers(efficient):
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    layer.norm1.register_forward_hook(lambda *args: None)
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
            return results(model)

    assert_all_equal_plain(run)


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

    assert_all_equal_plain(run)
    model = EfficientDenseLayer(4, 3, efficient="fused")
    model.conv2.weight = Scaled(model.conv2.weight.detach())
    with pytest.warns(UserWarning, match="has a parameter that is a Scaled"):
        set_fallback("warn")
        model(torch.randn(2, 4, 6, 6))


def test_a_wrapper_subclass_and_a_hook():
    def run(efficient):
        model = network(efficient)
        model.get_submodule(f"{LAYER}.norm1").register_forward_hook(lambda *args: None)
        y = model(TwoTensor(images(), images()))
        y.sum().backward()
        return [y.a, *[p.grad.a if isinstance(p.grad, TwoTensor) else p.grad for p in model.parameters()]]

    assert_all_equal_plain(run)


@pytest.mark.parametrize("watched", _patches._WATCHED, ids=[f"{o.__name__}.{n}" for o, n in _patches._WATCHED])
def test_whatever_is_replaced_is_reported(watched, monkeypatch):
    owner, name = watched
    original = getattr(owner, name)
    model = network("fused", small_inputs=False, se_reduction=1)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    set_fallback("error")
    with pytest.raises(RuntimeError, match=f"{owner.__name__}.{name} was replaced"):
        model(images(40))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d])
def test_call_of_a_class_replaced(kind, monkeypatch):
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args: 0.7 * original(self, *args))
    assert_all_equal_plain(lambda efficient: results(network(efficient, small_inputs=False), x=images(40)))


def test_dropout_of_torch_replaced(monkeypatch):
    """A user who makes dropout drop in evaluation, too, expects it of this layer as of any other."""

    def run(efficient):
        return [network(efficient, drop_rate=0.3).eval()(images())]

    (usual,) = run(False)
    monkeypatch.setattr(F, "dropout", lambda x, p, training: 0.5 * x)
    assert_all_equal_plain(run)
    assert not torch.allclose(run(False)[0], usual)


def test_an_empty_block_and_a_part_that_is_none():
    def empty(efficient):
        model = network(efficient, num_init_features=6)
        model.features.denseblock1.clear()
        model.features.transition1 = nn.Sequential()
        model.features.denseblock2.clear()
        model.features.norm5 = nn.BatchNorm2d(6).double()
        model.classifier = nn.Linear(6, 4).double()
        torch.nn.init.constant_(model.classifier.weight, 0.1)
        torch.nn.init.zeros_(model.classifier.bias)
        return results(model)

    assert_all_equal_plain(empty)
    for efficient in EFFICIENT:
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
        return results(model)

    assert_all_equal_plain(run)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_dropout_of_everything(efficient):
    """The constructor refuses drop_rate 1, but it may be set later; torch.nn.functional.dropout gives zeros."""
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    layer.drop_rate = 1.0
    y = layer(torch.randn(2, 4, 6, 6, requires_grad=True))
    y.sum().backward()
    assert y.count_nonzero() == 0 and layer.conv2.weight.grad.count_nonzero() == 0


def test_arguments_that_are_no_numbers():
    for options in ({"drop_rate": None}, {"drop_channel": "0.1"}, {"compression": None}, {"block_config": 6}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is {options[name]!r}"):
            DenseNetBC(**options)
    with pytest.raises(ValueError, match="efficient is"):
        DenseNetBC(efficient=torch.tensor([1, 2]))
    assert len(DenseNetBC(block_config=(n for n in (1, 2))).features.denseblock2) == 2


def test_copies_of_a_network_under_a_hook_are_independent():
    model = network("fused")
    model.get_submodule(f"{LAYER}.norm1").register_forward_hook(lambda *args: None)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(results(other), results(model), rtol=0, atol=0)
