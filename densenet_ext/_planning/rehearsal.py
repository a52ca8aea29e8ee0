"""A script of a step, run without memory: the fused ops compute nothing, and the library counts what they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._load import load_extension
from .._ops import handles
from .._protocol import Options
from .recording import ALONE, Call, Drop, Held, Mark, Script, Take

_FORWARD = handles.dense_stage
_BACKWARD = (handles.dense_stage_backward, handles.dense_block_backward)
_KEPT = Options._fields.index("kept_bottlenecks")


@dataclass(frozen=True)
class StepMemory:
    """Bytes over parameters and their gradients.

    peak: the most that a step takes; on a CPU every page counts that a workspace has touched, whether a tensor holds it
    at that moment or not. live: the most that tensors hold at once. workspaces: the pages of workspaces, part of
    `peak`. kept: what tensors hold between forward and backward.
    """

    peak: int
    live: int
    workspaces: int
    kept: int


def rehearse(script: Script, kept: Sequence[int]) -> StepMemory:
    """Return the memory of a recorded step whose stage i keeps the bottlenecks of its last kept[i] layers."""
    library, rehearsal = load_extension(), _Rehearsal(script, kept)
    with ALONE:
        library.start_rehearsal()
        try:
            for event in script.events:
                rehearsal.run(event)
                rehearsal.measure(*library.rehearsal_use())
            return rehearsal.memory()
        finally:
            rehearsal.outputs.clear()
            library.stop_rehearsal()


class _Rehearsal:
    def __init__(self, script: Script, kept: Sequence[int]):
        self.script, self.kept = script, kept
        self.outputs: dict[int, Tensor] = {}  # of fused ops
        self.sizes: dict[int, int] = {}  # of torch's tensors
        self.stages: dict[int | None, int] = {}  # output of a stage: number of the stage
        self.forward_calls = 0
        self.level = self.peak = self.live = self.workspaces = self.base = self.after_forward = self.now = 0

    def run(self, event: Take | Drop | Call | Mark) -> None:
        if isinstance(event, Take):
            self.sizes[event.key] = event.nbytes
            self.level += event.nbytes
        elif isinstance(event, Drop):
            self.level -= self.sizes.pop(event.key, 0)
            self.outputs.pop(event.key, None)
        elif isinstance(event, Call):
            self._call(event)
        elif event is Mark.START:
            self.base = self.peak = self.live = self.level
        else:
            self.after_forward = self.now

    def measure(self, tensors: int, most_tensors: int, most_in_all: int, occupied: int) -> None:
        """Take in what the library has counted since the last event."""
        self.peak = max(self.peak, self.level + most_tensors)
        self.live = max(self.live, self.level + most_in_all)
        self.now, self.workspaces = self.level + most_in_all, occupied

    def memory(self) -> StepMemory:
        peak = self.peak - self.base + self.workspaces
        return StepMemory(peak, self.live - self.base, self.workspaces, self.after_forward - self.base)

    def _call(self, call: Call) -> None:
        positional, named = [*call.arguments[0]], call.arguments[1]
        names = [argument.name for argument in call.op._schema.arguments]
        stage = None
        if call.op is _FORWARD:
            stage = self.forward_calls
            self.forward_calls += 1
            self.stages.update(dict.fromkeys(call.keys, stage))
        elif call.op in _BACKWARD:
            stage = self.stages[positional[names.index("features")].key]
            place = names.index("bottlenecks")  # their number is not the recorded one
            positional[place] = self.outputs[positional[place].key]
        if stage is not None:
            place = names.index("options")
            positional[place] = [*positional[place]]
            positional[place][_KEPT] = self.kept[stage]
        positional, named = pytree.tree_map_only(Held, self._tensor, (positional, named))
        with torch.no_grad():
            result = call.op(*positional, **named)
        for key, tensor in zip(call.keys, pytree.tree_leaves(result), strict=True):
            if key is not None:
                self.outputs[key] = tensor

    def _tensor(self, held: Held) -> Tensor:
        output = self.outputs.get(held.key)
        if output is None:
            return self.script.nowhere.tensor(held.shape, held.stride, held.offset, held.dtype)
        return output.as_strided(held.shape, held.stride, held.offset)
