"""Does a fused module compute what a module of another library computes? It is tried out, on random copies in float64.

Names alone would not tell: the same names stand for a concatenation or for the new channels alone, and a forward may do
more than its modules. So outputs, gradients and running statistics are compared, in training and in evaluation mode.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import Tensor, nn

from .. import fallback
from .settings import tracked

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
)
# torch looks these up in the module first, so they take the place of the class's forward.
CALLED_FIRST = ("forward", "_call_impl", "_conv_forward", "_compiled_call_impl")
_TOLERANCE = 1e-9  # relative to the largest value
SEED = 1707_06990


def random_copy(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU in float64, without hooks, with random values; these are the same for each call.

    Raises:
        ValueError: a parameter has no shape yet, because it is a lazy module's.
    """
    return _copy(module, torch.Generator().manual_seed(SEED), {})


def _copy(module: nn.Module, generator: torch.Generator, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin = done[id(module)] = object.__new__(type(module))
    twin.__dict__ = {name: _rebound(value, module, twin) for name, value in module.__dict__.items()}
    for name in _HOOKS:
        twin.__dict__[name] = type(module.__dict__[name])()
    for name in CALLED_FIRST:
        twin.__dict__.pop(name, None)
    twin._parameters = {
        name: p if p is None else nn.Parameter(_random(name, p, generator)) for name, p in module._parameters.items()
    }
    twin._buffers = {name: b if b is None else _random(name, b, generator) for name, b in module._buffers.items()}
    twin._modules = {name: m if m is None else _copy(m, generator, done) for name, m in module._modules.items()}
    return twin


def _rebound(value: object, module: nn.Module, twin: nn.Module) -> object:
    """Return a method of `module` as one of `twin`, and anything else as it is."""
    is_method = isinstance(value, MethodType) and value.__self__ is module
    return MethodType(value.__func__, twin) if is_method else value


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if nn.parameter.is_lazy(like):
        raise ValueError("a parameter is not initialized yet")
    if not like.dtype.is_floating_point:
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    shape = tuple(like.shape)
    if name == "running_var" or (name == "weight" and like.dim() == 1):
        return torch.rand(shape, generator=generator, dtype=torch.double, device="cpu") + 0.5
    spread = (like.numel() / shape[0]) ** -0.5 if like.dim() > 1 and like.numel() else 0.3
    return torch.randn(shape, generator=generator, dtype=torch.double, device="cpu") * spread


def random_maps(channels: int, size: int = 4) -> Tensor:
    """Return two samples of maps of size x size pixels, as an input to compare with."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.double, device="cpu")


def difference(
    plain: nn.Module, fused: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor], read: set[str]
) -> str | None:
    """Return how run(fused, x) differs from run(plain, x), or None if it does not; both are random copies.

    Adds to `read` the names of the attributes that the forward of `plain` reads.
    """
    before = [(module, dict(module.__dict__)) for module in plain.modules()]
    original, plain.__class__ = type(plain), tracked(type(plain), read)
    try:
        return _difference(plain, fused, x, run) or _assignment(before)
    finally:
        plain.__class__ = original


def _assignment(before: list[tuple[nn.Module, dict]]) -> str | None:
    """Return which attribute was assigned since then: the fused form of a module would not do that."""
    for module, attributes in before:
        for name, value in module.__dict__.items():
            if name != "training" and (name not in attributes or attributes[name] is not value):
                return f"it assigns the attribute {name}"
    return None


def _difference(plain: nn.Module, fused: nn.Module, x: Tensor, run: Callable) -> str | None:
    with quiet(), fallback.strict():
        for training in (True, False):
            mode = "training" if training else "evaluation"
            try:
                results = [_results(module.train(training), x, run) for module in (plain, fused)]
            except fallback.NotFused as error:
                return str(error)
            except Exception as error:  # a forward that is not that of a dense layer may do anything
                return f"in {mode} mode it cannot be compared: {type(error).__name__}: {str(error).splitlines()[0]}"
            for (name, want), (_, actual) in zip(*results, strict=True):
                if want is None and actual is None:
                    continue
                if want is None or actual is None or want.shape != actual.shape:
                    return f"in {mode} mode {name} has another shape"
                error, scale = (want - actual).abs().max().item(), want.abs().max().item()
                if not error <= _TOLERANCE * max(scale, 1e-6):
                    return f"in {mode} mode {name} differs by {error:.1e}, where the largest value is {scale:.1e}"
    return None


def _results(module: nn.Module, x: Tensor, run: Callable) -> list[tuple[str, Tensor | None]]:
    x = x.clone().requires_grad_()
    for p in module.parameters():
        p.grad = None
    torch.manual_seed(SEED)
    y = run(module, x)
    if not isinstance(y, Tensor):
        raise TypeError(f"the output is a {type(y).__name__}, not a tensor")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED + 2), dtype=torch.double, device="cpu")
    (y * weights).sum().backward()
    gradients = [(f"the gradient of {name}", p.grad) for name, p in module.named_parameters()]
    buffers = [(name, b.detach().double().clone()) for name, b in module.named_buffers()]
    return [("the output", y.detach()), ("the gradient of the input", x.grad), *gradients, *buffers]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context with gradients and without autocast, which leaves random numbers as they were."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            yield
