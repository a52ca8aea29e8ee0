"""docs/support.md is right, row by row: each implementation does what it says, and the numbers are the same."""

import copy
import warnings
from collections import Counter
from pathlib import Path

import pytest
import support_cases
import torch
import torch.nn.functional as F
from support_cases import LOWER, PYTORCH_REFUSES, SCENARIOS, SILENT
from torch import nn

from densenet_ext import DenseNetBC, _plain_layer, convert, functional, set_fallback

torchvision = pytest.importorskip("torchvision")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
COLUMNS = ("fused", "checkpoint", False, "converted")
TINY = {"growth_rate": 8, "block_config": (2, 3, 2), "num_init_features": 16, "bn_size": 2, "num_classes": 5}


def rows():
    """Return (what is done, what happens in each of COLUMNS) for each line of the table."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[:5] for row in cells if row[1] in OUTCOMES]


OUTCOMES = ("fused", "partly fused", "checkpointed", "plain", "error")
CASES = [(row[0], column, row[1 + i]) for row in rows() for i, column in enumerate(COLUMNS)]


class TheirNetwork(nn.Module):
    """torchvision's network without the in-place ReLU on the output of `features`, which a hook there forbids."""

    def __init__(self):
        super().__init__()
        network = torchvision.models.DenseNet(**TINY)
        self.features, self.classifier = network.features, network.classifier

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1))


def networks(column):
    """The network of a column and torchvision's, with the same weights and the same statistics, none of them initial."""
    torch.manual_seed(0)
    theirs = TheirNetwork().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.ReLU):
            module.inplace = False
    if column == "converted":
        ours = copy.deepcopy(theirs)
        assert not convert(ours).left_alone
        return ours, theirs
    ours = DenseNetBC(**TINY, small_inputs=False).double()
    ours.load_state_dict(theirs.state_dict())
    ours.efficient = column
    return ours, theirs


@pytest.fixture
def calls(monkeypatch):
    """Count how often each implementation computes a layer or a stage."""
    counts = Counter()

    def count(owner, method, name):
        original = getattr(owner, method)

        @torch.compiler.assume_constant_result  # torch.compile would compile again for another count
        def note():
            counts[name] += 1

        def counted(*args, **kwargs):
            note()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    count(functional, "dense_stage", "stage")
    count(functional, "dense_layer", "layer")
    count(_plain_layer, "_checkpointed_bottleneck", "checkpointed")
    count(_plain_layer, "call_layer", "called")
    count(torchvision.models.densenet._DenseLayer, "bn_function", "called")
    return counts


def outcome(calls):
    if calls["stage"] + calls["layer"]:
        return "partly fused" if calls["called"] or calls["layer"] else "fused"
    return "checkpointed" if calls["checkpointed"] else "plain"


def error(got, want):
    """Return the largest relative error of a tensor, by the norm of all its values."""
    pairs = [(a.double(), b) for a, b in zip(got, want, strict=True) if b.is_floating_point()]
    return max(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in pairs)


def test_the_table_has_every_scenario_once():
    assert [row[0] for row in rows()] == list(SCENARIOS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("what", "column", "expected"), CASES, ids=[f"{w}-{c}" for w, c, _ in CASES])
def test_row(what, column, expected, calls):
    run = SCENARIOS[what]
    (ours, theirs), (plain, same) = networks(column), networks(False)
    calls.clear()
    set_fallback("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        try:
            got, found = run(ours), None
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as raised:
            found, said = "error", str(raised)
    if found is None:
        found = outcome(calls)
        torch.manual_seed(1)
        want = run(theirs)
        if run in LOWER:
            exact = support_cases.step(same)
            torch.manual_seed(1)
            assert error(got, exact) <= 2 * error(run(plain), exact)
        else:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert found == expected
    warned = any("instead of efficient='fused'" in str(warning.message) for warning in caught)
    if found == "error":
        assert run in PYTORCH_REFUSES or len(said) < 700
        assert run in PYTORCH_REFUSES or any(word in said for word in ("densenet_ext", "it may be", "not resizable"))
    elif column in ("fused", "converted") and found != "fused" and run not in SILENT:
        assert warned
    elif column not in ("fused", "converted"):
        assert not warned
