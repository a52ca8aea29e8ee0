"""Recordings of fused networks for other processes: plain operators, the signature of the network, and no reports.

Each test runs in the mode in which a reported fallback is an error.
"""

import inspect
import io

import pytest
import torch
from fused_networks import MAKERS, fused_network
from small_networks import images

from densenet_ext import functional, revert

SIZE = (40, 40)
NAMES = list(MAKERS)
SAMPLES = torch.export.Dim("samples")


def float32(name):
    model = fused_network(name).float().eval()
    return model, images(3, SIZE, torch.float32), images(5, SIZE, torch.float32, seed=4)


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_computes_the_same(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, other = float32(name)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: SAMPLES},))
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert_equal(torch.from_numpy(got), model(other).detach())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_exported_program_has_plain_operators(name, strict, recwarn):
    model, x, other = float32(name)
    (argument,) = inspect.signature(model.forward).parameters
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes={argument: {0: SAMPLES}})
    kinds = {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert kinds == {"aten"}
    assert_equal(program.module()(other), model(other).detach())
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_traced_file_has_plain_operators(name):
    model, x, other = float32(name)
    traced = torch.jit.trace(model, x, check_trace=False)
    kinds = {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()}
    assert "aten" in kinds and kinds <= {"aten", "prim"}
    assert_equal(traced(other), model(other).detach())


@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI"])
def test_converted_modules_have_their_signatures(name, monkeypatch):
    model = fused_network(name)
    signatures = {path: inspect.signature(module.forward) for path, module in model.named_modules()}
    x = images(3, SIZE)
    tails = []
    stage = functional.dense_stage
    monkeypatch.setattr(
        functional, "dense_stage", lambda *args, **kw: tails.append(len(args) - 2) or stage(*args, **kw)
    )
    want = model.eval()(**{next(iter(signatures[""].parameters)): x})
    assert tails == [2, 2, 1]  # a keyword is no reason to leave the head out
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        model(nothing=x)
    revert(model)
    assert signatures == {path: inspect.signature(module.forward) for path, module in model.named_modules()}
    torch.testing.assert_close(want, model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
def test_scripting_says_what_to_do_instead():
    with pytest.raises(NotImplementedError, match="load the weights into torchvision's DenseNet"):
        torch.jit.script(fused_network("built"))
    model = fused_network("torchvision").eval()
    with pytest.raises(NotImplementedError, match="call densenet_ext.revert"):
        torch.jit.script(model)
    x = images(3, SIZE)
    want = model(x)
    revert(model)
    torch.testing.assert_close(torch.jit.script(model)(x), want, rtol=1e-9, atol=1e-9)
