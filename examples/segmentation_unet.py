"""Train a U-Net of segmentation-models-pytorch whose DenseNet-121 encoder is converted.

    python examples/segmentation_unet.py

It finds discs under noise. The encoder hands a map of each resolution to the decoder, so its dense blocks are fused
without the transitions after them.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from kept import kept_megabytes
from tqdm import tqdm

import densenet_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--size", type=int, default=64, help="height and width of the images, a multiple of 32")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def discs(count, size):
    """Return images [count, 3, size, size] and masks [count, 1, size, size]: 1 inside a disc."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    center = torch.randint(size // 4, 3 * size // 4, (2, count, 1, 1))
    radius = torch.randint(size // 8, size // 4, (count, 1, 1))
    masks = ((y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2).float()[:, None]
    return masks + 0.7 * torch.randn(count, 3, size, size), masks


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = smp.Unet("densenet121", encoder_weights=None, decoder_channels=(64, 48, 32, 24, 16)).to(args.device)
    images = discs(args.batch_size, args.size)[0].to(args.device)
    before = kept_megabytes(model, images)
    print(densenet_ext.convert(model))
    after = kept_megabytes(model, images)
    print(f"kept for backward, {args.batch_size} images: {before:.0f} MB before, {after:.0f} MB now")

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in tqdm(range(1, args.steps + 1), leave=False, disable=None):
        images, masks = (t.to(args.device) for t in discs(args.batch_size, args.size))
        logits = model(images)
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            inside, found = masks > 0, logits > 0
            overlap = (inside & found).sum() / (inside | found).sum()
            tqdm.write(f"step {step}: loss {loss.item():.3f}, intersection over union {overlap:.2f}")


if __name__ == "__main__":
    main()
