"""Wrong arguments: the error names the argument, what it was, and what it may be."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from stage_cases import Case
from torch import nn

from densenet_ext import (
    DenseNetBC,
    DropChannel,
    EfficientDenseBlock,
    EfficientDenseLayer,
    SqueezeExcitation,
    Transition,
    memory,
    set_fallback,
)
from densenet_ext._protocol import Options
from densenet_ext.functional import dense_layer, dense_stage, dense_stem

CONSTRUCTORS = [
    (lambda: DropChannel(1.0), "p is 1.0; it must be at least 0 and less than 1"),
    (lambda: DropChannel(-0.1), "p is -0.1"),
    (lambda: DropChannel(float("nan")), "p is nan"),
    (lambda: SqueezeExcitation(0), "channels is 0; it must be a positive integer"),
    (lambda: SqueezeExcitation(4, 0.5), "reduction is 0.5; it must be a positive integer"),
    (lambda: Transition(4, 0), "out_channels is 0"),
    (lambda: Transition(-4, 2), "in_channels is -4"),
    (lambda: EfficientDenseLayer(0, 3), "in_channels is 0"),
    (lambda: EfficientDenseLayer(3, 0), "growth_rate is 0"),
    (lambda: EfficientDenseLayer(3, 3, 0), "bn_size is 0"),
    (lambda: EfficientDenseLayer(3, 3, drop_rate=1), "drop_rate is 1"),
    (lambda: EfficientDenseLayer(3, 3, drop_channel=-1), "drop_channel is -1"),
    (lambda: EfficientDenseLayer(3, 3, drop_channel_position="post"), "is 'post'; it may be 'pre_norm' or 'pre_conv'"),
    (lambda: EfficientDenseLayer(3, 3, efficient=1), "efficient is 1; it may be False, 'checkpoint', 'fused' or True"),
    (lambda: EfficientDenseLayer(3, 3, efficient="fast"), "efficient is 'fast'"),
    (lambda: EfficientDenseBlock(2, 3, 3, efficient=None), "efficient is None"),
    (lambda: DenseNetBC(efficient="on"), "efficient is 'on'"),
    (
        lambda: setattr(EfficientDenseLayer(3, 3), "drop_channel_rate", 1.0),
        "drop_channel_rate is 1.0; it must be at least",
    ),
    (lambda: EfficientDenseBlock(0, 3, 3), "num_layers is 0"),
    (lambda: DenseNetBC(depth=41), "depth is 41; it must be 6 * n + 4 with n at least 1"),
    (lambda: DenseNetBC(depth=4), "depth is 4"),
    (lambda: DenseNetBC(depth=40, block_config=(1, 2)), "depth is 40 and block_config is (1, 2)"),
    (lambda: DenseNetBC(block_config=()), "block_config is empty"),
    (lambda: DenseNetBC(block_config=(2, 0)), "block_config[1] is 0"),
    (lambda: DenseNetBC(compression=0), "compression is 0; it must be more than 0 and at most 1"),
    (lambda: DenseNetBC(compression=1.1), "compression is 1.1"),
    (lambda: DenseNetBC(drop_rate=None), "drop_rate is None"),
    (lambda: DenseNetBC(drop_channel="0.1"), "drop_channel is '0.1'"),
    (lambda: DenseNetBC(compression=None), "compression is None"),
    (lambda: DenseNetBC(block_config=6), "block_config is 6"),
    (lambda: DenseNetBC(efficient=torch.tensor([1, 2])), "efficient is tensor([1, 2])"),
    (lambda: DenseNetBC(num_classes=0), "num_classes is 0"),
    (lambda: DenseNetBC(num_init_features=0), "num_init_features is 0"),
    (lambda: DenseNetBC.variant("C"), "variant is 'C'; it may be 'vanilla', 'A', 'B', 'A+B', 'A+B+C'"),
    (lambda: memory.set_limit(-1), "limit is -1; it must be at least 0"),
    (lambda: set_fallback("ignore"), "mode is 'ignore'; it may be 'warn', 'error' or 'silent'"),
]


@pytest.mark.parametrize(("call", "message"), CONSTRUCTORS, ids=[message for _, message in CONSTRUCTORS])
def test_constructor(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("make", [lambda: DenseNetBC(block_config=(1,)), lambda: EfficientDenseBlock(1, 4, 3)])
def test_setting_an_unknown_implementation_changes_nothing(make):
    model = make()
    with pytest.raises(ValueError, match="efficient is 'magic'"):
        model.efficient = "magic"
    assert model.efficient is False


def layers(count=2, channels=4, growth=3, **options):
    return EfficientDenseBlock(count, channels, growth, 2, **options).layers


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape or (2, 4, 6, 6), dtype=dtype)


NORM, CONV = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1, bias=False)
MIXED_SE = [*layers(1), *layers(1, 7, se_reduction=2)]
MIXED_WIDTH = [*layers(1), EfficientDenseLayer(7, 3, 5)]
MIXED_DROP = [*layers(1), *layers(1, 7, drop_rate=0.5)]
CALLS = [
    (lambda: memory.set_limit(1.5), TypeError, "limit is a float; it must be an int, a number of bytes"),
    (lambda: memory.set_limit(True), TypeError, "limit is a bool"),
    (lambda: dense_stage([1], layers()), TypeError, "x is a list; it must be a tensor"),
    (lambda: dense_stage(x(4, 6, 6), layers()), ValueError, "x has 3 dimensions; it must have 4: [N, C, H, W]"),
    (
        lambda: dense_stage(x(2, 4, 0, 6), layers()),
        ValueError,
        "x is (2, 4, 0, 6); only the number of samples may be 0",
    ),
    (lambda: dense_stage(x(dtype=torch.int64), layers()), TypeError, "x has dtype int64; it may be float64, float32"),
    (lambda: dense_stage(x(dtype=torch.complex64), layers()), TypeError, "x has dtype complex64"),
    (lambda: dense_stage(x(), []), ValueError, "layers is empty"),
    (
        lambda: dense_stage(x(2, 5, 6, 6), layers()),
        ValueError,
        "layers[0].norm1.weight has 4 channels; it must have 5",
    ),
    (lambda: dense_stage(x(), layers()[1:]), ValueError, "layers[0].norm1.weight has 7 channels; it must have 4"),
    (
        lambda: dense_stage(x(), MIXED_WIDTH),
        ValueError,
        "layers[1] has 15 channels in the bottleneck and 3 new ones, the first layer 6 and 3",
    ),
    (lambda: dense_stage(x(), MIXED_SE), ValueError, "layers[1] has squeeze-and-excitation to 1 channels, the first"),
    (lambda: dense_stage(x(), MIXED_DROP), ValueError, "layers[1] has drop_rate 0.5, the first layer 0.0"),
    (lambda: dense_stage(x(), layers(), None, CONV), ValueError, "tail_conv is given without tail_norm"),
    (lambda: dense_stage(x(), layers(1), NORM), ValueError, "tail_norm.weight has 10 channels; it must have 7"),
    (
        lambda: dense_stage(x(), layers(), NORM, nn.Conv2d(9, 5, 1)),
        ValueError,
        "tail_conv takes 9 channels; it must take 10",
    ),
    (lambda: dense_stage(x(2, 4, 1, 6), layers(), NORM, CONV), ValueError, "a transition needs at least 2x2 pixels"),
    (lambda: dense_stage(x(1, 4, 1, 1), layers()), ValueError, "Expected more than 1 value per channel when training"),
    (lambda: dense_layer([], layers()[0]), ValueError, "inputs is empty"),
    (lambda: dense_layer([x(), 3], layers()[0]), TypeError, "inputs[1] is a int; it must be a tensor"),
    (lambda: dense_layer([x(), x(3, 4, 6, 6)], layers()[0]), ValueError, "inputs[1] is (3, 4, 6, 6) of torch.float32"),
    (
        lambda: dense_layer([x(), x(dtype=torch.double)], layers()[0]),
        ValueError,
        "inputs[1] is (2, 4, 6, 6) of torch.float64",
    ),
    (
        lambda: dense_layer(x(2, 3, 6, 6), layers()[0]),
        ValueError,
        "layers[0].norm1.weight has 4 channels; it must have 3",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[message for *_, message in CALLS])
def test_call(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("efficient", [False, "checkpoint", "fused"])
def test_one_value_a_channel_in_training(efficient):
    """Every implementation raises PyTorch's error; in evaluation mode one value is enough."""
    block = EfficientDenseBlock(2, 4, 3, efficient=efficient)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.zeros(1, 4, 1, 1))
    assert block.eval()(torch.zeros(1, 4, 1, 1)).shape == (1, 10, 1, 1)


