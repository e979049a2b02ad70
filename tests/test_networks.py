"The networks' layout against the authors' snapshots, first weights, saving and loading, parameter groups; the pretraining step."
import copy
import json

import pytest
import torch
import torch.nn as nn
import torchvision
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from sac_lit.abn_pretraining import abn_step, freeze_bn, source_loss
from sac_lit.core import IGNORE_INDEX, UserError, generator
from sac_lit.deeplabv2 import ARCHS, FCN8sVGG16, SegmentationModel, build_model, load_imagenet, param_groups, upsample

quick = settings(deadline=None, derandomize=True, max_examples=10)


def layout(arch, num_classes=19):
    "A network without memory: shapes and names only."
    with torch.device("meta"): return SegmentationModel(arch, num_classes)


def shapes(arch): return {k.removeprefix("backbone."): tuple(v.shape) for k, v in layout(arch).state_dict().items()}


def tiny(seed=0):
    torch.manual_seed(seed)
    return build_model("deeplabv2_tiny", 19)


def noise(*size, seed=0): return torch.randn(*size, generator=generator(seed, "noise"))


@pytest.fixture(scope="module")
def vgg():
    "A DeepLab on VGG-16, and the torchvision network that its first weights come from, as tensors by name."
    torch.manual_seed(1)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True).eval()
    state = {f"features.{k}": v for k, v in features.state_dict().items()} | {"classifier.0.weight": torch.zeros(2, 2)}
    return build_model("deeplabv2_vgg16", 19).eval(), features, state


# ---------------------------------------------------------------- layout

def test_resnet_has_torchvisions_names_and_a_fifth_layer():
    with torch.device("meta"): theirs = torchvision.models.resnet101().state_dict()
    expected = {f"model.{k}": tuple(v.shape) for k, v in theirs.items() if not k.startswith("fc.")}
    for i in range(4): expected |= {f"model.layer5.conv2d_list.{i}.weight": (19, 2048, 3, 3), f"model.layer5.conv2d_list.{i}.bias": (19,)}
    assert shapes("deeplabv2_resnet101") == expected


def test_resnet_strides_and_dilations():
    net = layout("deeplabv2_resnet101").backbone.model
    assert net.maxpool.ceil_mode and net.maxpool.kernel_size == 3
    for name, stride, rate in (("layer1", 1, 1), ("layer2", 2, 1), ("layer3", 1, 2), ("layer4", 1, 4)):
        stage = getattr(net, name)
        assert all(b.conv2.dilation == b.conv2.padding == (rate, rate) and b.conv2.stride == (1, 1) for b in stage), name
        assert [b.conv1.stride for b in stage] == [(stride, stride)] + [(1, 1)] * (len(stage) - 1), name
        assert stage[0].downsample[0].stride == (stride, stride)
    assert [c.dilation for c in net.layer5.conv2d_list] == [(r, r) for r in (6, 12, 18, 24)]


def test_vgg_is_numbered_without_its_last_two_poolings():
    net, found = layout("deeplabv2_vgg16").backbone, shapes("deeplabv2_vgg16")
    convs = {i: m for i, m in enumerate(net.features) if isinstance(m, nn.Conv2d)}
    assert list(convs) == [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 33, 36, 39, 42, 44]
    assert [i for i, m in enumerate(net.features) if isinstance(m, nn.MaxPool2d)] == [6, 13, 23]
    assert [m.dilation[0] for m in convs.values()] == [1] * 10 + [2] * 3 + [4] * 2
    assert found["features.42.weight"] == (1024, 512, 3, 3) and found["features.44.weight"] == (1024, 1024, 3, 3)
    assert all(found[f"classifier.conv2d_list.{i}.weight"] == (19, 1024, 3, 3) for i in range(4))


def test_fcn_keeps_vggs_own_numbers():
    found = shapes("fcn8s_vgg16")
    with torch.device("meta"): theirs = torchvision.models.vgg16_bn().features.state_dict()
    block = lambda i: 1 if i < 24 else 2 if i < 34 else 3
    expected = {f"block{block(int(k.split('.')[0]))}.{k}": tuple(v.shape) for k, v in theirs.items()}
    new = {k: v for k, v in found.items() if k not in expected}
    assert expected.items() <= found.items()
    assert {k.rsplit(".", 1)[0] for k in new} == {f"vgg_head.{i}" for i in (0, 1, 4, 5, 8)} | {"score_pool4", "score_pool3"}
    assert found["vgg_head.0.weight"] == (4096, 512, 7, 7)


