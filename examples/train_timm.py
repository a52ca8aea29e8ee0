"""Train a DenseNet of timm, converted: timm's model, optimizer and loss, in bfloat16 where the device has it.

    python examples/train_timm.py

It learns to tell horizontal stripes from vertical ones under noise, which takes half a minute on two cores.
"""

import argparse

import timm
import torch
from kept import kept_megabytes
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from tqdm import tqdm

import densenet_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="densenet121", help="one of timm.list_models('*densenet*')")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--size", type=int, default=64, help="height and width of the images")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def stripes(count, size):
    """Return images [count, 3, size, size] and labels [count]: 0 horizontal, 1 vertical."""
    labels = torch.randint(2, (count,))
    horizontal = torch.randint(2, (count, 1, size // 4, 1)).float().repeat_interleave(4, 2).expand(-1, 3, -1, size)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, horizontal.transpose(2, 3), horizontal)
    return images + torch.randn(count, 3, size, size), labels


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=2, proj_drop_rate=0.1).to(args.device)
    images, _ = stripes(args.batch_size, args.size)
    before = kept_megabytes(model, images.to(args.device))
    print(densenet_ext.convert(model))
    after = kept_megabytes(model, images.to(args.device))
    print(f"kept for backward, {args.batch_size} images: {before:.0f} MB before, {after:.0f} MB now")

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    criterion = LabelSmoothingCrossEntropy(0.1)
    model.train()
    for step in tqdm(range(1, args.steps + 1), leave=False, disable=None):
        images, labels = (t.to(args.device) for t in stripes(args.batch_size, args.size))
        with torch.autocast(args.device, torch.bfloat16):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            tqdm.write(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
