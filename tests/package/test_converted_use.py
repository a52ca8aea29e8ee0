"""Things that people do to a converted network, and what they ask `convert` for."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from converted_networks import KuangliuLayer, assert_equal, build, images, pair, step
from tool_cases import replicas
from torch import nn

from densenet_ext import DenseLayerSpec, convert, functional, revert, set_fallback

pytest.importorskip("torchvision")
LAYER = "features.denseblock2.denselayer2"


@pytest.fixture
def calls(monkeypatch):
    """How often the fused ops compute a stage and a layer."""
    counts = {"dense_stage": 0, "dense_layer": 0}

    def count(name):
        original = getattr(functional, name)

        def counted(*args, **options):
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(functional, name, counted)

    for name in counts:
        count(name)
    return counts


@pytest.mark.parametrize(
    ("path", "stages", "layers"),
    [
        ("", 2, 0),
        ("features", 2, 0),  # the head is left to the modules
        ("features.conv0", 2, 0),
        ("features.denseblock1", 2, 0),
        ("features.transition1", 2, 0),
        ("features.transition1.norm", 2, 0),
        ("features.norm5", 2, 0),
        ("classifier", 2, 0),
        ("features.denseblock2.denselayer3", 1, 3),
        (f"{LAYER}.conv1", 1, 2),
        (f"{LAYER}.norm1", 1, 2),
    ],
)
def test_hooks_see_what_they_saw(path, stages, layers, calls):
    """Each hook runs once, with the values that it had; what is not concerned stays fused."""
    results = []
    for model in pair("torchvision"):
        for module in model.modules():  # torchvision's ReLUs overwrite what a hook has seen
            if isinstance(module, nn.ReLU):
                module.inplace = False
        seen = []
        model.get_submodule(path).register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach().clone()))
        calls.update(dense_stage=0, dense_layer=0)
        with set_fallback("silent"):
            results.append([*seen, *step(model, images())])
        assert len(seen) == 1
    assert (calls["dense_stage"], calls["dense_layer"]) == (stages, layers)
    assert_equal(results[1], results[0])


def test_hooks_of_grad_cam_on_monai():
    """MONAI's class activation maps take the output of class_layers.relu, and its gradient."""
    pytest.importorskip("monai")
    results = []
    for model in pair("MONAI"):
        seen = []
        relu = model.class_layers.relu
        relu.inplace = False
        relu.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach()))
        relu.register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.append(dy[0]))
        with set_fallback("silent"):
            model.eval()(images())[:, 1].sum().backward()
        results.append(seen)
    assert len(results[0]) == 2 and results[0][0].shape[2:] != (1, 1)
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("keep", ["auto", True])
def test_tensors_of_monai(keep, calls):
    """MetaTensor overrides methods of tensors with other signatures."""
    data = pytest.importorskip("monai").data
    plain = build("MONAI")
    converted = copy.deepcopy(plain)
    convert(converted, keep_bottleneck=keep)
    results = []
    for model in (converted, plain):
        y = model(data.MetaTensor(images()))
        assert type(y) is data.MetaTensor
        y.as_tensor().square().sum().backward()
        results.append([y.as_tensor(), *(p.grad for p in model.parameters())])
    assert_equal(*results)
    assert calls["dense_stage"] >= 2


