"""Dense blocks that torch.distributed.fsdp.fully_shard (FSDP2) has sharded, and what consumes them.

fully_shard gives a block a subclass of its class, and two hooks: they gather its parameters before a call and release
them after it. So one op computes a sharded block and its tail inside a call of the block, which is handed the tail.
"""

import sys

import torch
from torch import nn

from . import _reasons


def is_sharded(module: nn.Module) -> bool:
    """Return True for a module that fully_shard was called with."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def tail_reason(module: nn.Module, name: str) -> str | None:
    """Check that the parameters of a transition or a norm are not gathered by a call of that module alone."""
    return f"{name} is sharded by itself, and not with the network" if is_sharded(module) else None


def called_reason(block: nn.Module, prefix: str, name: str, expected: type) -> str | None:
    """Check a block that is not called, or called by FSDP2's hooks alone: its type, its methods and users' hooks."""
    if not is_sharded(block):
        return _reasons.module_reason(block, prefix, name, expected)
    kind = type(block)
    if expected not in (kind, kind.__bases__[-1]):
        return f"{prefix}{name} is a {kind.__bases__[-1].__name__}, not a {expected.__name__}"
    state = block._get_fsdp_state()
    return _reasons.attached_reason(block, prefix, name, lambda hook: getattr(hook, "__self__", None) is state)


def precision_reason(
    block: nn.Module, dtype: torch.dtype, tail: tuple[nn.Module, ...], name: str, tail_name: str
) -> str | None:
    """Check that FSDP2 casts neither the block's parameters nor its output to another dtype than the tail has.

    dtype: the input's, which the block's parameters have if FSDP2 does not cast them.
    """
    if not is_sharded(block):
        return None
    policy = block._get_fsdp_state()._mp_policy
    if policy.param_dtype is None and policy.output_dtype is None:
        return None
    computed = policy.param_dtype or dtype
    dtypes = {computed, policy.output_dtype or computed}
    if dtypes == {p.dtype for module in tail for p in module.parameters()}:
        return None
    return f"{name} is sharded with a MixedPrecisionPolicy of another dtype than {tail_name} has"
