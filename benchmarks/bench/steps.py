"""One training step of a `Spec`, which the measures call."""

import torch
import torch.nn.functional as F

from bench.networks import build_batch, build_model


class TrainingStep:
    """Model, optimizer and batch of one `Spec`; calling it trains one step and waits for the device."""

    def __init__(self, spec):
        self.spec = spec
        self.model = build_model(spec)
        # fused: one pass, and on a GPU one launch, for many parameters
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
        self.batch = build_batch(spec)
        self.warm_up()

    def warm_up(self):
        """Train on two images of 8x8: that allocates gradients and momentum, starts threads, loads libraries."""
        batch, self.batch = self.batch, build_batch(self.spec, batch_size=2, size=8)
        self()
        self.batch = batch

    def clear(self):
        """Set gradients to zero; they stay allocated."""
        self.optimizer.zero_grad(set_to_none=False)

    def forward(self):
        images, labels = self.batch
        with self.spec.autocast(), self.spec.saved_tensors():
            return F.cross_entropy(self.model(images), labels)

    def finish(self, loss):
        loss.backward()
        self.optimizer.step()

    def __call__(self):
        self.clear()
        self.finish(self.forward())
        self.synchronize()

    def synchronize(self):
        if self.spec.device != "cpu":
            torch.accelerator.synchronize()
