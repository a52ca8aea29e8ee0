"""The examples as a user would start them, with less work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.slow
def test_quickstart_learns():
    """A wrong gradient, or statistics that differ between training and evaluation, does not get this far in six epochs."""
    pytest.importorskip("sklearn")
    arguments = ["--epochs", "6", "--depth", "16"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy ([\d.]+) %", done.stdout)[1]) > 70
    assert "epoch 6/6" in done.stdout  # no terminal, so lines instead of a bar
