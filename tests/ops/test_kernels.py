"""Every compiled kernel op against its reference twin, in float64 where the op computes in float32."""

import pytest
import torch
from kernel_cases import DEVICES, SHAPES, Problem, Shape, to_device

from densenet_ext import reference
from densenet_ext._layout import is_channels_last
from densenet_ext._load import load_extension
from densenet_ext.reference.views import write_moments

# Largest error by dtype of arithmetic, relative to the largest value of a tensor: sums of up to 20000 terms.
ARITHMETIC = {torch.float64: 1e-12, torch.float32: 1e-5}
# The error from rounding a product's operands, relative to the largest value of a tensor. Matrix units take operands in
# the storage dtype, as a convolution under autocast does, or in TF32 (with float16's mantissa).
OPERANDS = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
PRODUCTS = ("bottleneck_forward", "bottleneck_backward", "conv3x3_forward", "conv3x3_backward")
PRODUCTS += ("transition_forward", "transition_backward")
TILE_UNIT = load_extension().cpu_capability() == "amx"  # rounds operands of bfloat16 alone
# Sums of products of both signs multiply that error by these factors. coef also has factors mean and 1/deviation, which
# are arbitrary here.
SUMS = {"coef": 8, "dnorm_weight": 3, "dnorm_bias": 3}
# The error from storing, relative to each value: op and twin may round to neighbors, one unit in the last place apart.
STORAGE = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = list(STORAGE)

OPS = {
    "append": [{}, {"channels_last": True}],
    "fold_norm": [{}, {"has_statistics": True}],
    "bottleneck_forward": [{}, {"moments": False}],
    "conv3x3_forward": [{}, {"moments": False}],
    "squeeze_excite_forward": [{}],
    "squeeze_excite_backward": [{}],
    "conv3x3_backward": [{}, {"training": False}],
    "bottleneck_backward": [
        *({}, {"training": False}, {"grad_in": "same"}, {"grad_in": "other"}),
        *({"previous": True}, {"previous": True, "grad_in": "same"}),
    ],
    "transition_forward": [{}],
    "transition_backward": [{}, {"training": False}],
    "head_forward": [{}],
    "head_backward": [{}, {"training": False}],
    "finish_gradient": [{}, {"channels_last": True}],
    "stem_forward": [{}, {"has_statistics": True}],
    "stem_backward": [{}, {"training": False}, {"need_dx": False}],
}
MASKED = ("fold_norm", "bottleneck_forward", "conv3x3_forward", "conv3x3_backward", "bottleneck_backward")
CASES = [(op, options) for op, variants in OPS.items() for options in variants]


def for_twin(value, dtype):
    """The tensor as the twin gets it: in float64, unless it is stored in half precision."""
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
        return value
    return value.clone() if value.dtype == dtype and dtype not in ARITHMETIC else value.double().clone()


def run_both(op, args, dtype, device="cpu", **options):
    """The op's arguments after it ran, and the twin's."""
    actual, expected = to_device(args, device), [for_twin(a, dtype) for a in args]
    for i, a in enumerate(args):
        for j in range(i):
            if a is args[j] and isinstance(a, torch.Tensor):
                expected[j] = expected[i]
    # cuDNN computes wide 3x3 convolutions. It obeys PyTorch's own switch, which is on by default.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=options.get("allow_tf32", False)):
        getattr(torch.ops.densenet_ext, op)(*actual, **options)
    getattr(reference, op)(*expected)
    actual = to_device(actual, "cpu")
    if dtype not in ARITHMETIC:
        use_moments_of_stored_values(op, actual, expected)
    return actual, expected


def use_moments_of_stored_values(op, actual, expected):
    """Take the twin's moments from the kernel's stored values, which may be rounded otherwise than the twin's."""
    if op == "bottleneck_forward" and expected[5] is not None:
        rows, (mean, m2) = actual[4][:, : expected[5].size(1)].double(), expected[5:]
        mean[:] = rows.sum(0) / max(len(rows), 1)
        m2[:] = (rows - mean).square().sum(0)
    if op == "conv3x3_forward" and expected[8] is not None:
        columns = slice(actual[7], actual[7] + actual[3].size(0))
        write_moments(actual[6][:, columns], *expected[8:], columns)


def check(op, args, dtype, device="cpu", **options):
    """Compare outputs with the twin's, and check that all other bytes are unchanged."""
    actual, expected = run_both(op, args, dtype, device, **options)
    units = is_channels_last(torch.empty(0, device=device)) or (TILE_UNIT and dtype == torch.bfloat16)
    operands = OPERANDS.get(torch.float16 if options else dtype, 0.0) if units and op in PRODUCTS else 0.0
    schema = getattr(torch.ops.densenet_ext, op).default._schema
    for argument, got, want, original in zip(schema.arguments[: len(args)], actual, expected, args, strict=True):
        if not isinstance(got, torch.Tensor):
            continue
        written = argument.alias_info is not None or any(
            got is actual[i] for i in range(len(args)) if is_written(schema, i)
        )
        assert_gaps_unchanged(got, original, argument.name)
        if written:
            assert_near(got, want, argument.name, operands * SUMS.get(argument.name, 1))
        else:
            assert bits(got).equal(bits(original)), f"{argument.name} was changed"


