"""Weights of other libraries, old files and wrappers, loaded into any DenseNet, with a report of what was done."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import _weight_files
from ._state_dicts import canonical_names

__all__ = ["WeightsReport", "load_weights"]

# canonical_names returns these.
_Names = dict[str, tuple[str, frozenset[str]]]

_STEM, _DEEP_STEM = "features.conv0.weight", "features.conv1.weight"
_CLASSIFIER = "classifier."
_SKIP = "classifier='skip' leaves the model's classifier as it is"
_ADAPT = "input_channels='adapt' takes another number of input channels"
# Buffers that are no weights, by the last part of their names: files before 2018 and frozen norms have no counters;
# AveragedModel adds n_averaged, and torchxrayvision the thresholds that it applies after the classifier.
_OPTIONAL = ("num_batches_tracked", "n_averaged", "op_threshs")


@dataclass
class WeightsReport:
    """The report of load_weights, which says what was done; print it for a short table.

    Attributes:
        source: the file, and the entry of a checkpoint.
        loaded: the model's keys that were loaded.
        renamed: how many of these have another name in the source, {form of the name: number of keys}; a key that
            follows two forms counts in both.
        adapted: the model's keys whose values were adapted, {key: how}.
        kept: the model's keys that were left as they were.
        ignored: the source's keys that were not used.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, int] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = {
            "source": self.source,
            "loaded": f"{len(self.loaded)} tensors",
            "renamed": ", ".join(f"{count} {form}" for form, count in self.renamed.items()),
            "adapted": ", ".join(f"{key} {how}" for key, how in self.adapted.items()),
            "kept": _summary(self.kept),
            "ignored": _summary(self.ignored),
        }
        return "\n".join(f"{name:<9}{text}" for name, text in rows.items() if text)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Tensor],
    *,
    classifier: str = "strict",
    input_channels: str = "strict",
) -> WeightsReport:
    """Load the weights of a DenseNet, whichever library's names they have, and return a report of what was done.

    Names are those of torchvision and timm, of torchvision's files of 2017, of MONAI, of wrappers such as DataParallel
    and torch.compile, and of networks inside another module; in the source and in the model. All weights of the model
    must be in the source and fit, or none is loaded. They take the model's dtypes and devices; the source is not
    changed. Counters of norms (num_batches_tracked) are loaded where source and model both have them.

    With input_channels='adapt' the first convolution's weight w of C input channels becomes w' of C' channels:

        w'[:, 0] = sum over c of w[:, c]             if C' = 1
        w'[:, j] = w[:, j mod C] * C / C'            otherwise

    Args:
        model: a DenseNetBC, or a DenseNet of torchvision, timm, MONAI or torchxrayvision, or a module that holds one.
        source: a state dict; or a checkpoint that holds it under 'state_dict', 'model', 'model_state_dict' or 'net'; or
            the path of a file with either: *.safetensors, or any other name for a file of torch.save.
        classifier: 'strict': it is loaded, too. 'skip': the model's stays as it is, as for other classes.
        input_channels: 'strict': the source's must be as many as the model's. 'adapt': they may differ.

    Raises:
        ValueError: keys or shapes do not fit, and the message says which option would take them; the file has a stem of
            three convolutions, as timm's densenet264d; it cannot be read, or holds more than tensors, as
            torchxrayvision's do; an option has another value; the model is on the meta device.
        TypeError: model is no module, or source neither a path nor a mapping.
        ImportError: the file is *.safetensors, and the package safetensors is missing.
        OSError: the file cannot be opened.

    Source of the adapted weight: timm.models.adapt_input_conv, which its option in_chans uses.
    """
    _check_options(model, classifier, input_channels)
    description, weights = _weight_files.read(source)
    state = model.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("model is on the meta device, which keeps no values; call model.to_empty(device='cpu') first")
    ours, theirs = canonical_names(tensors), canonical_names(weights)
    report = WeightsReport(description)
    values = {ours[name][0]: weights[theirs[name][0]] for name in _match(ours, theirs, classifier, report)}
    if input_channels == "adapt" and _STEM in ours:
        _adapt_stem(ours[_STEM][0], values, state, report)
    _check_shapes(values, state, {key: name for name, (key, _) in ours.items()})
    # Conversions may fail, so all are done before the first tensor is loaded.
    state.update({key: value.to(state[key].device, state[key].dtype) for key, value in values.items()})
    model.load_state_dict(state)
    return report


