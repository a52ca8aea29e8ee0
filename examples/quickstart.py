"""Train a DenseNet with Drop-Channel, squeeze-and-excitation and fused stages (A+B+C) on handwritten digits.

    python examples/quickstart.py

The data are the 1797 digits of 8x8 pixels that come with scikit-learn, enlarged to 32x32; a fifth is held out. With
the default arguments it takes two or three minutes on two cores and ends above 95 % on the held-out digits.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from sklearn import datasets  # pip install scikit-learn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from densenet_ext import DenseNetBC

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--depth", type=int, default=40, help="6n + 4")
parser.add_argument("--growth-rate", type=int, default=12)
parser.add_argument("--learning-rate", type=float, default=0.01)
parser.add_argument(
    "--seed", type=int, default=0, help="of the split, the weights, the masks and the order of the data"
)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--efficient", choices=["plain", "checkpoint", "fused"], default="fused", help="see DenseNetBC")


def load_digits(args, generator):
    """Return the training and the test set: images [N, 3, 32, 32] with labels [N]."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear", align_corners=False)
    images, labels = images.expand(-1, 3, -1, -1).to(args.device), torch.tensor(digits.target).to(args.device)
    test, train = torch.randperm(len(labels), generator=generator).split([360, len(labels) - 360])
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def peak_memory(device):
    """Return the highest memory so far in MB: allocated on the device or, on a CPU, resident in the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train_set, test_set = load_digits(args, generator)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, generator=generator)
    efficient = False if args.efficient == "plain" else args.efficient
    network = {"depth": args.depth, "growth_rate": args.growth_rate, "efficient": efficient, "num_classes": 10}
    model = DenseNetBC.variant("A+B", **network).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.epochs * len(loader))
    baseline, start = peak_memory(args.device), time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for images, labels in tqdm(loader, f"epoch {epoch}/{args.epochs}", leave=False, disable=None):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}/{args.epochs}: loss {total / len(loader):.4f}", flush=True)
    seconds, peak = time.perf_counter() - start, peak_memory(args.device)
    model.eval()
    with torch.no_grad():
        hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(test_set, 120))
    print(f"test accuracy {100 * hits / len(test_set):.2f} %")
    print(f"peak memory {peak - baseline:.0f} MB above the {baseline:.0f} MB before training")
    print(f"time {seconds:.1f} s, {seconds / args.epochs:.1f} s an epoch")


if __name__ == "__main__":
    main()
