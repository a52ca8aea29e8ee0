"""DenseNetBC in training and evaluation: the three implementations against each other, with inputs in any layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from decisions import clear_input
from small_networks import EFFICIENT, EVERYTHING, SMALL, images, network, norms
from torch import nn

from densenet_ext import DenseNetBC, EfficientDenseBlock
from densenet_ext.models import VARIANTS


def train(model, efficient, steps, batch=lambda step: images() + 0.1 * step):
    """Losses, and the state after that many steps of SGD, everything random from one seed."""
    model = copy.deepcopy(model)
    model.efficient = efficient
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(5)
    losses = []
    for step in range(steps):
        x = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **model.state_dict()}


def assert_same_training(model, efficient, *args):
    want = train(model, False, *args)
    torch.testing.assert_close(train(model, efficient, *args), want, rtol=1e-9, atol=1e-9)


def variant(name):
    torch.manual_seed(0)
    return DenseNetBC.variant(name, **SMALL).double()


def with_norms(change):
    model = network()
    for norm in norms(model):
        change(norm)
    return model


def no_affine(norm):
    norm.affine, norm.weight, norm.bias = False, None, None


def no_tracking(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def single_frozen_norms():
    model = network(**EVERYTHING)
    for norm in (model.features.denseblock1.denselayer2.norm1, model.features.transition1.norm, model.features.norm5):
        norm.eval()
    return model


def frozen_parameters():
    model = network(**EVERYTHING)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    return model


# how the network is made, how many steps it is trained for
NETWORKS = {
    "every mask, before the norm": (lambda: network(**EVERYTHING), 10),
    "every mask, before the convolution": (lambda: network(**EVERYTHING, drop_channel_position="pre_conv"), 10),
    **{f"variant {name}": (lambda name=name: variant(name), 2) for name in VARIANTS},
    "kept bottlenecks": (lambda: network(**EVERYTHING, keep_bottleneck=True), 2),
    "norms: no affine": (lambda: with_norms(no_affine), 3),
    "norms: no tracking": (lambda: with_norms(no_tracking), 3),
    "norms: cumulative": (lambda: with_norms(lambda norm: setattr(norm, "momentum", None)), 3),
    "norms: large eps": (lambda: with_norms(lambda norm: setattr(norm, "eps", 0.1)), 3),
    "norms: frozen": (lambda: with_norms(nn.Module.eval), 3),
    "norms: single ones frozen": (single_frozen_norms, 3),
    "frozen parameters": (frozen_parameters, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_training_equals_plain(efficient, name):
    """Weights, running statistics and num_batches_tracked are equal after the steps."""
    make, steps = NETWORKS[name]
    assert_same_training(make(), efficient, steps)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(layout):
    assert_same_training(network(), "fused", 1, lambda step: LAYOUTS[layout](images()))
    block = EfficientDenseBlock(2, 3, 2).double()
    x = LAYOUTS[layout](images())
    want = block(x)
    block.efficient = "fused"
    torch.testing.assert_close(block(x), want, rtol=1e-11, atol=1e-11)


def test_channels_last_model():
    model = network().to(memory_format=torch.channels_last)
    assert_same_training(model, "fused", 2, lambda step: LAYOUTS["channels last"](images()))


@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["planar", *LAYOUTS])
def test_first_convolution_is_called_and_writes_what_the_fused_ops_read(layout, channels, small_inputs):
    """Its hooks see channels-last maps, whose gradient is so, too, where the stem is fused; planar ones stay so elsewhere.

    In float32, which is oneDNN's. One channel is a case of its own: its maps are planar and channels last at once.
    """
    model, seen = network(in_channels=channels, small_inputs=small_inputs).float(), []

    def hook(module, inputs, output):
        seen.append(output)
        output.register_hook(seen.append)

    # few enough values for all decisions of one batch in a few to be clear
    size = (9, 10) if small_inputs else (33, 40)
    formed = LAYOUTS.get(layout, torch.clone)
    x = clear_input(model, lambda seed: formed(images(size=size, dtype=torch.float32, seed=seed)[:, :channels]))
    model.features.conv0.register_forward_hook(hook)
    for efficient in ("fused", False):
        model.efficient = efficient
        model(x).square().sum().backward()
    assert len(seen) == 4
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen[:2])
    assert seen[2].is_contiguous() or layout != "planar"
    torch.testing.assert_close(seen[:2], seen[2:], rtol=1e-3, atol=1e-3)


def test_imagenet_stem_equals_plain():
    assert_same_training(network(small_inputs=False), "fused", 2, lambda step: images(size=(33, 47)))


def test_one_sample_and_odd_sizes_equal_plain():
    assert_same_training(network(), "fused", 2, lambda step: images(1, (13, 11)))


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_evaluation_equals_plain_and_changes_nothing(efficient):
    model = network(**EVERYTHING)
    model(images())  # statistics that are not the initial ones
    model.eval()
    want = model(images())
    state = copy.deepcopy(model.state_dict())
    model.efficient = efficient
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_evaluation_without_running_statistics_uses_the_batch(efficient):
    model = with_norms(no_tracking).eval()
    want = model(images())
    model.efficient = efficient
    torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_training_mode_without_gradients_updates_statistics_once(efficient):
    model = network(efficient)
    with torch.no_grad():
        model(images())
    assert all(norm.num_batches_tracked == 1 for norm in norms(model))
