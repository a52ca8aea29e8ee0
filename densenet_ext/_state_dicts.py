"""State dicts of older files, wrappers and other libraries: their keys are renamed to torchvision's, as they are here."""

import re
from collections.abc import Collection, Container, Iterable

# Each rule is (the form of keys that it undoes, a pattern at the start of a key, its replacement).
_Rule = tuple[str, re.Pattern, str]
MONAI, OF_2017 = "MONAI's names", "torchvision's names of 2017"
# A dense layer of MONAI holds a Sequential ('layers.norm1'); torchvision's files of 2017 have 'norm.1' and 'conv.2'.
_LAYER_RULES: tuple[_Rule, ...] = (
    (MONAI, re.compile(r"layers\.(?=(?:norm|conv)\.?[12]\.)"), ""),
    (OF_2017, re.compile(r"(norm|conv)\.([12])\."), r"\1\2."),
)
# The classifier may stand in a Sequential, before an activation; MONAI's has another name.
_NETWORK_RULES: tuple[_Rule, ...] = (
    ("a classifier in a Sequential", re.compile(r"classifier\.0\."), "classifier."),
    (MONAI, re.compile(r"class_layers\.out\."), "classifier."),
)
_LAYER = re.compile(r"\bdenselayer\d+\.")
# DataParallel, torch.compile, FSDP and checkpoint_wrapper put these names in front of those of the module they wrap.
_WRAPPER = re.compile(r"\b(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The network may be an attribute of another module, as in 'densenet121.features.conv0.weight'.
_FEATURES = "features.conv0.weight"


def rename_layer_keys(state_dict: dict, prefix: str) -> None:
    """Rename the parameters of the dense layer at `prefix`, in place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name, _ = _rename(key.removeprefix(prefix), _LAYER_RULES)
        _move(state_dict, key, prefix + name)


def rename_network_keys(state_dict: dict, prefix: str, known: Container[str]) -> None:
    """Remove a wrapper's prefix from the keys of the network at `prefix`, and rename its classifier, in place.

    `known` has the network's own keys, which stay: its classifier may have been replaced by a Sequential.
    """
    front = _front(state_dict) if prefix == "" else ""
    for key in [key for key in state_dict if key.startswith(prefix + front)]:
        name = key.removeprefix(prefix + front)
        if name not in known:
            name, _ = _rename(name, _NETWORK_RULES)
        _move(state_dict, key, prefix + name)


def canonical_names(keys: Iterable[str]) -> dict[str, tuple[str, frozenset[str]]]:
    """Return {torchvision's name: (key, the forms that set the key apart from this name)} for a network's keys.

    Names that follow no known form, such as those of another network, stand for themselves.
    """
    unwrapped = [(_WRAPPER.sub("", key), key) for key in keys]
    front = _front({name for name, _ in unwrapped})
    names = {}
    for name, key in unwrapped:
        forms = {"a wrapper's names"} if name != key else set()
        if front and name.startswith(front):
            name = name.removeprefix(front)
            forms.add(f"names that begin with {front!r}")
        name, network_forms = _rename(name, _NETWORK_RULES)
        layer = _LAYER.search(name)
        start = layer.end() if layer else len(name)
        rest, layer_forms = _rename(name[start:], _LAYER_RULES)
        name = name[:start] + rest
        if name in names:
            raise ValueError(f"{names[name][0]} and {key} are two names of one weight; only one of them may be there")
        names[name] = key, frozenset(forms | network_forms | layer_forms)
    return names


def _rename(name: str, rules: tuple[_Rule, ...]) -> tuple[str, set[str]]:
    """Return the name by these rules, and the forms that were undone."""
    forms = set()
    for form, pattern, replacement in rules:
        if match := pattern.match(name):
            name = match.expand(replacement) + name[match.end() :]
            forms.add(form)
    return name, forms


def _front(keys: Collection[str]) -> str:
    """Return what stands in front of every key of the network: the same for all, or nothing."""
    fronts = {key.removesuffix(_FEATURES) for key in keys if key.endswith("." + _FEATURES)}
    return fronts.pop() if len(fronts) == 1 and _FEATURES not in keys else ""


def _move(state_dict: dict, key: str, name: str) -> None:
    if name != key:
        state_dict[name] = state_dict.pop(key)


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
