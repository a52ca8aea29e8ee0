"""Checkpoints: folders that exist whole or not at all, and are known to be undamaged when they are read.

A folder is filled under a temporary name, every file is synced to the disk, and then it is renamed. Its manifest holds
size and SHA-256 of each file.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.errors import UserError
from training.files import readable_errors, sync_folder, write_synced
from training.libraries import library

KEPT = 2  # newest checkpoints
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


@dataclass
class Checkpoint:
    """What a checkpoint holds: weights by the names of the plain model, and tensors and plain values for the rest."""

    path: Path
    weights: dict[str, Tensor]
    state: dict


def save(folder: Path, step: int, weights: Mapping[str, Tensor], state: dict) -> Path:
    """Writes folder/step-XXXXXXXX, then deletes all but the two newest ones.

    Raises:
        UserError: it could not be written, and names the path and the reason; nothing of it is left, and the earlier
            checkpoints are untouched.
    """
    path = folder / f"step-{step:08}"
    temporary = folder / f".{path.name}.tmp"
    if path.exists():  # nothing has been done since
        return path
    with readable_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _fill(temporary, weights, state)
            os.rename(temporary, path)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in paths(folder)[:-KEPT]:
        _delete(old)
    return path


def paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest one last."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a folder, if there is one.

    Raises:
        UserError: a file of it is damaged or missing; the message names it and the way out.
    """
    found = paths(folder)
    return load_folder(found[-1]) if found else None


def load_folder(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`; errors as in `load`."""
    contents = {name: _verified(path / name, entry) for name, entry in _manifest(path).items()}
    state = torch.load(io.BytesIO(contents[STATE]), map_location="cpu", weights_only=True)
    return Checkpoint(path, parse_weights(contents[WEIGHTS]), state)


def remove_temporary(folder: Path) -> None:
    """Deletes what a killed process had begun to write."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def format_weights(weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file."""
    to_bytes = library("safetensors.torch").save
    return to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, metadata)


def parse_weights(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    return library("safetensors.torch").load(content)


def _fill(folder: Path, weights: Mapping[str, Tensor], state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = {WEIGHTS: format_weights(weights), STATE: buffer.getvalue()}
    files = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in contents.items()}
    manifest = json.dumps({"files": files, "sha256": _sha256(_canonical(files))})
    for name, content in {**contents, MANIFEST: manifest.encode()}.items():
        write_synced(folder / name, content)
    sync_folder(folder)


def _delete(path: Path) -> None:
    """Under a temporary name first, so that no checkpoint is ever seen with a part of its files."""
    temporary = path.with_name(f".{path.name}.tmp")
    with readable_errors(path):
        os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _manifest(path: Path) -> dict[str, dict]:
    content = _read(path / MANIFEST)
    try:
        manifest = json.loads(content)
        files = manifest["files"]
        intact = manifest["sha256"] == _sha256(_canonical(files)) and set(files) == {WEIGHTS, STATE}
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _damaged(path / MANIFEST, "its content is not what was written")
    return files


def _verified(path: Path, entry: dict) -> bytes:
    content = _read(path)
    if len(content) != entry["bytes"]:
        raise _damaged(path, f"it has {len(content)} bytes of {entry['bytes']}")
    if _sha256(content) != entry["sha256"]:
        raise _damaged(path, "its content is not what was written (its SHA-256 differs)")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror or error}") from error


def _damaged(path: Path, what: str) -> UserError:
    folder = path.parent
    before = [other for other in paths(folder.parent) if other.name < folder.name]
    remedy = f"go on from {before[-1].name}, which is kept" if before else "start from the beginning"
    return UserError(f"the checkpoint {path} is damaged: {what}; delete the folder {folder} to {remedy}")


def _canonical(files: dict) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
