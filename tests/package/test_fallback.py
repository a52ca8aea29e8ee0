"""set_fallback decides what is reported where the fused implementation cannot serve, to whom, and how often."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from densenet_ext import DenseNetBC, EfficientDenseLayer, fallback, functional, set_fallback

SMALL = {
    "growth_rate": 3,
    "block_config": (2, 2),
    "num_classes": 5,
    "bn_size": 2,
    "se_reduction": 2,
    "drop_channel": 0.1,
}


def test_warns_once_for_each_reason():
    set_fallback("warn")
    model = DenseNetBC(**SMALL, efficient="fused")
    x = torch.randn(2, 3, 8, 8)
    handle = model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning) as caught:
        model(x)
        model(x)
    assert len(caught) == 1
    model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="denseblock2") as caught:
        model(x)
    assert len(caught) == 1
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def hooked_layer():
    layer = EfficientDenseLayer(4, 3, efficient="fused")
    layer.norm1.register_forward_hook(lambda *args: None)
    return layer, torch.randn(2, 4, 8, 8)


@pytest.mark.filterwarnings("error")
def test_silent_says_nothing_and_computes():
    layer, x = hooked_layer()
    set_fallback("silent")
    y = layer(x)
    layer.efficient = False
    torch.testing.assert_close(layer(x), y)


def test_the_mode_of_a_with_block_ends_with_it():
    """An error ends the block and its mode, too. Warnings from before the block are not repeated after it."""
    set_fallback("warn")
    layer, x = hooked_layer()
    with pytest.warns(UserWarning, match="norm1 has a forward hook"):
        layer(x)
    with set_fallback("error"):
        with set_fallback("silent"):
            layer(x)
        with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
            layer(x)
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"), set_fallback("error"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    set_fallback("warn")
    with pytest.warns(UserWarning, match="norm1 has a forward hook"):
        layer(x)


def test_the_mode_holds_for_all_threads():
    layer, x = hooked_layer()
    with set_fallback("silent"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(layer, x).result().shape == (2, 3, 8, 8)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        pool.submit(layer, x).result()


def test_a_mode_that_does_not_exist_changes_nothing():
    layer, x = hooked_layer()
    with pytest.raises(ValueError, match="mode is None"):
        set_fallback(None)
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        layer(x)


def test_single_layer_falls_back():
    layer, x = hooked_layer()
    with pytest.raises(RuntimeError, match="norm1 has a forward hook"):
        layer(x)


def test_disabled_by_the_environment(monkeypatch):
    """The switch serves to find out if the fused ops are to blame, so it raises no error in the mode 'error'."""
    model = DenseNetBC(**SMALL, efficient="fused").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    model.eval()
    want = model(x)
    monkeypatch.setattr(fallback, "_disabled", True)
    monkeypatch.setattr(functional, "dense_stage", None)
    monkeypatch.setattr(functional, "dense_layer", None)
    with pytest.warns(UserWarning, match="DENSENET_EXT_DISABLE is set"):
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("0", False), ("", False)])
def test_the_environment_variable(value, disabled):
    code = "from densenet_ext import fallback; print(fallback._disabled)"
    environment = {**os.environ, "DENSENET_EXT_DISABLE": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(disabled)
