"""One step of the training, one pass over a split for its loss and accuracy, and the paper's optimizer."""

import argparse
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.processes import Processes

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # passes before the recording: cuDNN and cuBLAS choose algorithms, PyTorch's allocator fills its pools


def make_optimizer(parameters: Iterable[nn.Parameter], options: argparse.Namespace) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum, all parameters at once; weight decay on all of them."""
    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        dampening=options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=True,
    )


def learning_rate(options: argparse.Namespace, epoch: int) -> float:
    """Return lr * gamma^(milestones passed) in the epoch of number `epoch`, the first one being 0."""
    passed = sum(epoch >= milestone * options.epochs for milestone in options.lr_milestones)
    return options.lr * options.lr_gamma**passed


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """Return the context of --amp. Weights are used once a pass: a cache of converted ones would only cost memory."""
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp is not None, cache_enabled=False)


@torch.no_grad()
def evaluate(model: nn.Module, loader, processes: Processes, amp: str | None = None, top: int = 5) -> dict[str, float]:
    """Return mean cross entropy, accuracy and top-`top` accuracy in percent over all that the processes' loaders serve.

    The model is left in the mode that it was in, the random number generators as they were.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    devices = [processes.device] if processes.device.type == "cuda" else []
    with torch.random.fork_rng(devices), autocast(processes.device, amp):
        for images, labels in loader.epoch(0):
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            hits = (logits.argmax(1) == labels).sum()
            top_hits = (logits.topk(min(top, logits.shape[1])).indices == labels[:, None]).sum()
            sums[:3] += torch.stack([loss, hits, top_hits])
            sums[3] += len(labels)
    model.train(training)
    loss, hits, top_hits, count = processes.reduce_sum(sums).tolist()
    return {"loss": loss / count, "accuracy": 100 * hits / count, "top_accuracy": 100 * top_hits / count}


class Gradients:
    """Add the gradients of the mean cross entropy of a batch, divided by `parts`, to those of the parameters.

    Args:
        network: is called; its parameters get the gradients.
        scaler: of the loss; disabled unless --amp fp16.
        amp: None, 'bf16' or 'fp16'.
        parts: batches that make one step.
    """

    def __init__(self, network: nn.Module, scaler: torch.amp.GradScaler, amp: str | None, parts: int):
        self.network, self.scaler, self.amp, self.parts = network, scaler, amp, parts

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take images [B, C, S, S] and labels [B] to float64 [2]: the batch's mean loss and the number of its hits.

        The result stays on the device: nothing waits for it.
        """
        with autocast(images.device, self.amp):
            logits = self.network(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss / self.parts).backward()
        hits = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach().double(), hits.double()])

    def clear(self) -> None:
        """Drop the gradients, before the first batch of a step."""
        for parameter in self.network.parameters():
            parameter.grad = None


class GraphedGradients:
    """`Gradients` as one CUDA graph, recorded for one shape of batches and replayed: hundreds of kernels are launched at once.

    Gradients are kept in one set of tensors, which the recorded backward adds to: `clear` fills them with zeros. Random masks
    differ from replay to replay, since a recorded generator advances with each one. The optimizer stays outside. The graph
    avoids the launches, and costs the memory that one pass holds, which stays reserved for it.

    Args:
        gradients: is recorded; its network in training mode, on a GPU.
        images: example of a batch [B, C, S, S], whose shape, dtype and memory format all batches have.
        labels: example [B].

    Parameters, buffers and the state of the random number generators stay as they are.
    """

    def __init__(self, gradients: Gradients, images: Tensor, labels: Tensor):
        network = gradients.network
        self.images, self.labels = images.clone(), labels.clone()
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        buffers = list(network.buffers())
        values = [buffer.clone() for buffer in buffers]
        random_state = torch.cuda.get_rng_state(images.device)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                gradients(self.images, self.labels)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that pins memory for the next batches may go on while this one records
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = gradients(self.images, self.labels)
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        torch.cuda.set_rng_state(random_state, images.device)
        self.clear()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Do as Gradients does; the result [2] is overwritten by the next call."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result

    def clear(self) -> None:
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
