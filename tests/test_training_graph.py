"""--cuda-graph: the host's part with a device that only pretends, and on a GPU the losses of the eager run."""

from contextlib import nullcontext

import pytest
import torch
import training_cases as cases

for name in ("sklearn", "safetensors", "tensorboard", "yaml"):
    pytest.importorskip(name)

from train_in_float64 import build_in_float64  # noqa: E402
from training import engine, options  # noqa: E402
from training.cuda_graph import GraphedGradients  # noqa: E402
from training.gradients import Gradients  # noqa: E402
from training.model import build  # noqa: E402


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """What is recorded is also run here, and a replay is nothing."""

    def replay(self):
        pass


@pytest.fixture
def pretended_device(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", lambda graph, capture_error_mode: nullcontext())
    monkeypatch.setattr(cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))


def test_recording_leaves_everything_as_it_was(pretended_device):
    """Parameters, running statistics, generator; gradients are zeros that a replay adds to, always the same tensors."""
    model = build(options.parse([*cases.SMALL]), 10, 1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    eager = Gradients(model, scaler, None, 1)
    graphed = GraphedGradients(eager, torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)

    images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    graphed(images, labels)
    assert torch.equal(graphed.images, images) and torch.equal(graphed.labels, labels)
    eager(graphed.images, graphed.labels)  # what a replay does
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert any(gradient.count_nonzero() > 0 for gradient in gradients)
    graphed.clear()
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arguments", [[], ["--accumulate", "2"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_same_losses_as_eager(tmp_path, monkeypatch, arguments):
    """Without masks, whose order a graph may change; each step from the same weights but for rounding: float64's, in which
    no rectifier decides otherwise, and under autocast that of the half types."""
    if "--amp" not in arguments:
        monkeypatch.setattr(engine, "build", build_in_float64)
    curves = []
    for graph in ([], ["--cuda-graph"]):
        folder = tmp_path / ("graph" if graph else "eager")
        recipe = ["--device", "cuda", "--drop-channel", "0", "--lr", "0.003", "--epochs", "1", "--limit-steps", "15"]
        cases.train(folder, *recipe, *arguments, *graph)
        curves.append(torch.tensor([loss for _, loss in cases.scalars(folder, "train/loss")]))
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-2 if "--amp" in arguments else 5e-7)
