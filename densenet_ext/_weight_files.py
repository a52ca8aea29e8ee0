"""Weights as people keep them, in files of two formats and in checkpoints: each is read as one flat state dict."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Checkpoints of training programs hold the state dict under one of these names.
ENTRIES = ("state_dict", "model", "model_state_dict", "net")


def read(source: str | os.PathLike | Mapping) -> tuple[str, Mapping[str, Tensor]]:
    """Return what was read, in words, and its state dict, which is not to be changed."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        name, content = str(path), _read_file(path)
    else:
        name, content = "a state dict", source
    _refuse_module(content, "source")
    if not isinstance(content, Mapping):
        kinds = f"a state dict, a checkpoint that holds one under {_quoted(ENTRIES)}, or the path of a file with either"
        raise TypeError(f"source has type {type(content).__name__}; it must be {kinds}")
    for entry in ENTRIES:
        _refuse_module(content.get(entry), f"source[{entry!r}]")
        if isinstance(content.get(entry), Mapping):
            name, content = f"{name}, entry {entry!r}", content[entry]
            break
    _check_state_dict(content)
    return name, content


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # errors of many types, KeyError and OSError among them
            raise _load_error(path, error) from error


def _load_error(path: Path, error: Exception) -> ValueError:
    """Return what to raise for an error of torch.load with weights_only=True."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if not found:
        return ValueError(f"{path} is not a file that torch.load can read, or it is damaged")
    code = f"torch.load({str(path)!r}, map_location='cpu', weights_only=False)"
    return ValueError(
        f"{path} holds Python objects ({found[1]}) and not only tensors, as a pickled module does; reading it may run any "
        f"code. If you trust it, pass the state dict: load_weights(model, {code}.state_dict()), without .state_dict() for "
        "a checkpoint"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is damaged: {error}") from error


def _refuse_module(value: Any, name: str) -> None:
    if isinstance(value, nn.Module):
        raise TypeError(f"{name} is a module, a {type(value).__name__}; pass its state_dict()")


def _check_state_dict(content: Mapping) -> None:
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not content:
        what = f"values that are no tensors, such as {others[0]!r}" if others else "nothing"
        raise ValueError(
            f"source has {what}; a state dict has tensors under strings, and a checkpoint one under {_quoted(ENTRIES)}"
        )


def _quoted(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
