"""Converted networks compute what they computed before: outputs, gradients, statistics, ten steps of training."""

import copy

import converted_networks
import pytest
import torch
import torch.nn.functional as F
from converted_networks import NETWORKS, assert_equal, build, images, pair, step
from torch import nn

from densenet_ext import convert, functional, revert, set_fallback


@pytest.fixture(autouse=True)
def strict():
    """Nothing may fall back unseen."""
    with set_fallback("error"):
        yield


@pytest.fixture
def stages(monkeypatch):
    """The calls of the fused op, each with what consumes the block: 'block', 'transition' or 'head'."""
    calls, original = [], functional.dense_stage

    def counted(x, layers, *tail, **options):
        calls.append(("block", "head", "transition")[len(tail)])
        return original(x, layers, *tail, **options)

    monkeypatch.setattr(functional, "dense_stage", counted)
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_unconverted_network(name, training, stages):
    plain, converted = pair(name)
    stages.clear()
    assert_equal(step(converted.train(training), images()), step(plain.train(training), images()))
    assert len(stages) == 2 and stages.count("transition") == NETWORKS[name][1]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name in ("torchvision", "timm", "MONAI", "bearpaw")])
def test_dropout_draws_the_same_numbers(name, stages):
    """MONAI's drops whole channels; the others drop single values."""
    plain, converted = pair(name, drop_rate=0.3)
    stages.clear()
    found, wanted = step(converted, images()), step(plain, images())
    assert_equal(found, wanted)
    assert len(stages) == 2 and not torch.equal(found[0], step(plain, images(seed=2))[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps_of_training(name):
    results = []
    for model in pair(name):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        losses = []
        for seed in range(10):
            loss = F.cross_entropy(model(images(6, (20, 20), seed=seed)), torch.arange(6) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *model.state_dict().values()])
    assert_equal(results[1], results[0], 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI", "phlippe"])
def test_error_is_no_more_than_twice_the_plain_one(name, dtype):
    """All gradients together: a single ReLU that one rounding decides would decide a comparison of each."""
    x = images().to(dtype)
    exact = step(build(name).train(), x.double())
    errors = []
    for model in pair(name, dtype=torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = step(model, x.float())
        pairs = [(a.double(), b) for a, b in zip(found, exact, strict=True) if a is not None and a.is_floating_point()]
        outputs, gradients = pairs[:1], pairs[1 : 2 + len([*model.parameters()])]
        errors.append([torch.cat([(a - b).flatten() for a, b in part]).norm().item() for part in (outputs, gradients)])
    (plain_output, plain_gradient), (output, gradient) = errors
    assert output <= 2 * plain_output and gradient <= 2 * plain_gradient


def frozen_by_torchvision(model):
    from torchvision.ops import FrozenBatchNorm2d

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight)
                frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
                setattr(parent, name, frozen)
    return model


def frozen_by_timm(model):
    return pytest.importorskip("timm").layers.freeze_batch_norm_2d(model).double()


def frozen_by_mode(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "freeze"),
    [
        *(("torchvision", freeze) for freeze in (frozen_by_torchvision, frozen_by_mode)),
        *(("timm", freeze) for freeze in (frozen_by_timm, frozen_by_mode)),
        ("MONAI", frozen_by_mode),
        ("phlippe", frozen_by_torchvision),
    ],
)
def test_frozen_norms(name, freeze, first, stages):
    """Norms are frozen before the conversion or after it."""
    plain = freeze(build(name))
    converted = build(name)
    converted = freeze(converted) if first else converted
    convert(converted)
    converted = converted if first else freeze(converted)
    stages.clear()
    assert_equal(step(converted, images()), step(plain, images()))
    assert len(stages) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_keeps_objects_names_and_classes(name):
    """revert leaves nothing behind."""
    model = build(name)
    kinds, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    keys, text = list(model.state_dict()), repr(model)
    report = convert(model)
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert list(model.state_dict()) == keys and repr(model) == text
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert len([line for line in report.fused.values() if "as one op" in line]) == 2
    assert convert(model).fused == {}  # it is converted already
    assert set(revert(model).fused) >= set(report.fused)
    assert [type(m) for m in model.modules()] == kinds and [set(vars(m)) for m in model.modules()] == attributes
    assert revert(model).fused == {}


def test_keep_bottleneck_keeps_more():
    kept = []
    for keep in (False, True):
        model = build("torchvision")
        convert(model, keep_bottleneck=keep)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            model(images())
        kept.append(sum(saved))
    assert kept[1] > kept[0]


def test_example_is_compared():
    model = build("MONAI")
    report = convert(model, example=images(2))
    assert 0 <= report.difference < 1e-9 and "on the example" in str(report)


def test_encoder_of_segmentation_models(stages):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    plain = smp.Unet("densenet121", encoder_weights=None, decoder_channels=(16, 12, 8, 8, 4)).double()
    converted = copy.deepcopy(plain)
    report = convert(converted)
    assert "features calls" not in str(report) and "where their container calls both" in str(report)
    stages.clear()
    assert_equal(step(converted, images(2, (64, 64))), step(plain, images(2, (64, 64))), 1e-7)
    assert stages == ["block"] * 4


def test_parts_of_features(stages):
    """A slice is a converted container, too; modules in a container of one's own are blocks alone."""
    plain, converted = pair("torchvision")
    for count in (4, 5, 6, 7):
        assert_equal([converted.features[:count](images())], [plain.features[:count](images())])
    assert stages == ["block", "transition", "transition", "block"]
    stages.clear()
    parts = [nn.Sequential(*model.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1)) for model in (converted, plain)]
    assert_equal([parts[0](images())], [parts[1](images())])
    assert stages == ["block", "block"]


def test_networks_that_stay_as_they_are():
    """Dropout after the first convolution; a transition without ReLU, whose block is fused alone."""
    model = converted_networks.build("OpenOOD", drop_rate=0.2)
    report = convert(model)
    assert report.fused == {} and len(report.left_alone) == 5
    assert all("its forward is not that of a dense layer" in why for why in report.left_alone.values())
    report = convert(converted_networks.build("weiaicunzai"))
    assert list(report.left_alone) == ["0.2"] and "is not that of a transition" in report.left_alone["0.2"]
