"""Checks of the arguments of public modules: each returns the value, or raises ValueError that names the argument."""

import operator

POSITIONS = ("pre_norm", "pre_conv")  # of Drop-Channel in a dense layer


def check_positive(value: int, name: str) -> int:
    """`value`, an integer of any type such as numpy's, as an int if it is positive, else ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return number


def check_probability(value: float, name: str) -> float:
    """`value` as a float if it is a probability below 1, else ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, str) or not 0 <= number < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 0 and less than 1")
    return number


def check_position(value: str) -> str:
    """`value` if it is a position of Drop-Channel, else ValueError."""
    if value not in POSITIONS:
        raise ValueError(f"drop_channel_position is {value!r}; it may be 'pre_norm' or 'pre_conv'")
    return value


def check_efficient(value: bool | str) -> bool | str:
    """`value` if it names an implementation, else ValueError."""
    if value is not False and not (isinstance(value, str) and value in ("checkpoint", "fused")):
        raise ValueError(f"efficient is {value!r}; it may be False, 'checkpoint' or 'fused'")
    return value
