"""Training, validation and test images: stratified by class, fixed by a seed, and written down for the run."""

import json
from pathlib import Path

import torch
from torch import Tensor

from training.errors import UserError
from training.files import replace_file


def stratified(labels: Tensor, classes: list[str], fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Cuts parts out of each class at random: indices int64 into `labels` [N], ascending, for each name in `fractions`
    and for 'train', which is what remains.

    A part has `fraction` of the images of each class, rounded, and at least one. Raises UserError where a class has too
    few images to give one to each part.
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


def write_splits(path: Path, dataset, options) -> None:
    """Writes which image belongs to which split to a JSON file, which exists whole or not at all."""
    replace_file(Path(path), json.dumps(_as_json(dataset, options)))


def check_splits(path: Path, dataset, options) -> None:
    """Raises UserError unless the splits of `dataset` are those that `write_splits` wrote when the run began."""
    try:
        written = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): the run cannot be resumed") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): the run cannot be resumed") from error
    now = _as_json(dataset, options)
    for key, value in now.items():
        before = written.get(key) if isinstance(written, dict) else None
        if before != value:
            shown = "" if key == "indices" else f": {before} then, {value} now"
            raise UserError(
                f"the run began with other data than there are now: '{key}' in {path} differs{shown}. "
                "Give the --dataset, --data and --split-seed of that run, or another --output"
            )


def _as_json(dataset, options) -> dict:
    return {
        "dataset": dataset.name,
        "split_seed": options.split_seed,
        "images": len(dataset.pool),
        "classes": len(dataset.classes),
        "counts": {name: len(indices) for name, indices in dataset.splits.items()},
        "indices": {name: indices.tolist() for name, indices in dataset.splits.items()},
    }