def _check_options(model: nn.Module, classifier: str, input_channels: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has type {type(model).__name__}; it must be a torch.nn.Module")
    if classifier not in ("strict", "skip"):
        raise ValueError(f"classifier is {classifier!r}; it may be 'strict' or 'skip'")
    if input_channels not in ("strict", "adapt"):
        raise ValueError(f"input_channels is {input_channels!r}; it may be 'strict' or 'adapt'")


def _match(ours: _Names, theirs: _Names, classifier: str, report: WeightsReport) -> list[str]:
    """Return the names of the weights to load, and note them in the report; raise ValueError if any are left over."""
    skipped = {name for name in {*ours, *theirs} if classifier == "skip" and name.startswith(_CLASSIFIER)}
    optional = {name for name in {*ours, *theirs} if name.rpartition(".")[2] in _OPTIONAL}
    missing = [name for name in ours if name not in theirs and name not in skipped | optional]
    extra = [name for name in theirs if name not in ours and name not in skipped | optional]
    if missing or extra:
        raise ValueError(_keys_error(ours, theirs, missing, extra))
    names = [name for name in ours if name in theirs and name not in skipped]
    report.loaded = [ours[name][0] for name in names]
    report.kept = [key for name, (key, _) in ours.items() if name not in theirs or name in skipped]
    report.ignored = [key for name, (key, _) in theirs.items() if name not in ours or name in skipped]
    report.renamed = dict(Counter(form for name in names for form in _renamings(theirs[name][1], ours[name][1])))
    return names


def _renamings(theirs: frozenset[str], ours: frozenset[str]) -> list[str]:
    return [f"from {form}" for form in sorted(theirs - ours)] + [f"to {form}" for form in sorted(ours - theirs)]


def _keys_error(ours: _Names, theirs: _Names, missing: list[str], extra: list[str]) -> str:
    deep = [_STEM in names and _DEEP_STEM in names for names in (theirs, ours)]
    if deep[0] != deep[1]:
        one, other = ("source", "model") if deep[0] else ("model", "source")
        return (
            f"{one} has a stem of three convolutions, as timm's densenet264d and densenetblur121d, and {other} has not; "
            "weights of one do not fit the other"
        )
    parts = []
    if missing:
        parts.append(f"source has no {_first([ours[name][0] for name in missing])}")
    if extra:
        parts.append(f"model has no {_first([theirs[name][0] for name in extra])}")
    if all(name.startswith(_CLASSIFIER) for name in missing + extra):
        parts.append(_SKIP)
    return f"source does not fit model: {'; '.join(parts)}"


def _adapt_stem(key: str, values: dict[str, Tensor], state: Mapping[str, Tensor], report: WeightsReport) -> None:
    """Give the first convolution's weight the model's number of input channels, if nothing else is different."""
    weight, channels = values[key], state[key].shape[1]
    count = weight.shape[1] if weight.ndim > 1 else 0
    if count == channels or not _differ_in_channels(weight, state[key]):
        return
    weight = weight.double()
    if channels == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        weight = weight[:, torch.arange(channels) % count] * (count / channels)
    values[key] = weight
    report.adapted[key] = f"from {count} to {channels} input channels"


def _differ_in_channels(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and a.shape[:1] + a.shape[2:] == b.shape[:1] + b.shape[2:]


def _check_shapes(values: dict[str, Tensor], state: Mapping[str, Tensor], names: dict[str, str]) -> None:
    """Raise ValueError unless each value has the shape of the model's tensor; say which option would help."""
    wrong = [key for key, value in values.items() if value.shape != state[key].shape]
    if not wrong:
        return
    parts = [f"{key} is {tuple(values[key].shape)} in source and {tuple(state[key].shape)} in model" for key in wrong]
    remedies = set()
    for key in wrong:
        stem = names[key] == _STEM and _differ_in_channels(values[key], state[key])
        remedies.add(_ADAPT if stem else _SKIP if names[key].startswith(_CLASSIFIER) else None)
    hints = [] if None in remedies else sorted(remedies)
    more = [f"{len(wrong) - 3} more tensors differ in shape"] if len(wrong) > 3 else []
    raise ValueError(f"source does not fit model: {'; '.join(parts[:3] + more + hints)}")


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _summary(keys: list[str]) -> str:
    """Return the keys, but numbers in place of those that every norm has."""
    counts = Counter(key.rpartition(".")[2] for key in keys if key.rpartition(".")[2] in _OPTIONAL)
    others = [key for key in keys if key.rpartition(".")[2] not in _OPTIONAL]
    return ", ".join(others + [f"{count} {name}" for name, count in counts.items()])
