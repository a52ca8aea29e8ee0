"""memory.py --model: what is named, what is compared, what is measured."""

import pytest
import torch
from bench import own_model

torchvision = pytest.importorskip("torchvision")

TINY = "torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2, num_classes=5)"
FILE = f"""
import torch, torchvision

def network():
    return {TINY}

def pair():
    network = {TINY}
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network
        def forward(self, x):
            return {{"logits": self.network(x), "all": [self.network.features(x)]}}
    return Pair()

def other():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())

def number():
    return 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "networks.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("function", ["network", "pair"])
def test_model_of_a_file(run, file, function):
    """All rows agree with the plain one, and the converted ones keep less for backward."""
    printed, found = run("memory.py", "--model", f"{file}:{function}", "--input", "32x3x64x64", "--rounds", 1)
    assert "features.denseblock1  2 layers as one op" in printed and "agree in float64" in printed
    assert max(found["agreement"].values()) <= own_model.LIMIT
    plain, converted, kept = found["rows"]
    assert [plain["implementation"], converted["implementation"]] == ["plain", "converted"]
    assert converted["kept_bytes"] < kept["kept_bytes"] < plain["kept_bytes"]
    assert converted["peak_bytes"] < plain["peak_bytes"] and all(row["seconds"] > 0 for row in found["rows"])


def test_model_of_a_library(run):
    """torchvision has checkpointing of its own, which is measured, too."""
    _, found = run("memory.py", "--model", "torchvision:densenet121", "--input", "2x3x64x64", "--rounds", 1)
    names = [row["implementation"] for row in found["rows"]]
    assert names == ["plain", "checkpointed by the library", "converted", "converted, bottlenecks kept"]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "densenet121": "it must be library:name or path/to/file.py:function",
        "keras:densenet121": "the library may be torchvision, timm, monai, or a file",
        "torchvision:densenet12": "torchvision has no densenet12; near names: densenet121",
        "nowhere.py:network": "there is no file nowhere.py",
    }.items(),
)
def test_unknown_models(name, message):
    with pytest.raises(own_model.ModelError, match=message):
        own_model.build(name, (2, 3, 8, 8))


def test_functions_that_return_no_densenet(run, file):
    with pytest.raises(own_model.ModelError, match="returns a int; it must return a torch.nn.Module"):
        own_model.build(f"{file}:number", (2, 3, 8, 8))
    with pytest.raises(own_model.ModelError, match="has no netwrk; near names: network"):
        own_model.build(f"{file}:netwrk", (2, 3, 8, 8))
    with pytest.raises(SystemExit, match="nothing of .* can be fused"):
        run("memory.py", "--model", f"{file}:other", "--input", "2x3x8x8")


def test_disagreement_is_found():
    """A model that computes something else is refused; the difference lies in a buffer, a gradient or an output."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.001

    torch.manual_seed(0)
    plain, other = torch.nn.Linear(3, 2), Scaled(3, 2)
    other.load_state_dict(plain.state_dict())
    with pytest.raises(own_model.ModelError, match="outputs differ|gradients differ"):
        own_model.check(plain, other, torch.randn(4, 3))
    assert own_model.check(plain, plain, torch.randn(4, 3))["outputs"] == 0
