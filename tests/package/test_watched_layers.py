"""Dense layers with a hook or another module inside: each module is called once, and little is kept for backward."""

import pytest
import torch
from allocations import allocations
from small_networks import LAYER, assert_equal_plain, network, step
from torch import nn
from torch.profiler import ProfilerActivity, profile

from densenet_ext import DenseNetBC, DropChannel, EfficientDenseLayer, memory, set_fallback


def test_module_in_place_of_drop_channel_is_recomputed_with_its_own_randomness():
    """Under 'checkpoint' such a module draws twice: both times the same."""

    def run(efficient):
        torch.manual_seed(1)
        layer = EfficientDenseLayer(4, 3, efficient=efficient).double()
        layer.drop_channel = nn.Dropout2d(0.5)
        assert not isinstance(layer.drop_channel, DropChannel)
        return step(layer, torch.randn(3, 4, 5, 5, dtype=torch.double))

    assert_equal_plain(run, ["checkpoint"], tolerance=1e-12)


def kept_bytes(model, x):
    """Return the bytes that a forward pass leaves behind for backward: torch's and the workspaces'."""
    held, outputs = memory.memory_allocated(), []  # the outputs hold their graph while memory is counted
    of_torch = sum(allocations(lambda: outputs.append(model(x))))
    return of_torch + memory.memory_allocated() - held


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


@pytest.mark.filterwarnings("ignore:using the plain implementation")
def test_what_a_hook_changes_is_what_backward_sees():
    """The watched layer's ReLU is made again only where nobody has changed its input."""
    set_fallback("warn")

    def run(efficient):
        model = network(efficient, se_reduction=2, drop_channel=0.1)
        layer = model.get_submodule(LAYER)
        layer.norm1.register_forward_hook(lambda module, args, output: output * 1.5 - 0.1)
        layer.norm2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.relu2.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))
        torch.manual_seed(1)
        return step(model)

    assert_equal_plain(run, ["fused"])


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
