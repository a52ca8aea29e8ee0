"""The fused stem against the modules that it replaces: norm0, relu0 and pool0 of an ImageNet DenseNet."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densenet_ext import DenseNetBC, functional, set_fallback
from densenet_ext._layout import is_channels_last
from densenet_ext._ops import handles
from densenet_ext.functional import dense_stem

SIZES = {
    "odd": (2, 3, 33, 47),
    "even": (2, 3, 40, 36),
    "one pixel": (3, 2, 1, 1),
    "one row": (2, 2, 1, 70),
    "one column": (2, 2, 70, 1),
    "2x2": (1, 1, 2, 2),
    "one sample": (1, 3, 31, 64),
    "empty batch": (0, 3, 4, 4),
    "channels no multiple of a vector": (2, 21, 7, 6),
    "channels of several vectors": (2, 67, 6, 9),
}
# Inputs: no two values equal; all equal; many equal, with ties among positive values and among those rectified to 0.
VALUES = {"random": lambda x: x, "constant": torch.ones_like, "rounded": lambda x: (2 * x).round()}


def new_norm(channels, training=True, **options):
    norm = nn.BatchNorm2d(channels, **options).double().train(training)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.normal_(norm.bias)
    if norm.track_running_stats:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def plain_stem(x, norm):
    return F.max_pool2d(F.relu(norm(x)), 3, stride=2, padding=1)


def run(stem, x, norm, upstream=lambda g: g):
    """Output, gradients of x and of the parameters, and the norm's buffers, of a step with random gradients."""
    norm, x = copy.deepcopy(norm), x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = stem(x, norm)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    y.backward(upstream(gradient.to(y.dtype)))
    return [y.detach(), x.grad, *[p.grad for p in norm.parameters()], *norm.buffers()]


def assert_same(x, norm, **options):
    got, want = run(dense_stem, x, norm, **options), run(plain_stem, x, norm, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_modules(size, values, training):
    x = VALUES[values](torch.randn(SIZES[size], dtype=torch.double))
    assert_same(x, new_norm(x.shape[1], training))


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_ties_that_the_norm_makes(scale):
    """Values differ, but are equal once they are scaled: the first of a window gets the gradient."""
    norm = new_norm(3)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, 1.0)
    assert_same(torch.randn(2, 3, 9, 8, dtype=torch.double), norm)


NORMS = {
    "no affine": {"affine": False},
    "no tracking": {"track_running_stats": False},
    "no tracking, evaluation": {"track_running_stats": False, "training": False},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 0.1},
}


@pytest.mark.parametrize("options", NORMS)
def test_norms_of_every_kind(options):
    assert_same(torch.randn(2, 3, 9, 8, dtype=torch.double), new_norm(3, **NORMS[options]))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_input_and_gradient(layout):
    assert_same(LAYOUTS[layout](torch.randn(2, 3, 9, 8, dtype=torch.double)), new_norm(3), upstream=LAYOUTS[layout])


def test_expanded_gradient():
    """The backward of sum() hands an expanded gradient to the stem."""
    assert_same(torch.randn(2, 3, 9, 8, dtype=torch.double), new_norm(3), upstream=lambda g: g[:1, :1].expand_as(g))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias"])
def test_frozen_inputs(frozen):
    norm, x = new_norm(3), torch.randn(2, 3, 9, 8, dtype=torch.double, requires_grad=frozen != "x")
    for name, parameter in norm.named_parameters():
        parameter.requires_grad_(name not in frozen)
    results = []
    for stem in (dense_stem, plain_stem):
        inputs = [p for p in (x, norm.weight, norm.bias) if p.requires_grad]
        results.append(torch.autograd.grad(stem(x, norm).square().sum(), inputs))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_statistics_are_updated_once(mode):
    x, norms = torch.randn(2, 3, 9, 8, dtype=torch.double), [new_norm(3)]
    norms.append(copy.deepcopy(norms[0]))
    with mode():
        y, want = dense_stem(x, norms[0]), plain_stem(x, norms[1])
    assert not y.requires_grad and norms[0].num_batches_tracked == 1
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(norms[0].buffers()), list(norms[1].buffers()), rtol=1e-9, atol=1e-9)