@pytest.mark.parametrize("arch, millions, groups", [("deeplabv2_resnet101", 43.90, [208, 104, 4, 4]), ("deeplabv2_vgg16", 29.58, [26, 26, 6, 6]),
                                                    ("fcn8s_vgg16", 134.38, [26, 26, 7, 7]), ("deeplabv2_tiny", .29, [36, 20])])
def test_sizes_and_groups(arch, millions, groups):
    net = layout(arch)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    found = param_groups(net, 1., .5)
    assert [len(g["params"]) for g in found] == groups
    assert [g["name"] for g in found] == ["weights", "biases", "new weights", "new biases"][:len(groups)]
    assert [g["lr"] for g in found] == [1, 2, 10, 20][:len(groups)] and [g["weight_decay"] for g in found] == [.5, 0, .5, 0][:len(groups)]
    assert sorted(id(p) for g in found for p in g["params"]) == sorted(id(p) for p in net.parameters())
    scales = {id(m.weight) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert scales <= {id(p) for g in found if g["weight_decay"] for p in g["params"]}


# ---------------------------------------------------------------- forward

@pytest.fixture(scope="module")
def nets(): return {arch: layout(arch).eval() for arch in ARCHS}


@quick
@given(st.integers(32, 150), st.integers(32, 150))
def test_every_size_gives_scores_at_the_stride(nets, height, width):
    for arch, net in nets.items():
        with torch.no_grad(): h, w = net(torch.empty(1, 3, height, width, device="meta")).shape[-2:]
        s = net.stride
        assert s == (4 if arch == "deeplabv2_tiny" else 8)
        assert height // s <= h <= height // s + 2 and width // s <= w <= width // s + 2, arch


def test_fcn_doubles_where_doubling_fits():
    "On sizes divisible by 32, FCN-8s equals the textbook form that doubles its scores twice."
    torch.manual_seed(0)
    net, x = FCN8sVGG16.__new__(FCN8sVGG16), noise(1, 3, 64, 96)
    nn.Module.__init__(net)                                                    # the same wiring with narrow layers
    step = lambda i, o, n: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.AvgPool2d(n))
    net.block1, net.block2, net.block3, net.vgg_head = step(3, 4, 8), step(4, 5, 2), step(5, 6, 2), nn.Conv2d(6, 3, 1)
    net.score_pool4, net.score_pool3 = nn.Conv2d(5, 3, 1), nn.Conv2d(4, 3, 1)
    twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    x8 = net.block1(x)
    x16 = net.block2(x8)
    slow = twice(twice(net.vgg_head(net.block3(x16))) + net.score_pool4(x16)) + net.score_pool3(x8)
    torch.testing.assert_close(net(x), slow)
    assert net(noise(1, 3, 80, 96)).shape == (1, 3, 10, 12)                     # where doubling does not fit


def test_same_seed_same_network():
    a, b, c = tiny(), tiny(), tiny(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    x = noise(2, 3, 40, 56)
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_upsampling_interpolates_between_corners():
    ramp = torch.arange(4.).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    torch.testing.assert_close(upsample(ramp, (5, 31))[0, 0, 3], torch.linspace(0, 3, 31))


# ---------------------------------------------------------------- first weights

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_fills_the_trunk_and_leaves_the_head(vgg, tmp_path, suffix):
    model, features, state = vgg
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}   # as in files from before the counters
    torch.save(old, tmp_path / "vgg.pth") if suffix == ".pth" else save_file(old, tmp_path / "vgg.safetensors")
    new = {k: v.clone() for k, v in model.backbone.state_dict().items() if k.startswith(model.backbone.new)}
    load_imagenet(model, tmp_path / f"vgg{suffix}")
    x = noise(1, 3, 40, 48)
    with torch.no_grad(): torch.testing.assert_close(model.backbone.features[:33](x), features[:33](x), rtol=0, atol=0)
    mine, theirs = ([m.weight for m in net if isinstance(m, nn.Conv2d)][:13] for net in (model.backbone.features, features))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in new.items())


@pytest.mark.parametrize("change, words", [
    (lambda s: {k: v for k, v in s.items() if not k.startswith("features.40.")}, "lacks features.39.bias"),
    (lambda s: s | {"layer1.0.conv1.weight": torch.zeros(1)}, "has besides layer1.0.conv1.weight"),
    (lambda s: s | {"features.0.weight": torch.zeros(64, 4, 3, 3)}, "has in another shape features.0.weight"),
    (lambda s: {"model": s, "epoch": 3}, "has besides epoch, model")])
