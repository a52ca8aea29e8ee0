"""Whatever a fused stage would pass over in silence is noticed, named, and computed by the plain implementation."""

import copy
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from densenet_ext import (
    DenseNetBC,
    DropChannel,
    EfficientDenseBlock,
    EfficientDenseLayer,
    fallback,
    functional,
    set_fallback,
    workspace_use,
)

SMALL = {
    "growth_rate": 3,
    "block_config": (2, 2),
    "num_classes": 5,
    "bn_size": 2,
    "se_reduction": 2,
    "drop_channel": 0.1,
}
LAYER = "features.denseblock1.denselayer2"


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


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


def strided(old):
    return nn.Conv2d(old.in_channels, old.out_channels, 3, padding=2, dilation=2, bias=False).double()


def biased(old):
    return nn.Conv2d(old.in_channels, old.out_channels, 1).double()


# what is done, to which module, and what the reason says besides the module's name
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


def changed_model(change, path):
    """The same model at every call: a copy would not do, since some changes cannot be copied."""
    torch.manual_seed(0)
    model = DenseNetBC(**SMALL).double()
    change(model, path)
    return model


def step(model, efficient):
    model.efficient = efficient
    torch.manual_seed(1)
    y = model(torch.randn(3, 3, 8, 8, dtype=torch.double))
    y.square().sum().backward()
    return [y, *[p.grad for p in model.parameters()], *model.buffers()]


