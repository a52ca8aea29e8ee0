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
