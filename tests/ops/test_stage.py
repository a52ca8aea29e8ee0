"""The stage ops against plain PyTorch on the same arguments: values, gradients, and how they behave in a graph."""

import threading
from itertools import product

import pytest
import torch
from stage_cases import Case

from densenet_ext import reference
from densenet_ext._protocol import Options, StageSizes, tail_params

MASKS = range(32)
TAILS = (0, 1, 2)
FROZEN = ("none", "all", "every second")
EVERYTHING = list(product(MASKS, (False, True), TAILS, FROZEN))
ALL_MASKS = 31


def name(value):
    return value.replace(" ", "-") if isinstance(value, str) else None


def gradients(output, x, params, grad):
    return torch.autograd.grad(output, [x, *params], grad)


def largest_error(got, want):
    """The largest error of several tensors, each relative to its largest value."""
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("keep_bottleneck", [False, 1, True])
@pytest.mark.parametrize(("mask_kind", "squeeze_excite", "tail", "frozen"), EVERYTHING, ids=name)
def test_equals_plain(mask_kind, squeeze_excite, tail, frozen, keep_bottleneck):
    case = Case(mask_kind, squeeze_excite, tail, frozen)
    x, params = case.leaves()
    got, want = case.fused(x, params, keep_bottleneck), case.plain(x, params)
    grad = torch.randn_like(want)
    assert largest_error([got], [want]) < 1e-12
    assert largest_error(gradients(got, x, params, grad), gradients(want, x, params, grad)) < 1e-10


@pytest.mark.parametrize(("mask_kind", "squeeze_excite", "tail", "frozen"), EVERYTHING, ids=name)
def test_gradcheck(mask_kind, squeeze_excite, tail, frozen):
    case = Case(mask_kind, squeeze_excite, tail, frozen)
    x, params = case.leaves()
    assert torch.autograd.gradcheck(lambda x, *p: case.fused(x, list(p)), (x, *params), fast_mode=True)


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_of_every_entry(tail):
    """gradcheck of single entries, without the random projection of its fast mode."""
    case = Case(ALL_MASKS, True, tail, "every second", in_channels=2, width=3)
    x, params = case.leaves()
    assert torch.autograd.gradcheck(lambda x, *p: case.fused(x, list(p)), (x, *params))


@pytest.mark.parametrize("keep_bottleneck", [False, 1, True])
@pytest.mark.parametrize(
    ("mask_kind", "squeeze_excite", "frozen"), list(product(MASKS, (False, True), FROZEN)), ids=name
)
def test_layer_equals_plain(mask_kind, squeeze_excite, frozen, keep_bottleneck):
    case = Case(mask_kind, squeeze_excite, 0, frozen, in_channels=6, layers=1)
    x, params = case.leaves()
    inputs = [part.clone().detach().requires_grad_() for part in x.split([3, 1, 2], 1)]
    got = torch.ops.densenet_ext.dense_layer(*case.layer_args(inputs, params, keep_bottleneck))[0]
    want = case.plain(torch.cat(inputs, 1), params)[:, 6:]
    grad = torch.randn_like(want)
    assert largest_error([got], [want]) < 1e-12
    leaves = [*inputs, *params]
    got, want = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
    assert largest_error(got, want) < 1e-10