@pytest.mark.parametrize(
    ("change", "path", "reason"), CHANGES, ids=[f"{p}-{r}".replace(" ", "-") for _, p, r in CHANGES]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_change_is_named_and_honored(change, path, reason):
    with pytest.raises(RuntimeError, match=f"{path}.*{reason}"):
        step(changed_model(change, path), "fused")
    set_fallback("warn")
    with pytest.warns(UserWarning, match=f"{path}.*{reason}") as caught:
        got = step(changed_model(change, path), "fused")
    assert sum("efficient='fused'" in str(warning.message) for warning in caught) == 1
    torch.testing.assert_close(got, step(changed_model(change, path), False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [f"{LAYER}.norm1", LAYER, "features.denseblock1", "features.transition1", "features"])
def test_hooks_are_called(path):
    set_fallback("warn")
    model, seen = DenseNetBC(**SMALL, efficient="fused"), []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.warns(UserWarning):
        model(torch.randn(2, 3, 8, 8))
    assert len(seen) == 1


@pytest.mark.filterwarnings("error")
def test_hooks_on_modules_that_are_called_anyway_cost_nothing():
    model, seen = DenseNetBC(**SMALL, efficient="fused"), []
    for module in (model, model.features.conv0, model.classifier):
        module.register_forward_hook(lambda *args: seen.append(args[0]))
    model(torch.randn(2, 3, 8, 8))
    assert len(seen) == 3


def test_global_hook():
    handle = register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(RuntimeError, match="registered for all modules"):
            EfficientDenseBlock(2, 4, 3, efficient="fused")(torch.randn(2, 4, 8, 8))
    finally:
        handle.remove()


INPUTS = {
    "meta": (lambda: torch.randn(2, 4, 8, 8, device="meta"), "no kernels for meta"),
    "a subclass with data of its own": (
        lambda: TwoTensor(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)),
        "is a TwoTensor",
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_the_kernels_cannot_read(kind):
    make, reason = INPUTS[kind]
    x = make()
    block = EfficientDenseBlock(2, 4, 3, efficient="fused").to(x.device)
    with pytest.raises(RuntimeError, match=reason):
        block(x)
    set_fallback("warn")
    with pytest.warns(UserWarning, match=reason):
        assert block(x).shape == (2, 10, 8, 8)


@pytest.mark.filterwarnings("error")
def test_frozen_parameters_need_no_fallback():
    model = DenseNetBC(**SMALL, efficient="fused").requires_grad_(False)
    model.classifier.requires_grad_(True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.classifier.weight.grad is not None


def test_warns_once_for_each_reason():
    set_fallback("warn")
    model = DenseNetBC(**SMALL, efficient="fused")
    x = torch.randn(2, 3, 8, 8)
    handle = model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning) as caught:
        model(x)
        model(x)
    assert len(caught) == 1
    model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="denseblock2") as caught:
        model(x)
    assert len(caught) == 1
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def hooked_layer():
    layer = EfficientDenseLayer(4, 3, efficient="fused")
    layer.norm1.register_forward_hook(lambda *args: None)
    return layer, torch.randn(2, 4, 8, 8)


@pytest.mark.filterwarnings("error")
def test_silent_says_nothing_and_computes():
    layer, x = hooked_layer()
    set_fallback("silent")
    y = layer(x)
    layer.efficient = False
    torch.testing.assert_close(layer(x), y)


def test_the_mode_of_a_with_block_ends_with_it():
    """An error ends it, too. What was warned about outside is not warned about again afterwards."""
    set_fallback("warn")
    layer, x = hooked_layer()
    with pytest.warns(UserWarning, match="norm1 has a forward hook"):
        layer(x)
    with set_fallback("error"):
        with set_fallback("silent"):
            layer(x)
        with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
            layer(x)
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"), set_fallback("error"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    set_fallback("warn")
    with pytest.warns(UserWarning, match="norm1 has a forward hook"):
        layer(x)


def test_the_mode_holds_for_all_threads():
    layer, x = hooked_layer()
    with set_fallback("silent"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(layer, x).result().shape == (2, 3, 8, 8)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        pool.submit(layer, x).result()


def test_a_mode_that_does_not_exist_changes_nothing():
    layer, x = hooked_layer()
    with pytest.raises(ValueError, match="mode is None"):
        set_fallback(None)
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        layer(x)


def test_single_layer_falls_back():
    layer, x = hooked_layer()
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        layer(x)


def test_module_in_place_of_drop_channel_is_recomputed_with_its_own_randomness():
    """Under 'checkpoint', what somebody put there draws twice: both times the same."""
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
    """What a forward pass leaves behind for backward: torch's memory and the workspaces'."""
    held = workspace_use().held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = model(x)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    kept = sum(e.nbytes() for e in events) + workspace_use().held - held
    del y
    return kept


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
        kept = kept_bytes(model, x)
    assert 0 < kept < checkpointed
    assert len(seen) == len(set(seen)) and (where == "everywhere" or len(seen) == 1)


def test_what_a_hook_changes_is_what_backward_sees():
    """The watched layer's ReLU is made again only where nobody has changed its input."""
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
    """Where a layer is computed again from it, as autograd notices it for what it keeps."""
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


def test_disabled_by_the_environment(monkeypatch):
    """A switch to find out whether the fused ops are to blame: not an error even where a fallback is one."""
    model = DenseNetBC(**SMALL, efficient="fused").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    model.eval()
    want = model(x)
    monkeypatch.setattr(fallback, "_disabled", True)
    monkeypatch.setattr(functional, "dense_stage", None)
    monkeypatch.setattr(functional, "dense_layer", None)
    with pytest.warns(UserWarning, match="DENSENET_EXT_DISABLE is set"):
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("0", False), ("", False)])
def test_the_environment_variable(value, disabled):
    code = "from densenet_ext import fallback; print(fallback._disabled)"
    environment = {**os.environ, "DENSENET_EXT_DISABLE": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(disabled)


@pytest.mark.parametrize("efficient", ["fused", "checkpoint", False])
def test_a_child_that_nobody_calls_is_reported(efficient):
    set_fallback("warn")
    layer = EfficientDenseLayer(4, 3, efficient=efficient)
    layer.dropout = nn.Dropout()
    with pytest.warns(UserWarning, match="does not call its child dropout"):
        layer(torch.randn(2, 4, 6, 6))


def test_a_child_of_a_subclass_is_its_own_matter():
    class Scaled(EfficientDenseLayer):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = nn.Conv2d(3, 3, 1)

        def forward(self, inputs):
            return self.scale(super().forward(inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scaled(4, 3)(torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("change", ["transition", "block", "append"])
def test_parts_of_transitions_and_blocks_can_be_reached(change):
    """As in torchvision's network: a transition is a Sequential, a block a ModuleDict."""
    set_fallback("warn")
    torch.manual_seed(0)
    model = DenseNetBC(**SMALL).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    before, transition = model(x), model.features.transition1
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(results[0], before)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.filterwarnings("error")
def test_relu_of_either_kind_is_fused(inplace):
    model = DenseNetBC(**SMALL, efficient="fused", small_inputs=False)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    model(torch.randn(2, 3, 40, 40)).sum().backward()


@pytest.mark.parametrize("hooked", ["norm1", "relu1", None])
def test_plain_rectifies_in_place_where_nobody_looks(hooked):
    """The baseline of every figure keeps one map where a hook makes it two."""
    layer = EfficientDenseLayer(4, 3)
    x = torch.randn(2, 4, 6, 6)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        if hooked:
            getattr(layer, hooked).register_forward_hook(lambda *args: None)
        layer(x)
    names = [e.name() for e in profiler.profiler.kineto_results.events()]
    assert names.count("aten::relu_") == (1 if hooked else 2)