def test_failed_call_leaves_running_statistics_alone():
    block = EfficientDenseBlock(2, 4, 3, efficient="fused")
    with pytest.raises(ValueError, match="must have 5"):
        block(torch.randn(2, 5, 6, 6))
    assert block.denselayer1.norm1.num_batches_tracked == 0


STAGE_OP_ERRORS = {
    "x of 3 dimensions": (lambda args: args.__setitem__(0, torch.zeros(3, 4, 4)), "x must have 4 dimensions"),
    "integers": (lambda args: args.__setitem__(0, args[0].long()), "x must be float32, float64, bfloat16 or float16"),
    "params missing": (lambda args: args[1].pop(), "params must hold"),
    "params of another dtype": (lambda args: args[1].__setitem__(0, args[1][0].float()), "params"),
    "a shape": (
        lambda args: args[1].__setitem__(0, torch.zeros(9, dtype=torch.double)),
        "norm1.weight must have shape",
    ),
    "masks missing": (lambda args: args[2].pop(), "masks must hold"),
    "eps missing": (lambda args: args[4].pop(), "eps and frozen must have"),
    "tail": (lambda args: args[7].__setitem__(Options._fields.index("tail"), 9), "tail must be 0, 1 or 2"),
    "frozen statistics missing": (lambda args: args[3].pop(), "frozen_stats"),
    "a mask's shape": (lambda args: args[2].__setitem__(0, args[2][0][:, :-1].contiguous()), "mask"),
}


