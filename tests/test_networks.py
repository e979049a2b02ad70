"The networks' layout against the authors' snapshots, first weights, saving and loading, parameter groups; the pretraining step."
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from sac_lit.abn_pretraining import abn_step, freeze_bn, source_loss
from sac_lit.core import IGNORE_INDEX, NAMES, UserError, generator
from sac_lit.deeplabv2 import ARCHS, FCN8sVGG16, SegmentationModel, build_model, load_imagenet, load_snapshot, param_groups, save_snapshot, upsample

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

def released(arch, C=19):
    "Names and shapes below `backbone.` in the released snapshots, from torchvision's networks and what is known of the rest."
    with torch.device("meta"): resnet, vgg = torchvision.models.resnet101().state_dict(), torchvision.models.vgg16_bn().features.state_dict()
    conv = lambda name, *shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norm = lambda name, n: {f"{name}.{k}": (n,) for k in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.num_batches_tracked": ()}
    head = lambda name, inputs: {k: v for i in range(4) for k, v in conv(f"{name}.conv2d_list.{i}", C, inputs, 3, 3).items()}
    trunk = [(int(k.split(".")[0]), k.split(".")[1], tuple(v.shape)) for k, v in vgg.items()]
    if arch == "deeplabv2_resnet101":
        return {f"model.{k}": tuple(v.shape) for k, v in resnet.items() if not k.startswith("fc.")} | head("model.layer5", 2048)
    if arch == "deeplabv2_vgg16":
        return ({f"features.{i - (i > 33)}.{k}": shape for i, k, shape in trunk} | conv("features.42", 1024, 512, 3, 3) | conv("features.44", 1024, 1024, 3, 3)
                | head("classifier", 1024))
    return ({f"block{1 if i < 24 else 2 if i < 34 else 3}.{i}.{k}": shape for i, k, shape in trunk}
            | conv("vgg_head.0", 4096, 512, 7, 7) | norm("vgg_head.1", 4096) | conv("vgg_head.4", 4096, 4096, 1, 1) | norm("vgg_head.5", 4096)
            | conv("vgg_head.8", C, 4096, 1, 1) | conv("score_pool4", C, 512, 1, 1) | conv("score_pool3", C, 256, 1, 1))


RELEASED = ("deeplabv2_resnet101", "deeplabv2_vgg16", "fcn8s_vgg16")


@pytest.mark.parametrize("arch", RELEASED)
def test_names_and_shapes_are_those_of_the_released_networks(arch):
    assert shapes(arch) == released(arch)


def test_resnet_strides_and_dilations():
    net = layout("deeplabv2_resnet101").backbone.model
    assert net.maxpool.ceil_mode and net.maxpool.kernel_size == 3
    for name, stride, rate in (("layer1", 1, 1), ("layer2", 2, 1), ("layer3", 1, 2), ("layer4", 1, 4)):
        stage = getattr(net, name)
        assert all(b.conv2.dilation == b.conv2.padding == (rate, rate) and b.conv2.stride == (1, 1) for b in stage), name
        assert [b.conv1.stride for b in stage] == [(stride, stride)] + [(1, 1)] * (len(stage) - 1), name
        assert stage[0].downsample[0].stride == (stride, stride)
    assert [c.dilation for c in net.layer5.conv2d_list] == [(r, r) for r in (6, 12, 18, 24)]


def test_vgg_has_no_last_two_poolings():
    net = layout("deeplabv2_vgg16").backbone
    convs = {i: m for i, m in enumerate(net.features) if isinstance(m, nn.Conv2d)}
    assert list(convs) == [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 33, 36, 39, 42, 44]
    assert [i for i, m in enumerate(net.features) if isinstance(m, nn.MaxPool2d)] == [6, 13, 23]
    assert [m.dilation[0] for m in convs.values()] == [1] * 10 + [2] * 3 + [4] * 2


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
    model, x = build_model("deeplabv2_tiny", 2, names=("land", "sea")).eval(), noise(1, 3, 40, 48)
    model.save_pretrained(tmp_path / "model")
    again = SegmentationModel.from_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "model/config.json").read_text()) == {"arch": "deeplabv2_tiny", "num_classes": 2, "names": ["land", "sea"]}
    assert (again.arch, again.num_classes, again.names, again.stride, again.training) == ("deeplabv2_tiny", 2, ("land", "sea"), 4, False)
    assert torch.equal(again(x), model(x))
    copy.deepcopy(again).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