def test_second_derivative_is_an_error_that_says_so():
    x = torch.randn(2, 3, 9, 8, dtype=torch.double, requires_grad=True)
    (dx,) = torch.autograd.grad(dense_stem(x, new_norm(3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_nan_in_evaluation():
    """A NaN reaches the windows around it and takes their gradients; the last NaN of a window takes its gradient."""
    x = torch.randn(2, 3, 12, 11, dtype=torch.double)
    x[0, 1, 4:7, 5:7] = x[1, 2, 0, 0] = torch.nan
    norm = new_norm(3, training=False)
    got, want = run(dense_stem, x, norm), run(plain_stem, x, norm)
    assert want[0].isnan().any() and not want[0].isnan().all() and not want[1].isnan().any()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_infinity_in_evaluation():
    x = torch.randn(2, 3, 12, 11, dtype=torch.double)
    x[0, 1, 4, 5], x[1, 2, 0, 0] = torch.inf, -torch.inf
    norm = new_norm(3, training=False)
    torch.testing.assert_close(run(dense_stem, x, norm), run(plain_stem, x, norm), rtol=1e-9, atol=1e-9, equal_nan=True)


def mean_error(got, want):
    errors = [(a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in zip(got, want, strict=True)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_error_at_most_twice_plain(training, dtype):
    """Both against float64, from the same rounded values; parameters and statistics are float32, as under autocast.

    Values are multiples of 1/8, so that rounding in float32 does not decide which value of a window is the largest.
    """
    x, norm = ((8 * torch.randn(4, 3, 20, 20)).round() / 8).to(dtype), new_norm(3, training).float()
    want = run(plain_stem, x.double(), copy.deepcopy(norm).double())
    got, plain = run(dense_stem, x, norm), run(plain_stem, x, norm)
    assert [a.dtype for a in got] == [a.dtype for a in plain]
    assert mean_error(got, want) <= 2 * mean_error(plain, want)


def test_autocast_casts_as_stages_do():
    with torch.autocast("cpu", torch.bfloat16):
        assert dense_stem(torch.randn(2, 3, 9, 8), nn.BatchNorm2d(3)).dtype == torch.bfloat16
        assert dense_stem(torch.randn(2, 3, 9, 8).double(), nn.BatchNorm2d(3).double()).dtype == torch.double


def test_batch_statistics_without_cancellation():
    """Values of 1000 +- 0.01 in float32: the variance 1e-4 is right to 1 percent, where E[x^2] - E[x]^2 gives noise."""
    x = 1000 + 0.01 * torch.randn(4, 17, 20, 20)
    _, stats = handles.dense_stem(x, torch.ones(17), torch.zeros(17), [], 1e-5)
    torch.testing.assert_close(stats[1].double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-2, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_runs_are_bit_equal(threads):
    torch.set_num_threads(threads)
    x, norm = torch.randn(3, 17, 19, 22), new_norm(17).float()
    first = run(dense_stem, x, norm)
    for _ in range(3):
        assert all(a.equal(b) for a, b in zip(first, run(dense_stem, x, norm), strict=True))


@pytest.mark.parametrize("layout", ["planar", *LAYOUTS])
def test_layouts_are_those_of_the_neighbors(layout):
    """For every layout of x, dx is channels last and the output has the stage's layout; so it is for the op alone."""
    x = LAYOUTS.get(layout, torch.clone)(torch.randn(2, 3, 9, 8, dtype=torch.double)).requires_grad_()
    norm = new_norm(3)
    for y in (dense_stem(x, norm), handles.dense_stem(x, norm.weight, norm.bias, [], norm.eps)[0]):
        assert y.is_contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
        torch.testing.assert_close(y, plain_stem(x, norm), rtol=1e-9, atol=1e-9)
    _, stats = handles.dense_stem(x, norm.weight, norm.bias, [], norm.eps)
    dx, _, _ = handles.dense_stem_backward(torch.randn_like(y), x, norm.weight, norm.bias, stats, norm.eps, False, True)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_single_value_a_channel_is_the_error_of_batch_norm():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        dense_stem(torch.zeros(1, 3, 1, 1), nn.BatchNorm2d(3))


def test_backward_checks_the_statistics():
    x, norm = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3)
    y, stats = handles.dense_stem(x, norm.weight, norm.bias, [], norm.eps)
    with pytest.raises(RuntimeError, match=r"stats must have shape \[2, 3\], got \[2, 2\]"):
        handles.dense_stem_backward(y, x, norm.weight, norm.bias, stats[:, :2].contiguous(), norm.eps, False, True)


def test_operators_are_registered_as_they_behave():
    """torch.library.opcheck finds the schemas, the shape functions and autograd in order."""
    norm = nn.BatchNorm2d(3)
    for frozen_stats in ([], [torch.zeros(3), torch.ones(3)]):
        for layout in (torch.clone, LAYOUTS["channels last"]):
            x = layout(torch.randn(2, 3, 9, 8)).requires_grad_()
            torch.library.opcheck(handles.dense_stem, (x, norm.weight, norm.bias, frozen_stats, 1e-5))


# ---- in the network ----------------------------------------------------------------------------------------------------


def network(**options):
    torch.manual_seed(0)
    small = {"growth_rate": 3, "block_config": (2, 2), "num_classes": 5, "bn_size": 2, "small_inputs": False}
    return DenseNetBC(**{**small, "efficient": "fused", **options}).double()


def images():
    return torch.randn(3, 3, 33, 40, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def calls(monkeypatch):
    """A list with one entry for each call of the fused stem."""
    found = []
    original = functional.dense_stem
    monkeypatch.setattr(functional, "dense_stem", lambda *args: (found.append(1), original(*args))[1])
    return found


def step(model, efficient):
    model = copy.deepcopy(model)
    model.efficient = efficient
    y = model(images())
    y.square().sum().backward()
    return [y, *[p.grad for p in model.parameters()], *model.buffers()]


@pytest.mark.parametrize("freeze", [None, "norm0", "everything"])
def test_network_equals_plain_and_uses_it(calls, freeze):
    model = network()
    if freeze == "norm0":
        model.features.norm0.eval()
    if freeze == "everything":
        model.eval()
    got, want = step(model, "fused"), step(model, False)
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class MyRelu(nn.ReLU):
    pass


def put(name, module):
    return lambda features: setattr(features, name, module)


CHANGES = {
    "features.norm0 has a forward hook": lambda f: f.norm0.register_forward_hook(lambda *args: None),
    "features.relu0 has a forward hook": lambda f: f.relu0.register_forward_pre_hook(lambda *args: None),
    "features.pool0 has a backward hook": lambda f: f.pool0.register_full_backward_hook(lambda *args: None),
    "features.norm0 is a GroupNorm, not a BatchNorm2d": put("norm0", nn.GroupNorm(1, 6).double()),
    "features.relu0 is a MyRelu, not a ReLU": put("relu0", MyRelu()),
    "features.relu0 is a Sigmoid, not a ReLU": put("relu0", nn.Sigmoid()),
    "features.pool0 is a AvgPool2d, not a MaxPool2d": put("pool0", nn.AvgPool2d(3, 2, 1)),
    "features.pool0.kernel_size is 2, not 3": put("pool0", nn.MaxPool2d(2, 2, 1)),
    "features.pool0.stride is 3, not 2": put("pool0", nn.MaxPool2d(3, 3, 1)),
    "features.pool0.ceil_mode is True, not False": put("pool0", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_changed_modules_are_reported_and_called(calls, reason):
    model = network()
    CHANGES[reason](model.features)
    set_fallback("warn")
    with pytest.warns(UserWarning, match=reason.replace(".", r"\.")):
        got = step(model, "fused")
    torch.testing.assert_close(got, step(model, False), rtol=1e-9, atol=1e-9)
    assert not calls
    set_fallback("error")
    with pytest.raises(RuntimeError, match="features"):
        step(model, "fused")


@pytest.mark.parametrize("missing", ["pool0", "relu0"])
def test_stem_without_a_part_needs_no_word(calls, missing):
    """A stem with nothing to fuse is no fallback: set_fallback('error') raises nothing."""
    model = network()
    delattr(model.features, missing)
    torch.testing.assert_close(step(model, "fused"), step(model, False), rtol=1e-9, atol=1e-9)
    assert not calls


def test_pool_given_by_pairs_is_the_same(calls):
    model = network()
    model.features.pool0 = nn.MaxPool2d((3, 3), (2, 2), (1, 1))
    step(model, "fused")
    assert calls


def test_norm_that_shares_with_nobody_is_fused(calls):
    """SyncBatchNorm without a process group is batch normalization."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    torch.testing.assert_close(step(model, "fused"), step(model, False), rtol=1e-9, atol=1e-9)
    assert len(calls) == 1


def test_devices_without_kernels_run_the_modules_and_say_so(calls, monkeypatch):
    monkeypatch.setattr(handles, "DEVICES", frozenset())
    set_fallback("warn")
    model = network()
    with pytest.warns(UserWarning, match="no kernels for cpu"):
        got = step(model, "fused")
    torch.testing.assert_close(got, step(model, False), rtol=1e-9, atol=1e-9)
    assert not calls


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler")
def test_compiled_network_equals_the_network():
    model = network(block_config=(1,))
    compiled, results = copy.deepcopy(model), []
    for module, call in ((model, model), (compiled, torch.compile(compiled, fullgraph=True))):
        call(images()).square().sum().backward()
        results.append(([p.grad for p in module.parameters()], list(module.buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
