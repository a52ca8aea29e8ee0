"""Bytes and operations by formula, against what torch counts and what was computed by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bench import machine_rates, roofline
from bench.kernel_cases import PAIRS, cpu_cases, gpu_cases, tiny_cases
from bench.networks import Spec, build_batch, build_model
from bench.workloads import find
from torch.utils.flop_counter import FlopCounterMode

from densenet_ext import info

IMAGENET = find("densenet121", "bfloat16", 256).spec
NETWORKS = [
    Spec("plain", "", depth=22, growth_rate=8, size=16, batch_size=3),
    Spec("plain", "A+B", depth=16, size=8, batch_size=2),
    Spec("plain", "", blocks=(2, 3, 1, 2), growth_rate=8, size=64, batch_size=2, small_inputs=False, num_classes=10),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", NETWORKS, ids=["cifar", "squeeze-and-excitation", "imagenet"])
def test_operations_are_those_that_torch_counts(spec, training):
    model, (images, labels) = build_model(spec).train(training), build_batch(spec)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        loss = F.cross_entropy(model(images), labels)
        if training:
            loss.backward()
    assert roofline.step_flops(spec, training) == counter.get_total_flops()


# M = 48 pixels, 12 after pooling, N = 2, C = 24, K2 = 32, k = 8, O = 12; e = 2, a = 4
BY_HAND = {
    "append": 2 * 48 * 24 * 2,
    "fold_norm": 2 * 2 * 24 * 4,
    "bottleneck_forward": 48 * (24 + 32) * 2 + 32 * 24 * 4,
    "bottleneck_backward": 48 * (3 * 24 + 2 * 32) * 2 + 2 * 32 * 24 * 4,
    "conv3x3_forward": 48 * (32 + 8) * 2 + 9 * 32 * 8 * 4,
    "conv3x3_backward": 48 * (2 * 32 + 2 * 8) * 2 + 18 * 32 * 8 * 4,
    "squeeze_excite_forward": 2 * 48 * 8 * 2,
    "squeeze_excite_backward": 2 * 48 * 8 * 2,
    "transition_forward": 48 * 24 * 2 + 12 * 12 * 2 + 12 * 24 * 4,
    "transition_backward": 2 * 48 * 24 * 2 + 12 * 12 * 2 + 2 * 12 * 24 * 4,
    "head_forward": 48 * 24 * 2 + 2 * 24 * 2,
    "head_backward": 2 * 48 * 24 * 2 + 2 * 24 * 2,
    "finish_gradient": 3 * 48 * 24 * 2,
    "stem_forward": 48 * 24 * 2 + 12 * 24 * 2,
    "stem_backward": 2 * 48 * 24 * 2 + 12 * 24 * 2,
}


@pytest.mark.parametrize("op", roofline.FORMULAS)
def test_bytes_are_those_computed_by_hand(op):
    size = roofline.Size(2, 6, 4, channels=24, bottleneck=32, growth=8, outputs=12)
    assert roofline.op_bytes(op, size, 2) == BY_HAND[op]


@pytest.mark.parametrize(("op", "pooled"), [("transition_forward", 3 * 2), ("stem_forward", 4 * 3)])
def test_odd_maps_are_pooled_as_the_ops_do(op, pooled):
    """7x5 maps: an average pool leaves the last row and column out, the stem's maximum pool pads them."""
    size = roofline.Size(1, 7, 5, channels=16, outputs=8)
    outputs, weight = (8, 8 * 16 * 4) if op == "transition_forward" else (16, 0)
    assert roofline.op_bytes(op, size, 4) == 35 * 16 * 4 + pooled * outputs * 4 + weight


@pytest.mark.parametrize("op", ["bottleneck_forward", "bottleneck_backward", "conv3x3_forward", "conv3x3_backward"])
def test_operations_are_those_of_the_products(op):
    """2 M C K2, or 9 times 2 M K2 k: once forward, twice backward (gradients of the input and of the weight)."""
    size = roofline.Size(3, 5, 7, channels=24, bottleneck=16, growth=4)
    once = 2 * 105 * (24 * 16 if op.startswith("bottleneck") else 9 * 16 * 4)
    assert roofline.op_flops(op, size) == once * (2 if op.endswith("backward") else 1)