SIZES = {
    "growth 12 on 32x32": {"samples": 3, "in_channels": 24, "growth": 12, "width": 48, "height": 32, "breadth": 32},
    "growth 32 on 14x14": {"in_channels": 40, "growth": 32, "width": 128, "height": 14, "breadth": 14},
    "odd sizes": {"samples": 3, "in_channels": 13, "growth": 5, "width": 20, "height": 33, "breadth": 31},
    "7x7": {"in_channels": 16, "growth": 8, "width": 32, "height": 7, "breadth": 7},
    "one sample": {"samples": 1, "height": 5, "breadth": 5},
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("size", SIZES, ids=name)
def test_equals_plain_at_real_sizes(size, tail):
    case = Case(ALL_MASKS, True, tail, **SIZES[size])
    x, params = case.leaves()
    got, want = case.fused(x, params), case.plain(x, params)
    grad = torch.randn_like(want)
    assert largest_error([got], [want]) < 1e-12
    assert largest_error(gradients(got, x, params, grad), gradients(want, x, params, grad)) < 1e-10


@pytest.mark.parametrize("mask_kind", [0, ALL_MASKS])
@pytest.mark.parametrize("keep_bottleneck", [False, 1, True])
@pytest.mark.parametrize("tail", TAILS)
def test_every_output_equals_reference(tail, keep_bottleneck, mask_kind):
    """The statistics, gates and bottlenecks kept for backward, too, and the strides that shape functions promise."""
    case = Case(mask_kind, True, tail, "every second", height=17, breadth=18)
    got = torch.ops.densenet_ext.dense_stage(*case.args(keep_bottleneck=keep_bottleneck))
    want = reference.dense_stage(*case.args(keep_bottleneck=keep_bottleneck))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert a.stride() == b.stride()


CHANNELS_LAST = {
    "channels no multiple of 16": {"in_channels": 21, "height": 9, "breadth": 7},
    "as after the stem of a CIFAR network": {"in_channels": 24, "height": 32, "breadth": 32},
    "one channel, planar as well": {"in_channels": 1},
    "one pixel, planar as well": {"in_channels": 5, "height": 1, "breadth": 1},
    "one sample": {"samples": 1, "in_channels": 17, "height": 17, "breadth": 1},
    "empty batch": {"samples": 0, "height": 4, "breadth": 4},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", [0, 2])  # a transition wants two rows and columns
@pytest.mark.parametrize("size", CHANNELS_LAST, ids=name)
def test_channels_last_input_changes_no_bit_but_the_layout_of_its_gradient(size, tail, dtype):
    case = Case(tail=tail, dtype=dtype, **CHANNELS_LAST[size])
    x, params = case.leaves()
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for leaf in (x, last):
        output = case.fused(leaf, params)
        results.append([output, *gradients(output, leaf, params, torch.ones_like(output))])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert results[1][1].stride() == last.stride() or last.numel() == 0 or last.is_contiguous()


def test_channels_last_backward_equals_reference():
    """dx is right in each layout that it may have."""
    case = Case(tail=2, height=17, breadth=18)
    output, features, *state = reference.dense_stage(*case.args())
    for layout in (0, 1, 2):
        rest = case.backward_args(torch.ones_like(output), features, state, layout)
        got, want = torch.ops.densenet_ext.dense_stage_backward(*rest), reference.dense_stage_backward(*rest)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        assert got[0].stride() == want[0].stride()
    with pytest.raises(RuntimeError, match="dx_layout must be 0, 1 or 2, got 3"):
        torch.ops.densenet_ext.dense_stage_backward(*rest[:-1], 3)


def parts_of_backward(case, ops, layout=1):
    """Call dense_tail_backward and dense_block_backward of `ops`, and return their results and written arguments."""
    output, features, stats, *state = reference.dense_stage(*case.args())
    count = tail_params(case.tail)
    options = [*case.options()]
    tail = (features, case.params[-count:], stats, case.eps[-1], bool(case.frozen[-1]), options)
    tail = (torch.ones_like(output), *tail)
    buffer, coef, dtail = ops.dense_tail_backward(*tail)
    started = buffer.clone(), coef.clone()
    numbers = (*case.numbers(), case.in_channels, layout)
    dparams = ops.new_gradients(case.params[:-count])
    block = (buffer, coef, dparams, features, case.params[:-count], case.masks, stats, *state, *numbers)
    dx = ops.dense_block_backward(*block)
    return [*started, *dtail, dx, buffer, coef, *dparams], tail, block


@pytest.mark.parametrize("frozen", FROZEN, ids=name)
@pytest.mark.parametrize("tail", [1, 2])
def test_parts_of_backward_equal_reference(tail, frozen):
    """Both parts also write the same values into their arguments, and together they equal dense_stage_backward."""
    case = Case(ALL_MASKS, True, tail, frozen, height=17, breadth=18)
    for layout in (0, 1, 2):
        got, args, block = parts_of_backward(case, torch.ops.densenet_ext, layout)
        want, *_ = parts_of_backward(case, reference, layout)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        assert all(a.stride() == b.stride() for a, b in zip(got[2:], want[2:], strict=True))
        rest = case.backward_args(args[0], args[1], block[6:9], layout)
        dx, dparams = torch.ops.densenet_ext.dense_stage_backward(*rest)
        tail_end = 2 + len(args[2])
        parts = [got[tail_end], *got[len(got) - len(block[2]) :], *got[2:tail_end]]
        assert all(a.equal(b) for a, b in zip([dx, *dparams], parts, strict=True))


@pytest.mark.parametrize("tail", [1, 2])
def test_opcheck_of_parts_of_backward(tail):
    _, args, block = parts_of_backward(Case(ALL_MASKS, True, tail, "every second"), torch.ops.densenet_ext)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.densenet_ext.dense_tail_backward.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.densenet_ext.dense_block_backward.default, block, test_utils=checks)


def test_parts_of_backward_check_their_arguments():
    _, args, block = parts_of_backward(Case(tail=2), torch.ops.densenet_ext)
    with pytest.raises(RuntimeError, match=r"stats must have shape \[4, >= 7\], got \[4, 6\]"):
        torch.ops.densenet_ext.dense_tail_backward(*args[:3], args[3][:, :6].contiguous(), *args[4:])
    with pytest.raises(RuntimeError, match="params must hold 2 tensors, got 1"):
        torch.ops.densenet_ext.dense_tail_backward(*args[:2], args[2][:1], *args[3:])
    with pytest.raises(RuntimeError, match="dparams must hold 12 tensors, got 11"):
        torch.ops.densenet_ext.dense_block_backward(*block[:2], block[2][:-1], *block[3:])


NOT_SERVED = {
    "kept_bottlenecks must be at least 0 and at most 2, all layers, got 3": {"kept_bottlenecks": 3},
    "kept_bottlenecks must be at least 0 and at most 2, all layers, got -1": {"kept_bottlenecks": -1},
    "tail must be 0, 1 or 2, got 5": {"tail": 5},
    "mask_kind must be a sum of 1, 2, 4, 8 and 16, got 32": {"mask_kind": 32},
}


@pytest.mark.parametrize("message", NOT_SERVED)
def test_what_is_not_served_is_refused_in_one_sentence(message):
    """Forward and backward refuse it alike."""
    case = Case()
    output, _, *state = torch.ops.densenet_ext.dense_stage(*case.args())
    options = [*case.options()._replace(**NOT_SERVED[message])]
    *args, _ = case.args()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.densenet_ext.dense_stage(*args, options)
    *args, _, in_channels, layout = case.backward_args(output, output, state)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.densenet_ext.dense_stage_backward(*args, options, in_channels, layout)


def test_options_of_another_length_are_refused():
    *args, options = Case().args()
    with pytest.raises(RuntimeError, match=f"options must hold {len(Options._fields)} numbers, got 2"):
        torch.ops.densenet_ext.dense_stage(*args, options[:2])


@pytest.mark.parametrize("shape", [(), (8,), (3, 7), (3, 7, 1)])
def test_parameters_of_other_dimensions_are_refused(shape):
    """Each tensor of a stage in turn, by a sentence of the op's own, forward and backward."""
    case = Case(ALL_MASKS, True, 1)
    x, params, *rest = case.args()
    wrong = torch.ones(shape, dtype=torch.double)
    for i in range(len(params)):
        with pytest.raises(RuntimeError, match="must have"):
            torch.ops.densenet_ext.dense_stage(x, [*params[:i], wrong, *params[i + 1 :]], *rest)
    output, features, *state = torch.ops.densenet_ext.dense_stage(x, params, *rest)
    grad, features, params, *rest = case.backward_args(output, features, state)
    for i in range(len(params)):
        with pytest.raises(RuntimeError, match="must have"):
            torch.ops.densenet_ext.dense_stage_backward(grad, features, [*params[:i], wrong, *params[i + 1 :]], *rest)


@pytest.mark.parametrize(("shape", "dimensions"), [((2, 3, 4), 3), ((2, 3, 4, 4, 4), 5)])
def test_signals_and_volumes_are_refused(shape, dimensions):
    case = Case()
    with pytest.raises(RuntimeError, match=f"got {dimensions}: signals and volumes are not served yet"):
        torch.ops.densenet_ext.dense_stage(*case.args(torch.randn(shape, dtype=torch.float64)))


@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_sizes_in_python_are_those_of_the_op(tail, squeeze_excite):
    """_protocol.py and csrc/stage/protocol.h agree."""
    case = Case(tail=tail, squeeze_excite=squeeze_excite)
    sizes = StageSizes(case.params, case.options(keep_bottleneck=True), case.in_channels)
    *_, stats, gates, bottlenecks = torch.ops.densenet_ext.dense_stage(*case.args(keep_bottleneck=True))
    assert stats.shape == sizes.stats_shape() and gates.shape == sizes.gates_shape(case.samples)
    assert bottlenecks.shape == sizes.bottlenecks_shape(case.samples * case.height * case.breadth)
    assert len(sizes.layers) == case.layers and all(
        (layer.fc1_weight is not None) == squeeze_excite for layer in sizes.layers
    )


@pytest.mark.parametrize("tail", TAILS)
def test_kept_bottlenecks_change_no_bit(tail):
    """Neither does a second backward, which finds those that are kept as the first one left them."""
    case = Case(ALL_MASKS, True, tail, dtype=torch.float32, height=17, breadth=18, growth=5, width=20, layers=4)
    results = []
    for kept in range(case.layers + 1):
        x, params = case.leaves()
        output = case.fused(x, params, kept)
        for _ in range(2):
            grads = torch.autograd.grad(output, [x, *params], torch.ones_like(output), retain_graph=True)
            results.append([output, *grads])
    assert all(a.equal(b) for result in results for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_runs_are_bit_equal(threads):
    torch.set_num_threads(threads)
    case = Case(ALL_MASKS, True, 1, dtype=torch.float32, samples=5, height=19, breadth=18, growth=6, width=24)
    results = []
    for _ in range(3):
        x, params = case.leaves()
        output = case.fused(x, params)
        results.append([output, *gradients(output, x, params, torch.ones_like(output))])
    for repeated in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], repeated, strict=True))


