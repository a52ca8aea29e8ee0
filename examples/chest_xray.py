"""Train torchxrayvision's DenseNet-121 on several findings at once, converted; unknown labels are left out.

    python examples/chest_xray.py

The X-rays are made up: noise with bright discs in one half or the other, and each half is a finding. --weights takes a
name of torchxrayvision's, such as densenet121-res224-all, which it downloads; images are then 224x224.
"""

import argparse

import torch
import torch.nn.functional as F
import torchxrayvision
from kept import kept_megabytes
from tqdm import tqdm

import densenet_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--weights")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--size", type=int, default=64, help="height and width of the images")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def x_rays(count, size):
    """Return images [count, 1, size, size] from -1024 to 1024, and labels [count, 2], a fifth of them NaN: unknown."""
    found = torch.rand(count, 2) < 0.5
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.randn(count, 1, size, size) * 200
    for side in range(2):
        center = torch.randint(size // 4, 3 * size // 4, (count,)), size // 4 + side * size // 2
        disc = (y - center[0].view(-1, 1, 1)) ** 2 + (x - center[1]) ** 2 < (size // 8) ** 2
        images[:, 0] += 500 * disc * found[:, side].view(-1, 1, 1)
    labels = found.float()
    labels[torch.rand(count, 2) < 0.2] = torch.nan
    return images.clamp(-1024, 1024), labels


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.weights:
        model = torchxrayvision.models.DenseNet(weights=args.weights)
    else:
        model = torchxrayvision.models.DenseNet(num_classes=2, drop_rate=0.1)
    model.to(args.device).train()
    images = x_rays(args.batch_size, args.size)[0].to(args.device)
    before = kept_megabytes(model, images)
    print(densenet_ext.convert(model))
    after = kept_megabytes(model, images)
    print(f"kept for backward, {args.batch_size} images: {before:.0f} MB before, {after:.0f} MB now")

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in tqdm(range(1, args.steps + 1), leave=False, disable=None):
        images, labels = (t.to(args.device) for t in x_rays(args.batch_size, args.size))
        logits = model(images)[:, :2]
        known = ~labels.isnan()
        loss = F.binary_cross_entropy_with_logits(logits[known], labels[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            tqdm.write(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