def test_a_file_that_does_not_fit_is_refused(vgg, tmp_path, change, words):
    model, _, state = vgg
    before = copy.deepcopy(model.state_dict())
    torch.save(change(state), tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="vgg.pth") as error: load_imagenet(model, tmp_path / "vgg.pth")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors", "tensor.pth"])
def test_an_unreadable_file_is_refused(vgg, tmp_path, name):
    (tmp_path / "torn.pth").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match=name): load_imagenet(vgg[0], tmp_path / name)
    with pytest.raises(UserError, match="no such file"): load_imagenet(vgg[0], tmp_path / "absent.pth")


def test_no_connection(vgg, monkeypatch):
    def offline(*args, **kwargs): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="vgg16_bn.*no route to host.*path"): load_imagenet(vgg[0], "imagenet")


def test_unknown_architecture_and_no_imagenet():
    with pytest.raises(UserError, match="deeplabv2_resnet101"): build_model("resnet", 19)
    with pytest.raises(UserError, match="deeplabv2_tiny"): build_model("deeplabv2_tiny", 19, "imagenet")


# ---------------------------------------------------------------- folders

def test_saved_and_loaded_silently(tmp_path, capfd):
    model, x = build_model("deeplabv2_tiny", 7).eval(), noise(1, 3, 40, 48)
    model.save_pretrained(tmp_path / "model")
    again = SegmentationModel.from_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "model/config.json").read_text()) == {"arch": "deeplabv2_tiny", "num_classes": 7}
    assert (again.arch, again.num_classes, again.stride, again.training) == ("deeplabv2_tiny", 7, 4, False)
    assert torch.equal(again(x), model(x))
    copy.deepcopy(again).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    damage = {"config.json": '{"arch": "deeplabv2_tiny", "num_classes": 5}', "model.safetensors": "torn"}
    for name, text in damage.items():
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(UserError, match="model"): SegmentationModel.from_pretrained(tmp_path / "model")
    for folder in (tmp_path / "empty", tmp_path / "absent", "a/b/c"):
        with pytest.raises(UserError): SegmentationModel.from_pretrained(folder)


# ---------------------------------------------------------------- pretraining

def test_target_pass_moves_statistics_only():
    x, y, t = noise(2, 3, 32, 48), torch.randint(19, (2, 32, 48), generator=generator(0, "labels")), 2 + noise(3, 3, 40, 40, seed=1)
    a, b = tiny(), tiny()
    for model, target in ((a, None), (b, t)):
        optimizer = torch.optim.SGD(param_groups(model, .01, 1e-3), momentum=.9)
        for _ in range(3): abn_step(model, optimizer, x, y, target)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(not torch.equal(p, q) for (k, p), q in zip(a.named_buffers(), b.buffers()) if "running" in k)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, x = tiny(), noise(2, 3, 32, 32)
    optimizer, before = torch.optim.SGD(model.parameters(), 1.), copy.deepcopy(list(model.parameters()))
    x[0, 0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="nan"): abn_step(model, optimizer, x, torch.zeros(2, 32, 32, dtype=torch.int64), x)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


@quick
@given(st.integers(0, 2 ** 31), st.floats(0, 1))
def test_source_loss_counts_every_pixel(seed, ignored):
    g = generator(seed, "loss")
    logits, labels = torch.randn(2, 5, 8, 8, generator=g), torch.randint(5, (2, 8, 8), generator=g)
    labels[torch.rand(2, 8, 8, generator=g) < ignored] = IGNORE_INDEX
    logp, known = logits.double().log_softmax(1), labels != IGNORE_INDEX
    total = -logp.gather(1, labels.where(known, 0)[:, None])[:, 0][known].sum()
    assert source_loss(logits, labels).item() == pytest.approx(total.item() / labels.numel(), rel=1e-5)


def test_frozen_batch_norm_still_learns():
    model = freeze_bn(tiny().train())
    before = {k: v.clone() for k, v in model.named_buffers()}
    source_loss(model(noise(2, 3, 32, 32)), torch.zeros(2, 32, 32, dtype=torch.int64)).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    assert all(m.weight.grad.any() and m.bias.grad.any() and not m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.training and isinstance(freeze_bn(nn.SyncBatchNorm(3)), nn.SyncBatchNorm) and not freeze_bn(nn.SyncBatchNorm(3)).training