def is_written(schema, index):
    return schema.arguments[index].alias_info is not None


def bits(x):
    """The tensor as bytes, so that NaN equals NaN."""
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_gaps_unchanged(got, original, name):
    if original._base is None:
        return
    inside = torch.zeros_like(original._base, dtype=torch.bool)
    inside.as_strided(original.shape, original.stride(), original.storage_offset()).fill_(True)
    assert bits(got._base[~inside]).equal(bits(original._base[~inside])), f"{name} was changed between its planes"


def assert_near(got, want, name, operands):
    """Assert that both are NaN at the same places, and near each other elsewhere."""
    rounding = STORAGE[got.dtype]
    got, want, near = got.double(), want.double(), ARITHMETIC.get(got.dtype, ARITHMETIC[torch.float32]) + operands
    assert torch.equal(got.isnan(), want.isnan()), f"{name} has NaN at other places"
    got, want = got.nan_to_num(), want.nan_to_num()
    if want.numel():
        excess = (got - want).abs() - rounding * want.abs() - near * want.abs().max()
        assert excess.max() <= 0, f"{name}: error {(got - want).abs().max():.2e} of values up to {want.abs().max():.2e}"


def problems(shape, dtype, op, device="cpu"):
    """The arguments of an op without masks and, if the op takes masks, with them."""
    kinds = ("none", "pre", "all") if op in MASKED else ("none",)
    return [Problem(shape, dtype, masks, device=device) for masks in kinds]


def fits(op, shape):
    return not op.startswith("transition") or (shape.height > 1 and shape.width > 1)


def first_and_last(op):
    """The first variant of an op's options, which has none, and the last, which has the most."""
    return OPS[op][:: max(1, len(OPS[op]) - 1)]


def label(value):
    return (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value).removeprefix("torch.")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "options"), CASES, ids=label)
