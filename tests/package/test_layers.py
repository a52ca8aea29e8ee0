"""Drop-Channel, squeeze-and-excitation, transition, dense layer and block as modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import EFFICIENT, assert_equal_plain, step, watch

from densenet_ext import DropChannel, EfficientDenseBlock, EfficientDenseLayer, SqueezeExcitation, Transition

DROPS = {
    "nothing": {},
    "dropout": {"drop_rate": 0.3},
    "pre-norm": {"drop_channel": 0.3},
    "pre-conv": {"drop_channel": 0.3, "drop_channel_position": "pre_conv"},
    "everything": {"drop_channel": 0.3, "drop_channel_position": "pre_conv", "drop_rate": 0.2, "se_reduction": 2},
}


def assert_module_equals_plain(module, x, implementations=EFFICIENT):
    """One step has the same outputs, gradients and buffers; random masks are the same for every implementation."""

    def run(efficient):
        copied = copy.deepcopy(module)
        copied.efficient = efficient
        torch.manual_seed(1)
        return step(copied, [part.clone() for part in x] if isinstance(x, list) else x.clone())

    assert_equal_plain(run, implementations, tolerance=1e-10)


def test_drop_channel_drops_channels_and_keeps_the_mean():
    x = torch.ones(200, 50, 2, 3)
    y = DropChannel(0.2)(x)
    assert torch.equal(y.amax((2, 3)), y.amin((2, 3)))
    scales = y[:, :, 0, 0]
    assert set(scales.unique().tolist()) == {0.0, 1.25}
    assert abs((scales == 0).double().mean() - 0.2) < 0.02


def test_drop_channel_takes_a_mask():
    x, mask = torch.randn(2, 3, 4, 4), torch.tensor([[0.0, 2, 1], [1, 0, 3]])
    torch.testing.assert_close(DropChannel(0.5)(x, mask), x * mask[:, :, None, None])


def test_drop_channel_in_evaluation_mode_is_the_identity():
    x = torch.randn(2, 3, 4, 4)
    assert DropChannel(0.5).eval()(x) is x
    assert DropChannel(0.0)(x) is x


def test_squeeze_excitation_is_its_formula():
    module, x = SqueezeExcitation(12, 4), torch.randn(3, 12, 5, 4)
    hidden = torch.relu(F.linear(x.mean((2, 3)), module.fc1.weight[:, :, 0, 0], module.fc1.bias))
    gate = F.linear(hidden, module.fc2.weight[:, :, 0, 0], module.fc2.bias).sigmoid()
    torch.testing.assert_close(module(x), x * gate[:, :, None, None])


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(12, 16, 1), (32, 16, 2), (64, 16, 4), (12, 5, 2)])
def test_squeeze_excitation_width(channels, reduction, hidden):
    assert SqueezeExcitation(channels, reduction).fc1.out_channels == hidden


def test_transition_is_its_formula():
    module, x = Transition(6, 3).double(), torch.randn(4, 6, 5, 7, dtype=torch.double)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    z = torch.relu((x - mean) / (var + 1e-5).sqrt())
    want = F.avg_pool2d(torch.einsum("nchw,oc->nohw", z, module.conv.weight[:, :, 0, 0]), 2)
    torch.testing.assert_close(module(x), want)
    assert want.shape == (4, 3, 2, 3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_layer_equals_plain(efficient, drop, training):
    layer = EfficientDenseLayer(6, 4, 3, **DROPS[drop]).double().train(training)
    x = [torch.randn(3, c, 5, 4, dtype=torch.double) for c in (1, 3, 2)]
    assert_module_equals_plain(layer, x, [efficient])
    assert_module_equals_plain(layer, torch.cat(x, 1), [efficient])


@pytest.mark.parametrize("keep_bottleneck", [False, True])
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_block_equals_plain(efficient, drop, keep_bottleneck):
    block = EfficientDenseBlock(3, 5, 4, 2, keep_bottleneck=keep_bottleneck, **DROPS[drop]).double()
    assert_module_equals_plain(block, torch.randn(3, 5, 6, 5, dtype=torch.double), [efficient])


def test_block_of_single_fused_layers_equals_fused_block():
    block = EfficientDenseBlock(3, 5, 4, 2, drop_channel=0.3, efficient="fused").double()
    x = torch.randn(3, 5, 6, 5, dtype=torch.double)
    torch.manual_seed(1)
    want = block(x)
    torch.manual_seed(1)
    features = [x]
    for layer in block.layers:
        features.append(layer(features))
    torch.testing.assert_close(torch.cat(features, 1), want, rtol=1e-12, atol=1e-12)


def test_block_keeps_its_input_in_the_first_channels():
    block, x = EfficientDenseBlock(2, 5, 4, efficient="fused"), torch.randn(2, 5, 6, 6)
    assert torch.equal(block(x)[:, :5], x)


def test_layer_is_the_formula_of_the_paper():
    """The composite function of Huang et al. is written out here without this package."""
    layer = EfficientDenseLayer(6, 4, 3, efficient="fused").double()
    x = torch.randn(3, 6, 5, 4, dtype=torch.double)

    def norm(x):
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    b = torch.einsum("nchw,oc->nohw", torch.relu(norm(x)), layer.conv1.weight[:, :, 0, 0])
    padded = F.pad(torch.relu(norm(b)), (1, 1, 1, 1))
    want = sum(
        torch.einsum("nchw,oc->nohw", padded[:, :, i : i + 5, j : j + 4], layer.conv2.weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("efficient", [False, *EFFICIENT])
def test_running_statistics_by_definition(efficient, momentum):
    """Each of two batches counts once, with its unbiased variance; momentum None averages over all batches."""
    layer = EfficientDenseLayer(3, 2, 2, efficient=efficient, momentum=momentum).double()
    mean, var = torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double)
    for batch in range(1, 3):
        x = torch.randn(4, 3, 5, 5, dtype=torch.double, requires_grad=True)
        layer(x).sum().backward()
        factor = 1 / batch if momentum is None else momentum
        mean = (1 - factor) * mean + factor * x.detach().mean((0, 2, 3))
        var = (1 - factor) * var + factor * x.detach().var((0, 2, 3), unbiased=True)
        torch.testing.assert_close(layer.norm1.running_mean, mean)
        torch.testing.assert_close(layer.norm1.running_var, var)
        assert layer.norm1.num_batches_tracked == layer.norm2.num_batches_tracked == batch


def assert_recomputes(between, training=True, watched=False, **options):
    """Gradients are plain's, although between(layer, efficient) changes the layer after forward."""

    def run(efficient):
        torch.manual_seed(0)
        layer = EfficientDenseLayer(3, 2, 2, **options, efficient=efficient).double().train(training)
        if watched:
            watch(layer, "norm1")
        x = torch.randn(4, 3, 5, 5, dtype=torch.double, requires_grad=True)
        y = layer(x)
        between(layer, efficient)
        y.square().sum().backward()
        return [x.grad, *[p.grad for p in layer.parameters()]]

    assert_equal_plain(run, ["checkpoint"], tolerance=1e-12)


