"""A step of a model on tensors without data, noted as a script of tensors that come and go and of fused ops.

Torch's own operators are noted by the tensors that they return. Scratch memory of torch's libraries is not seen, nor is
it by a profiler. What happens inside a fused op is found out by a rehearsal of the script.
"""

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import _features, _transforms
from .._features import FusedBlock
from .._layout import arithmetic_dtype
from .._ops import handles
from .._protocol import Options, StageSizes
from .nowhere import Nowhere
from .order import StageSize

# A recording changes how the whole process sees tensors without data, and the library counts one rehearsal at a time.
ALONE = threading.Lock()


class Take(NamedTuple):
    """Torch makes a tensor of so many bytes."""

    key: int
    nbytes: int


class Drop(NamedTuple):
    """A tensor is freed: one that torch has made, or an output of a fused op."""

    key: int


@dataclass(frozen=True)  # a named tuple would be a node of a pytree
class Held:
    """An argument of a fused op: a view of a tensor that the script has made."""

    key: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Call(NamedTuple):
    """A fused op is called; its output i is the tensor keys[i]. Arguments that last longer than a step are ghosts."""

    op: Any
    arguments: tuple
    keys: list[int]


class Mark(Enum):
    """Places in a script: the step begins, with gradients that are there already; forward has ended."""

    START = 0
    FORWARD_END = 1


@dataclass
class Script:
    """A recorded step. blocks: the dense blocks of its stages, in the order of their calls of dense_stage."""

    events: list = field(default_factory=list)
    blocks: list[FusedBlock] = field(default_factory=list)
    nowhere: Nowhere | None = None


def record(model: nn.Module, input_size: Sequence[int], dtype: torch.dtype, training: bool) -> Script:
    """Record a step of `model`: forward, and backward if it trains.

    In lower precision than the parameters' the step runs under autocast, as a user would have it. Gradients of the
    parameters are there from the start, so that they are not counted.

    Raises:
        ValueError: the model needs the values of tensors, not only their shapes.
    """
    mode, script = FakeTensorMode(allow_non_fake_inputs=True), Script(nowhere=Nowhere())
    recorder = _Recorder(script)
    tensors = {name: _on_cpu(mode, t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    kinds = {t.dtype for t in model.parameters()}
    lower = dtype in (torch.float16, torch.bfloat16) and dtype not in kinds
    thread = threading.get_ident()

    def observe(block: FusedBlock) -> None:
        if threading.get_ident() == thread:  # another one may train a model meanwhile
            script.blocks.append(block)

    was_training = {module: module.training for module in model.modules()}
    gc.collect()
    try:
        if model.training != training:  # else modules that are in another mode were set so
            model.train(training)
        with ALONE, torch.inference_mode(False), mode, _transforms.recording(FakeTensor), _features.observed(observe):
            x = torch.empty(tuple(input_size), dtype=torch.float32 if lower else dtype)
            for tensor in (x, *tensors.values()):
                recorder.ignore(tensor)
            if training:
                for t in tensors.values():
                    if t.requires_grad:
                        t.grad = torch.zeros_like(t)
                        recorder.take(t.grad)
            script.events.append(Mark.START)
            with recorder, torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=lower):
                outputs = torch.func.functional_call(model, tensors, (x,))
            script.events.append(Mark.FORWARD_END)
            leaves = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
            with recorder:
                if leaves:
                    torch.autograd.backward(leaves, [torch.ones_like(y) for y in leaves])
                del outputs, leaves
    except Exception as error:
        if isinstance(error, TypeError | ValueError):
            raise
        raise ValueError(
            f"the model cannot run without data, so its memory cannot be predicted: {str(error).splitlines()[0]}"
        ) from error
    finally:
        recorder.close()
        for module, was in was_training.items():
            module.training = was
        tensors.clear()
        gc.collect()
    return script


def _on_cpu(mode: FakeTensorMode, t: Tensor) -> FakeTensor:
    """Return a tensor without data in the form of `t`, which may be on the meta device."""
    fake = mode.from_tensor(t)
    if not t.is_meta:
        return fake
    with mode:
        return torch.empty_like(fake, device="cpu").requires_grad_(t.requires_grad)


def stage_sizes(script: Script) -> tuple[StageSize, ...]:
    """Return the size of each stage of a script, in the order of their calls."""
    sizes = []
    for event in script.events:
        if isinstance(event, Call) and event.op is handles.dense_stage:
            x, params, *_, options = event.arguments[0]
            stage = StageSizes(params, Options(*options), x.shape[1])
            gradient = arithmetic_dtype(x.dtype).itemsize
            size = StageSize(
                *(x.shape[0] * x.shape[2:].numel(), x.shape[1], stage.growth, stage.width, len(stage.layers)),
                *(x.dtype.itemsize, gradient, sum(p.shape.numel() for p in params) * gradient),
            )
            sizes.append(size)
    return tuple(sizes)


class _Recorder(TorchDispatchMode):
    """Notes in a script what each operator returns, and when it is freed."""

    def __init__(self, script: Script):
        super().__init__()
        self.script, self.next = script, 0
        self.keys: dict[int, int | None] = {}  # of the storages that are there now, by address
        self.closed = False

    def close(self) -> None:
        """Note nothing any more."""
        self.closed = True

    def ignore(self, tensor: Tensor) -> None:
        """Do not note this tensor, which is there before the step and stays."""
        self.keys[tensor.untyped_storage()._cdata] = None

    def take(self, tensor: Tensor) -> None:
        """Note a tensor that torch has made."""
        key = self._new_key(tensor)
        if key is not None:
            self.script.events.append(Take(key, tensor.untyped_storage().nbytes()))

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace != "densenet_ext":
            result = op(*args, **(kwargs or {}))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.take(tensor)
            return result
        with _disable_current_modes():
            arguments = pytree.tree_map_only(Tensor, self._argument, (args, kwargs or {}))
        result = op(*args, **(kwargs or {}))
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.script.events.append(Call(op, arguments, [self._new_key(tensor) for tensor in outputs]))
        return result

    def _argument(self, tensor: Tensor) -> Held | Tensor:
        key = self.keys.get(tensor.untyped_storage()._cdata)
        if key is None:
            return self.script.nowhere.tensor(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        return Held(key, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)

    def _new_key(self, tensor: Tensor) -> int | None:
        """Return a new key for the tensor's storage, or None if that is known already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.keys:
            return None
        key = self.keys[storage._cdata] = self.next
        self.next += 1
        weakref.finalize(storage, self._free, storage._cdata, key)
        return key

    def _free(self, address: int, key: int) -> None:
        del self.keys[address]
        if not self.closed:
            self.script.events.append(Drop(key))
