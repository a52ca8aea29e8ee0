"""Build a network of your own: fused dense blocks and layers between ordinary PyTorch modules.

    python examples/custom_block.py

It learns to tell horizontal stripes from vertical ones under noise, which takes a few seconds, and prints its loss.
"""

import torch
import torch.nn.functional as F
from torch import nn

from densenet_ext import EfficientDenseBlock, EfficientDenseLayer, Transition


class StripeNet(nn.Module):
    """A convolution, a dense block, a transition, a single dense layer, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.block = EfficientDenseBlock(6, 16, growth_rate=8, drop_channel=0.1, efficient="fused")
        self.transition = Transition(16 + 6 * 8, 32)  # a block returns its input and growth_rate channels a layer
        self.layer = EfficientDenseLayer(32, growth_rate=8, se_reduction=4, efficient="fused")
        self.classifier = nn.Linear(32 + 8, 2)

    def forward(self, x):
        x = self.transition(self.block(self.stem(x)))
        x = torch.cat([x, self.layer(x)], 1)  # a layer returns its growth_rate new channels alone
        return self.classifier(F.relu(x).mean((2, 3)))


def stripes(count):
    """Return images [count, 1, 32, 32] and labels [count]: 0 horizontal, 1 vertical."""
    labels = torch.randint(2, (count,))
    horizontal = torch.randint(2, (count, 1, 32, 1)).float().expand(-1, -1, -1, 32)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, horizontal.transpose(2, 3), horizontal)
    return images + torch.randn(count, 1, 32, 32), labels


def main():
    torch.manual_seed(0)
    model = StripeNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(1, 41):
        images, labels = stripes(32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
