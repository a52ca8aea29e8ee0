"""Dense layers with a hook or another module inside: each module is called once, and little is kept for backward."""

import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from densenet_ext import DenseNetBC, DropChannel, EfficientDenseLayer, memory, set_fallback

SMALL = {
    "growth_rate": 3,
    "block_config": (2, 2),
    "num_classes": 5,
    "bn_size": 2,
    "se_reduction": 2,
    "drop_channel": 0.1,
}
LAYER = "features.denseblock1.denselayer2"


def test_module_in_place_of_drop_channel_is_recomputed_with_its_own_randomness():
    """Under 'checkpoint' such a module draws twice, both times the same numbers."""
    layer = EfficientDenseLayer(4, 3, efficient="checkpoint").double()
    layer.drop_channel = nn.Dropout2d(0.5)
    assert not isinstance(layer.drop_channel, DropChannel)
    x = torch.randn(3, 4, 5, 5, dtype=torch.double)
    results = []
    for efficient in ("checkpoint", False):
        layer.efficient, leaf = efficient, x.clone().requires_grad_()
        torch.manual_seed(1)
        layer(leaf).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def kept_bytes(model, x):
    """Return the bytes that a forward pass keeps for backward: torch's and the workspaces'."""
    held = memory.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = model(x)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = sum(e.nbytes() for e in events) + memory.memory_allocated() - held
    del y
    return level


@pytest.mark.parametrize("where", ["one norm", "one convolution", "everywhere"])
def test_hooks_cost_the_fusion_not_the_memory(where):
    """Less is kept for backward than 'checkpoint' keeps without hooks, while each module is called once."""
    set_fallback("warn")
    torch.manual_seed(0)
    model = DenseNetBC(growth_rate=12, block_config=(6, 6), num_classes=5)
    x, seen = torch.randn(2, 3, 64, 64), []
    layer = model.features.denseblock1.denselayer4
    modules = {"one norm": [layer.norm1], "one convolution": [layer.conv2], "everywhere": list(model.modules())}[where]
    model.efficient = "checkpoint"
    checkpointed = kept_bytes(model, x)
    for module in modules:
        module.register_forward_hook(lambda module, *args: seen.append(module))
    model.efficient = "fused"
    with pytest.warns(UserWarning):
        fused = kept_bytes(model, x)
    assert 0 < fused < checkpointed
    assert len(seen) == len(set(seen)) and (where == "everywhere" or len(seen) == 1)


def test_what_a_hook_changes_is_what_backward_sees():
    """A watched layer computes ReLU's output again only if nobody has changed its input."""
    gradients = []
    for efficient in ("fused", False):
        set_fallback("warn")
        torch.manual_seed(0)
        model = DenseNetBC(**SMALL).double()
        model.efficient = efficient
        layer = model.get_submodule(LAYER)
        layer.norm1.register_forward_hook(lambda module, args, output: output * 1.5 - 0.1)
        layer.norm2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.relu2.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.randn(3, 3, 8, 8, dtype=torch.double)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("efficient", ["fused", "checkpoint"])
def test_a_parameter_that_changes_before_backward_is_noticed(efficient):
    """Backward of a recomputed layer raises the error that autograd raises for tensors that it keeps."""
    set_fallback("warn")
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    if efficient == "fused":
        layer.norm1.register_forward_hook(lambda *args: None)
    x = [torch.randn(2, 2, 6, 6, requires_grad=True) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x)
    with torch.no_grad():
        layer.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("hooked", ["norm1", "relu1", None])
def test_plain_rectifies_in_place_where_nobody_looks(hooked):
    """Plain, the baseline of every figure, keeps one map for norm and ReLU, or two if there is a hook."""
    layer = EfficientDenseLayer(4, 3)
    x = torch.randn(2, 4, 6, 6)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        if hooked:
            getattr(layer, hooked).register_forward_hook(lambda *args: None)
        layer(x)
    names = [e.name() for e in profiler.profiler.kineto_results.events()]
    assert names.count("aten::relu_") == (1 if hooked else 2)
