"""State dicts from elsewhere: the keys of older files, of wrappers and of other libraries, as this package names them."""

import re

# Other names of a dense layer's parameters: in torchvision's files of 2017 ('norm.1', 'conv.2'), and in MONAI,
# whose layers hold a Sequential ('layers.norm1').
_LAYER_KEY = re.compile(r"(?:layers\.)?(norm|conv)\.?([12])\.")
# The classifier as a Sequential of it and an activation, and MONAI's.
_CLASSIFIER_KEY = re.compile(r"(?:classifier\.0|class_layers\.out)\.")
# Prefixes of wrappers; an attribute of theirs may follow, as in 'module.densenet121.features.conv0.weight'.
_FEATURES = "features.conv0.weight"


def rename_layer_keys(state_dict: dict, prefix: str) -> None:
    """Give the parameters of the dense layer at `prefix` the names that it has now; in place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        match = _LAYER_KEY.match(key, len(prefix))
        if match and (name := f"{match[1]}{match[2]}.") != match[0]:
            state_dict[prefix + name + key[match.end() :]] = state_dict.pop(key)


def rename_network_keys(state_dict: dict, prefix: str) -> None:
    """Take off what a wrapper put in front of the keys of the network at `prefix`, and rename its classifier; in place."""
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
    """`error`, of Module.load_state_dict, with the first keys of each kind in place of hundreds."""
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
