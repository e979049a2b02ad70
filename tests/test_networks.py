"The networks: layout, sizes, a class of one's own, first weights, folders, parameter groups."
import copy
import json
import os
import sys

import pytest
import torch
import torch.nn as nn
import torchvision
from house import answer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sac_lit.deeplabv2
from sac_lit.core import generator, NAMES, UserError
from sac_lit.deeplabv2 import (
    ARCHS,
    build_model,
    FCN8sVGG16,
    load_imagenet,
    mismatch,
    param_groups,
    predicted_classes,
    SegmentationModel,
    upsample,
)

quick = settings(deadline=None, derandomize=True, max_examples=10)


def layout(arch, num_classes=19):
    "A network without memory: shapes and names only."
    with torch.device("meta"): return SegmentationModel(arch, num_classes)


def shapes(arch):
    state = layout(arch).state_dict()
    return {k.removeprefix("backbone."): tuple(v.shape) for k, v in state.items()}


def tiny(seed=0):
    torch.manual_seed(seed)
    return build_model("deeplabv2_tiny", 19)


def noise(*size, seed=0):
    return torch.randn(*size, generator=generator(seed, "noise"))


def same(a, b):
    "Whether two networks have equal parameters."
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def vgg():
    "A DeepLab on VGG-16, the torchvision network of its first weights, and its tensors by name."
    torch.manual_seed(1)
    make, cfgs = torchvision.models.vgg.make_layers, torchvision.models.vgg.cfgs
    features = make(cfgs["D"], batch_norm=True).eval()
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(2, 2)
    return build_model("deeplabv2_vgg16", 19).eval(), features, state


# ---------------------------------------------------------------- layout

RELEASED = ("deeplabv2_resnet101", "deeplabv2_vgg16", "fcn8s_vgg16")


def released(arch, C=19):
    "Names and shapes below `backbone.` in the released snapshots."
    return {"deeplabv2_resnet101": released_resnet, "deeplabv2_vgg16": released_vgg,
            "fcn8s_vgg16": released_fcn}[arch](C)


def conv(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, n):
    four = {f"{name}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")}
    return four | {f"{name}.num_batches_tracked": ()}


def aspp(name, inputs, C):
    found = {}
    for i in range(4): found |= conv(f"{name}.conv2d_list.{i}", C, inputs, 3, 3)
    return found


def vgg_layers():
    "(number, name, shape) of each tensor of torchvision's features."
    with torch.device("meta"): state = torchvision.models.vgg16_bn().features.state_dict()
    return [(int(k.split(".")[0]), k.split(".")[1], tuple(v.shape)) for k, v in state.items()]


def released_resnet(C):
    with torch.device("meta"): state = torchvision.models.resnet101().state_dict()
    trunk = {f"model.{k}": tuple(v.shape) for k, v in state.items() if not k.startswith("fc.")}
    return trunk | aspp("model.layer5", 2048, C)


def released_vgg(C):
    trunk = {f"features.{i - (i > 33)}.{k}": shape for i, k, shape in vgg_layers()}
    fc6 = conv("features.42", 1024, 512, 3, 3)
    fc7 = conv("features.44", 1024, 1024, 3, 3)
    return trunk | fc6 | fc7 | aspp("classifier", 1024, C)


def released_fcn(C):
    block = lambda i: 1 if i < 24 else 2 if i < 34 else 3
    trunk = {f"block{block(i)}.{i}.{k}": shape for i, k, shape in vgg_layers()}
    fc6 = conv("vgg_head.0", 4096, 512, 7, 7) | norm("vgg_head.1", 4096)
    fc7 = conv("vgg_head.4", 4096, 4096, 1, 1) | norm("vgg_head.5", 4096)
    scores = (conv("vgg_head.8", C, 4096, 1, 1) | conv("score_pool4", C, 512, 1, 1)
              | conv("score_pool3", C, 256, 1, 1))
    return trunk | fc6 | fc7 | scores


@pytest.mark.parametrize("arch", RELEASED)
def test_names_and_shapes_are_those_of_the_released_networks(arch):
    assert shapes(arch) == released(arch)


