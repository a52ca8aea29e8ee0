"""Forward and backward of one batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.evaluation import autocast


class Gradients:
    """Adds the gradients of the mean cross entropy of a batch, divided by `parts`, to those of the parameters.

    Args:
        network: what is called; its parameters get the gradients.
        scaler: of the loss; disabled unless --amp fp16.
        amp: None, 'bf16' or 'fp16'.
        parts: batches that make one step.
    """

    def __init__(self, network: nn.Module, scaler: torch.amp.GradScaler, amp: str | None, parts: int):
        self.network, self.scaler, self.amp, self.parts = network, scaler, amp, parts

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images [B, C, S, S] and labels [B] to float64 [2]: the batch's mean loss and the number of its hits.

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
        """No gradients, before the first batch of a step."""
        for parameter in self.network.parameters():
            parameter.grad = None
