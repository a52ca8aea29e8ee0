"""The memory that fused stages keep from step to step on CPU.

Feature buffers, their gradients, what stages hand on and scratch of at least 128 KB come from an arena, whose pages
stay for the next step: to map and clear them anew would cost more time than much of the arithmetic. torch's profiler
does not see them, so every memory figure has to add `workspace_use()`. On other devices torch's allocator serves.
"""

from typing import NamedTuple

from ._load import load_extension


class WorkspaceUse(NamedTuple):
    """Bytes of the workspaces that tensors hold now, and bytes of memory that all of them occupy."""

    held: int
    occupied: int


def workspace_use() -> WorkspaceUse:
    """How much memory the workspaces take."""
    return WorkspaceUse(*load_extension().workspace_use())


def release_workspaces() -> None:
    """Give the memory of workspaces that no tensor holds back to the system. The next step takes what it needs again."""
    load_extension().release_workspaces()


def set_workspace_limit(limit: int) -> None:
    """How much memory may stay occupied while no tensor holds it.

    Args:
        limit: bytes, at least 0; unless set a quarter of the memory that this process may use: the machine's, or what
            a container or batch system (Linux's control groups) leaves of it when the first workspace is taken. With 0
            every workspace is given back as soon as it is free: slower, least memory between steps.

    Raises:
        TypeError: limit is no int.
        ValueError: limit is negative.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit is a {type(limit).__name__}; it must be an int, a number of bytes")
    if limit < 0:
        raise ValueError(f"limit is {limit}; it must be at least 0")
    load_extension().set_workspace_limit(limit)