def test_models_saved_without_names_still_load(tmp_path):
    for n, names in ((19, NAMES), (2, ("class 0", "class 1"))):
        model = build_model("deeplabv2_tiny", n)
        model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"arch": "deeplabv2_tiny", "num_classes": n}))
        assert SegmentationModel.from_pretrained(tmp_path).names == model.names == names
    with pytest.raises(UserError, match="2 class names for 19"): build_model("deeplabv2_tiny", 19, names=("land", "sea"))


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    damage = {"config.json": '{"arch": "deeplabv2_tiny", "num_classes": 5}', "model.safetensors": "torn"}
    for name, text in damage.items():
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(UserError, match="holds no model"): SegmentationModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("torn")
    for folder in (tmp_path / "model", tmp_path / "empty"):
        with pytest.raises(UserError, match="holds no model"): SegmentationModel.from_pretrained(folder)


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    def asked(repo_id, **kwargs): raise FileNotFoundError(f"asked for {repo_id}")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "absent", str(tmp_path / "absent"), "runs/absent", "./a/b", "a/b/c", "absent"):
        with pytest.raises(UserError, match="no such folder; give"): SegmentationModel.from_pretrained(folder)
    with pytest.raises(UserError, match="not a folder"): SegmentationModel.from_pretrained("file")
    with pytest.raises(UserError, match="no such model on the Hub .asked for user/model.0"): SegmentationModel.from_pretrained("user/model.0")


# ---------------------------------------------------------------- the authors' snapshots

def snapshot(arch, joint=True, C=19):
    "A dictionary in the exact format of the released files. Tensors repeat a single number, so the file is small."
    def network(part, order):
        state = {f"module.{part}.{k}": torch.zeros((), dtype=torch.int64 if k.endswith("tracked") else torch.float32).expand(shape) for k, shape in released(arch, C).items()}
        state[next(reversed(state))] = order.float()                           # the head's last bias decides the class
        return state
    state = network("backbone", torch.arange(C))
    if joint: state |= network("slow_net", -torch.arange(C)) | {"module.running_conf": torch.full((C,), .05), "module.slow_init": torch.ones(1)}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 2.5e-4, "params": [0]}]}
    return {"model": state, "opt": momentum, "score": np.float64(.538), "epoch": 136}


@pytest.mark.parametrize("arch", RELEASED)
def test_a_released_snapshot_loads_predicts_and_round_trips(arch, tmp_path):
    torch.save(snapshot(arch), path := tmp_path / "sac.pth")
    for which, best in (("momentum", 0), ("student", 18)):
        model = load_snapshot(path, which)
        assert (model.arch, model.num_classes, model.names, model.training) == (arch, 19, NAMES, False)
        assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
        with torch.no_grad(): assert (model(noise(1, 3, 32, 40)).argmax(1) == best).all()
    save_snapshot(path, model)
    again = torch.load(path, weights_only=True, mmap=True)["model"]
    assert {k: tuple(v.shape) for k, v in again.items()} == {f"module.backbone.{k}": shape for k, shape in released(arch).items()}
    assert torch.equal(again[f"module.backbone.{next(reversed(released(arch)))}"], torch.arange(19.))


