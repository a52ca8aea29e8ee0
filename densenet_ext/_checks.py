"""Checks of the arguments of public modules: each returns the value, or raises a ValueError that names the argument."""

import operator


def check_positive(value: int, name: str) -> int:
    """Return `value`, an integer of any type such as numpy's, as an int; raise ValueError unless it is positive."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return number


def check_probability(value: float, name: str) -> float:
    """Return `value` as a float; raise ValueError unless it is a probability below 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, str) or not 0 <= number < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 0 and less than 1")
    return number


def check_efficient(value: bool | str) -> bool | str:
    """Return `value` as False, 'checkpoint' or 'fused' (True means 'fused'); raise ValueError for any other value."""
    if isinstance(value, bool):
        return "fused" if value else False
    if not isinstance(value, str) or value not in ("checkpoint", "fused"):
        raise ValueError(f"efficient is {value!r}; it may be False, 'checkpoint', 'fused' or True, which is 'fused'")
    return value


def check_kept(value: bool | int | str, name: str, auto: bool = False) -> bool | int | str:
    """Return `value`, True, False, a number of layers, or 'auto' if that is allowed; raise ValueError for others."""
    if isinstance(value, bool) or (auto and isinstance(value, str) and value == "auto"):
        return value
    try:
        number = -1 if isinstance(value, str) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(
            f"{name} is {value!r}; it may be True, False{', ' + repr('auto') if auto else ''} or a number of layers, at least 0"
        )
    return number
