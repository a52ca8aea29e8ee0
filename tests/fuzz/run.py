"""Two steps of a random network by one implementation, and all of their results."""

import contextlib
import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from densenet_ext import DropChannel, convert
from densenet_ext._layout import arithmetic_dtype
from fuzz.draw import Network
from fuzz.noise import Noise

RATE = 0.5


@dataclass
class Run:
    """results: tensors by name, None for a missing gradient; starts: states before each step; error: ends the run."""

    results: dict[str, Tensor | None] = field(default_factory=dict)
    starts: list[dict] = field(default_factory=list)
    error: Exception | None = None


def run(
    network: Network,
    efficient: bool | str,
    *,
    draw: int = 0,
    reference: bool = False,
    starts: list[dict] | None = None,
    noise: Noise | None = None,
) -> Run:
    """Run two steps of a network, with a step of SGD between them.

    Args:
        efficient: the implementation.
        draw: number of the draw of random values, see Network.build.
        reference: compute in float64, with the masks of the network's own precision.
        starts: the states of another run in which to begin the steps; None: the second begins where the first ended.
        noise: the noise to compute with, see noise.py.
    """
    module = network.build(draw).to(network.dtype)
    if reference:
        module.double()
    if not network.library:
        module.efficient = efficient
        module.keep_bottleneck = network.keep_bottleneck
    elif efficient:
        report = convert(module, keep_bottleneck=network.keep_bottleneck)
        if len(report.fused) != len(network.options["block_config"]):
            raise AssertionError(f"not everything is fused:\n{report}")
    done = Run()
    for step in range(2):
        if starts is not None:
            if step == len(starts):
                break
            module.load_state_dict(starts[step])
        done.starts.append(copy.deepcopy(module.state_dict()))
        network.set_mode(module, step)
        try:
            _step(network, module, step, draw, reference, noise, done.results)
        except (ValueError, RuntimeError, TypeError) as error:
            done.error = error
            break
        _update(module)
    return done


def _step(network, module, step, draw, reference, noise, results) -> None:
    dtype = network.half if network.half and network.kind != "model" else network.dtype
    leaves = [leaf.to(dtype) for leaf in network.leaves(step, draw)]
    if reference:
        leaves = [leaf.double() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_(network.gradients == "inputs too")
    torch.manual_seed(network.values_seed("masks", draw, step))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(network.gradients != "no grad"))
        stack.enter_context(_new_memory_of_nan(network.poisoned))
        if reference:
            stack.enter_context(_masks_of(network.dtype))
        elif network.half:
            stack.enter_context(torch.autocast("cpu", network.half))
        with noise or contextlib.nullcontext():
            output = module(network.views(leaves))
        if output.requires_grad:
            with torch.autocast("cpu", enabled=False):
                output.backward(network.upstream_gradient(output, step, draw))
    name = f"step {step + 1}: "
    results[name + "output"] = output.detach().clone()
    for i, leaf in enumerate(leaves):
        results[f"{name}gradient of input {i}"] = leaf.grad
    for key, parameter in module.named_parameters():
        results[f"{name}gradient of {key}"] = None if parameter.grad is None else parameter.grad.clone()
    for key, buffer in module.named_buffers():
        results[name + key] = buffer.clone()


def _update(module: nn.Module) -> None:
    """Take a step of SGD with the gradients' joint norm clipped to 1, and set the gradients to None."""
    trained = [p for p in module.parameters() if p.grad is not None]
    length = sum(p.grad.double().square().sum() for p in trained) ** 0.5
    for p in trained:
        if length.isfinite():
            p.data.sub_(p.grad * (RATE / max(length.item(), 1)))
        p.grad = None


@contextlib.contextmanager
def _new_memory_of_nan(wanted: bool):
    """With deterministic algorithms PyTorch fills new memory with NaN."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _masks_of(dtype: torch.dtype):
    """A context in which Drop-Channel draws the masks that it draws for maps of this dtype."""
    draw = DropChannel.draw

    def draw_as(self, samples, channels, like):
        return draw(self, samples, channels, like.new_empty(0, dtype=arithmetic_dtype(dtype))).to(like.dtype)

    DropChannel.draw = draw_as
    try:
        yield
    finally:
        DropChannel.draw = draw
