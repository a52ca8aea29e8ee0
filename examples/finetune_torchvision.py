"""Fine-tune torchvision's DenseNet-121 with frozen batch normalization, in a fraction of the memory.

    python examples/finetune_torchvision.py

densenet_ext.convert changes the model in place, with its weights and names. The data are scikit-learn's 1797
handwritten digits, enlarged; a fifth is held out. Without --weights the network starts from random numbers.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from kept import kept_megabytes
from sklearn import datasets  # pip install scikit-learn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import densenet_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--weights", help="DEFAULT downloads ImageNet's; a path is a state dict of torchvision's densenet121"
)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--size", type=int, default=64, help="height and width of the images")
parser.add_argument("--samples", type=int, default=1797)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load_digits(size, samples):
    """Return the training and the test set: images [N, 3, size, size] with labels [N]."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images[:samples], dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=size, mode="bilinear").expand(-1, 3, -1, -1)
    data, fifth = TensorDataset(images, torch.tensor(digits.target[:samples])), samples // 5
    return torch.utils.data.random_split(data, [samples - fifth, fifth])


def freeze_norms(model, loader, device):
    """Take the statistics of the data into all batch normalizations, and let them stay as they are from now on."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for images, _ in loader:
            model(images.to(device))
    for norm in norms:
        norm.eval().requires_grad_(False)


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.densenet121(weights="DEFAULT" if args.weights == "DEFAULT" else None)
    if args.weights not in (None, "DEFAULT"):
        print(densenet_ext.load_weights(model, args.weights))
    model.classifier = nn.Linear(model.classifier.in_features, 10)
    model.to(args.device)
    train_set, test_set = load_digits(args.size, args.samples)
    images = torch.stack([train_set[i][0] for i in range(16)]).to(args.device)
    before = kept_megabytes(model, images)
    print(densenet_ext.convert(model))
    print(f"kept for backward, 16 images: {before:.0f} MB before, {kept_megabytes(model, images):.0f} MB now")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    loader = DataLoader(train_set, 32, shuffle=True, drop_last=True)
    model.train()
    for epoch in range(1, args.epochs + 1):
        if epoch == (
            1 if args.weights else 2
        ):  # a network that starts from random numbers first learns with the batches' own
            freeze_norms(model, loader, args.device)
        total = 0.0
        for images, labels in tqdm(loader, f"epoch {epoch}/{args.epochs}", leave=False, disable=None):
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch}/{args.epochs}: loss {total / len(loader):.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        hits = sum((model(x.to(args.device)).argmax(1).cpu() == y).sum().item() for x, y in DataLoader(test_set, 64))
    print(f"test accuracy {100 * hits / len(test_set):.1f} %")


if __name__ == "__main__":
    main()
