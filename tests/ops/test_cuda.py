"""Fused stages and networks on a CUDA device, or on a simulated one; the kernels alone are in test_kernels.py."""

import copy
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICES, Problem, Shape, to_device
from stage_cases import Case

from densenet_ext import DenseNetBC, EfficientDenseBlock
from densenet_ext._layout import is_channels_last
from densenet_ext._ops import handles
from densenet_ext.functional import dense_stem

DEVICE = next((d for d in DEVICES[::-1] if is_channels_last(torch.empty(0, device=d))), None)
needs_device = pytest.mark.skipif(DEVICE is None, reason="no CUDA device with kernels here, and none simulated")
needs_real_device = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device with kernels here")


def error(got, want):
    """The largest error of several tensors, each relative to its largest value."""
    pairs = zip(got, want, strict=True)
    return max(((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


def shared_memory():
    """Bytes of shared memory that one block may use."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return (227 if os.environ.get("SIMT_SHARED") == "most" else 99) * 1024


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("bottleneck", "growth"), [(48, 12), (128, 32), (100, 22), (160, 40)])
def test_which_layers_conv3x3_forward_leaves_to_a_library(bottleneck, growth, dtype):
    """A library computes wide layers, except in 16 bits up to 128 and 32 channels if they fit in shared memory."""
    has_room = dtype != torch.float32 and shared_memory() >= 160 * 1024
    has_kernel = (bottleneck <= 64 and growth <= 16) or (bottleneck <= 128 and growth <= 32 and has_room)
    shape = Shape("", height=14, width=14, bottleneck=bottleneck, growth=growth)
    arguments = to_device(Problem(shape, dtype, device=DEVICE).conv3x3_forward(), DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        torch.ops.densenet_ext.conv3x3_forward(*arguments)
    assert ("aten::convolution" in {event.name for event in recorded.events()}) != has_kernel


@needs_device
@pytest.mark.parametrize("keep_bottleneck", [False, True])
@pytest.mark.parametrize("tail", [0, 1, 2])
@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("mask_kind", [0, 1, 6, 16, 31])
def test_stage_equals_plain(mask_kind, squeeze_excite, tail, keep_bottleneck):
    case = Case(mask_kind, squeeze_excite, tail, "every second", in_channels=5, growth=3, height=6, breadth=5).to(
        DEVICE
    )
    x, params = case.leaves()
    got, want = case.fused(x, params, keep_bottleneck), case.plain(x, params)
    grad = torch.randn_like(want)
    assert error([got], [want]) < 1e-12
    got, want = (torch.autograd.grad(y, [x, *params], grad) for y in (got, want))
    assert error(got, want) < 1e-10


@needs_device
def test_layer_equals_plain():
    case = Case(15, True, 0, "every second", in_channels=6, layers=1, height=5, breadth=4).to(DEVICE)
    x, params = case.leaves()
    inputs = [part.clone().detach().requires_grad_() for part in x.split([3, 1, 2], 1)]
    got = torch.ops.densenet_ext.dense_layer(*case.layer_args(inputs, params))[0]
    want = case.plain(torch.cat(inputs, 1), params)[:, 6:]
    grad = torch.randn_like(want)
    assert error([got], [want]) < 1e-12
    leaves = [*inputs, *params]
    assert error(*(torch.autograd.grad(y, leaves, grad) for y in (got, want))) < 1e-10


@needs_device
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_stem_equals_plain(training, form):
    x = torch.randn(3, 10, 15, 12, dtype=torch.double, device=DEVICE).to(memory_format=form).requires_grad_()
    norm = torch.nn.BatchNorm2d(10, dtype=torch.double, device=DEVICE).train(training)
    torch.nn.init.uniform_(norm.weight, -1, 1)
    norms = norm, copy.deepcopy(norm)
    got = dense_stem(x, norms[0])
    want = F.max_pool2d(F.relu(norms[1](x)), 3, stride=2, padding=1)
    grad = torch.randn_like(want)
    results = [
        [y, *torch.autograd.grad(y, [x, *norm.parameters()], grad), *norm.buffers()]
        for y, norm in zip((got, want), norms, strict=True)
    ]
    assert error(*results) < 1e-12


def step(model, x, labels, autocast=None):
    """Loss and gradients of one step; the same random masks in every call."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def small_net(variant="A+B", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return DenseNetBC.variant(variant, depth=16, num_classes=5, **options).to(DEVICE, dtype).train()


@needs_device
@pytest.mark.parametrize("variant", ["vanilla", "A", "B", "A+B"])
def test_network_equals_plain(variant):
    model = small_net(variant)
    plain = copy.deepcopy(model)
    model.efficient = "fused"
    x, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64, device=DEVICE), torch.tensor([0, 3, 1], device=DEVICE)
    assert error(step(model, x, labels), step(plain, x, labels)) < 1e-9
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert error([model(x)], [plain(x)]) < 1e-11


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_under_autocast_is_that_of_plain(dtype):
    """Error against float64 over all gradients together, in the median of seeds: at most twice the plain network's."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        exact = small_net("vanilla")
        x, labels = torch.randn(8, 3, 8, 8, device=DEVICE), torch.randint(5, (8,), device=DEVICE)
        for module in exact.modules():
            if hasattr(module, "drop_rate"):
                module.drop_rate = 0.0
        want = step(exact, x.double(), labels)
        distances = []
        for efficient in ("fused", False):
            model = copy.deepcopy(exact).float()
            model.efficient = efficient
            got = step(model, x, labels, dtype)
            distances.append(sum(((a.double() - b) ** 2).sum().item() for a, b in zip(got, want, strict=True)) ** 0.5)
        ratios.append(distances[0] / distances[1])
    assert sorted(ratios)[2] < 2, ratios


@needs_device
@pytest.mark.parametrize("form", ["contiguous", "channels last", "every second pixel", "expanded", "of other channels"])
@pytest.mark.parametrize("tail", [0, 1])
def test_memory_format_of_input_and_gradient(form, tail):
    case = Case(0, False, tail, in_channels=4, height=6, breadth=8).to(DEVICE)

    def formed(x):
        if form == "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        if form == "every second pixel":
            return x.repeat_interleave(2, 3)[..., ::2]
        if form == "expanded":
            return x[:, :, :, :1].expand_as(x)
        if form == "of other channels":
            return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.size(1) :]
        return x.contiguous()

    x, params = case.leaves()
    got, want = case.fused(formed(x), params), case.plain(formed(x), params)
    grad = formed(torch.randn_like(want))
    assert error([got], [want]) < 1e-12
    assert error(*(torch.autograd.grad(y, [x, *params], grad) for y in (got, want))) < 1e-10


@needs_device
def test_empty_batch():
    model = small_net(efficient="fused").eval()
    x = torch.randn(0, 3, 8, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@needs_device
def test_repeated_steps_are_bit_equal():
    model = small_net(dtype=torch.float32, efficient="fused")
    x, labels = torch.randn(4, 3, 16, 16, device=DEVICE), torch.tensor([0, 3, 1, 4], device=DEVICE)
    first, second = step(model, x, labels), step(model, x, labels)
    first = [g.clone() for g in first]
    second = step(model, x, labels)
    # the first convolution and the classifier are PyTorch's own
    names = ["loss", *(name for name, _ in model.named_parameters())]
    differing = [n for n, a, b in zip(names, first, second, strict=True) if not a.equal(b)]
    assert not [n for n in differing if "conv0" not in n and "classifier" not in n]


# ---- a real device only ------------------------------------------------------------------------------------------------


@needs_real_device
def test_no_synchronization():
    model = small_net(dtype=torch.float32, efficient="fused")
    x, labels = torch.randn(4, 3, 16, 16, device=DEVICE), torch.tensor([0, 3, 1, 4], device=DEVICE)
    step(model, x, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_real_device
def test_side_stream():
    """The kernels run on PyTorch's current stream, after the work that is queued there."""
    model = small_net(dtype=torch.float64, efficient="fused")
    x, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64, device=DEVICE), torch.tensor([0, 3, 1, 4], device=DEVICE)
    want = [g.clone() for g in step(model, x, labels)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = x * 1.0
        got = [g.clone() for g in step(model, late, labels)]
    stream.synchronize()
    assert error(got, want) < 1e-12


def graphed_step(model, x, labels):
    """Capture a whole step in a CUDA graph, replay it, and return its loss and gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
    return graph, loss


@needs_real_device
def test_step_in_a_cuda_graph():
    model = small_net("B", torch.float64)
    for module in model.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    plain = copy.deepcopy(model)
    model.efficient = "fused"
    x, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64, device=DEVICE), torch.tensor([0, 3, 1, 4], device=DEVICE)
    graph, loss = graphed_step(model, x, labels)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    want = step(plain, x, labels)
    assert error([loss, *(p.grad for p in model.parameters())], want) < 1e-9


@needs_real_device
def test_graphed_callable():
    block = EfficientDenseBlock(3, 8, 4, efficient="fused").to(DEVICE).double()
    plain = copy.deepcopy(block)
    plain.efficient = False
    x = torch.randn(2, 8, 6, 6, device=DEVICE, dtype=torch.float64, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(block, (torch.randn_like(x).requires_grad_(),))
    (got,), (want,) = (torch.autograd.grad(b(x).square().sum(), [x]) for b in (graphed, plain))
    assert error([got], [want]) < 1e-9


@needs_real_device
def test_out_of_memory_leaves_nothing_behind():
    model = small_net(dtype=torch.float64, efficient="fused")
    x, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64, device=DEVICE), torch.tensor([0, 3, 1, 4], device=DEVICE)
    want = [g.clone() for g in step(model, x, labels)]
    state = copy.deepcopy(model.state_dict())
    large = torch.empty(1 << 11, 3, 256, 256, dtype=torch.float64, device=DEVICE)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    try:
        with pytest.raises(RuntimeError, match="out of memory|failed"):
            step(model, large, torch.zeros(len(large), dtype=torch.long, device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del large
    model.load_state_dict(state)
    assert error(step(model, x, labels), want) < 1e-9


@needs_real_device
def test_parameters_on_another_device():
    block = EfficientDenseBlock(2, 4, 2, efficient="fused")
    with pytest.raises(ValueError, match=r"layers\[0\].norm1.weight is on cpu; it must be on cuda"):
        block(torch.randn(2, 4, 5, 5, device=DEVICE))


@pytest.mark.skipif(DEVICE != "cpu", reason="no simulated device, which can take any compute capability")
@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ("7", "has compute capability 7.0, and the CUDA kernels need 8.0"),
        ("9", "built for 8.0: .*TORCH_CUDA_ARCH_LIST='9.0'"),
    ],
)
def test_unsupported_architecture(capability, message):
    code = """
import torch
from densenet_ext import EfficientDenseBlock, set_fallback
set_fallback("error")
EfficientDenseBlock(2, 4, 2, efficient="fused")(torch.randn(2, 4, 5, 5))
"""
    environment = os.environ | {"SIMT_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(rf"RuntimeError: .*{message}", done.stderr), done.stderr


def test_cuda_tensor_without_kernels(monkeypatch):
    monkeypatch.setattr(handles, "DEVICES", frozenset({"cpu"}))
    with pytest.raises(
        RuntimeError, match=r"x is on cuda:1, and the CUDA kernels of densenet_ext are .*efficient=False"
    ):
        handles.require_kernels(SimpleNamespace(device=torch.device("cuda", 1)))
