"""Predict the memory of a training step, and choose what is kept for backward within a budget."""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import factories
from ._checks import check_positive
from ._features import FusedBlock
from ._planning.measurement import measured_peak
from ._planning.order import keep_order
from ._planning.recording import Script, record, stage_sizes
from ._planning.rehearsal import StepMemory, rehearse

__all__ = ["Plan", "largest_batch", "plan"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# A measured peak is at most so much larger than the predicted one, of it; tests hold predictions to that.
ERROR = 0.005


@dataclass(frozen=True)
class Plan:
    """A choice of what a training step keeps for backward, and its memory; printed, it is a table.

    Attributes:
        kept: for each dense block by name, how many of its last layers keep their bottleneck.
        layers: for each dense block by name, how many layers it has.
        memory: bytes of a step over parameters and their gradients: peak, live, workspaces, kept. On a CPU `peak` counts
            all pages that workspaces have touched, `live` what tensors hold at once.
        smallest, fastest: the peaks if no bottleneck and if all are kept.
        saved: the part of the multiplications that backward would compute again, and does not; 0 to 1.
        parameters: bytes of the parameters, as large as their gradients; an optimizer's state comes to that.
    """

    kept: dict[str, int]
    layers: dict[str, int]
    memory: StepMemory
    smallest: int
    fastest: int
    saved: float
    parameters: int
    input_size: tuple[int, ...]
    dtype: torch.dtype
    blocks: dict[str, FusedBlock] = field(repr=False, default_factory=dict)

    def apply(self, model: nn.Module | None = None) -> None:
        """Set what each dense block keeps: of the planned model, or of another one with blocks of the same names.

        Raises:
            ValueError: a model has no such block, or its conversion was reverted; nothing was changed.
        """
        blocks = self.blocks if model is None else dict(model.named_modules())
        for name in self.kept:
            if not isinstance(blocks.get(name), FusedBlock):
                raise ValueError(f"model has no fused dense block {name}")
        for name, count in self.kept.items():
            blocks[name].keep_bottleneck = count

    def __str__(self) -> str:
        width = max([len(name) for name in self.kept], default=0)
        rows = [f"{name:{width}}  {count:3} of {self.layers[name]:3} layers keep" for name, count in self.kept.items()]
        size = "x".join(map(str, self.input_size))
        memory = self.memory
        return "\n".join(
            [
                f"A training step on {size}, {str(self.dtype).removeprefix('torch.')}:",
                *rows,
                f"peak {_mb(memory.peak)} over parameters and gradients; smallest {_mb(self.smallest)}, all kept "
                f"{_mb(self.fastest)}",
                f"of it {_mb(memory.workspaces)} in pages of workspaces; tensors hold at most {_mb(memory.live)} at once, "
                f"{_mb(memory.kept)} between forward and backward",
                f"parameters and gradients take {_mb(2 * self.parameters)}, an optimizer's state comes to that",
                f"backward computes {100 * (1 - self.saved):.0f} % of the bottlenecks again, by their multiplications",
            ]
        )


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def plan(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    budget: int | str | None = None,
    training: bool = True,
    measure: bool = False,
) -> Plan:
    """Predict the memory of a step of `model` before anything is allocated, and choose what it keeps for backward.

    A fused dense block recomputes the outputs of its 1x1 convolutions, the bottlenecks, in backward, or keeps those of
    its last layers. The layers that read most channels win most time a byte, so they keep theirs first; before them
    those whose bottleneck does not raise the peak. This order does not depend on the budget: a larger budget keeps all
    that a smaller one does, and more.

    The step is run on shapes alone, and its fused ops are rehearsed by the library without memory; tests hold the
    predicted peak to 5 % of a measured one.

    Args:
        model: a network with fused dense blocks, built or converted, on a CPU.
        input_size: of the model's one input, with the samples, such as (8, 3, 224, 224).
        dtype: the input's. bfloat16 and float16 beside float32 parameters: the step runs under autocast.
        budget: the most that a step may take over parameters and their gradients: bytes, or a string such as '160 MB'
            (10**6 bytes) or '1.5 GiB'; 'smallest': keep no bottleneck; 'fastest': keep all; None: keep what does not
            raise the peak.
        training: False predicts inference under no_grad in evaluation mode. Norms of a model in training mode that are in
            evaluation mode themselves stay so.
        measure: run one step of a copy of the model, too, which keeps no bottleneck, and add to each prediction what
            that takes beyond its own: scratch memory of torch's operators, such as convolutions in float64, and what is
            around blocks that a network calls without their transitions.

    Returns:
        A Plan. It changes nothing until `plan.apply()` is called; another one may be applied at any time.

    Raises:
        TypeError: model is no module, or dtype no dtype.
        ValueError: the budget is none of these, or less than the smallest possible peak, which the message names; the
            model has no fused dense block, is not on a CPU, or needs the values of tensors to run.

    Source: Pleiss et al., arXiv 1707.06990, for keeping bottlenecks.
    """
    limit = _limit(budget)
    options = _Options(model, input_size, dtype, training, measure)
    order = options.order
    if limit == "smallest" or not training:
        count = 0
    elif limit == "fastest":
        count = len(order)
    elif limit is None:
        count = options.largest(options.peak(0) * 1.01)
    else:
        room = limit / (1 + ERROR)
        if options.peak(0) > room:
            least = options.peak(0) * (1 + ERROR)
            raise ValueError(
                f"budget is {budget!r}; a step on {'x'.join(map(str, options.input_size))} takes {_mb(least)} at least"
            )
        count = options.largest(room)
    return options.plan(count)


def largest_batch(
    model: nn.Module,
    input_size: Sequence[int],
    budget: int | str,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
) -> int:
    """Return the largest number of samples with which a step of `model` fits into a budget, keeping no bottleneck.

    Args:
        model, dtype, training: as in `plan`.
        input_size: of one input with any number of samples, which is ignored.
        budget: bytes or a string, as in `plan`; over parameters and their gradients.

    Raises:
        TypeError, ValueError: as in `plan`; not even one sample fits.
    """
    limit = _limit(budget)
    if not isinstance(limit, int):
        raise ValueError(f"budget is {budget!r}; it must be bytes, or a string such as '160 MB'")
    room = limit / (1 + ERROR)

    @functools.cache
    def fits(samples: int) -> bool:
        return _Options(model, (samples, *input_size[1:]), dtype, training).peak(0) <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        least = _Options(model, (1, *input_size[1:]), dtype, training).peak(0) * (1 + ERROR)
        raise ValueError(f"budget is {budget!r}; a step on one sample takes {_mb(least)}")
    return low


def _limit(budget: int | str | None) -> int | str | None:
    """Return the budget in bytes, or 'smallest', 'fastest' or None.

    Raises:
        ValueError: it is none of these.
    """
    if budget in (None, "smallest", "fastest"):
        return budget
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", budget, re.IGNORECASE)
        unit = _UNITS.get(match[2].upper()) if match else None
        if unit is not None:
            return int(float(match[1]) * unit)
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ValueError(
        f"budget is {budget!r}; it may be a number of bytes, a string such as '160 MB', 'smallest', 'fastest' or None"
    )


def main(network: str, input_size: tuple[int, ...], dtype: str, budget: str | None) -> int:
    """Print a plan for a network of this package, and return 0, the status of success.

    Args:
        network: the name of a function that builds one, such as 'densenet121'.
        input_size, budget: as in `plan`; dtype: the name of one.
    """
    build = getattr(factories, network, None) if network in factories.__all__ else None
    if build is None:
        sys.exit(f"network is {network!r}; it may be {', '.join(factories.__all__)}")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        sys.exit(f"dtype is {dtype!r}; it may be float32, bfloat16, float16 or float64")
    budget = int(budget) if budget is not None and budget.isdigit() else budget
    try:
        print(plan(build(in_channels=input_size[1], efficient=True), input_size, dtype=kind, budget=budget))
    except (TypeError, ValueError) as error:
        sys.exit(str(error))
    return 0


class _Options:
    """The choices of a model at one input size: an order of its layers, and the memory of each beginning of it."""

    def __init__(
        self, model: nn.Module, input_size: Sequence[int], dtype: torch.dtype, training: bool, measure: bool = False
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype!r}; it must be a floating-point torch.dtype")
        devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
        if devices - {"cpu", "meta"}:
            raise ValueError(f"model is on {', '.join(sorted(devices))}; plans are made on a CPU")
        self.input_size = tuple(check_positive(size, f"input_size[{i}]") for i, size in enumerate(input_size))
        self.model, self.dtype, self.training = model, dtype, training
        self.script: Script = record(model, self.input_size, dtype, training)
        if not self.script.blocks:
            raise ValueError("model has no dense block that runs fused: build it with efficient='fused', or convert it")
        self.sizes = stage_sizes(self.script)
        self.order = keep_order(self.sizes)
        self.beyond = 0
        if measure:
            self.beyond = max(0, measured_peak(model, self.input_size, dtype, training) - self.memory(0).peak)
        self.peak: Callable[[int], int] = functools.cache(lambda count: self.memory(count).peak)

    def kept(self, count: int) -> list[int]:
        """Return how many layers of each stage are among the first `count` of the order.

        A block that is called several times is several stages, and keeps the least that one of them may.
        """
        counts = [self.order[:count].count(stage) for stage in range(len(self.sizes))]
        blocks = self.script.blocks
        return [min(n for n, other in zip(counts, blocks, strict=True) if other is block) for block in blocks]

    def memory(self, count: int) -> StepMemory:
        """Return the memory of a step that keeps the first `count` of the order."""
        memory = rehearse(self.script, self.kept(count))
        return replace(memory, peak=memory.peak + self.beyond, live=memory.live + self.beyond)

    def largest(self, room: float) -> int:
        """Return the largest count at which, and below which, every peak fits into `room`."""
        count = 0
        while count < len(self.order) and self.peak(count + 1) <= room:
            count += 1
        return count

    def plan(self, count: int) -> Plan:
        names = {module: name for name, module in self.model.named_modules()}
        called, kept = [names[block] for block in self.script.blocks], self.kept(count)
        again = [[size.channels(i) * size.rows * size.width for i in range(size.layers)] for size in self.sizes]
        total = sum(map(sum, again))
        saved = sum(sum(work[len(work) - n :]) for work, n in zip(again, kept, strict=True))
        return Plan(
            kept=dict(zip(called, kept, strict=True)),
            layers={name: size.layers for name, size in zip(called, self.sizes, strict=True)},
            memory=self.memory(count),
            smallest=self.peak(0),
            fastest=self.peak(len(self.order)),
            saved=saved / total,
            parameters=sum(p.nbytes for p in self.model.parameters()),
            input_size=self.input_size,
            dtype=self.dtype,
            blocks=dict(zip(called, self.script.blocks, strict=True)),
        )