@pytest.mark.parametrize("wanted", ["x", "params", "one", "every second", "tail", "last"])
@pytest.mark.parametrize("tail", TAILS)
def test_subsets_of_inputs_that_need_gradients(tail, wanted):
    case = Case(ALL_MASKS, True, tail)
    x, params = case.leaves()
    leaves = [x, *params]
    chosen = {
        "x": leaves[:1],
        "params": leaves[1:],
        "one": [leaves[3]],
        "every second": leaves[::2],
        "tail": leaves[-(0, 3, 2)[tail] :],  # all without one
        "last": leaves[-1:],
    }[wanted]
    for leaf in leaves:
        leaf.requires_grad_(any(leaf is c for c in chosen))
    got, want = case.fused(x, params), case.plain(x, params)
    grad = torch.randn_like(want)
    assert largest_error(torch.autograd.grad(got, chosen, grad), torch.autograd.grad(want, chosen, grad)) < 1e-10


@pytest.mark.parametrize("tail", TAILS)
def test_backward_twice_gives_the_same(tail):
    case = Case(ALL_MASKS, True, tail)
    x, params = case.leaves()
    output = case.fused(x, params)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, [x, *params], grad, retain_graph=True)
    second = torch.autograd.grad(output, [x, *params], grad)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_asked_for_one_by_one(tail):
    """A gradient that is asked for alone equals the one that a call for all gradients gives."""
    case = Case(ALL_MASKS, True, tail)
    x, params = case.leaves()
    output = case.fused(x, params)
    grad = torch.randn_like(output)
    together = torch.autograd.grad(output, [x, *params], grad, retain_graph=True)
    for leaf, want in zip([x, *params], together, strict=True):
        assert torch.autograd.grad(output, leaf, grad, retain_graph=True)[0].equal(want)


