"""A data set: images, labels, and splits that are stratified by class and fixed by a seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.images import Images
from training.errors import UserError


@dataclass
class DataSet:
    """Images with labels, cut into splits."""

    name: str
    classes: list[str]
    images: Images  # of all splits, in one numbering
    labels: Tensor  # int64 [N]
    splits: dict[str, Tensor]  # 'train', 'validation', 'test': int64 indices into images and labels
    flip: bool = True  # a mirrored image is still of its class

    def __post_init__(self):
        if len(self.labels) != len(self.images):
            raise UserError(
                f"'{self.name}' has {len(self.images)} images but {len(self.labels)} labels: get its files anew"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise UserError(
                f"'{self.name}' has labels {self.labels.min()} to {self.labels.max()} for {len(self.classes)} classes: "
                "get its files anew"
            )


def stratified(labels: Tensor, classes: list[str], fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Cut parts out of each class at random.

    Args:
        labels: int64 [N].
        fractions: of the images of each class by name of the part: rounded, and at least one image.

    Returns ascending int64 indices into `labels` for each part, and for 'train', which is what remains.

    Raises:
        UserError: a class has too few images to give one to each part.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("train", *fractions)}
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [max(1, round(fraction * len(members))) for fraction in fractions.values()]
        remaining = len(members) - sum(counts)
        if remaining < 1:
            raise UserError(
                f"class '{name}' has {len(members)} images, too few for {' and '.join(parts)}, which need one each: "
                "add images of it or remove the class"
            )
        for part, indices in zip(parts, members.split([remaining, *counts]), strict=True):
            parts[part].append(indices)
    return {part: torch.cat(indices).sort().values for part, indices in parts.items()}