def test_rates_and_parts_that_change_later(calls):
    """A rate is read at each call; a replaced stem or classifier is called; another norm makes a layer plain."""
    results = []
    for model in pair("torchvision"):
        for layer in model.features.denseblock2.values():
            layer.drop_rate = 0.4
        torch.manual_seed(5)
        model.features.conv0 = nn.Conv2d(3, 6, 5, stride=2, padding=2).double()
        model.classifier = nn.Sequential(nn.Linear(19, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        results.append(step(model, images()))
        model.features.denseblock2.denselayer1.norm1 = nn.GroupNorm(1, 7).double()
        with set_fallback("silent"):
            results[-1] += step(model, images(seed=3))
    assert_equal(results[1], results[0])
    assert calls["dense_layer"] == 2


def test_attribute_that_forward_reads_is_changed(calls):
    plain, converted = pair("torchvision")
    for model in (plain, converted):
        model.features.denseblock1.denselayer1.memory_efficient = True
        model.features.denseblock1.denselayer2.remark = "forward does not read this one"
    with (
        set_fallback("warn"),
        pytest.warns(
            UserWarning, match="denselayer1.memory_efficient was False when the model was converted and is Tr"
        ),
    ):
        assert_equal(step(converted, images()), step(plain, images()))
    assert calls["dense_layer"] == 1


def test_copies_and_pickles(calls):
    model = pair("torchvision")[1]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    wanted = step(copy.deepcopy(model), images())
    for other in others:
        assert type(other) is type(model)
        other.zero_grad()
        calls.update(dense_stage=0)
        other.load_state_dict(model.state_dict())
        assert_equal(step(copy.deepcopy(other), images()), wanted)
        assert calls["dense_stage"] == 2
    assert type(revert(others[0])) and type(others[0]).__module__ == "torchvision.models.densenet"


def test_pickle_loads_in_another_process(tmp_path):
    model = pair("torchvision")[1].eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save([images(), model(images())], tmp_path / "expected.pt")
    program = """
import sys, torch, densenet_ext
densenet_ext.set_fallback("error")
model, (x, y) = torch.load(sys.argv[1], weights_only=False), torch.load(sys.argv[2])
torch.testing.assert_close(model(x), y)
densenet_ext.revert(model)
torch.testing.assert_close(model(x), y)
"""
    arguments = [sys.executable, "-c", program, tmp_path / "model.pt", tmp_path / "expected.pt"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_replicas_and_threads():
    """nn.DataParallel's replicas, on two threads; the model is built on a third."""
    results, models = [], []
    thread = threading.Thread(target=lambda: models.extend(pair("torchvision")))
    thread.start()
    thread.join()
    for model in models:
        results.append(replicas(model))
    assert_equal(results[1], results[0])


def test_optimizer_and_ema_from_before():
    results = []
    for convert_it in (False, True):
        model = build("torchvision")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        if convert_it:
            convert(model)
            convert(ema)
        for seed in range(3):
            optimizer.zero_grad()
            model(images(seed=seed)).square().sum().backward()
            optimizer.step()
            ema.update_parameters(model)
        results.append([*model.state_dict().values(), *ema.state_dict().values(), ema.eval()(images())])
    assert_equal(results[1], results[0], 1e-7)


def test_scripting_needs_revert():
    model = pair("torchvision")[1].eval()
    with pytest.raises(NotImplementedError, match="revert"):
        torch.jit.script(model)
    revert(model)
    torch.testing.assert_close(torch.jit.script(model)(images()), model(images()))


class Louder(pytest.importorskip("torchvision").models.densenet._DenseLayer):
    def forward(self, x):
        return 2 * super().forward(x)


class Quiet(nn.Module):
    """A layer that is torchvision's, but for what `change` does."""

    def __init__(self, channels=6):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def new(self, x):
        return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))


class TrainsDifferently(Quiet):
    def forward(self, x):
        return torch.cat([x, self.new(x) * (0.9 if self.training else 1)], 1)


class Detaches(Quiet):
    def forward(self, x):
        return torch.cat([x, self.new(x.detach())], 1)


class CountsCalls(Quiet):
    def __init__(self, channels=6):
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return torch.cat([x, self.new(x)], 1)


SPEC = DenseLayerSpec(returns="concatenation")


@pytest.mark.parametrize(
    ("layer", "reason"),
    {
        TrainsDifferently: "in training mode the output differs",
        Detaches: "the gradient of",
        CountsCalls: "calls differs",
    }.items(),
)
def test_layer_that_computes_something_else_is_left_alone(layer, reason):
    model = nn.Sequential(nn.Sequential(layer(6), layer(10)), nn.ReLU())
    report = convert(model, layers={layer: SPEC})
    assert not report.fused and type(model[0][0]) is layer
    assert convert(model).fused == {}
    found = convert(nn.Sequential(layer(6)), layers={layer: SPEC})
    assert found.fused == {} and all(reason in why for why in found.left_alone.values()) and found.left_alone


def test_subclass_that_overrides_forward_is_left_alone():
    model = build("torchvision")
    block = model.features.denseblock2
    block.denselayer2.__class__ = Louder
    wanted = step(copy.deepcopy(model), images())
    report = convert(model)
    assert "Louder overrides the forward of _DenseLayer" in str(report) and type(block.denselayer2) is Louder
    assert_equal(step(model, images()), wanted)


def test_own_layers_by_a_spec(calls):
    """The spec that is passed wins over the tables, and a wrong one is refused by comparison."""

    class Renamed(KuangliuLayer):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.a, self.b = self.bn1, self.bn2
            del self.bn1, self.bn2

        def forward(self, x):
            y = self.conv2(torch.relu(self.b(self.conv1(torch.relu(self.a(x))))))
            return torch.cat([y, x], 1)

    torch.manual_seed(0)
    plain = nn.Sequential(*[Renamed(6 + 4 * i, 4, 8) for i in range(3)]).double()
    names = {"norm1": "a", "norm2": "b", "relu1": None, "relu2": None, "returns": "concatenation"}
    assert convert(copy.deepcopy(plain)).fused == {}
    assert convert(copy.deepcopy(plain), layers={Renamed: DenseLayerSpec(**names)}).fused == {}
    converted = copy.deepcopy(plain)
    report = convert(converted, layers={Renamed: DenseLayerSpec(**names, order="new_first")})
    assert list(report.fused.values()) == ["3 layers as one op"]
    x = torch.randn(2, 6, 5, 7, dtype=torch.double)
    calls.update(dense_stage=0)
    assert_equal(step(converted, x), step(plain, x))
    assert calls["dense_stage"] == 1


def test_convert_leaves_everything_else_alone():
    """Random numbers, modes and gradients are as before, under any context; no hook runs."""
    model = build("torchvision")
    model.features.denseblock1.train(False)
    model.features.conv0.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    model.features.denseblock2.denselayer1.conv1.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        report = convert(model)
    assert len([what for what in report.fused.values() if "layers as one op" in what]) == 2
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", [lambda m: m.to("meta"), lambda m: m.bfloat16(), lambda m: m.half().eval()])
def test_models_in_any_state_are_converted(change):
    assert len(convert(change(build("timm"))).fused) == 2


def test_no_library_is_imported():
    program = "import sys, densenet_ext; print([n for n in ('torchvision', 'timm', 'monai') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convert("densenet121"), TypeError, "model is a str; it must be a torch.nn.Module"),
        (lambda: revert(None), TypeError, "model is a NoneType"),
        (lambda: convert(nn.ReLU(), layers=[Quiet]), TypeError, "layers is a list; it must map classes"),
        (lambda: convert(nn.ReLU(), layers={"Quiet": SPEC}), TypeError, "layers has the key 'Quiet'"),
        (lambda: convert(nn.ReLU(), layers={Quiet: "bn1"}), TypeError, r"layers\[Quiet\] is a str"),
        (lambda: DenseLayerSpec(norm1=None), TypeError, "norm1 is None; it must be a name"),
        (lambda: DenseLayerSpec(order="first"), ValueError, "order is 'first'; it may be 'new_last' or 'new_first'"),
        (lambda: DenseLayerSpec(returns="all"), ValueError, "returns is 'all'; it may be 'new' or 'concatenation'"),
        (lambda: DenseLayerSpec(dropout="d", drop_rate="p"), ValueError, "only one may be given"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_example_that_differs_changes_nothing(monkeypatch):
    model = build("torchvision")
    original = functional.dense_stage
    monkeypatch.setattr(functional, "dense_stage", lambda *a, **k: original(*a, **k) * 1.01)
    with pytest.raises(ValueError, match="on `example` in training mode the converted model differs by"):
        convert(model, example=images())
    assert type(model).__module__ == "torchvision.models.densenet" and not hasattr(model, "_densenet_ext")


def test_parts_that_are_converted_already(calls):
    """A network around converted features is converted with its head; the report tells what was there before."""
    plain = build("torchvision")
    converted = copy.deepcopy(plain)
    convert(converted.features)
    report = convert(converted)
    assert str(report) == "features.* (2 modules)  left alone: it is converted already"
    with set_fallback("error"):
        assert_equal(step(converted, images()), step(plain, images()))
    revert(converted.features.denseblock1.denselayer2)
    assert "denselayer2" in str(convert(converted))


def test_report_of_a_model_without_dense_blocks():
    model = pytest.importorskip("torchvision").models.resnet18()
    assert str(convert(model)) == "no dense block was found"


def test_fallback_error_mode_names_the_part():
    model = pair("torchvision")[1]
    model.features.denseblock1.denselayer2.relu1.register_forward_hook(lambda *args: None)
    with (
        set_fallback("error"),
        pytest.raises(RuntimeError, match=r"features.denseblock1.denselayer2.relu1 has a forward"),
    ):
        model(images())
