"""Does a fused module compute what a module of another library computes? It is tried out, on random copies in float64.

Names alone would not tell: the same names stand for a concatenation or for the new channels alone, and a forward may do
more than its modules. So outputs, gradients and running statistics are compared, in training and in evaluation mode.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import fallback

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
)
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
    twin.__dict__ = dict(module.__dict__)
    for name in _HOOKS:
        twin.__dict__[name] = type(module.__dict__[name])()
    for name in ("forward", "_call_impl", "_conv_forward"):
        twin.__dict__.pop(name, None)
    twin._parameters = {
        name: p if p is None else nn.Parameter(_random(name, p, generator)) for name, p in module._parameters.items()
    }
    twin._buffers = {name: b if b is None else _random(name, b, generator) for name, b in module._buffers.items()}
    twin._modules = {name: m if m is None else _copy(m, generator, done) for name, m in module._modules.items()}
    return twin


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


def difference(plain: nn.Module, fused: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> str | None:
    """Return how run(fused, x) differs from run(plain, x), or None if it does not; both are random copies."""
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