class NoGradient(torch.autograd.Function):
    """The identity, whose backward returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("tail", TAILS)
def test_no_gradient_of_the_output_gives_none(tail):
    case = Case(tail=tail)
    x, params = case.leaves()
    output = NoGradient.apply(case.fused(x, params))
    grads = torch.autograd.grad(output.sum(), [x, *params], allow_unused=True)
    assert grads == (None,) * (1 + len(params))


@pytest.mark.parametrize("tail", TAILS)
def test_feature_maps_are_saved_once(tail):
    """Hooks that move the tensors kept for backward elsewhere move the feature maps only once."""
    case = Case(ALL_MASKS, True, tail)
    x, params = case.leaves()
    channels, saved = case.in_channels + case.layers * case.growth, []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = case.fused(x, params)
    assert saved.count((case.samples, channels, case.height, case.breadth)) == 1
    grad = torch.randn_like(got)
    want = gradients(case.plain(x, params), x, params, grad)
    assert largest_error(gradients(got, x, params, grad), want) < 1e-10


@pytest.mark.parametrize("tail", [1, 2])
def test_writing_into_the_output_of_a_tail_is_allowed(tail):
    """Backward does not need the output of a tail."""
    case = Case(ALL_MASKS, True, tail)
    x, params = case.leaves()
    got, want = case.fused(x, params).mul_(2), case.plain(x, params) * 2
    grad = torch.randn_like(want)
    assert largest_error(gradients(got, x, params, grad), gradients(want, x, params, grad)) < 1e-10


@pytest.mark.parametrize("tail", TAILS)
def test_a_kept_gradient_of_the_input_keeps_its_values(tail):
    """The gradient may lie in the library's memory, which later steps use again."""
    sizes = {"samples": 8, "in_channels": 16, "height": 32, "breadth": 32, "dtype": torch.float32}
    case = Case(tail=tail, **sizes)
    x, params = case.leaves()
    case.fused(x, params).sum().backward()
    gradient, values = x.grad, x.grad.clone()
    for _ in range(2):
        other = case.x.clone().requires_grad_()
        case.fused(other * 3, params).square().sum().backward()
    assert gradient.equal(values) and gradient.count_nonzero() > 0