def test_resnet_strides_and_dilations():
    net = layout("deeplabv2_resnet101").backbone.model
    assert net.maxpool.ceil_mode and net.maxpool.kernel_size == 3
    stages = ("layer1", 1, 1), ("layer2", 2, 1), ("layer3", 1, 2), ("layer4", 1, 4)
    for name, stride, rate in stages:
        stage = getattr(net, name)
        for block in stage:
            assert block.conv2.dilation == block.conv2.padding == (rate, rate), name
            assert block.conv2.stride == (1, 1), name
        strides = [block.conv1.stride for block in stage]
        assert strides == [(stride, stride)] + [(1, 1)] * (len(stage) - 1), name
        assert stage[0].downsample[0].stride == (stride, stride)
    assert [c.dilation for c in net.layer5.conv2d_list] == [(r, r) for r in (6, 12, 18, 24)]


def test_vgg_has_no_last_two_poolings():
    net = layout("deeplabv2_vgg16").backbone
    convs = {i: m for i, m in enumerate(net.features) if isinstance(m, nn.Conv2d)}
    assert list(convs) == [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 33, 36, 39, 42, 44]
    poolings = [i for i, m in enumerate(net.features) if isinstance(m, nn.MaxPool2d)]
    assert poolings == [6, 13, 23]
    assert [m.dilation[0] for m in convs.values()] == [1] * 10 + [2] * 3 + [4] * 2


@pytest.mark.parametrize("arch, millions, tensors", [
    ("deeplabv2_resnet101", 43.90, [208, 104, 4, 4]),
    ("deeplabv2_vgg16", 29.58, [26, 26, 6, 6]),
    ("fcn8s_vgg16", 134.38, [26, 26, 7, 7]),
    ("deeplabv2_tiny", .29, [36, 20])])
def test_sizes_and_groups(arch, millions, tensors):
    net = layout(arch)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    groups = param_groups(net, 1., .5)
    n = len(tensors)
    assert [len(g["params"]) for g in groups] == tensors
    assert [g["name"] for g in groups] == ["weights", "biases", "new weights", "new biases"][:n]
    assert [g["lr"] for g in groups] == [1, 2, 10, 20][:n]
    assert [g["weight_decay"] for g in groups] == [.5, 0, .5, 0][:n]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    scales = {id(m.weight) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert scales <= {id(p) for g in groups if g["weight_decay"] for p in g["params"]}


# ---------------------------------------------------------------- forward

@pytest.fixture(scope="module")
def nets():
    return {arch: layout(arch).eval() for arch in ARCHS}


@quick
@given(st.integers(32, 150), st.integers(32, 150))
def test_every_size_gives_scores_at_the_stride(nets, height, width):
    for arch, net in nets.items():
        images = torch.empty(1, 3, height, width, device="meta")
        with torch.no_grad(): logits = net(images)
        assert logits.shape[:2] == (1, 19), arch
        h, w = logits.shape[-2:]
        s = net.stride
        assert s == (4 if arch in ("deeplabv2_tiny", "deeplabv2_timm") else 8), arch
        assert height // s <= h <= height // s + 2, arch
        assert width // s <= w <= width // s + 2, arch


def test_fcn_doubles_where_doubling_fits():
    "On sizes divisible by 32, FCN-8s equals the textbook form that doubles its scores twice."
    torch.manual_seed(0)
    net, x = FCN8sVGG16.__new__(FCN8sVGG16), noise(1, 3, 64, 96)
    nn.Module.__init__(net)                                # the same wiring with narrow layers

    def step(inputs, outputs, n):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.AvgPool2d(n))

    net.block1, net.block2, net.block3 = step(3, 4, 8), step(4, 5, 2), step(5, 6, 2)
    net.vgg_head = nn.Conv2d(6, 3, 1)
    net.score_pool4, net.score_pool3 = nn.Conv2d(5, 3, 1), nn.Conv2d(4, 3, 1)
    twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    x8 = net.block1(x)
    x16 = net.block2(x8)
    y16 = twice(net.vgg_head(net.block3(x16))) + net.score_pool4(x16)
    torch.testing.assert_close(net(x), twice(y16) + net.score_pool3(x8))
    assert net(noise(1, 3, 80, 96)).shape == (1, 3, 10, 12)      # where doubling does not fit


def test_same_seed_same_network():
    a, b, c = tiny(), tiny(), tiny(1)
    assert same(a, b)
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    x = noise(2, 3, 40, 56)
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_upsampling_interpolates_between_corners():
    ramp = torch.arange(4.).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    torch.testing.assert_close(upsample(ramp, (5, 31))[0, 0, 3], torch.linspace(0, 3, 31))


