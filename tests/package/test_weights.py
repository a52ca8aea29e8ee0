"""load_weights: networks of other libraries, old files and wrappers give their outputs to ours, and ours to theirs."""

import io
import pickle
import re
import sys

import pytest
import torch
from torch import nn

from densenet_ext import DenseNetBC, densenet121, load_weights
from densenet_ext.weights import WeightsReport

SIZES = {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2}
INIT = {"num_init_features": 8}  # twice the growth rate, which timm always has


def ours(num_classes=5, **options):
    return DenseNetBC(**SIZES, **INIT, num_classes=num_classes, small_inputs=False, **options)


def torchvisions(num_classes=5):
    return pytest.importorskip("torchvision").models.DenseNet(**SIZES, **INIT, num_classes=num_classes)


def timms(num_classes=5, in_channels=3, **options):
    network = pytest.importorskip("timm.models.densenet").DenseNet
    return network(**SIZES, num_classes=num_classes, in_chans=in_channels, **options)


def monais(num_classes=5, in_channels=3, spatial_dims=2):
    network = pytest.importorskip("monai.networks.nets").DenseNet
    return network(spatial_dims, in_channels, num_classes, init_features=8, **SIZES)


def torchxrayvisions(num_classes=5):
    network = pytest.importorskip("torchxrayvision").models.DenseNet
    return network(**SIZES, **INIT, num_classes=num_classes, in_channels=3)


NETWORKS = {
    "ours": ours,
    "torchvision": torchvisions,
    "timm": timms,
    "MONAI": monais,
    "torchxrayvision": torchxrayvisions,
}


def trained(model, dtype=torch.double):
    """Give the network values that no initialization gives, statistics and counters included, for evaluation."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(7)
    return model.to(dtype).eval()


def images(channels=3, size=(37, 40)):
    return torch.randn(2, channels, *size, dtype=torch.double)


def outputs(model, x):
    """Return the logits; torchxrayvision's network would first resize the images."""
    with torch.no_grad():
        if type(model).__module__.startswith("torchxrayvision"):
            return model.classifier(torch.relu(model.features(x)).mean((2, 3)))
        return model(x)


def of_2017(state):
    return {re.sub(r"(denselayer\d+)\.(norm|conv)(\d)\.", r"\1.\2.\3.", key): value for key, value in state.items()}


def without_counters(state):
    return {key: value for key, value in state.items() if "num_batches" not in key}


def copy_of(state):
    return {key: value.clone() for key, value in state.items()}


def assert_unchanged(model, state):
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("target", NETWORKS)
@pytest.mark.parametrize("source", NETWORKS)
def test_outputs_are_those_of_the_source(source, target):
    theirs, model, x = trained(NETWORKS[source]()), trained(NETWORKS[target]()), images()
    assert not torch.allclose(outputs(model, x), outputs(theirs, x))
    report = load_weights(model, theirs.state_dict())
    torch.testing.assert_close(outputs(model, x), outputs(theirs, x), rtol=1e-11, atol=1e-11)
    assert report.loaded == list(model.state_dict()) and not (report.adapted or report.kept or report.ignored)
    forms = {"from MONAI's names": 62} if source == "MONAI" else {"to MONAI's names": 62}
    assert report.renamed == (forms if "MONAI" in (source, target) and source != target else {})


def _torchvision121():
    return pytest.importorskip("torchvision").models.densenet121()


def _timm121():
    return pytest.importorskip("timm").create_model("densenet121")


def _monai121():
    return pytest.importorskip("monai.networks.nets").DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000)


@pytest.mark.parametrize("build", [_torchvision121, _timm121, _monai121])
def test_densenet121_of_a_library_in_the_fused_network(build):
    theirs, model, x = trained(build()), densenet121(efficient=True).double().eval(), images(size=(64, 64))[:1]
    load_weights(model, theirs.state_dict())
    torch.testing.assert_close(outputs(model, x), outputs(theirs, x), rtol=1e-9, atol=1e-9)


