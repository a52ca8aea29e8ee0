"""set_fallback decides what is reported where the fused implementation cannot serve, to whom, and how often."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from installed import run_python
from small_networks import images, network, watch

from densenet_ext import EfficientDenseLayer, fallback, functional, set_fallback


def test_warns_once_for_each_reason():
    set_fallback("warn")
    model, x = network("fused"), images()
    handle = model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning) as caught:
        model(x)
        model(x)
    assert len(caught) == 1
    watch(model, "features.denseblock2.denselayer1.norm1")
    with pytest.warns(UserWarning, match="denseblock2") as caught:
        model(x)
    assert len(caught) == 1
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def hooked_layer():
    layer = EfficientDenseLayer(4, 3, efficient="fused")
    watch(layer, "norm1")
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


def test_disabled_by_the_environment(monkeypatch):
    """A switch to find out whether the fused ops are to blame: not an error even where a fallback is one."""
    model, x = network("fused").eval(), images()
    want = model(x)
    monkeypatch.setattr(fallback, "_disabled", True)
    monkeypatch.setattr(functional, "dense_stage", None)
    monkeypatch.setattr(functional, "dense_layer", None)
    with pytest.warns(UserWarning, match="DENSENET_EXT_DISABLE is set"):
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("0", False), ("", False)])
def test_the_environment_variable(value, disabled):
    code = "from densenet_ext import fallback; print(fallback._disabled)"
    done = run_python("-c", code, DENSENET_EXT_DISABLE=value)
    assert done.stdout.strip() == str(disabled)