def test_the_class_changes_where_two_scores_are_equal():
    falling = torch.linspace(1, 0, 4).view(1, 1, 1, 4)
    logits = torch.cat([falling, 1 - falling], 1).expand(1, 2, 2, 4)
    classes = predicted_classes(logits.bfloat16(), (3, 32))
    assert classes.dtype == torch.int64 and classes.shape == (1, 3, 32)
    assert classes[0].tolist() == [[0] * 16 + [1] * 16] * 3


# ---------------------------------------------------------------- a class of one's own

OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, num_classes, 3, 2, 1))

class Stated(Net):
    stride, new = 14, ("2.",)

class Always19(Net):
    def __init__(self, num_classes): super().__init__(19)

class Flat(Net):
    def forward(self, x): return super().forward(x).mean((2, 3))

class Dictionary(Net):
    def forward(self, x): return {"out": super().forward(x)}

class Fails(Net):
    def forward(self, x): raise ValueError("no\\nimages today")

class NoClasses(nn.Module):
    def __init__(self): super().__init__()

def function(num_classes): return Net(num_classes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with modules of one's own, in which a command is given."
    (tmp_path / "own_net.py").write_text(OWN)
    (tmp_path / "broken_net.py").write_text("import a_module_that_nobody_has")
    (tmp_path / "torn_net.py").write_text("class Net(")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_net", "broken_net", "torn_net"): sys.modules.pop(name, None)


def test_a_network_of_ones_own(own):
    before = torch.get_rng_state()
    torch.manual_seed(3)
    model = build_model("own_net:Net", 5)
    assert (model.arch, model.num_classes, model.stride, model.new) == ("own_net:Net", 5, 4, ())
    assert model.training and all(m.training for m in model.modules())
    torch.manual_seed(3)
    plain = sys.modules["own_net"].Net(5)
    assert same(plain, model.backbone)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    build_model("own_net:Net", 5)
    assert torch.equal(torch.get_rng_state(), after), "the trial draws numbers"
    groups = param_groups(model, 1., .5)
    assert [(g["name"], len(g["params"]), g["lr"]) for g in groups] == [
        ("weights", 2, 1), ("biases", 2, 2)]
    torch.set_rng_state(before)


def test_what_ones_own_class_states_is_taken(own):
    model = build_model("own_net:Stated", 5)
    assert (model.stride, model.new) == (14, ("2.",))
    names = [g["name"] for g in param_groups(model, 1., .5)]
    assert names == ["weights", "biases", "new weights", "new biases"]
    with pytest.raises(UserError, match="no ImageNet weights for own_net:Stated"):
        load_imagenet(model, "imagenet")


def test_a_network_of_ones_own_is_saved_and_loaded(own):
    model = build_model("own_net:Net", 3, names=("land", "sea", "sky")).eval()
    model.save_pretrained(own / "model")
    config = json.loads((own / "model/config.json").read_text())
    assert config == {"arch": "own_net:Net", "num_classes": 3, "names": ["land", "sea", "sky"],
                      "encoder": None, "inference_size": None}
    again = SegmentationModel.from_pretrained(own / "model")
    assert (again.arch, again.stride, again.names) == ("own_net:Net", 4, ("land", "sea", "sky"))
    assert torch.equal(again(noise(1, 3, 40, 48)), model(noise(1, 3, 40, 48)))
    (own / "own_net.py").write_text("Net = None")
    sys.modules.pop("own_net")
    with pytest.raises(UserError, match="model: .*own_net:Net"):
        SegmentationModel.from_pretrained(own / "model")


@pytest.mark.parametrize("arch, words", [
    ("nowhere_net:Net", "nowhere_net"),
    ("broken_net:Net", "a_module_that_nobody_has"),
    ("torn_net:Net", "SyntaxError"),
    ("own_net:Absent", "Absent"),
    ("own_net:", "own_net"),
    ("own_net", "deeplabv2_tiny"),
    ("own_net:function", "is no network; give a subclass of torch.nn.Module"),
    ("own_net:nn", "is no network"),
    ("own_net:NoClasses", "cannot be built with num_classes=5 .TypeError"),
    ("own_net:Always19", r"returns \(1, 19, 32, 32\) .* expected .* \(1, 5, h, w\)"),
    ("own_net:Flat", r"returns \(1, 5\) for images \(1, 3, 128, 128\); expected"),
    ("own_net:Dictionary", "returns dict for images"),
    ("own_net:Fails", "fails on images .*ValueError: no images today")])
def test_what_is_no_network_is_refused_in_a_sentence(own, arch, words):
    with pytest.raises(UserError, match=words) as error: build_model(arch, 5)
    said = str(error.value)
    assert arch in said and "\n" not in said


def test_an_entry_may_leave_everything_out(own, monkeypatch):
    build_model("own_net:Net", 2)
    monkeypatch.setitem(ARCHS, "two_layers", sys.modules["own_net"].Net)
    model = build_model("two_layers", 2)
    assert (model.arch, model.stride, model.new) == ("two_layers", 4, ())
    assert layout("two_layers", 7).stride == 4                   # on the meta device, too


def test_the_exercise_adds_an_architecture(tmp_path):
    code = answer("02_deeplabv2", "architecture")
    assert len(code.splitlines()) <= 20
    space = dict(vars(sac_lit.deeplabv2))
    try:
        exec(code, space)
        torch.manual_seed(0)
        classifier = torchvision.models.mobilenet_v3_small()
        torch.save(classifier.state_dict(), tmp_path / "mobile.pth")
        model = build_model("deeplabv2_mobile", 4, tmp_path / "mobile.pth").eval()
        assert model.stride == 16 and model(noise(1, 3, 64, 96)).shape == (1, 4, 4, 6)
        theirs = classifier.features[4].block[0][0].weight
        assert torch.equal(model.backbone.features[4].block[0][0].weight, theirs)
        groups = {g["name"]: len(g["params"]) for g in param_groups(model, 1., 0.)}
        assert groups["new weights"] == groups["new biases"] == 4
        model.save_pretrained(tmp_path / "model")
        assert SegmentationModel.from_pretrained(tmp_path / "model").arch == "deeplabv2_mobile"
    finally: ARCHS.pop("deeplabv2_mobile", None)


# ---------------------------------------------------------------- first weights

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_fills_the_trunk_and_leaves_the_head(vgg, tmp_path, suffix):
    model, features, state = vgg
    path = tmp_path / f"vgg{suffix}"
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    (torch.save if suffix == ".pth" else save_file)(old, path)   # old files have no counters
    own = model.backbone.state_dict()
    new = {k: v.clone() for k, v in own.items() if k.startswith(model.backbone.new)}
    load_imagenet(model, path)
    x = noise(1, 3, 40, 48)
    with torch.no_grad(): ours, theirs = model.backbone.features[:33](x), features[:33](x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    mine, theirs = (
        [m.weight for m in net if isinstance(m, nn.Conv2d)][:13]
        for net in (model.backbone.features, features))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in new.items())


@pytest.mark.parametrize("change, words", [
    (lambda s: {k: v for k, v in s.items() if not k.startswith("features.40.")},
     "lacks features.39.bias"),
    (lambda s: s | {"layer1.0.conv1.weight": torch.zeros(1)}, "has besides layer1.0.conv1.weight"),
    (lambda s: s | {"features.0.weight": torch.zeros(64, 4, 3, 3)},
     "has in another shape features.0.weight"),
    (lambda s: {"model": s, "epoch": 3}, "has besides epoch, model")])
def test_a_file_that_does_not_fit_is_refused(vgg, tmp_path, change, words):
    model, _, state = vgg
    before = copy.deepcopy(model.state_dict())
    torch.save(change(state), tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="vgg.pth") as error:
        load_imagenet(model, tmp_path / "vgg.pth")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors", "tensor.pth"])
def test_an_unreadable_file_is_refused(vgg, tmp_path, name):
    (tmp_path / "torn.pth").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match=name): load_imagenet(vgg[0], tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        load_imagenet(vgg[0], tmp_path / "absent.pth")


def test_no_connection(vgg, monkeypatch):
    def offline(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="vgg16_bn.*no route to host.*path"):
        load_imagenet(vgg[0], "imagenet")


def test_unknown_architecture_and_no_imagenet():
    with pytest.raises(UserError, match="deeplabv2_resnet101"): build_model("resnet", 19)
    with pytest.raises(UserError, match="deeplabv2_tiny"):
        build_model("deeplabv2_tiny", 19, "imagenet")


def test_a_mismatch_names_three_of_each_kind():
    own = {k: 1 for k in "abcde"} | {"x": 1}
    said = mismatch(own, {"x": 2, "z": 1})
    assert said == "it lacks a, b, c and 2 more; it has besides z; it has in another shape x"
    assert mismatch(own, dict(own)) == ""


# ---------------------------------------------------------------- folders

def test_saved_and_loaded_silently(tmp_path, capfd):
    model = build_model("deeplabv2_tiny", 2, names=("land", "sea")).eval()
    x = noise(1, 3, 40, 48)
    model.save_pretrained(tmp_path / "model")
    again = SegmentationModel.from_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config == {"arch": "deeplabv2_tiny", "num_classes": 2, "names": ["land", "sea"],
                      "encoder": None, "inference_size": None}
    assert (again.arch, again.num_classes, again.names) == ("deeplabv2_tiny", 2, ("land", "sea"))
    assert (again.stride, again.training) == (4, False)
    assert torch.equal(again(x), model(x))
    copy.deepcopy(again).save_pretrained(tmp_path / "copy")
    files = (tmp_path / name / "model.safetensors" for name in ("copy", "model"))
    copied, saved = (f.read_bytes() for f in files)
    assert copied == saved


def test_models_saved_without_names_still_load(tmp_path):
    for n, names in ((19, NAMES), (2, ("class 0", "class 1"))):
        model = build_model("deeplabv2_tiny", n)
        model.save_pretrained(tmp_path)
        config = {"arch": "deeplabv2_tiny", "num_classes": n}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert SegmentationModel.from_pretrained(tmp_path).names == model.names == names
    with pytest.raises(UserError, match="2 class names for 19"):
        build_model("deeplabv2_tiny", 19, names=("land", "sea"))


@pytest.mark.parametrize("config", [
    "null", "[]", "3", '"x"', "[" * 10_000, "{}", '{"arch": null, "num_classes": 5}',
    '{"arch": ["deeplabv2_tiny"], "num_classes": 5}',
    *('{"arch": "deeplabv2_tiny", "num_classes": 5, %s}' % text for text in (
        '"num_classes": 1e9', '"num_classes": 1000000000', '"num_classes": -1',
        '"num_classes": "5"', '"num_classes": null', '"names": 3', '"names": [1, 2, 3, 4, 5]',
        '"names": {"a": 1}', '"inference_size": {}', '"inference_size": "ab"',
        '"inference_size": [0, 0]', '"about": 3'))])
def test_a_config_of_anything_is_answered_in_one_sentence(config, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(config)
    with pytest.raises(UserError) as error: SegmentationModel.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value) and len(str(error.value)) < 600


def test_weights_that_are_no_file_are_not_opened(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a pipe, where a file is expected"):
        SegmentationModel.from_pretrained(tmp_path)


def test_a_folder_without_a_whole_model_is_refused(tmp_path, capfd):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    config = '{"arch": "deeplabv2_tiny", "num_classes": 5}'
    damage = {"config.json": config, "model.safetensors": "torn"}
    for name, text in damage.items():
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(UserError, match="holds no model"):
            SegmentationModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("torn")
    for folder in (tmp_path / "model", tmp_path / "empty"):
        with pytest.raises(UserError, match="holds no model"):
            SegmentationModel.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_an_unknown_architecture_is_named(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    config = {"arch": "a_net_of_tomorrow", "num_classes": 19}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model: .*a_net_of_tomorrow.*deeplabv2_tiny"):
        SegmentationModel.from_pretrained(tmp_path / "model")


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    def asked(repo_id, **kwargs): raise FileNotFoundError(f"asked for {repo_id}")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    absent = tmp_path / "absent"
    for folder in (absent, str(absent), "runs/absent", "./a/b", "a/b/c", "absent"):
        with pytest.raises(UserError, match="no such folder; give"):
            SegmentationModel.from_pretrained(folder)
    with pytest.raises(UserError, match="not a folder"): SegmentationModel.from_pretrained("file")
    with pytest.raises(UserError, match="no such model on the Hub .asked for user/model.0"):
        SegmentationModel.from_pretrained("user/model.0")
