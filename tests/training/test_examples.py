"""The examples as a user would start them, with less work."""

import re

import pytest
import training_cases as cases


@pytest.mark.slow
def test_quickstart_learns():
    """A wrong gradient, or statistics that differ between training and evaluation, does not get this far in six epochs."""
    printed = cases.run("quickstart.py", "--epochs", 6, "--depth", 16).stdout
    assert float(re.search(r"test accuracy ([\d.]+) %", printed)[1]) > 70
    assert "epoch 6/6" in printed  # no terminal, so lines instead of a bar


def test_custom_block_learns():
    """Guessing has a loss of 0.69."""
    printed = cases.run("custom_block.py").stdout
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[-1] < 0.3


CONVERTED = {
    "finetune_torchvision.py": ("torchvision", ["--samples", 400, "--epochs", 2], r"epoch \d/\d: loss ([\d.]+)"),
    "train_timm.py": ("timm", ["--steps", 20], r"step \d+: loss ([\d.]+)"),
    "chest_xray.py": ("torchxrayvision", ["--steps", 20], r"step \d+: loss ([\d.]+)"),
    "segmentation_unet.py": ("segmentation_models_pytorch", ["--steps", 20], r"step \d+: loss ([\d.]+)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", CONVERTED)
def test_converted_network_learns(script):
    """The loss falls, and less than half is kept for backward."""
    library, arguments, pattern = CONVERTED[script]
    pytest.importorskip(library)
    printed = cases.run(script, *arguments).stdout
    first, *_, last = (float(loss) for loss in re.findall(pattern, printed))
    assert last < 0.7 * first or last < 0.3
    before, now = (float(value) for value in re.search(r": (\d+) MB before, (\d+) MB now", printed).groups())
    assert now < before / 2 and re.search(r"denseblock4 +16 layers as one op", printed)
