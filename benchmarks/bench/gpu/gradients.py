"""The check of the fused network's gradients on a GPU, against the plain network's in float64."""

from dataclasses import replace

from bench.agreement import relative_norm, train_once

BATCH_SIZE = 8
# An error against float64 may be so many times the plain network's, and so much more; but not larger than the last.
TIMES_PLAIN, ROUNDING, LARGEST_ERROR = 3.0, 1e-3, 0.9


def check_gradients(spec_of):
    """Errors of outputs and gradients, norm over norm: {'plain': {...}, 'fused': {...}, ..., 'agrees': ...}.

    They are taken without masks, against the plain network in float64; 'masked' is with them, fused against plain in one
    type. A deep network multiplies rounding, in half precision until a gradient is half noise, so the limit hangs on what
    the plain network's error is; an error of 1 is a gradient that has nothing to do with the true one.
    """

    def train(spec, state=None):
        return train_once(spec, state, BATCH_SIZE, input_gradient=False)

    reference = train(replace(spec_of("plain"), random=False, dtype="float64"))
    state, found = reference["state"], {}
    for implementation in ("plain", "fused", "fused-kept"):
        found[implementation] = _errors(train(replace(spec_of(implementation), random=False), state), reference)
    found["masked"] = _errors(*(train(spec_of(implementation), state) for implementation in ("fused", "plain")))
    limits = {kind: error_limit(error) for kind, error in found["plain"].items()}
    agrees = all(found[i][kind] <= limits[kind] for i in ("fused", "fused-kept", "masked") for kind in limits)
    return found | {"limits": limits, "agrees": agrees}


def error_limit(plain):
    """The limit of the fused network's error where the plain one's is `plain`."""
    return max(min(TIMES_PLAIN * plain + ROUNDING, LARGEST_ERROR), 1.2 * plain)


def _errors(found, expected):
    """Errors by kind."""
    return {kind: relative_norm(found[kind], expected[kind])[0] for kind in ("outputs", "gradients")}
