"""Files and checkpoints that exist whole or not at all.

A file or the folder of a checkpoint is filled under a temporary name, synced to the disk, and renamed. The manifest of a
checkpoint holds size and SHA-256 of each of its files, so that damage is noticed when they are read.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from training.errors import UserError, explain, library

COUNT = 2  # the newest checkpoints, which stay
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


def explain_writing(path: Path) -> AbstractContextManager:
    """Turn an OSError inside (no room, no permission, a file in the way, ...) into a UserError that names `path`."""
    return explain(OSError, what=f"{path} could not be written")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file or folder, which is renamed to `path` at the end: a reader sees all of it or nothing.

    Raises:
        UserError: it could not be written, and names the path and the reason; an old file is untouched and nothing else
            is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write `content` to a file, of which a reader sees the old content or the new one; errors as in `replacing`."""
    with replacing(path) as temporary:
        _write_synced(temporary, content.encode() if isinstance(content, str) else content)


def save(folder: Path, step: int, weights: Mapping[str, Tensor], state: dict) -> None:
    """Write folder/step-XXXXXXXX, and delete all checkpoints but the two newest ones.

    Args:
        folder: of the checkpoints of a run.
        step: its number.
        weights: by the names of the plain model.
        state: tensors and plain values.

    Raises:
        UserError: it could not be written; see `replacing`. The earlier checkpoints are untouched.
    """
    path = folder / f"step-{step:08}"
    if path.exists():  # no step has been taken since
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = {WEIGHTS: format_weights(weights), STATE: buffer.getvalue()}
    files = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in contents.items()}
    contents[MANIFEST] = json.dumps({"files": files, "sha256": _sha256_of_files(files)}).encode()
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            _write_synced(temporary / name, content)
        _sync(temporary)
    for old in paths(folder)[:-COUNT]:
        with explain_writing(old):  # under the temporary name no reader sees a part of its files
            os.rename(old, old.with_name(f".{old.name}.tmp"))
        remove_temporary(folder)


def paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest one last."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(folder: Path) -> dict | None:
    """Return the state and the 'weights' of the newest checkpoint in a folder, if there is one.

    Raises:
        UserError: a file of it is damaged or missing; the message names it and the way out.
    """
    found = paths(folder)
    if not found:
        return None
    contents = _read_verified(found[-1])
    state = torch.load(io.BytesIO(contents[STATE]), map_location="cpu", weights_only=True)
    return {**state, "weights": parse_weights(contents[WEIGHTS])}


def remove_temporary(folder: Path) -> None:
    """Delete the folders that a killed process left half written."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def format_weights(weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file."""
    to_bytes = library("safetensors.torch").save
    return to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, metadata)


def parse_weights(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    return library("safetensors.torch").load(content)


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_verified(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint by name, which are those that its manifest lists."""
    manifest = _read(folder / MANIFEST)
    try:
        parsed = json.loads(manifest)
        files = parsed["files"]
        intact = parsed["sha256"] == _sha256_of_files(files) and set(files) == {WEIGHTS, STATE}
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _damaged(folder / MANIFEST, "its content is not what was written")
    contents = {name: _read(folder / name) for name in files}
    for name, content in contents.items():
        if _sha256(content) != files[name]["sha256"]:
            raise _damaged(folder / name, "its content is not what was written (its SHA-256 differs)")
    return contents


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror or error}") from error


def _damaged(path: Path, what: str) -> UserError:
    folder = path.parent
    earlier = [other for other in paths(folder.parent) if other.name < folder.name]
    remedy = f"go on from {earlier[-1].name}, which is kept" if earlier else "start from the beginning"
    return UserError(f"the checkpoint {path} is damaged: {what}; delete the folder {folder} to {remedy}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_files(files: dict) -> str:
    return _sha256(json.dumps(files, sort_keys=True).encode())