@pytest.mark.parametrize("part", ["backbone", "slow_net"])
@pytest.mark.parametrize("arch", RELEASED)
def test_a_snapshot_with_a_renamed_tensor_is_refused(arch, part, tmp_path):
    saved = snapshot(arch)
    names = [k for k in saved["model"] if part in k]
    for k in (names[0], names[len(names) // 2], names[-1]):
        state = {("module.other" if n == k else n): v for n, v in saved["model"].items()}
        torch.save(saved | {"model": state}, tmp_path / "sac.pth")
        with pytest.raises(UserError) as error: load_snapshot(tmp_path / "sac.pth")
        said = str(error.value)
        assert "sac.pth" in said and arch in said and f"lacks {k.removeprefix('module.')}; it has besides other" in said, said


def test_both_networks_of_a_snapshot_return(tmp_path):
    a, b, x = tiny(1).eval(), tiny(2).eval(), noise(1, 3, 32, 40)
    save_snapshot(tmp_path / "sac.pth", a, b, torch.linspace(0, 1, 19))
    with torch.no_grad():
        assert torch.equal(load_snapshot(tmp_path / "sac.pth")(x), a(x)) and torch.equal(load_snapshot(tmp_path / "sac.pth", "momentum")(x), b(x))
    state = torch.load(tmp_path / "sac.pth", weights_only=True)["model"]
    assert torch.equal(state["module.running_conf"], torch.linspace(0, 1, 19)) and state["module.slow_init"].tolist() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["sac.pth"]
    with pytest.raises(ValueError, match="neither"): save_snapshot(tmp_path / "half.pth", a, b)


def test_a_snapshot_of_other_classes_says_how_many(tmp_path):
    saved = snapshot("deeplabv2_vgg16", joint=False, C=16)
    torch.save(saved, path := tmp_path / "abn.pth")
    assert (model := load_snapshot(path)).num_classes == 16 and model.names[0] == "class 0"
    saved["model"]["module.backbone.classifier.conv2d_list.1.weight"] = torch.zeros(19, 1024, 3, 3)
    torch.save(saved, path)
    with pytest.raises(UserError, match="with 16 classes.*another shape backbone.classifier.conv2d_list.1.weight"): load_snapshot(path)


@pytest.mark.parametrize("change, words", [
    (lambda s: s | {"opt": json.JSONEncoder()}, "json.encoder.JSONEncoder.*could run code"),
    (lambda s: s["model"], "no snapshot, which"), (lambda s: s | {"model": [1]}, "no snapshot, which"), (lambda s: torch.zeros(1), "no snapshot, which"),
    (lambda s: {"model": {"layer1.weight": torch.zeros(1)}}, "lacks .* and [0-9]+ more; it has besides layer1.weight")])
def test_what_is_no_snapshot_is_refused(change, words, tmp_path):
    torch.save(change(snapshot("deeplabv2_vgg16", joint=False)), path := tmp_path / "abn.pth")
    with pytest.raises(UserError, match=words): load_snapshot(path)


def test_a_snapshot_without_the_network_asked_for(tmp_path):
    torch.save(snapshot("deeplabv2_vgg16", joint=False), path := tmp_path / "abn.pth")
    assert load_snapshot(path).arch == "deeplabv2_vgg16"
    with pytest.raises(UserError, match="no momentum network"): load_snapshot(path, "momentum")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read"): load_snapshot(path)
    with pytest.raises(UserError, match="no such file"): load_snapshot(tmp_path / "absent.pth")


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("score", [np.float64(.5), np.float32(.5), np.arange(3), {np.int64(3): 1}], ids=["float64", "float32", "array", "key"])
def test_nothing_of_numpy_is_run(score, core, tmp_path, monkeypatch):
    "Files from before NumPy 2 name its functions differently; neither name is followed."
    saved = snapshot("deeplabv2_vgg16", joint=False) | {"score": score}
    torch.save(saved, path := tmp_path / "abn.pth", _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", f"cnumpy.{core}.multiarray\n".encode()))
    assert load_snapshot(path).num_classes == 19


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
