"""The parts of a step, each against its formula, and --cuda-graph on a device that only pretends."""

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import train
import training_cases as cases
from train_in_float64 import build_in_float64
from training import engine, options
from training.checkpoint import replace_file
from training.errors import UserError
from training.memory import PeakMemory
from training.model import build
from training.processes import Processes
from training.step import Gradients, GraphedGradients, evaluate, learning_rate, make_optimizer


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match="missing/a could not be written: No such file"):
        replace_file(tmp_path / "missing" / "a", "new")
    replace_file(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_learning_rate():
    """The paper has 0.1, a tenth from half of the epochs on, a hundredth from three quarters on."""
    recipe = options.parse(["--dataset", "cifar100"])
    rates = [learning_rate(recipe, epoch) for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)


def test_optimizer():
    """Write the paper's SGD out: g' = g + wd * w; v = m * v + g'; w -= lr * (g' + m * v)."""
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
    return build(options.parse([*cases.SMALL, *arguments]), 10, 1)


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["float32", "scaled loss"])
def test_gradients_of_parts(scale):
    """The gradients of two parts have their mean; the results are each part's mean loss and its hits."""
    model = small_model("--drop-channel", "0")
    parts = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    losses = [F.cross_entropy(model(images), labels) for images, labels in parts]
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
    """A loader of these batches."""

    def __init__(self, *batches):
        self.batches = batches

    def epoch(self, epoch):
        torch.rand(1)  # a draw that nobody may notice
        yield from self.batches


def test_evaluation():
    """Loss and accuracies are those of all images together, in batches of different sizes; mode and generators stay."""
    model = small_model().double().train()
    images, labels = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(10, (20,))
    model(images)  # running statistics
    random_state = torch.get_rng_state()
    batches = zip(images.split([13, 7]), labels.split([13, 7]), strict=True)
    found = evaluate(model, Batches(*batches), Processes.alone("cpu"), top=3)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        logits = model.eval()(images)
    order = logits.argsort(1, descending=True)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert found["top_accuracy"] == pytest.approx(100 * (order[:, :3] == labels[:, None]).any(1).double().mean().item())


def test_evaluation_of_an_undecided_network():
    """Equal outputs for all classes are one hit in ten, not ten."""
    batch = torch.zeros(10, 10, 1, 1), torch.arange(10)
    found = evaluate(torch.nn.Flatten(), Batches(batch), Processes.alone("cpu"), top=5)
    assert found == {"loss": pytest.approx(math.log(10)), "accuracy": 10.0, "top_accuracy": 50.0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset without /proc")
def test_peak_memory():
    """The resident set grows by what is touched, also after it was given back; reset forgets it."""
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


class Pretended:
    """A stream and a graph: recorded work also runs, and a replay does nothing."""

    def wait_stream(self, other):
        pass

    def replay(self):
        pass


def test_recording_a_graph_changes_nothing(monkeypatch):
    """Parameters, running statistics and generator stay; gradients are zeros that a replay adds to, in the same tensors."""
    for name, replacement in {
        "Stream": lambda device: Pretended(),
        "current_stream": lambda device: Pretended(),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Pretended,
        "graph": lambda graph, capture_error_mode: nullcontext(),
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    model = small_model().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    eager = Gradients(model, torch.amp.GradScaler("cpu", enabled=False), None, 1)
    graphed = GraphedGradients(eager, torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    gradients = [parameter.grad for parameter in model.parameters()]

    def are_zero():
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
        return all(gradient.count_nonzero() == 0 for gradient in gradients)

    assert are_zero()
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    graphed(images, labels)
    assert torch.equal(graphed.images, images) and torch.equal(graphed.labels, labels)
    eager(graphed.images, graphed.labels)  # like a replay
    assert not are_zero()
    graphed.clear()
    assert are_zero()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arguments", [[], ["--accumulate", "2"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_graph_has_the_losses_of_the_eager_run(tmp_path, monkeypatch, arguments):
    """Without masks, whose order a graph may change, losses differ by rounding: float64's, in which no rectifier decides
    otherwise, and under autocast that of the half types."""
    if "--amp" not in arguments:
        monkeypatch.setattr(engine, "build", build_in_float64)
    recipe = "--device cuda --drop-channel 0 --lr 0.003 --epochs 1 --limit-steps 15".split()
    curves = []
    for name, graph in {"eager": [], "graph": ["--cuda-graph"]}.items():
        cases.train(tmp_path / name, *recipe, *arguments, *graph)
        curves.append(torch.tensor([loss for _, loss in cases.scalars(tmp_path / name, "train/loss")]))
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-2 if "--amp" in arguments else 5e-7)