@pytest.mark.parametrize("name", STAGE_OP_ERRORS)
def test_op_checks_its_arguments(name):
    """The compiled op, called without the Python functions around it, raises an error and reads nothing wrong."""
    change, message = STAGE_OP_ERRORS[name]
    args = [list(a) if isinstance(a, list) else a for a in Case(15, False, 0, "every second").args()]
    change(args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.densenet_ext.dense_stage(*args)


def test_parameters_on_another_device():
    block = EfficientDenseBlock(2, 4, 2, efficient="fused").to("meta")
    with pytest.raises(ValueError, match=r"layers\[0\].norm1.weight is on meta; it must be on cpu, where the input is"):
        block(torch.randn(2, 4, 5, 5))


def test_inputs_on_two_devices():
    layer = EfficientDenseLayer(4, 2, efficient="fused")
    with pytest.raises(ValueError, match=r"inputs\[1\] is on meta; it must be on cpu, where inputs\[0\] is"):
        dense_layer([torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5, device="meta")], layer)


def test_out_of_memory_leaves_nothing_behind():
    """The batch has terabytes but takes no memory: it is one value, expanded."""
    block = EfficientDenseBlock(2, 4, 2, efficient="fused")
    state = copy.deepcopy(block.state_dict())
    huge = torch.zeros(1).expand(1 << 20, 4, 1 << 10, 1 << 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: a tensor of shape \[1048576, 8, 1024, 1024\]"):
        block(huge)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert block(torch.randn(2, 4, 5, 5)).shape == (2, 8, 5, 5)


def types(x, weights, norms, autocast=None):
    """Return the error of a fused layer with input, convolutions and norms of these dtypes, or None."""
    layer = EfficientDenseLayer(4, 3, se_reduction=1, efficient="fused").to(weights)
    layer.norm1.to(norms), layer.norm2.to(norms)
    try:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            layer(torch.randn(2, 4, 6, 6).to(x))
    except TypeError as error:
        return str(error)


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[((dtype, dtype, dtype), None) for dtype in (F16, BF16, F32, F64)],
        ((BF16, BF16, F32), None),
        ((F16, F16, F32), None),
        ((F32, F32, F32, BF16), None),
        ((BF16, F32, F32, BF16), None),
        ((F32, BF16, F32, BF16), None),
        ((F64, F64, F64, BF16), None),
        ((F32, F64, F32), "layers[0].conv1.weight has dtype float64; it may be float32, as the input is"),
        ((F64, F32, F64), "layers[0].conv1.weight has dtype float32; it may be float64"),
        ((BF16, F32, F32), "layers[0].conv1.weight has dtype float32; it may be bfloat16"),
        ((F32, BF16, F32), "layers[0].conv1.weight has dtype bfloat16; it may be float32"),
        ((F32, F64, F32, BF16), "layers[0].conv1.weight has dtype float64; it may be bfloat16"),
        ((F64, F32, F64, BF16), "layers[0].conv1.weight has dtype float32; it may be float64"),
        ((F32, F32, F64), "layers[0].norm1.weight has dtype float64; it may be float32"),
        ((F32, F32, BF16), "layers[0].norm1.weight has dtype bfloat16; it may be float32"),
        ((BF16, BF16, F16), "layers[0].norm1.weight has dtype float16; it may be bfloat16, float32"),
        ((F64, F64, F32), "layers[0].norm1.weight has dtype float32; it may be float64"),
    ],
)
def test_mixed_types(arguments, message):
    """Only norms may be wider than the input, and only autocast changes a weight's type, as in plain PyTorch."""
    found = types(*arguments)
    assert found is None if message is None else found.startswith(message)


