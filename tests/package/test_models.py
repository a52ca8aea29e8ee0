"""DenseNetBC as a module: files, switches, sizes, unusual batches and threads."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from small_networks import EFFICIENT, EVERYTHING, SMALL, assert_equal_plain, images, network

from densenet_ext import DenseNetBC, EfficientDenseBlock, EfficientDenseLayer


def test_autocast_keeps_float64():
    model = network("fused")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features.denseblock1(images()[:, :1].expand(-1, 6, -1, -1)).dtype == torch.float64


def test_deepcopy_pickle_and_checkpoint_files():
    model = network("fused", **EVERYTHING, keep_bottleneck=True).eval()
    want = model(images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = DenseNetBC(**SMALL, **EVERYTHING).double().eval()
    loaded.load_state_dict(torch.load(file))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(copied(images()), want, rtol=1e-11, atol=1e-11)
    assert copy.deepcopy(model).efficient == "fused" and pickle.loads(pickle.dumps(model)).keep_bottleneck


def test_implementation_can_be_switched_on_a_built_model():
    model = network()
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


@pytest.mark.parametrize("efficient", [False, *EFFICIENT])
def test_empty_batch_counts_and_changes_nothing_else(efficient):
    model = network(se_reduction=2)
    state = copy.deepcopy(model.state_dict())
    model.efficient = efficient
    y = model(images(0))
    assert y.shape == (0, 5)
    y.sum().backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] + 1 if "num_batches" in key else state[key]), key
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters())


def test_two_models_train_in_two_threads():
    models = [network("fused", compression=c) for c in (0.5, 0.7)]

    def losses(model):
        model = copy.deepcopy(model)
        loss = F.cross_entropy(model(images()), torch.arange(4) % 5)
        loss.backward()
        return loss.detach()

    want = [losses(model) for model in models]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(losses, 10 * models))
    torch.testing.assert_close(got, 10 * want)


def test_same_model_twice_in_one_graph():
    def run(efficient):
        model = network(efficient)
        (model(images()) * model(2 * images())).sum().backward()
        assert model.features.norm5.num_batches_tracked == 2
        return [p.grad for p in model.parameters()]

    assert_equal_plain(run)


def test_nan_in_an_image_spreads_as_in_plain():
    x = images()
    x[1, 0, 2, 2] = torch.nan
    for training in (True, False):
        model = network().train(training)
        want = model(x)
        model.efficient = "fused"
        assert torch.equal(model(x).isnan(), want.isnan()) and want.isnan().any()
