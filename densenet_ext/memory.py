"""The memory that fused stages keep from step to step on CPU, with functions named as in torch.cuda.

On CPU, feature buffers, gradient buffers, tensors that a stage hands to the next, and scratch are workspaces if they
have at least 128 KB. They come from an arena, which does not return its pages to the system when a tensor is freed. The
next step uses the pages again, because mapping and clearing new ones would take longer than much of the arithmetic.
torch's profiler does not see workspaces, so a figure of a step's memory has to add memory_reserved(). On other devices,
and on other systems than Linux, torch's own allocator serves.

The package's top level has the same functions under other names: workspace_use() returns both figures at once,
release_workspaces is empty_cache, and set_workspace_limit is set_limit.
"""

from typing import NamedTuple

from ._load import load_extension


class WorkspaceUse(NamedTuple):
    """Bytes of workspaces that tensors hold, and bytes of memory that all workspaces occupy, at the same moment."""

    held: int
    occupied: int


def workspace_use() -> WorkspaceUse:
    """Return memory_allocated() and memory_reserved() together."""
    return WorkspaceUse(*load_extension().workspace_use())


def memory_allocated() -> int:
    """Return how many bytes of workspaces tensors hold."""
    return workspace_use().held


def memory_reserved() -> int:
    """Return how many bytes of memory all workspaces occupy, with those that no tensor holds."""
    return workspace_use().occupied


def empty_cache() -> None:
    """Return to the system all workspaces that no tensor holds. The next step takes new memory, which costs time."""
    load_extension().release_workspaces()


def set_limit(limit: int) -> None:
    """Limit how much memory stays occupied while no tensor holds it.

    Args:
        limit: bytes; at least 0. With 0 each workspace is returned to the system as soon as it is free: the least
            memory between steps, and slower steps. The limit at the start is a quarter of the memory that this process
            may use: the machine's, or what its container or batch system (Linux's control groups) leaves when the first
            workspace is taken.

    Raises:
        TypeError: limit is no int.
        ValueError: limit is negative.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit is a {type(limit).__name__}; it must be an int, a number of bytes")
    if limit < 0:
        raise ValueError(f"limit is {limit}; it must be at least 0")
    load_extension().set_workspace_limit(limit)


release_workspaces = empty_cache
set_workspace_limit = set_limit
