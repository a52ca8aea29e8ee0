"""The check that all implementations compute the same numbers, made before anything is measured.

From identical weights, data and random state, each implementation's outputs, gradients (of the input and of every
parameter) and running statistics after one training step are compared with the plain implementation's. torchvision's
network is left out where it has dropout, which draws other masks.

In float64 each tensor's largest difference over its largest value is held to 1e-9: that is the proof. In the
benchmark's own type the norm of the difference over the norm is held, over all tensors of a kind, and gradients only
loosely: one ReLU's pre-activation whose sign differs moves them. The plain implementation itself, run in two memory
formats, differs by 1e-2 in float32 and by 2e-1 in bfloat16.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.networks import build_batch, build_model

KINDS = ("outputs", "gradients", "running statistics")
LIMITS = {  # by kind
    "float64": (1e-9, 1e-9, 1e-9),
    "float32": (1e-4, 5e-2, 1e-5),
    "bfloat16": (5e-2, 6e-1, 2e-3),
    "float16": (1e-2, 3e-1, 5e-4),
}
# On a GPU an error against float64 may be so many times the plain network's, and so much more; but not larger than the last.
TIMES_PLAIN, ROUNDING, LARGEST_ERROR = 3.0, 1e-3, 0.9


class DisagreementError(RuntimeError):
    """An implementation's numbers are not the plain implementation's."""


def check(specs):
    """Compare the implementations of every variant in `specs`; returns errors by kind for each, raises if one fails."""
    specs = [s for s in specs if s.implementation != "plain" and not _has_other_masks(s)]
    specs = dict.fromkeys(replace(s, dtype=dtype) for s in specs for dtype in ("float64", s.dtype))
    results, plain, expected = [], None, None
    for spec in tqdm(sorted(specs, key=lambda s: (s.dtype != "float64", s.variant)), desc="agreement", disable=None):
        reference = replace(spec, implementation="plain", channels_last=False)
        if reference != plain:
            plain, expected = reference, train_once(reference)
        errors = compare(spec, train_once(spec, expected["state"]), expected)
        cell = {"variant": spec.variant, "implementation": spec.implementation, "dtype": spec.dtype}
        results.append(cell | {"errors": errors})
    return results


def _has_other_masks(spec):
    return spec.implementation.startswith("torchvision") and spec.variant == "vanilla" and spec.random


def train_once(spec, state=None, batch_size=2, input_gradient=True):
    """One forward and backward, from the weights `state` if there are any: what is compared, by kind, and the weights."""
    model = build_model(spec)
    if state is not None:
        model.load_state_dict(state)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = build_batch(spec, batch_size=min(spec.batch_size, batch_size))
    images.requires_grad_(input_gradient)
    torch.manual_seed(2)  # the masks of Drop-Channel
    with spec.autocast(), spec.saved_tensors():
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        "state": state,
        "outputs": {"logits": logits.detach()},
        "gradients": gradients | ({"input": images.grad} if input_gradient else {}),
        "running statistics": dict(model.named_buffers()),
    }


def compare(spec, found, expected, kinds=KINDS):
    """Errors by kind of what was `found`; `DisagreementError` where one of `kinds` is over its limit."""
    measure = _largest if spec.dtype == "float64" else _relative_norm
    errors = {}
    for kind, limit in zip(KINDS, LIMITS[spec.dtype], strict=True):
        if kind not in expected:
            continue
        if found[kind].keys() != expected[kind].keys():
            raise DisagreementError(f"{spec}: {kind} have other names than the plain implementation's")
        errors[kind], worst = measure(found[kind], expected[kind])
        if kind in kinds and not errors[kind] <= limit:  # catches NaN too
            raise DisagreementError(
                f"{spec}: {kind} differ from the plain implementation's by {errors[kind]:.1e} of their size, "
                f"the limit is {limit:.0e}; the worst is {worst}"
            )
    return errors


def check_on_gpu(spec_of):
    """Errors of outputs and gradients, norm over norm: {'plain': {...}, 'fused': {...}, ..., 'agrees': ...}.

    They are taken without masks, against the plain network in float64; 'masked' is with them, fused against plain in one
    type. A deep network multiplies rounding, in half precision until a gradient is half noise, so the limit hangs on what
    the plain network's error is; an error of 1 is a gradient that has nothing to do with the true one.
    """

    def train(implementation, state=None, **changes):
        return train_once(replace(spec_of(implementation), **changes), state, batch_size=8, input_gradient=False)

    def errors(found, expected):
        return {kind: _relative_norm(found[kind], expected[kind])[0] for kind in ("outputs", "gradients")}

    reference = train("plain", random=False, dtype="float64")
    state, found = reference["state"], {}
    for implementation in ("plain", "fused", "fused-kept"):
        found[implementation] = errors(train(implementation, state, random=False), reference)
    found["masked"] = errors(train("fused", state), train("plain", state))
    limits = {kind: error_limit(error) for kind, error in found["plain"].items()}
    agrees = all(found[i][kind] <= limits[kind] for i in ("fused", "fused-kept", "masked") for kind in limits)
    return found | {"limits": limits, "agrees": agrees}


def error_limit(plain):
    """The limit of the fused network's error on a GPU where the plain one's is `plain`."""
    return max(min(TIMES_PLAIN * plain + ROUNDING, LARGEST_ERROR), 1.2 * plain)


def _largest(found, expected):
    """Largest relative error over the tensors and whose it is. A tensor of rounding noise (a gradient that is zero in
    exact arithmetic) counts against a thousandth of the largest value of its kind."""
    floor = 1e-3 * max(t.double().abs().max().item() for t in expected.values())
    errors = {}
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max().item()
        errors[name] = difference / max(value.double().abs().max().item(), floor)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst


def _relative_norm(found, expected):
    """Norm of the difference over the norm, all tensors together, NaN if one is; and which tensor has the largest part."""
    differences = {name: (found[name].double() - value.double()).norm().item() for name, value in expected.items()}
    total = sum(value.double().norm().item() ** 2 for value in expected.values()) ** 0.5
    error = sum(difference**2 for difference in differences.values()) ** 0.5 / total
    return error, max(differences, key=differences.get)