def test_networks_in_three_dimensions_exchange_weights():
    theirs, model = monais(spatial_dims=3).double().eval(), monais(spatial_dims=3).double().eval()
    x = torch.randn(1, 3, 33, 33, 33, dtype=torch.double)
    load_weights(model, theirs.state_dict())
    torch.testing.assert_close(outputs(model, x), outputs(theirs, x), rtol=1e-12, atol=1e-12)


class Inside(nn.Module):
    """A network inside another module with a classifier before a sigmoid, as CheXNet has it."""

    def __init__(self, network):
        super().__init__()
        self.densenet121 = network
        network.classifier = nn.Sequential(network.classifier, nn.Sigmoid())


def in_front(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


FORMS = {
    "of 2017": (of_2017, {"from torchvision's names of 2017": 60}),
    "of 2017, without counters": (lambda s: of_2017(without_counters(s)), {"from torchvision's names of 2017": 50}),
    "of DataParallel": (in_front("module."), {"from a wrapper's names": 79}),
    "of both wrappers": (in_front("_orig_mod.module."), {"from a wrapper's names": 79}),
    "of a part that was wrapped": (
        lambda s: {key.replace("features.", "features.module.", 1): value for key, value in s.items()},
        {"from a wrapper's names": 77},
    ),
    "of Lightning": (in_front("model."), {"from names that begin with 'model.'": 79}),
    "of CheXNet": (
        lambda s: in_front("module.densenet121.")(
            {key.replace("classifier.", "classifier.0."): value for key, value in of_2017(s).items()}
        ),
        {
            "from a wrapper's names": 79,
            "from names that begin with 'densenet121.'": 79,
            "from torchvision's names of 2017": 60,
            "from a classifier in a Sequential": 2,
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_old_files_and_wrappers(form):
    change, renamed = FORMS[form]
    theirs, model, x = trained(ours()), trained(ours(efficient=True)), images()
    state = change(theirs.state_dict())
    before, values = list(state), list(state.values())
    report = load_weights(model, state)
    torch.testing.assert_close(outputs(model, x), outputs(theirs, x), rtol=1e-11, atol=1e-11)
    assert report.renamed == renamed
    assert list(state) == before and all(a is b for a, b in zip(state.values(), values, strict=True))


@pytest.mark.parametrize("wrap", [nn.DataParallel, Inside, lambda model: torch.compile(model, backend="eager")])
def test_the_model_may_be_wrapped(wrap):
    theirs, model, x = trained(ours()), trained(ours()), images()
    load_weights(wrap(model), theirs.state_dict())
    torch.testing.assert_close(outputs(model.features, x), outputs(theirs.features, x), rtol=1e-12, atol=1e-12)


def test_encoder_of_segmentation_models_pytorch():
    """It has no classifier, and a load_state_dict of its own."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = smp.encoders.get_encoder("densenet121", weights=None).double().eval()
    theirs, x = trained(_torchvision121()), images(size=(32, 32))
    with pytest.raises(ValueError, match=r"model has no classifier.weight, classifier.bias; classifier='skip' leaves"):
        load_weights(encoder, theirs.state_dict())
    report = load_weights(encoder, theirs.state_dict(), classifier="skip")
    assert report.ignored == ["classifier.weight", "classifier.bias"] and report.kept == []
    torch.testing.assert_close(encoder(x)[-1], theirs.features(x), rtol=1e-12, atol=1e-12)


def test_counters_are_loaded_where_both_have_them():
    theirs, model = trained(ours()), ours()
    load_weights(model, theirs.state_dict())
    assert model.features.norm5.num_batches_tracked == 7
    report = load_weights(model, without_counters(ours().state_dict()))
    assert model.features.norm5.num_batches_tracked == 7
    assert len(report.kept) == 13 and "kept     13 num_batches_tracked" in str(report)


def test_frozen_norms_have_no_counters():
    frozen = pytest.importorskip("torchvision").ops.FrozenBatchNorm2d

    def freeze(module):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, frozen(child.num_features))
            freeze(child)

    theirs, model, x = trained(ours()), ours().double().eval(), images()
    freeze(model)
    model.double()
    report = load_weights(model, theirs.state_dict())
    torch.testing.assert_close(outputs(model, x), outputs(theirs, x), rtol=1e-12, atol=1e-12)
    assert len(report.ignored) == 13 and "ignored  13 num_batches_tracked" in str(report)


def test_buffers_that_wrappers_and_libraries_add_are_no_weights():
    theirs = trained(ours())
    average = torch.optim.swa_utils.AveragedModel(theirs)
    state = {**average.state_dict(), "module.op_threshs": torch.rand(5)}
    report = load_weights(trained(ours()), state)
    assert report.ignored == ["n_averaged", "module.op_threshs"]


def test_other_classes():
    theirs, model = trained(torchvisions(7)), trained(ours())
    classifier = copy_of(model.classifier.state_dict())
    with pytest.raises(
        ValueError, match=r"classifier.weight is \(7, 20\) in source and \(5, 20\) in model; .*classifier='skip'"
    ):
        load_weights(model, theirs.state_dict())
    report = load_weights(model, theirs.state_dict(), classifier="skip")
    assert report.kept == report.ignored == ["classifier.weight", "classifier.bias"]
    assert_unchanged(model.classifier, classifier)
    x = images()
    torch.testing.assert_close(outputs(model.features, x), outputs(theirs.features, x), rtol=1e-11, atol=1e-11)


def test_classifier_is_left_alone_when_it_would_fit():
    model = trained(ours())
    classifier = copy_of(model.classifier.state_dict())
    load_weights(model, monais().state_dict(), classifier="skip")
    assert_unchanged(model.classifier, classifier)


@pytest.mark.parametrize(("theirs", "channels"), [(3, 1), (3, 2), (3, 4), (3, 6), (1, 3), (4, 3), (3, 3)])
def test_other_input_channels(theirs, channels):
    source, model = trained(ours(in_channels=theirs)), trained(ours(in_channels=channels))
    old = source.features.conv0.weight.detach()
    if theirs != channels:
        message = rf"conv0.weight is \(8, {theirs}, 7, 7\) in source .*; input_channels='adapt' takes another number"
        with pytest.raises(ValueError, match=message):
            load_weights(model, source.state_dict())
    report = load_weights(model, source.state_dict(), input_channels="adapt")
    how = {} if theirs == channels else {"features.conv0.weight": f"from {theirs} to {channels} input channels"}
    assert report.adapted == how
    adapted = model.features.conv0.weight.detach()
    if channels == 1:
        want = sum(old[:, c] for c in range(theirs))[:, None]
    else:
        want = torch.stack([old[:, j % theirs] for j in range(channels)], 1) * theirs / channels
    torch.testing.assert_close(adapted, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_input_channels_are_adapted_as_timm_does(channels):
    adapt = pytest.importorskip("timm.models").adapt_input_conv
    source, model = timms(), timms(in_channels=channels)
    load_weights(model, source.state_dict(), input_channels="adapt")
    want = adapt(channels, source.features.conv0.weight.detach())
    torch.testing.assert_close(model.features.conv0.weight.detach(), want)


def test_gray_images_give_what_the_same_in_three_channels_gives():
    source, model, gray = trained(ours()), trained(ours(in_channels=1)), images(1)
    load_weights(model, source.state_dict(), input_channels="adapt")
    want = outputs(source, gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(outputs(model, gray), want, rtol=1e-11, atol=1e-11)


def test_model_keeps_dtype_and_parameters():
    source, model = trained(ours()), ours().bfloat16()
    parameters = dict(model.named_parameters())
    model.features.conv0.weight.requires_grad_(False)
    load_weights(model, source.state_dict())
    assert all(parameters[name] is p and p.dtype == torch.bfloat16 for name, p in model.named_parameters())
    assert not model.features.conv0.weight.requires_grad and model.classifier.weight.requires_grad
    assert model.features.norm5.num_batches_tracked.dtype == torch.int64
    torch.testing.assert_close(model.classifier.weight, source.classifier.weight.bfloat16(), rtol=0, atol=0)


ENTRIES = ("state_dict", "model", "model_state_dict", "net")


@pytest.mark.parametrize("entry", [None, *ENTRIES])
@pytest.mark.parametrize("kind", ["path", "name", "mapping"])
def test_checkpoints(kind, entry, tmp_path):
    source, model = trained(ours()), trained(ours())
    content = source.state_dict() if entry is None else {"epoch": 3, entry: source.state_dict()}
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    report = load_weights(model, {"path": path, "name": str(path), "mapping": content}[kind])
    assert_unchanged(model, dict(source.state_dict()))
    name = "a state dict" if kind == "mapping" else str(path)
    assert report.source == (name if entry is None else f"{name}, entry {entry!r}")


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    source, model, path = trained(ours()), trained(ours()), tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    assert load_weights(model, path).source == str(path)
    assert_unchanged(model, dict(source.state_dict()))
    path.write_bytes(b"weights")
    with pytest.raises(ValueError, match="weights.safetensors is not a safetensors file, or it is damaged: "):
        load_weights(model, str(path))


def test_safetensors_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="weights.safetensors needs the package safetensors: pip install safetensors"):
        load_weights(ours(), tmp_path / "weights.safetensors")


class Spy:
    """Unpickling it runs code, as a hostile file would."""

    calls: list[int] = []

    def __reduce__(self):
        return Spy.calls.append, (1,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_refused(zipped, tmp_path):
    source, path = trained(ours()), tmp_path / "model.pt"
    torch.save(source, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as caught:
        load_weights(ours(), path)
    message = str(caught.value)
    assert message.startswith(f"{path} holds Python objects (densenet_ext.models.DenseNetBC) and not only tensors")
    advice = re.search(r"load_weights\(model, (torch\.load.*\.state_dict\(\))\)", message)[1]
    model = ours().double()
    load_weights(model, eval(advice))
    assert_unchanged(model, dict(source.state_dict()))


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"state_dict": ours().state_dict(), "args": Spy()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds Python objects"):
        load_weights(ours(), tmp_path / "checkpoint.pt")
    assert Spy.calls == []


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({}, protocol=2)[:3]])
def test_files_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="weights.pth"):
        load_weights(ours(), path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth is not a file that torch.load can read, or it is damaged"):
        load_weights(ours(), path)
    file = io.BytesIO()
    torch.save(ours().state_dict(), file)
    path.write_bytes(file.getvalue()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(ours(), path)


@pytest.mark.parametrize("stem_type", ["deep", "deep_tiered"])
def test_deep_stems_of_timm_are_refused(stem_type):
    deep = timms(stem_type=stem_type)
    message = "has a stem of three convolutions, as timm's densenet264d and densenetblur121d, and {} has not"
    with pytest.raises(ValueError, match="source " + message.format("model")):
        load_weights(ours(), deep.state_dict())
    with pytest.raises(ValueError, match="model " + message.format("source")):
        load_weights(deep, ours().state_dict())
    other = timms(stem_type=stem_type)
    load_weights(other, deep.state_dict())
    assert_unchanged(other, dict(deep.state_dict()))


def changed(**values):
    """A state dict of the network with these tensors in place of its own; None removes one."""
    state = {**ours().state_dict(), **{key.replace("__", "."): value for key, value in values.items()}}
    return {key: value for key, value in state.items() if value is not None}


LAYER = "features__denseblock1__denselayer1__"
ERRORS = {
    "a key is missing": (
        lambda: changed(features__norm5__bias=None),
        r"source does not fit model: source has no features\.norm5\.bias$",
    ),
    "a key is too many": (lambda: changed(head__weight=torch.rand(3)), r"model has no head\.weight$"),
    "the classifier is missing": (
        lambda: changed(classifier__weight=None, classifier__bias=None),
        r"source has no classifier\.weight, classifier\.bias; classifier='skip' leaves",
    ),
    "many keys differ": (
        lambda: DenseNetBC(growth_rate=4, block_config=(2, 4), num_classes=5, small_inputs=False).state_dict(),
        r"model has no features\.denseblock2\.denselayer4\.norm1\.weight, .* and 7 more$",
    ),
    "a shape differs": (
        lambda: changed(**{LAYER + "conv1__weight": torch.rand(8, 9, 1, 1)}),
        r"denselayer1\.conv1\.weight is \(8, 9, 1, 1\) in source and \(8, 8, 1, 1\) in model$",
    ),
    "many shapes differ": (
        lambda: DenseNetBC(6, block_config=(2, 3), bn_size=2, num_classes=5, small_inputs=False).state_dict(),
        r"; \d+ more tensors differ in shape$",
    ),
    "stem and classifier differ": (
        lambda: ours(7, in_channels=1).state_dict(),
        r"; classifier='skip' leaves .*; input_channels='adapt' takes another number of input channels$",
    ),
    "the stem differs in more than channels": (
        lambda: changed(features__conv0__weight=torch.rand(8, 1, 3, 3)),
        r"in model$",
    ),
    "two names of one weight": (
        lambda: {**ours().state_dict(), "module.classifier.bias": torch.rand(5)},
        r"classifier\.bias and module\.classifier\.bias are two names of one weight",
    ),
    "no state dict": (
        lambda: {"epoch": 3, "weights": {}},
        r"source has values that are no tensors, such as 'epoch'; .*'state_dict', 'model', 'model_state_dict' or 'net'",
    ),
    "nothing": (dict, "source has nothing; a state dict has tensors under strings"),
    "a tensor that cannot be converted": (
        lambda: changed(classifier__bias=torch.rand(5).to("meta")),
        "Cannot copy out of meta tensor|meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("target", [ours, monais])
def test_nothing_is_loaded_unless_everything_fits(case, target):
    source, message = ERRORS[case]
    model = target()
    before = copy_of(model.state_dict())
    if target is monais:  # its own keys are named
        message = message.replace(r"classifier\.", r"class_layers\.out\.") if "source has no" in message else message
        message = message.replace(r"denselayer1\.conv1", r"denselayer1\.layers\.conv1")
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load_weights(model, source())
    assert_unchanged(model, before)


ARGUMENTS = [
    (lambda: load_weights(None, {}), TypeError, "model has type NoneType; it must be a torch.nn.Module"),
    (
        lambda: load_weights(ours(), 3),
        TypeError,
        "source has type int; it must be a state dict, a checkpoint that holds",
    ),
    (lambda: load_weights(ours(), ours()), TypeError, "source is a module, a DenseNetBC; pass its state_dict()"),
    (
        lambda: load_weights(ours(), {"model": ours()}),
        TypeError,
        "source['model'] is a module, a DenseNetBC; pass its state_dict()",
    ),
    (
        lambda: load_weights(ours(), {}, classifier="keep"),
        ValueError,
        "classifier is 'keep'; it may be 'strict' or 'skip'",
    ),
    (
        lambda: load_weights(ours(), {}, input_channels=3),
        ValueError,
        "input_channels is 3; it may be 'strict' or 'adapt'",
    ),
    (lambda: load_weights(ours().to("meta"), ours().state_dict()), ValueError, "model is on the meta device"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ARGUMENTS, ids=[message for *_, message in ARGUMENTS])
def test_arguments(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_report_is_a_short_table():
    report = load_weights(
        monais(in_channels=1),
        {"net": without_counters(ours(7).state_dict())},
        classifier="skip",
        input_channels="adapt",
    )
    assert str(report).splitlines() == [
        "source   a state dict, entry 'net'",
        "loaded   64 tensors",
        "renamed  50 to MONAI's names",
        "adapted  features.conv0.weight from 3 to 1 input channels",
        "kept     class_layers.out.weight, class_layers.out.bias, 13 num_batches_tracked",
        "ignored  classifier.weight, classifier.bias",
    ]
    assert str(WeightsReport("x.pt", ["a"])) == "source   x.pt\nloaded   1 tensors"