def test_same_parameters_twice_in_one_graph():
    case = Case(ALL_MASKS, True, 0)
    x, params = case.leaves()

    def twice(stage):
        return stage(stage(x, params)[:, : case.in_channels].contiguous(), params)

    got, want = twice(case.fused), twice(case.plain)
    grad = torch.randn_like(want)
    assert largest_error(gradients(got, x, params, grad), gradients(want, x, params, grad)) < 1e-10


def test_writing_into_the_output_of_a_block_is_noticed():
    """Backward needs the output of a block."""
    case = Case()
    x, params = case.leaves()
    output = case.fused(x, params)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("tail", TAILS)
def test_second_derivative_is_refused(tail):
    case = Case(tail=tail)
    x, params = case.leaves()
    (dx,) = torch.autograd.grad(case.fused(x, params).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("of", ["x", "layers", "tail"])
@pytest.mark.parametrize("tail", [1, 2])
def test_second_derivative_is_refused_of_each_gradient(tail, of):
    """Only this gradient is differentiated again, so each part of the stage has to refuse by itself."""
    case = Case(tail=tail)
    x, params = case.leaves()
    leaf = {"x": x, "layers": params[0], "tail": params[-1]}[of]
    for other in (x, *params):
        other.requires_grad_(other is leaf)
    (grad,) = torch.autograd.grad(case.fused(x, params).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("keep_bottleneck", [False, 1, True])
@pytest.mark.parametrize("tail", TAILS)
def test_opcheck(tail, keep_bottleneck):
    """Schema, shape functions with symbolic sizes, and autograd under tracing."""
    case = Case(ALL_MASKS, True, tail, "every second", height=17, breadth=18)
    torch.library.opcheck(torch.ops.densenet_ext.dense_stage.default, case.args(*case.leaves(), keep_bottleneck))


def test_opcheck_of_channels_last_input():
    case = Case(tail=2, height=17, breadth=18)
    x, params = case.leaves()
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.densenet_ext.dense_stage.default, case.args(x, params))


def test_opcheck_of_layer():
    case = Case(ALL_MASKS, True, 0, "every second", layers=1)
    x, params = case.leaves()
    inputs = [part.clone().detach().requires_grad_() for part in x.split([2, 1], 1)]
    torch.library.opcheck(torch.ops.densenet_ext.dense_layer.default, case.layer_args(inputs, params))


@pytest.mark.parametrize("frozen", ["none", "all"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_spreads_as_in_plain(tail, frozen):
    case = Case(tail=tail, frozen_norms=frozen, height=6, breadth=6)
    x, params = case.leaves()
    with torch.no_grad():
        x[0, 1, 2, 3] = torch.nan
    got, want = case.fused(x, params), case.plain(x, params)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()


@pytest.mark.parametrize("tail", TAILS)
def test_empty_batch(tail):
    """Zero samples give an output of zero samples and parameter gradients that are all zero."""
    case = Case(0, True, tail, samples=0, height=4, breadth=4)
    for keep_bottleneck in (False, True):
        x, params = case.leaves()
        output = case.fused(x, params, keep_bottleneck)
        assert output.shape == case.plain(x, params).shape
        dx, *dparams = gradients(output, x, params, torch.ones_like(output))
        assert dx.shape == x.shape
        assert all(d.count_nonzero() == 0 for d in dparams)


@pytest.mark.parametrize("keep_bottleneck", [False, 1, True])
@pytest.mark.parametrize("tail", TAILS)
def test_no_uninitialized_memory_is_read(tail, keep_bottleneck):
    """With deterministic algorithms PyTorch fills new memory with NaN."""
    case = Case(ALL_MASKS, True, tail, "every second", samples=3, height=17, breadth=19)
    x, params = case.leaves()
    want = case.plain(x, params)
    grad = torch.randn_like(want)
    expected = gradients(want, x, params, grad)
    torch.use_deterministic_algorithms(True)
    try:
        got = case.fused(x, params, keep_bottleneck)
        actual = gradients(got, x, params, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest_error([got, *actual], [want, *expected]) < 1e-10


def test_expanded_gradient():
    """The backward of sum() hands a gradient of stride 0 to the stage."""
    case = Case(ALL_MASKS, True, 0)
    x, params = case.leaves()
    got = torch.autograd.grad(case.fused(x, params).sum(), [x, *params])
    want = torch.autograd.grad(case.plain(x, params).sum(), [x, *params])
    assert largest_error(got, want) < 1e-10


def test_two_python_threads():
    """Two stages at once, many times: no buffer is shared."""
    cases = [Case(ALL_MASKS, True, 1, seed=seed, height=12, breadth=12, growth=6, width=24) for seed in range(2)]
    wrong = []

    def work(case):
        x, params = case.leaves()
        want = case.plain(x, params)
        expected = gradients(want, x, params, torch.ones_like(want))
        for _ in range(20):
            got = case.fused(x, params)
            error = largest_error(gradients(got, x, params, torch.ones_like(got)), expected)
            if error > 1e-10:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batch_statistics_without_cancellation():
    """Values of 1000 +- 0.01 in float32: the variance 1e-4 is right to 1 percent, where E[x^2] - E[x]^2 gives noise."""
    case = Case(dtype=torch.float32, samples=4, height=16, breadth=16)
    case.x = 1000 + 0.01 * torch.randn(case.x.shape)
    _, _, stats, _, _ = torch.ops.densenet_ext.dense_stage(*case.args())
    want = case.x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(stats[1, : case.in_channels].double(), want, rtol=1e-2, atol=0)