@pytest.mark.parametrize("watched", [False, True])
def test_checkpoint_recomputes_in_the_mode_of_forward(watched):
    """model.eval() between forward and backward changes no gradient. A layer with a hook is called once only, and backward
    applies its mask before the norm again."""
    assert_recomputes(lambda layer, efficient: layer.eval(), watched=watched, drop_channel=0.5)


def test_evaluation_recomputes_with_the_statistics_of_forward():
    """A batch in training mode may have changed them by then."""
    assert_recomputes(lambda layer, efficient: efficient and layer.norm1.running_mean.add_(1), training=False)


def test_masks_are_the_same_in_every_implementation_and_differ_between_steps():
    block = EfficientDenseBlock(2, 6, 4, drop_channel=0.5, drop_rate=0.5).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.double)
    outputs = []
    for efficient in (False, *EFFICIENT):
        block.efficient = efficient
        torch.manual_seed(3)
        outputs.append((block(x), block(x)))
    for first, second in outputs:
        torch.testing.assert_close(first, outputs[0][0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("efficient", [False, *EFFICIENT])
def test_dropped_output_channel_has_no_gradient(efficient):
    """drop_rate acts on conv2's outputs, before squeeze-and-excitation: zeros stay zeros."""
    layer = EfficientDenseLayer(4, 3, 2, drop_rate=0.9, se_reduction=1, efficient=efficient)
    y = layer(torch.randn(2, 4, 6, 6))
    assert 0.75 < (y == 0).double().mean() < 1
