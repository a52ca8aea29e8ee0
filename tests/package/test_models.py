"""DenseNetBC: its three implementations agree, and it behaves as a module should."""

import copy
import io
import pickle
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from decisions import clear_input
from torch import nn

from densenet_ext import DenseNetBC, EfficientDenseBlock, EfficientDenseLayer
from densenet_ext.models import VARIANTS

SMALL = {"growth_rate": 3, "block_config": (2, 3, 2), "num_classes": 5, "bn_size": 2}
EVERYTHING = {**SMALL, "drop_rate": 0.2, "drop_channel": 0.3, "se_reduction": 2}
EFFICIENT = ("checkpoint", "fused")


def small(**options):
    torch.manual_seed(0)
    model = DenseNetBC(**{**SMALL, **options}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:  # so that it is neither the identity nor symmetric
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def images(samples=4, size=(9, 8), dtype=torch.double, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, *size, generator=generator, dtype=torch.double).to(dtype)


def train(model, efficient, steps=10, x=None, prepare=lambda x: x):
    """Return the losses and the final state of some steps of SGD; one seed decides all that is random."""
    model = copy.deepcopy(model)
    model.efficient = efficient
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(5)
    losses = []
    for step in range(steps):
        batch = prepare(images() + 0.1 * step if x is None else x)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), torch.arange(len(batch)) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


def assert_same_training(model, efficient, tolerance=1e-9, **options):
    got, want = train(model, efficient, **options), train(model, False, **options)
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    for key, value in want[1].items():
        torch.testing.assert_close(
            got[1][key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("position", ["pre_norm", "pre_conv"])
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_ten_steps_equal_plain(efficient, position):
    """Weights, running statistics and num_batches_tracked are equal after ten steps with every kind of mask."""
    assert_same_training(small(**EVERYTHING, drop_channel_position=position), efficient)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_variants_equal_plain(efficient, name):
    torch.manual_seed(0)
    assert_same_training(DenseNetBC.variant(name, **SMALL).double(), efficient, steps=2)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_kept_bottlenecks_equal_plain(efficient):
    assert_same_training(small(**EVERYTHING, keep_bottleneck=True), efficient, steps=2)


def test_imagenet_stem_equals_plain():
    assert_same_training(small(small_inputs=False), "fused", steps=2, x=images(size=(33, 47)))


def change_norms(model, change):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)
    return model


def no_affine(norm):
    norm.affine, norm.weight, norm.bias = False, None, None


def no_tracking(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


NORMS = {
    "no affine": no_affine,
    "no tracking": no_tracking,
    "cumulative": lambda norm: setattr(norm, "momentum", None),
    "large eps": lambda norm: setattr(norm, "eps", 0.1),
    "frozen": lambda norm: norm.eval(),
}


@pytest.mark.parametrize("change", NORMS)
@pytest.mark.parametrize("efficient", EFFICIENT)
def test_norms_of_every_kind_equal_plain(efficient, change):
    assert_same_training(change_norms(small(), NORMS[change]), efficient, steps=3)


def test_single_frozen_norms_equal_plain():
    model = small(**EVERYTHING)
    for norm in (model.features.denseblock1.denselayer2.norm1, model.features.transition1.norm, model.features.norm5):
        norm.eval()
    assert_same_training(model, "fused", steps=3)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_frozen_parameters_equal_plain(efficient):
    model = small(**EVERYTHING)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    assert_same_training(model, efficient, steps=2)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_evaluation_equals_plain_and_changes_nothing(efficient):
    model = small(**EVERYTHING)
    train(model, False, steps=2)
    model.eval()
    want = model(images())
    state = copy.deepcopy(model.state_dict())
    model.efficient = efficient
    torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)
    with torch.inference_mode():
        torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_evaluation_without_running_statistics_uses_the_batch(efficient):
    model = change_norms(small(), no_tracking).eval()
    want = model(images())
    model.efficient = efficient
    torch.testing.assert_close(model(images()), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("efficient", EFFICIENT)
def test_training_mode_without_gradients_updates_statistics_once(efficient):
    model = small()
    model.efficient = efficient
    with torch.no_grad():
        model(images())
    trackers = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(tracker == 1 for tracker in trackers)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(layout):
    assert_same_training(small(), "fused", steps=1, prepare=LAYOUTS[layout])
    block = EfficientDenseBlock(2, 3, 2).double()
    x = LAYOUTS[layout](images())
    want = block(x)
    block.efficient = "fused"
    torch.testing.assert_close(block(x), want, rtol=1e-11, atol=1e-11)


def test_channels_last_model():
    assert_same_training(
        small().to(memory_format=torch.channels_last), "fused", steps=2, prepare=LAYOUTS["channels last"]
    )


@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["planar", *LAYOUTS])
def test_first_convolution_is_called_and_writes_what_the_fused_ops_read(layout, channels, small_inputs):
    """If the stem is fused, hooks of conv0 see channels-last maps with a channels-last gradient; else maps stay planar.

    This takes float32, because oneDNN serves it. Maps of one channel are planar and channels last at once.
    """
    model, seen = small(in_channels=channels, small_inputs=small_inputs).float(), []

    def hook(module, inputs, output):
        seen.append(output)
        output.register_hook(seen.append)

    size = (9, 10) if small_inputs else (33, 40)  # so few values that all decisions are clear in one of a few batches
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


def test_autocast_keeps_float64():
    model = small()
    model.efficient = "fused"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features.denseblock1(images()[:, :1].expand(-1, 6, -1, -1)).dtype == torch.float64


def test_deepcopy_pickle_and_checkpoint_files():
    model = small(**EVERYTHING, efficient="fused", keep_bottleneck=True).eval()
    want = model(images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = DenseNetBC(**EVERYTHING).double().eval()
    loaded.load_state_dict(torch.load(file))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(copied(images()), want, rtol=1e-11, atol=1e-11)
    assert copy.deepcopy(model).efficient == "fused" and pickle.loads(pickle.dumps(model)).keep_bottleneck


def test_implementation_can_be_switched_on_a_built_model():
    model = small()
    for efficient, keep_bottleneck in (("fused", True), ("checkpoint", False), (False, True)):
        model.efficient, model.keep_bottleneck = efficient, keep_bottleneck
        parts = [m for m in model.modules() if isinstance(m, EfficientDenseBlock | EfficientDenseLayer)]
        assert len(parts) == 10
        assert all((m.efficient, m.keep_bottleneck) == (efficient, keep_bottleneck) for m in parts)


def test_torchvision_weights_fit_both_ways():
    models = pytest.importorskip("torchvision").models
    theirs = models.densenet121().double().eval()
    ours = DenseNetBC(
        32, block_config=(6, 12, 24, 16), num_init_features=64, num_classes=1000, small_inputs=False, efficient="fused"
    )
    ours.double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_sizes_of_the_paper():
    """DenseNet-BC (L=100, k=12) has 0.8 million parameters (Huang et al., table 2), and 342 channels before the classifier."""
    model = DenseNetBC(growth_rate=12, depth=100, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 769_162
    assert model.classifier.in_features == 342


def test_one_sample_and_odd_sizes_equal_plain():
    assert_same_training(small(), "fused", steps=2, x=images(1, (13, 11)))


@pytest.mark.parametrize("efficient", [False, *EFFICIENT])
def test_empty_batch_counts_and_changes_nothing_else(efficient):
    model = small(se_reduction=2)
    state = copy.deepcopy(model.state_dict())
    model.efficient = efficient
    y = model(images(0))
    assert y.shape == (0, 5)
    y.sum().backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] + 1 if "num_batches" in key else state[key]), key
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters())


