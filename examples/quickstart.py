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
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from densenet_ext import DenseNetBC

EFFICIENT = {"plain": False, "checkpoint": "checkpoint", "fused": "fused"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=32)
    add("--depth", type=int, default=40, help="6n + 4")
    add("--growth-rate", type=int, default=12)
    add("--learning-rate", type=float, default=0.01)
    add("--seed", type=int, default=0, help="of the split, the weights, the masks and the order of the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--efficient", choices=EFFICIENT, default="fused", help="how the dense blocks are computed")
    return parser.parse_args()


def load_digits(generator, device):
    """Return images [N, 3, 32, 32] and labels [N] of the training and of the test set."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit("The digits come with scikit-learn, which is not installed here: pip install scikit-learn")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1).contiguous().to(device)
    labels = torch.tensor(digits.target).to(device)
    test, train = torch.randperm(len(labels), generator=generator).to(device).split([360, len(labels) - 360])
    return (images[train], labels[train]), (images[test], labels[test])


def train(model, loader, args):
    """Train with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    with tqdm(total=steps, unit="step", disable=None) as progress:
        for epoch in range(args.epochs):
            model.train()
            total = 0.0
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
            if progress.disable:  # not a terminal
                print(f"epoch {epoch + 1}/{args.epochs}: loss {total / len(loader):.4f}", flush=True)


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the percentage of `images` that the model recognizes."""
    model.eval()
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(120), labels.split(120), strict=True)]
    return 100 * sum(hits).item() / len(labels)


def peak_memory(device):
    """Return the highest memory so far in MB: allocated on the device or, on a CPU, resident in the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train_set, test_set = load_digits(generator, args.device)
    loader = DataLoader(TensorDataset(*train_set), args.batch_size, shuffle=True, drop_last=True, generator=generator)
    network = {"depth": args.depth, "growth_rate": args.growth_rate, "efficient": EFFICIENT[args.efficient]}
    model = DenseNetBC.variant("A+B", num_classes=10, **network).to(args.device)
    baseline = peak_memory(args.device)
    start = time.perf_counter()
    train(model, loader, args)
    seconds, peak = time.perf_counter() - start, peak_memory(args.device)
    print(f"test accuracy {accuracy(model, *test_set):.2f} %")
    print(f"peak memory {peak - baseline:.0f} MB above the {baseline:.0f} MB before training")
    print(f"time {seconds:.1f} s, {seconds / args.epochs:.1f} s an epoch")


if __name__ == "__main__":
    main()
