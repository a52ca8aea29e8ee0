"""Loss and accuracy of a model on a split."""

import torch
import torch.nn.functional as F
from torch import nn

from training.processes import Processes

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The context of --amp. Weights are used once a pass, so that a cache of converted ones would only cost memory."""
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp is not None, cache_enabled=False)


@torch.no_grad()
def evaluate(model: nn.Module, loader, processes: Processes, amp: str | None = None, top: int = 5) -> dict[str, float]:
    """Mean cross entropy, accuracy and top-`top` accuracy in percent over all that the loaders of all processes serve.

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