def test_two_models_train_in_two_threads():
    models = [small(**SMALL, compression=c) for c in (0.5, 0.7)]
    want = [train(model, "fused", steps=1, x=images())[0] for model in models]
    got = [[], []]

    def work(i):
        for _ in range(10):
            model = copy.deepcopy(models[i])
            model.efficient = "fused"
            loss = F.cross_entropy(model(images()), torch.arange(4) % 5)
            loss.backward()
            got[i].append(loss.detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for losses, expected in zip(got, want, strict=True):
        torch.testing.assert_close(torch.stack(losses), expected.expand(10))


def test_same_model_twice_in_one_graph():
    model = small()
    grads = []
    for efficient in (False, "fused"):
        module = copy.deepcopy(model)
        module.efficient = efficient
        (module(images()) * module(2 * images())).sum().backward()
        grads.append([p.grad for p in module.parameters()])
        assert module.features.norm5.num_batches_tracked == 2
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_nan_in_an_image_spreads_as_in_plain():
    x = images()
    x[1, 0, 2, 2] = torch.nan
    for training in (True, False):
        model = small().train(training)
        want = model(x)
        model.efficient = "fused"
        assert torch.equal(model(x).isnan(), want.isnan()) and want.isnan().any()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler")
def test_compiled_fused_equals_fused():
    """Dynamo runs a frame that it cannot trace eagerly; with fullgraph it raises an error instead."""
    model = small(se_reduction=2)
    model.efficient = "fused"
    compiled = copy.deepcopy(model)
    results = []
    for module, call in ((model, model), (compiled, torch.compile(compiled, fullgraph=True))):
        loss = F.cross_entropy(call(images()), torch.arange(4) % 5)
        loss.backward()
        results.append(([p.grad for p in module.parameters()], list(module.buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_backward_equals_backward():
    """Compiled autograd traces backward of an eager forward, which has an op that writes into its arguments."""
    model = small(se_reduction=2)
    model.efficient = "fused"
    want = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    loss = model(images()).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want), rtol=1e-9, atol=1e-9)