def test_additions_of_computing_an_earlier_bottleneck_again():
    """b is written and the earlier layer's weight read; x is there already. Its product is one more."""
    size = roofline.Size(3, 5, 7, channels=24, bottleneck=16, growth=4)
    joint = replace(size, earlier=20)
    added = roofline.op_bytes("bottleneck_backward", joint, 2) - roofline.op_bytes("bottleneck_backward", size, 2)
    assert added == 105 * 16 * 2 + 16 * 20 * 4
    added = roofline.op_flops("bottleneck_backward", joint) - roofline.op_flops("bottleneck_backward", size)
    assert added == roofline.op_flops("bottleneck_forward", replace(size, channels=20))


def test_bytes_of_a_step_are_near_what_was_designed_for():
    """DenseNet-121, batch 256, bfloat16: 51 to 60 GB with a stem of PyTorch's operators, of which the fused one avoids a
    part, and with x read again for every recomputed convolution; without those less."""
    whole = roofline.step_bytes(IMAGENET)
    assert 40e9 < whole < 50e9
    assert roofline.step_bytes(IMAGENET, keep_bottleneck=True) < whole
    assert roofline.step_bytes(replace(IMAGENET, batch_size=128)) < 0.51 * whole
    assert 1.9 * whole < roofline.step_bytes(replace(IMAGENET, dtype="float32")) < 2 * whole


def test_bytes_of_inference():
    """Forward's share: each op once, no optimizer, so less than half of training."""
    spec = Spec(variant="")
    assert roofline.step_bytes(spec, training=False) < 0.4 * roofline.step_bytes(spec)
    ops = [op for op, _ in roofline.step_ops(spec, training=False)]
    assert ops.count("bottleneck_forward") == ops.count("conv3x3_forward") == 48
    assert ops.count("append") == 3 and ops.count("transition_forward") == 2 and ops.count("head_forward") == 1


def test_bytes_of_the_stem():
    """DenseNet-121, batch 8, float32: x of 8x64x112x112, read three times and its gradient written, and the pooled maps."""
    spec, x = find("densenet121").spec, 8 * 64 * 112**2 * 4
    parts = [roofline.op_bytes(op, s, 4) for op, s in roofline.step_ops(spec) if "stem" in op]
    assert parts == [1.25 * x, 2.25 * x]
    assert roofline.stem_bytes(spec) == 2 * (x + 8 * 3 * 224**2 * 4)


def test_parameters_are_the_networks():
    """All but the stem, the norms and the classifier's bias."""
    spec = Spec("plain", "", depth=22)
    model = build_model(spec)
    counted = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "conv0" not in name)
    assert roofline.parameters(spec) == counted


def test_floor_is_the_longer_of_bytes_and_operations():
    cases = {(100, 1, 10, 1): (10, "bytes"), (10, 30, 10, 2): (15, "operations")}
    for (moved, flops, bandwidth, rate), expected in cases.items():
        rates = {"bytes": bandwidth, "flops": rate}
        assert roofline.floor(moved, flops, rates) == expected


def test_rates_are_the_best_samples():
    """AMX's median stands beside its best, since it says how much of the unit is there."""
    machine = machine_rates.RateSamples(tiny=True)
    flops, times = machine.flops, {machine_rates.MATRIX: [0.5, 0.25], machine_rates.COPY: [0.125, 1.0]}
    rates = machine.rates(times)
    assert rates == {"flops": flops / 0.25, "bytes": 2 * machine.bytes / 0.125}
    assert "AMX" not in roofline.rates_text(rates)
    rates = machine.rates(times | {machine_rates.AMX: [0.25, 0.5, 1.0]})
    assert (rates["amx_flops"], rates["amx_flops_median"]) == (flops / 0.25, flops / 0.5)
    text = roofline.rates_text(rates | {"amx_flops": 2e12, "amx_flops_median": 1e12})
    assert text.endswith("bfloat16 product on AMX 2000 GFLOP/s at best, 1000 in the median")
    assert (machine_rates.AMX in machine.samples) == info.collect()["instruction set"].startswith("amx")
    assert all(sample() > 0 for sample in machine.samples.values())


@pytest.mark.parametrize("cases", [tiny_cases(), gpu_cases(), cpu_cases(), cpu_cases(tiny=True)])
def test_cases_cover_every_op_and_fit_their_buffers(cases):
    assert {op for case in cases for op in case.ops} == set(roofline.FORMULAS)
    for case in cases:
        assert case.size.channels + case.size.growth <= case.size.total or "stem_forward" in case.ops


def test_odd_sizes_are_those_that_could_be_slow():
    odd = {(size.height, size.width, size.growth) for size, _ in PAIRS.values()}
    assert odd >= {(7, 7, 12), (14, 14, 12), (33, 31, 12), (32, 32, 5)}
