"""torch.compile of fused networks: one graph for each mode, with eager's numbers and eager's memory."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from fused_networks import fused_network
from installed import needs_compiler
from small_networks import images
from torch import nn

from densenet_ext import release_workspaces, set_fallback, workspace_use

LAYER = "features.denseblock2.denselayer2"
SIZE = (40, 40)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(model, forward, x):
    """Return the loss, the gradients and the running statistics of a training step."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = F.cross_entropy(forward(x), torch.arange(len(x)) % 5)
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()], *[b.clone() for b in model.buffers()]]


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def assert_two_graphs(model, backend="aot_eager"):
    """A graph for training and one for evaluation serve all steps."""
    eager, forward = copy.deepcopy(model), compiled(model, backend)
    for i, training in enumerate((True, True, True, False, False, True)):
        model.train(training)
        eager.train(training)
        x = images(3, SIZE, seed=i)
        assert_equal(step(model, forward, x), step(eager, eager, x))
        assert graphs() == (1 if i < 3 else 2)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["built", "torchvision", "timm", "MONAI"])
def test_each_mode_is_one_graph(name):
    assert_two_graphs(fused_network(name))


def test_dropout_is_in_the_graph():
    model = fused_network("torchvision")
    for layer in model.modules():
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = 0.3
    eager, x = copy.deepcopy(model), images(3, SIZE)
    assert_equal(step(model, compiled(model), x), step(eager, eager, x))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["built", "torchvision"])
def test_inductor(name):
    assert_two_graphs(fused_network(name), "inductor")


def test_another_batch_size_is_one_graph_more():
    model = fused_network("torchvision")
    eager, forward = copy.deepcopy(model), compiled(model)
    for i, samples in enumerate((3, 5, 7, 4)):
        x = images(samples, SIZE, seed=i)
        assert_equal(step(model, forward, x), step(eager, eager, x))
    assert graphs() == 2


@pytest.mark.parametrize("name", ["built", "torchvision"])
def test_memory_is_eager_memory(name):
    """The peak of a step, with the workspaces that it takes, is at most a tenth higher."""
    model, x = fused_network(name), images(8, (64, 64))

    def peak(forward):
        step(model, forward, x)
        release_workspaces()
        model.zero_grad()
        start = workspace_use().occupied
        levels = itertools.accumulate(allocations(lambda: step(model, forward, x)))
        return max(0, *levels) + workspace_use().occupied - start

    eager = peak(model)
    assert peak(compiled(model)) <= 1.1 * eager


def double_norm(model):
    model.get_submodule(f"{LAYER}.norm2").register_forward_hook(lambda module, args, y: 2 * y)


def replace_pool(model):
    model.features.transition1.pool = nn.MaxPool2d(2)


def replace_relu(model):
    model.get_submodule(LAYER).relu2 = nn.LeakyReLU(0.3)


def replace_momentum(model):
    model.get_submodule(LAYER).norm1.momentum = 0.7


@pytest.mark.parametrize("name", ["built", "torchvision"])
def test_changes_after_compilation_are_noticed(name):
    set_fallback("silent")
    model, x = fused_network(name), images(3, SIZE)
    eager, forward = copy.deepcopy(model), compiled(model, "eager")
    before = step(model, forward, x), step(eager, eager, x)
    for change in (replace_momentum, replace_pool, double_norm, replace_relu):
        change(model)
        change(eager)
        after = step(model, forward, x), step(eager, eager, x)
        assert_equal(*after)
        with pytest.raises(AssertionError):
            assert_equal(after[0], before[0])
        before = after


@pytest.mark.parametrize("name", ["built", "torchvision"])
def test_fallback_is_reported_while_tracing_and_breaks_no_graph(name):
    set_fallback("warn")
    model, x = fused_network(name), images(3, SIZE)
    eager = copy.deepcopy(model)
    for module in (model, eager):
        double_norm(module)
    forward = compiled(model)
    with pytest.warns(UserWarning, match="denselayer2.norm2 has a forward hook") as caught:
        for _ in range(3):
            assert_equal(step(model, forward, x), step(eager, eager, x))
    assert graphs() == 1
    assert sum("instead of efficient='fused'" in str(warning.message) for warning in caught) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["built", "torchvision"])
def test_compiled_backward_equals_backward(name):
    """Compiled autograd traces the backward pass of an eager forward pass, with an op that writes into its arguments."""
    model = fused_network(name)
    want = torch.autograd.grad(model(images(size=SIZE)).square().sum(), list(model.parameters()))
    loss = model(images(size=SIZE)).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    assert_equal([p.grad for p in model.parameters()], list(want))