@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_is_checked(training):
    layer = EfficientDenseLayer(4, 3, se_reduction=1, efficient="fused").train(training)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point():
            other = copy.deepcopy(layer)
            parent, _, attribute = name.rpartition(".")
            module = other.get_submodule(parent)
            value = tensor.detach().double()
            setattr(module, attribute, nn.Parameter(value) if attribute in module._parameters else value)
            with pytest.raises(TypeError, match=re.escape(f"layers[0].{name} has dtype float64")):
                other(torch.randn(2, 4, 6, 6))


def test_integers_of_numpy_and_torch():
    options = dict(growth_rate=np.int64(3), num_classes=np.int32(4), in_channels=np.uint8(2), bn_size=torch.tensor(2))
    model = DenseNetBC(**options, block_config=np.array([2, 1]), num_init_features=np.int16(5), efficient="fused")
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 4)
    assert model.features.conv0.out_channels == 5 and type(model.features.conv0.out_channels) is int
    assert len(DenseNetBC(depth=np.int64(16)).features.denseblock1) == 2
    assert len(DenseNetBC(block_config=(n for n in (1, 2))).features.denseblock2) == 2
    with pytest.raises(ValueError, match="growth_rate is .*3.0.*; it must be a positive integer"):
        DenseNetBC(growth_rate=np.float64(3.0))


@pytest.mark.parametrize("call", ["dense_stage", "dense_layer", "dense_stem"])
def test_functions_refuse_transforms(call):
    layer = layers(1)[0].eval()
    run = {
        "dense_stage": lambda x: dense_stage(x, [layer]),
        "dense_layer": lambda x: dense_layer(x, layer),
        "dense_stem": lambda x: dense_stem(x, layer.norm1),
    }[call]
    with pytest.raises(RuntimeError, match="cannot be used: a transform of torch.func is active"):
        torch.func.vmap(lambda x: run(x[None]))(torch.randn(2, 4, 6, 6))
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be used"):
        torch.func.jvp(run, (x(),), (x(),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation is active"):
        run(forward_ad.make_dual(torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)))
