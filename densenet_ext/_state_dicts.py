"""State dicts of older files, wrappers and other libraries: their keys are renamed to this package's."""

import re

# A dense layer's parameters have other names in torchvision's files of 2017 ('norm.1', 'conv.2') and in MONAI, whose
# layers hold a Sequential ('layers.norm1').
_LAYER_KEY = re.compile(r"(?:layers\.)?(norm|conv)\.?([12])\.")
# The classifier may stand in a Sequential, before an activation; MONAI's has another name.
_CLASSIFIER_KEY = re.compile(r"(?:classifier\.0|class_layers\.out)\.")
# Wrappers put 'module.' or '_orig_mod.' in front of this key, and names of attributes, as in
# 'module.densenet121.features.conv0.weight'.
_FEATURES = "features.conv0.weight"


def rename_layer_keys(state_dict: dict, prefix: str) -> None:
    """Rename the parameters of the dense layer at `prefix`, in place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        match = _LAYER_KEY.match(key, len(prefix))
        if match and (name := f"{match[1]}{match[2]}.") != match[0]:
            state_dict[prefix + name + key[match.end() :]] = state_dict.pop(key)


def rename_network_keys(state_dict: dict, prefix: str) -> None:
    """Remove a wrapper's prefix from the keys of the network at `prefix`, and rename its classifier, in place."""
    if prefix == "" and _FEATURES not in state_dict:
        fronts = {key.removesuffix(_FEATURES) for key in state_dict if key.endswith("." + _FEATURES)}
        if len(fronts) == 1:
            front = fronts.pop()
            for key in [key for key in state_dict if key.startswith(front)]:
                state_dict[key.removeprefix(front)] = state_dict.pop(key)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        match = _CLASSIFIER_KEY.match(key, len(prefix))
        if match:
            state_dict[f"{prefix}classifier.{key[match.end() :]}"] = state_dict.pop(key)


def short_error(error: RuntimeError, limit: int = 1000) -> RuntimeError:
    """Return an error of Module.load_state_dict with the first keys of each kind in place of hundreds."""
    lines = str(error).splitlines()
    shortened = [_first_keys(line) for line in lines[:8]]
    if len(lines) > 8:
        shortened.append(f"\t... and {len(lines) - 8} more")
    return RuntimeError("\n".join(line if len(line) <= limit else line[:limit] + " ..." for line in shortened))


def _first_keys(line: str, count: int = 3) -> str:
    start, colon, keys = line.partition(": ")
    names = keys.rstrip(". ").split(", ")
    if not colon or len(names) <= count or not names[0].startswith('"'):
        return line
    return f"{start}: {', '.join(names[:count])} and {len(names) - count} more."
