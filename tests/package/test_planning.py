"""Plans: predicted against measured peaks, budgets, and numbers that do not depend on what is kept."""

import copy
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import converted_networks
import pytest
import torch
from allocations import step_peak
from small_networks import EVERYTHING, images, network, step
from torch import nn

from densenet_ext import DenseNetBC, EfficientDenseBlock, convert, largest_batch, plan, revert
from densenet_ext._planning.order import StageSize, free_layers, keep_order
from densenet_ext.planning import ERROR

TOLERANCE = 0.05  # the documentation promises it

NETWORKS = {
    "CIFAR, depth 40": (lambda: DenseNetBC(depth=40, efficient=True), (16, 3, 32, 32)),
    "A+B": (lambda: DenseNetBC.variant("A+B+C", depth=22), (20, 3, 32, 32)),
    "dropout": (lambda: DenseNetBC.variant("vanilla", depth=22, efficient=True), (20, 3, 32, 32)),
    "ImageNet's stem": (
        lambda: DenseNetBC(24, block_config=(4, 6, 4), small_inputs=False, efficient=True),
        (8, 3, 96, 80),
    ),
}


def peak_of(model, size, dtype, threads=2):
    torch.set_num_threads(threads)
    x = torch.randn(size, dtype=torch.double if dtype == torch.double else torch.float32)
    return step_peak(model, x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("budget", ["smallest", None, "fastest"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_peak_is_the_measured_one(name, budget, dtype):
    torch.set_num_threads(2)
    build, size = NETWORKS[name]
    model = build().to(torch.double if dtype == torch.double else torch.float32)
    # In float64 torch's convolution takes scratch memory of its own.
    planned = plan(model, size, dtype=dtype, budget=budget, measure=dtype == torch.double)
    planned.apply()
    peak = peak_of(model, size, dtype)
    assert planned.memory.peak == pytest.approx(peak, rel=TOLERANCE)
    assert peak <= planned.memory.peak * (1 + ERROR)  # a budget leaves so much room
    # Tensors below the size of a workspace come from torch, so a peak may differ by some of these.
    assert 0.999 * planned.smallest <= planned.memory.peak <= 1.001 * planned.fastest


def test_predicted_peak_of_a_small_network():
    """It also runs on the simulated device, whose maps are channels last and whose scratch is CUDA's."""
    torch.set_num_threads(2)
    model = DenseNetBC(8, block_config=(3, 3), bn_size=2, efficient=True)
    for budget in ("smallest", "fastest"):
        planned = plan(model, (4, 3, 40, 40), budget=budget)
        planned.apply()
        assert planned.memory.peak == pytest.approx(peak_of(model, (4, 3, 40, 40), torch.float32), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI", "torchxrayvision", "phlippe", "kuangliu"])
def test_predicted_peak_of_converted_networks(name):
    """kuangliu's calls blocks without their transitions, which are torch's own modules."""
    model, size = converted_networks.build(name, dtype=torch.float32), (24, 3, 96, 96)
    torch.set_num_threads(2)
    convert(model)
    planned = plan(model, size, budget="fastest", measure=name == "kuangliu")
    planned.apply()
    assert planned.memory.peak == pytest.approx(peak_of(model, size, torch.float32), rel=TOLERANCE)


def test_predicted_peak_of_a_segmenter():
    """The decoder's tensors are counted, too; scratch memory of torch's libraries is not, here as in a profiler."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("densenet121", encoder_weights=None, decoder_channels=(16, 12, 8, 8, 4))
    convert(model)
    planned = plan(model, (2, 3, 64, 64))
    assert planned.memory.peak == pytest.approx(peak_of(model, (2, 3, 64, 64), torch.float32), rel=TOLERANCE)


@pytest.mark.parametrize("keep", ["auto", False, True, 2])
def test_every_setting_is_the_predicted_one(keep):
    """'auto' takes no more memory than never keeping, to 1 %, and keeps something."""
    torch.set_num_threads(2)
    model, size = NETWORKS["CIFAR, depth 40"][0](), (32, 3, 32, 32)
    never = plan(model, size, budget="smallest").memory
    model.keep_bottleneck = keep
    peak = peak_of(model, size, torch.float32)
    if keep == "auto":
        assert peak <= 1.01 * never.peak
        sizes = [
            StageSize(1024 * 32, 24, 12, 48, 6),
            StageSize(256 * 32, 48, 12, 48, 6),
            StageSize(64 * 32, 60, 12, 48, 6),
        ]
        assert sum(free_layers(tuple(sizes))) > 6
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(size))
        model.keep_bottleneck, least = False, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: least.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(size))
        assert sum(kept) > sum(least)
    elif keep is False:
        assert peak == pytest.approx(never.peak, rel=TOLERANCE)
    else:
        assert peak > 1.02 * never.peak


def test_auto_means_nothing_for_a_lone_block():
    saved = {}
    for keep in ("auto", False, True):
        block, kept = EfficientDenseBlock(3, 8, 4, efficient=True, keep_bottleneck=keep), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            block(torch.randn(2, 8, 9, 9))
        saved[keep] = sum(kept)
    assert saved["auto"] == saved[False] < saved[True]


def test_measured_peak_stays_within_the_budget():
    """And more memory keeps a superset: never more time."""
    torch.set_num_threads(2)
    model, size = NETWORKS["CIFAR, depth 40"][0](), (16, 3, 32, 32)
    smallest, fastest = plan(model, size).smallest, plan(model, size).fastest
    rng, before = random.Random(0), dict.fromkeys(plan(model, size).kept, 0)
    for budget in sorted(rng.randint(int(1.01 * smallest), fastest) for _ in range(6)):
        planned = plan(model, size, budget=budget)
        planned.apply()
        assert peak_of(model, size, torch.float32) <= budget
        assert all(planned.kept[name] >= count for name, count in before.items())
        before = planned.kept
    assert sum(before.values()) > 3


def test_order_of_random_networks():
    """A larger part of the order keeps more of the last layers of each stage; free ones come first."""
    rng = random.Random(1)
    for _ in range(100):
        stages, rows, channels = [], rng.randint(100, 4000), rng.randint(1, 64)
        for _ in range(rng.randint(1, 4)):
            layers, growth = rng.randint(1, 9), rng.randint(1, 32)
            stages.append(StageSize(rows, channels, growth, 4 * growth, layers, parameters=rng.randint(0, 10**6)))
            rows, channels = rows // 4, max(1, (channels + layers * growth) // 2)
        order, free = keep_order(tuple(stages)), free_layers(tuple(stages))
        assert sorted(order) == sorted(i for i, stage in enumerate(stages) for _ in range(stage.layers))
        first = order[: sum(free)]
        assert [first.count(i) for i in range(len(stages))] == list(free)
        assert free[0] == 0 or max(range(len(stages)), key=lambda i: stages[i].features + stages[i].backward) != 0


def test_numbers_do_not_depend_on_the_plan():
    """In float64 forward and recomputation take the same kernel, so not a bit differs."""
    results = []
    for kept in ([0, 0, 0], [2, 3, 2], [1, 0, 2], [0, 2, 1]):
        model = network("fused", **EVERYTHING)
        blocks = [m for m in model.modules() if isinstance(m, EfficientDenseBlock)]
        for block, count in zip(blocks, kept, strict=True):
            block.keep_bottleneck = count
        torch.manual_seed(4)
        results.append(step(model, images()))
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_plan_changes_nothing_until_it_is_applied():
    model = NETWORKS["A+B"][0]()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    planned = plan(model.eval(), (4, 3, 32, 32), budget="fastest")
    assert all(a.equal(b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert not any(m.training for m in model.modules()) and all(modes) and torch.equal(rng, torch.get_rng_state())
    assert model.features.denseblock1.keep_bottleneck == "auto" and all(p.grad is None for p in model.parameters())
    planned.apply()
    assert model.features.denseblock1.keep_bottleneck == 3
    other = NETWORKS["A+B"][0]()
    plan(model, (4, 3, 32, 32), budget="smallest").apply(other)
    assert other.features.denseblock2.keep_bottleneck == 0
    assert "3 of   3 layers keep" in str(planned) and "peak" in str(planned)


def test_frozen_norms_stay_frozen():
    torch.set_num_threads(2)
    build, size = NETWORKS["ImageNet's stem"]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    planned = plan(model, size)
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert planned.memory.peak == pytest.approx(peak_of(model, size, torch.float32), rel=TOLERANCE)


def test_inference_keeps_nothing():
    model, size = NETWORKS["CIFAR, depth 40"][0](), (16, 3, 32, 32)
    planned = plan(model, size, training=False)
    assert sum(planned.kept.values()) == 0 and planned.memory.peak < plan(model, size).smallest


def test_largest_batch_fits_and_the_next_does_not():
    torch.set_num_threads(2)
    model = NETWORKS["CIFAR, depth 40"][0]()
    model.keep_bottleneck = False
    count = largest_batch(model, (1, 3, 32, 32), "20 MB")
    assert peak_of(model, (count, 3, 32, 32), torch.float32) <= 20_000_000
    assert 1.02 * peak_of(model, (count + 2, 3, 32, 32), torch.float32) > 20_000_000


class DependsOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = EfficientDenseBlock(2, 3, 4, efficient=True)

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else x


class CalledTwice(nn.Module):
    """A Siamese network: each block runs twice in a step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) - self.model(2 * x)


@pytest.mark.parametrize("budget", ["smallest", None, "fastest"])
def test_blocks_that_are_called_twice(budget):
    torch.set_num_threads(2)
    model, size = CalledTwice(DenseNetBC(depth=40, efficient=True)), (16, 3, 32, 32)
    planned = plan(model, size, budget=budget)
    planned.apply()
    assert len(planned.kept) == 3
    assert planned.memory.peak == pytest.approx(peak_of(model, size, torch.float32), rel=TOLERANCE)


def test_plan_does_not_depend_on_its_surroundings():
    """A model on the meta device is planned as on the CPU, in any mode of autograd, while other threads plan or train."""
    model, size = DenseNetBC(depth=22, efficient=True), (4, 3, 16, 16)
    want = plan(model, size)
    with torch.inference_mode():
        assert plan(model, size) == want
    assert plan(copy.deepcopy(model).to("meta"), size).memory == want.memory
    other = copy.deepcopy(model)
    with ThreadPoolExecutor(3) as pool:
        steps = [pool.submit(lambda: other(torch.randn(size)).sum().backward()) for _ in range(20)]
        plans = [pool.submit(plan, model, size) for _ in range(4)]
    assert all(planned.result() == want for planned in plans) and not any(step.exception() for step in steps)


def test_plan_of_a_model_that_was_reverted():
    model = converted_networks.build("torchvision", dtype=torch.float32)
    convert(model)
    planned = plan(model, (2, 3, 36, 40))
    revert(model)
    with pytest.raises(ValueError, match="model has no fused dense block features.denseblock1"):
        planned.apply()
    assert "keep_bottleneck" not in vars(model.features.denseblock1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: plan("model", (1, 3, 32, 32)), TypeError, "model is a str; it must be a torch.nn.Module"),
        (lambda m: plan(m, (1, 3, 32, 32), dtype="float32"), TypeError, "dtype is 'float32'; it must be"),
        (lambda m: plan(m, (0, 3, 32, 32)), ValueError, r"input_size\[0\] is 0; it must be a positive integer"),
        (lambda m: plan(m, (1, 3, 32, 32), budget="much"), ValueError, "budget is 'much'; it may be a number of bytes"),
        (lambda m: plan(m, (1, 3, 32, 32), budget=-5), ValueError, "budget is -5; it may be"),
        (lambda m: plan(m, (8, 3, 32, 32), budget="1 KB"), ValueError, "a step on 8x3x32x32 takes .* MB at least"),
        (lambda m: plan(nn.ReLU(), (1, 3, 8, 8)), ValueError, "model has no dense block that runs fused"),
        (lambda m: plan(DependsOnValues(), (1, 3, 8, 8)), ValueError, "the model cannot run without data"),
        (lambda m: largest_batch(m, (1, 3, 32, 32), "fastest"), ValueError, "budget is 'fastest'; it must be bytes"),
        (lambda m: largest_batch(m, (1, 3, 32, 32), 1000), ValueError, "a step on one sample takes"),
        (
            lambda m: plan(m, (2, 3, 32, 32)).apply(nn.ReLU()),
            ValueError,
            "model has no fused dense block features.dense",
        ),
        (
            lambda m: setattr(m, "keep_bottleneck", "all"),
            ValueError,
            "keep_bottleneck is 'all'; it may be True, False, 'auto'",
        ),
    ],
)
def test_errors(call, error, message):
    """A plan that fails leaves the library ready for the next one."""
    model = DenseNetBC(depth=10, efficient=True)
    with pytest.raises(error, match=message):
        call(model)
    assert plan(model, (2, 3, 32, 32)).memory.peak > 0


def test_command():
    command = [
        sys.executable,
        "-m",
        "densenet_ext",
        "plan",
        "densenet_bc_100_12",
        "--input",
        "4x3x32x32",
        "--budget",
        "20MB",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "features.denseblock3" in done.stdout, done.stderr
    done = subprocess.run([*command[:-1], "1MB"], capture_output=True, text=True)
    assert done.returncode != 0 and "at least" in done.stderr and "Traceback" not in done.stderr
