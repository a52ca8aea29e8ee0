"""The parts of the training loop, each against its formula."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import training_cases as cases

for name in ("sklearn", "safetensors", "tensorboard", "yaml"):
    pytest.importorskip(name)

import train  # noqa: E402
from training import options  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.evaluation import evaluate  # noqa: E402
from training.files import replace_file  # noqa: E402
from training.gradients import Gradients  # noqa: E402
from training.memory import PeakMemory  # noqa: E402
from training.model import build, prepare  # noqa: E402
from training.processes import Processes  # noqa: E402
from training.recipe import learning_rate, make_optimizer  # noqa: E402


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match="missing/a could not be written: No such file"):
        replace_file(tmp_path / "missing" / "a", "new")
    replace_file(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_learning_rate():
    """The paper's: 0.1, a tenth from half of the epochs on, a hundredth from three quarters on."""
    recipe = options.parse(["--dataset", "cifar100"])
    rates = [learning_rate(recipe, epoch) for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)


def test_optimizer():
    """SGD of the paper, written out: g' = g + wd * w; v = m * v + g'; w -= lr * (g' + m * v)."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer([parameter], options.parse(["--lr", "0.05"]))
    weight, velocity = parameter.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for gradient in torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.1, 0.2]], dtype=torch.float64):
        parameter.grad = gradient.clone()
        optimizer.step()
        total = gradient + 1e-4 * weight
        velocity = 0.9 * velocity + total
        weight = weight - 0.05 * (total + 0.9 * velocity)
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-14, atol=0)


def small_model(*arguments):
    chosen = options.parse([*cases.SMALL, *arguments])
    return prepare(build(chosen, 10, 1), chosen, Processes.alone("cpu"))


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["float32", "scaled loss"])
def test_gradients_of_parts(scale):
    """Two parts: the mean of the gradients of each; the result is each part's mean loss and its hits."""
    model = small_model("--drop-channel", "0")
    parts = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    losses = [torch.nn.functional.cross_entropy(model(images), labels) for images, labels in parts]
    expected = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1, enabled=scale is not None)
    gradients = Gradients(model, scaler, None, 2)
    gradients.clear()
    for (images, labels), loss in zip(parts, losses, strict=True):
        found, hits = gradients(images, labels).tolist()
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert hits == (model(images).argmax(1) == labels).sum()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad / (scale or 1), gradient, rtol=1e-4, atol=1e-6)
    gradients.clear()
    assert all(parameter.grad is None for parameter in model.parameters())


class Batches:
    """A loader of given batches."""

    def __init__(self, *batches):
        self.batches = batches

    def epoch(self, epoch):
        torch.rand(1)  # a draw that nobody may notice
        yield from self.batches


def test_evaluation():
    """Loss and accuracies of all images together, from batches of different sizes; mode and generators stay."""
    model = small_model().double().train()
    images, labels = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(10, (20,))
    model(images)  # running statistics
    before = torch.get_rng_state()
    batches = zip(images.split([13, 7]), labels.split([13, 7]), strict=True)
    found = evaluate(model, Batches(*batches), Processes.alone("cpu"), top=3)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        logits = model.eval()(images)
    order = logits.argsort(1, descending=True)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert found["top_accuracy"] == pytest.approx(100 * (order[:, :3] == labels[:, None]).any(1).double().mean().item())


def test_evaluation_of_an_undecided_network():
    """The same output for all classes is one hit in ten, not ten."""
    labels = torch.arange(10)
    found = evaluate(torch.nn.Flatten(), Batches((torch.zeros(10, 10, 1, 1), labels)), Processes.alone("cpu"), top=5)
    assert found == {"loss": pytest.approx(math.log(10)), "accuracy": 10.0, "top_accuracy": 50.0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset without /proc")
def test_peak_memory():
    """Growth of the resident set by what is touched, also after it was given back; forgotten by reset."""
    memory = PeakMemory(torch.device("cpu"))
    buffer = torch.ones(100_000_000, dtype=torch.uint8)
    assert 95 < memory.read() < 130
    del buffer
    assert 95 < memory.read() < 130
    memory.reset()
    assert memory.read() < 30


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        train.set_up(argparse.Namespace(deterministic=True, threads=1))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.deterministic = False