def test_kernel_equals_twin(op, options, shape, dtype, device):
    if not fits(op, shape):
        pytest.skip("a transition needs 2x2 pixels")
    for problem in problems(shape, dtype, op, device):
        check(op, getattr(problem, op)(**options), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", PRODUCTS)
def test_tf32(op, shape, device):
    """With allow_tf32 float32 products may differ by TF32's rounding; on a device without TF32 they may not."""
    if not fits(op, shape):
        pytest.skip("a transition needs 2x2 pixels")
    for problem in problems(shape, torch.float32, op, device):
        check(op, getattr(problem, op)(), torch.float32, device, allow_tf32=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads(op, threads):
    """5 threads are more than there are samples, and do not divide the rows."""
    torch.set_num_threads(threads)
    for shape in (Shape("", samples=3, height=33, width=31), Shape("", samples=1, height=12, width=12, bottleneck=40)):
        for problem in problems(shape, torch.float32, op):
            for options in first_and_last(op):
                check(op, getattr(problem, op)(**options), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_repeated_run_is_bit_equal(op, device):
    shape = Shape("", samples=3, height=17, width=19, channels=20, bottleneck=24, growth=6)
    problem = problems(shape, torch.float32, op, device)[-1]
    for options in first_and_last(op):
        args = getattr(problem, op)(**options)
        first, second = to_device(args, device), to_device(args, device)
        getattr(torch.ops.densenet_ext, op)(*first)
        getattr(torch.ops.densenet_ext, op)(*second)
        for a, b in zip(first, second, strict=True):
            assert not isinstance(a, torch.Tensor) or bits(a).equal(bits(b))


FORWARD = {"bottleneck_forward": 4, "conv3x3_forward": 6, "transition_forward": 4, "head_forward": 3, "stem_forward": 7}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)  # float64 never uses the tile unit
@pytest.mark.parametrize("op", FORWARD)
def test_nan_reaches_what_depends_on_it(op, dtype, device):
    """One NaN among the inputs: relu(NaN) is NaN, as in PyTorch."""
    options = {"has_statistics": True} if op == "stem_forward" else {}
    args = getattr(Problem(Shape("", height=8, width=8), dtype, device=device), op)(**options)
    first = args[0]
    first[(0, 1, 3, 3) if first.dim() == 4 else (9, 1)] = torch.nan
    actual, expected = run_both(op, args, dtype, device)
    out = FORWARD[op]
    assert expected[out].isnan().any() and not expected[out].isnan().all()
    assert torch.equal(actual[out].isnan(), expected[out].isnan())


@pytest.mark.parametrize("training", [True, False])
def test_gradient_goes_to_the_last_nan_of_a_window(training):
    """The pool treats NaN as torch.nn.MaxPool2d does: a NaN counts as larger than every value before it."""
    args = Problem(Shape("", height=9, width=9), torch.float32).stem_backward(training=training)
    args[0][0, 1, 2:5, 3:6] = torch.nan
    actual, expected = run_both("stem_backward", args, torch.float32)
    for got, want in zip(actual[8:], expected[8:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4, equal_nan=True)


def assert_rejected(op, args, message, device):
    """Assert that the op raises this error before it has written anything."""
    actual = to_device(args, device)
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.densenet_ext, op)(*actual)
    for argument, got, original in zip(op_arguments(op), to_device(actual, "cpu"), args, strict=False):
        assert not isinstance(got, torch.Tensor) or bits(got).equal(bits(original)), f"{argument.name} was changed"


def op_arguments(op):
    return getattr(torch.ops.densenet_ext, op).default._schema.arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_each_tensor_has_a_dtype_and_a_shape(op, device):
    """Each tensor in turn has an integer dtype, or one dimension too many; the error names it."""
    problem = problems(Shape("", height=6, width=6), torch.float32, op, device)[-1]
    options = {"previous": True, "grad_in": "other"} if op == "bottleneck_backward" else {}
    args = list(getattr(problem, op)(**options))
    for i, (argument, value) in enumerate(zip(op_arguments(op), args, strict=False)):
        if isinstance(value, torch.Tensor):
            for other in (value.int(), value[None]):
                assert_rejected(op, [*args[:i], other, *args[i + 1 :]], f", {argument.name} must (be|have)", device)


def more_rows(x):
    return torch.cat([x, x])


def with_gaps(x):
    """Channels-last maps whose pixels lie apart."""
    return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.size(1)]


# Ops reject other wrong arguments, too: (op, argument, function of the wrong value, error).
REJECTED = [
    ("append", "m2", lambda _: None, "both be tensors or both be None"),
    ("append", "offset", lambda _: -1, "channels -1 to 3 of"),
    ("append", "offset", lambda offset: offset + 3, "channels 19 to 23 of 22"),
    ("bottleneck_forward", "mean", lambda _: None, "both be tensors or both be None"),
    ("bottleneck_forward", "weight", lambda x: torch.cat([x, x], 1), "channels 0 to 32 of 18"),
    ("bottleneck_forward", "scale", lambda x: torch.cat([x, x, x]), "scale must have 1 or 2 rows"),
    ("bottleneck_backward", "previous_shift", lambda _: None, "previous_weight needs previous_scale"),
    ("bottleneck_backward", "previous_weight", more_rows, "previous_weight must have shape"),
    ("bottleneck_backward", "previous_scale", lambda x: torch.cat([x, x, x]), "previous_scale must have 1 or 2 rows"),
    ("conv3x3_forward", "m2", lambda _: None, "both be tensors or both be None"),
    ("conv3x3_forward", "weight", lambda x: x[:, :, 0], "weight must have 4 dimensions, got 3"),
    ("conv3x3_backward", "offset", lambda offset: offset + 3, "channels 19 to 23 of 22"),
    ("squeeze_excite_forward", "fc2_weight", lambda x: x[0], "fc2_weight must have 2 or 4 dimensions, got 1"),
    ("squeeze_excite_backward", "offset", lambda offset: offset + 3, "channels 19 to 23 of 22"),
    ("fold_norm", "mean", lambda x: x[:, :10].contiguous(), "mean must have shape .rows, >= 16"),
    ("fold_norm", "pre_mask", more_rows, "pre_mask must have shape"),
    ("fold_norm", "shift", lambda x: x[:1].clone(), "single one where post_mask is None"),
    # A transition has no masks, so all samples share a row of scale and shift.
    ("transition_forward", "scale", more_rows, "scale must have shape .1, 16., got .2, 16."),
    ("transition_backward", "shift", more_rows, "shift must have shape .1, 16., got .2, 16."),
    ("transition_backward", "grad_out", more_rows, "grad_out must have shape"),
    ("head_backward", "grad", more_rows, "grad must have shape"),
    ("stem_forward", "x", with_gaps, "x must be channels last without gaps"),
    ("stem_forward", "x", lambda x: x.contiguous(), "x must be channels last without gaps"),
    ("stem_backward", "dx", with_gaps, "dx must be channels last without gaps"),
    ("finish_gradient", "offset", lambda _: -1, "channels -1 to 3 of"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "name", "change", "message"), REJECTED, ids=lambda value: str(value).split()[0])
def test_rejects(op, name, change, message, device):
    problem = problems(Shape("", height=6, width=6), torch.float32, op, device)[-1]
    args = list(getattr(problem, op)(**({"previous": True} if name.startswith("previous") else {})))
    i = [argument.name for argument in op_arguments(op)].index(name)
    args[i] = change(args[i])
    assert_rejected(op, args, message, device)
