"""Exported files against `predict`, on photographs; and used where there is no PyTorch."""
import ast
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision.transforms.v2.functional as TF
from house import answer, cells, NBS
from PIL import Image

import sac_lit.export as module
from sac_lit.core import colors_of, generator, UserError
from sac_lit.deeplabv2 import build_model, network_input, SegmentationModel
from sac_lit.export import (
    export,
    FORMATS,
    ImageToLabels,
    photographs,
    plain_layers,
    quantize,
    resizing_matrix,
)
from sac_lit.fast import speed_up
from sac_lit.predict import main, predict, probabilities

NAMES = "land", "sea", "sky", "boat", "gull"


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def unsettled(net):
    "With norms and heads of random numbers, so that many classes occur."
    torch.manual_seed(0)
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for x in (m.weight, m.bias, m.running_mean, m.running_var): nn.init.uniform_(x, .5, 1.5)
    for conv in getattr(net.backbone, "head", net.backbone).modules():
        if isinstance(conv, nn.Conv2d) and conv.out_channels == net.num_classes:
            nn.init.normal_(conv.weight, 0, .3)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    net = unsettled(build_model("deeplabv2_tiny", 5, names=NAMES))
    net.set_inference_size((150, 200))
    net.describe(trained_on="a coast")
    return net


def photos(small=False):
    "Photographs of three sizes: scikit-image's where that is installed, else matplotlib's."
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    pictures = [Image.open(folder / name).convert("RGB")
                for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    if small: pictures = [x.resize((x.width // 4, x.height // 5)) for x in pictures]
    return [torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in pictures]


def run_onnx(path, image):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]


def run_torch(path, image): return torch.export.load(path).module()(image)


def facts_of(path):
    if path.suffix == ".pt2":
        extra = {"sac_lit.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["sac_lit.json"])
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return json.loads(session.get_modelmeta().custom_metadata_map["sac_lit"])


RUN = {".onnx": run_onnx, ".pt2": run_torch}
each_format = pytest.mark.parametrize("suffix", FORMATS)


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    "A file of each kind."
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    for suffix in FORMATS: export(network, folder / f"net{suffix}")
    return folder


# ---------------------------------------------------------------- agreement

@each_format
def test_a_file_labels_photographs_as_predict_does(suffix, network, exported):
    for photo in photos():
        labels, confidence = RUN[suffix](exported / f"net{suffix}", photo.permute(1, 2, 0)[None])
        assert labels.dtype == torch.uint8 and confidence.dtype == torch.float32
        expected = predict(network, photo)
        assert len(expected.unique()) > 1
        assert (labels == expected).float().mean() >= .9995
        scores = probabilities(network, photo).amax(0)
        torch.testing.assert_close(confidence, scores, rtol=0, atol=2e-3)


@pytest.mark.parametrize("arch, suffix, seen", [
    ("deeplabv2_tiny", ".onnx", None),
    ("deeplabv2_tiny", ".pt2", None),
    *(pytest.param(arch, suffix, seen, marks=pytest.mark.slow)
      for arch in ("deeplabv2_resnet101", "deeplabv2_vgg16", "fcn8s_vgg16")
      for suffix in FORMATS for seen in (None, (90, 120)))])
def test_every_architecture_is_exported(arch, suffix, seen):
    if suffix == ".onnx": pytest.importorskip("onnxruntime")
    net = unsettled(build_model(arch, 5, names=NAMES))
    net.set_inference_size(seen)
    found = export(net, Path(f"net{suffix}"), photos(small=True))
    assert found.pixels >= .999 and found.confidence < 1e-2
    assert [p.name for p in Path().iterdir()] == [f"net{suffix}"]


def test_the_photographs_are_of_three_sizes_and_one_is_a_landscape():
    sizes = [photo.shape[1:] for photo in photographs()]
    assert len(set(sizes)) == 3 and any(w > h for h, w in sizes)
    assert all(photo.dtype == torch.uint8 and photo.float().std() > 20 for photo in photographs())


@each_format
def test_what_a_user_must_know_is_in_the_file(suffix, exported):
    known = facts_of(exported / f"net{suffix}")
    assert known["names"] == list(NAMES)
    assert known["colors"] == [list(c) for c in colors_of(NAMES)]
    assert known["inference_size"] == [150, 200] and known["arch"] == "deeplabv2_tiny"
    assert known["training"] == {"trained_on": "a coast"}


def test_other_kinds_of_images_are_refused_by_the_file(exported):
    "Channels first, or floats."
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported / "net.onnx")
    image, = session.get_inputs()
    assert (image.shape, image.type) == ([1, "height", "width", 3], "tensor(uint8)")
    for wrong in (np.zeros((1, 3, 40, 50), np.uint8), np.zeros((1, 40, 50, 3), np.float32)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"): session.run(None, {"image": wrong})


# ---------------------------------------------------------------- the graph

def test_the_size_is_that_of_network_input(network):
    rng = random.Random(0)
    sizes = [(rng.randint(40, 400), rng.randint(40, 400)) for _ in range(40)]
    sizes += [(300, 400), (150, 200), (75, 100), (301, 401), (75, 101)]
    graph = ImageToLabels(network)
    for H, W in sizes:
        x = torch.rand(3, H, W, generator=generator(0, "x"))
        assert graph.resized(x).shape == network_input(network, (255 * x).byte()).shape[1:]


@pytest.mark.parametrize("old, new", [(7, 7), (40, 13), (13, 40), (301, 64), (64, 65), (1, 5)])
def test_a_resize_is_a_product_of_matrices(old, new):
    x = torch.rand(3, old, 17, generator=generator(0, "x"))
    matrix = resizing_matrix(torch.tensor(float(old)).double(), old, new)
    torch.testing.assert_close(matrix @ x, TF.resize(x, [new, 17], antialias=True),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, 2, 0, ceil_mode=True),
    nn.MaxPool2d(3, 2, 0, ceil_mode=True), nn.MaxPool2d(5, 3, 2, ceil_mode=True),
    nn.MaxPool2d(2, 3, 0, ceil_mode=True), nn.MaxPool2d((3, 2), 2, ceil_mode=True),
    nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True)])
@pytest.mark.parametrize("size", [(8, 9), (9, 12), (13, 10), (11, 11)])
def test_poolings_without_a_ceiling_are_the_same(pool, size):
    x = torch.randn(1, 2, *size, generator=generator(0, "x"))
    expected = pool(x)
    again = type("Again", (module._padded_form(pool),), {"__init__": lambda self: None})()
    again.__dict__ = pool.__dict__
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("arch", ["deeplabv2_tiny", "deeplabv2_resnet101"])
def test_plain_layers_compute_the_same_and_leave_the_network_alone(arch):
    net = speed_up(unsettled(build_model(arch, 5)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plain = plain_layers(net)
    x = torch.randn(1, 3, 65, 96, generator=generator(0, "x"))
    with torch.no_grad(): expected, found = net(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [m for m in plain.modules() if getattr(m, "ceil_mode", False)
                and type(m) is nn.MaxPool2d]
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


# ---------------------------------------------------------------- what is not kept

def fake(change):
    "A form that writes a file and gives changed results."
    def form(graph, image, path):
        path.write_text("sac_lit")
        def run(x):
            with torch.no_grad(): return change(*graph(x))
        return run
    return form


@pytest.mark.parametrize("change, words", [
    (lambda labels, sure: ((labels + 1) % 5, sure), "gives 100.00% of the pixels another class"),
    (lambda labels, sure: (labels, 1 - sure), "a confidence off by"),
    (lambda labels, sure: (labels, sure * float("nan")), "a confidence off by nan")])
def test_an_export_that_differs_is_not_kept(change, words, network, monkeypatch):
    monkeypatch.setitem(FORMATS, ".pt2", fake(change))
    with pytest.raises(UserError, match=words): export(network, Path("net.pt2"), photos(True))
    assert not list(Path().iterdir())


def test_what_is_compared_is_the_network_itself(network, monkeypatch):
    "Not the copy that is exported, which may have been made wrongly."
    other = unsettled(build_model("deeplabv2_tiny", 5, names=NAMES))
    with torch.no_grad(): other.backbone.head.conv2d_list[0].bias[0] += 1e3
    monkeypatch.setattr(module, "plain_layers", lambda model: other)
    monkeypatch.setitem(FORMATS, ".pt2", fake(lambda *found: found))
    with pytest.raises(UserError, match="another class"):
        export(network, Path("net.pt2"), photos(True))


def test_a_few_pixels_are_enough_to_refuse(network, monkeypatch):
    "Two in a thousand of one photograph of three."
    def change(labels, sure):
        if labels.shape == (80, 150): labels.flatten()[:24] += 1
        return labels, sure
    monkeypatch.setitem(FORMATS, ".pt2", fake(change))
    with pytest.raises(UserError, match="gives 0.20%"):
        export(network, Path("net.pt2"), photos(True))


@pytest.mark.parametrize("name", ["net.tflite", "net", "net.ONNX"])
def test_unknown_suffixes(name, network):
    with pytest.raises(UserError, match=".onnx or .pt2"): export(network, Path(name))


@each_format
@pytest.mark.parametrize("theirs", ["file", "empty", "folder", "link"])
def test_what_is_not_ours_is_left_alone(suffix, theirs, network):
    path = Path(f"net{suffix}")
    if theirs == "folder": path.mkdir()
    elif theirs == "link": path.symlink_to("nowhere")
    else: path.write_text("my own" * (theirs == "file"))
    with pytest.raises(UserError, match="is there, and no export of sac_lit"): export(network, path)
    assert path.is_dir() or path.is_symlink() or path.read_text() in ("my own", "")


def test_what_is_ours_is_replaced(network, exported):
    path = Path("net.pt2")
    path.write_bytes((exported / path).read_bytes())
    other = SegmentationModel("deeplabv2_tiny", 2, ("up", "down")).eval()
    export(other, path, photos(True))
    assert facts_of(path)["names"] == ["up", "down"]


def test_onnxruntime_is_named_where_it_is_not_installed(monkeypatch, network):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"sac_lit\[onnx\]"): export(network, Path("a.onnx"))
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- without PyTorch

def strings_of(notebook, name):
    "The text that a cell of a notebook gives to a name."
    for cell in cells(NBS / f"{notebook}.ipynb", "code"):
        if not re.search(rf"^{name} = ", cell.source, re.M): continue
        tree = ast.parse(cell.source)
        found = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == name]
        return ast.literal_eval(found[0].value)
    raise KeyError(name)


@pytest.mark.parametrize("photo", [0, 1, 2])
def test_ten_lines_of_the_page_label_a_photograph_without_pytorch(photo, network, exported):
    program = strings_of("10a_export", "PROGRAM")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    Path("label.py").write_text(program)
    image = photos()[photo]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save("photo.png")
    without = strings_of("10a_export", "WITHOUT")
    assert '"torch"' in without and '"sac_lit"' in without
    command = [sys.executable, "-c", without, "label.py", exported / "net.onnx", "photo.png"]
    done = subprocess.run([*command, "labels.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels = torch.from_numpy(np.array(Image.open("labels.png")))
    assert (labels == predict(network, image)).float().mean() >= .999


def test_the_wall_around_that_program_stands():
    "What imports PyTorch or this library there fails."
    without = strings_of("10a_export", "WITHOUT")
    for name in ("torch", "sac_lit", "sac_lit.core"):
        Path("own.py").write_text(f"import {name}")
        done = subprocess.run([sys.executable, "-c", without, "own.py"], capture_output=True)
        assert done.returncode and b"ModuleNotFoundError" in done.stderr


# ---------------------------------------------------------------- INT8

def test_integers_keep_most_classes_and_all_facts(exported, network):
    found = quantize(exported / "net.onnx", photos(), Path("net8.onnx"))
    assert .9 < found.pixels < 1 and found.confidence < 1
    assert facts_of(Path("net8.onnx")) == facts_of(exported / "net.onnx")
    small, large = (p.stat().st_size for p in (Path("net8.onnx"), exported / "net.onnx"))
    assert small < .5 * large
    for photo in photos():
        labels = run_onnx(Path("net8.onnx"), photo.permute(1, 2, 0)[None])[0]
        assert (labels == predict(network, photo)).float().mean() > .9


def test_integers_that_lose_too_much_are_not_kept(exported, monkeypatch):
    monkeypatch.setattr(module, "_compare", lambda *args: module._Agreement(.5, .5))
    with pytest.raises(UserError, match="in integers 50% of the pixels"):
        quantize(exported / "net.onnx", photos(True), Path("net8.onnx"))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("to, folder, words", [
    ("net.pt2", ".", "--int8: is for ONNX"),
    ("net.onnx", "nowhere", "--int8 nowhere: no images there"),
    ("net.onnx", ".", "--int8 .: no images there")])
def test_integers_need_onnx_and_photographs(to, folder, words, network, capsys):
    network.save_pretrained("model")
    with pytest.raises(SystemExit): main(["export", "model", to, "--int8", folder])
    assert words in capsys.readouterr().err
    assert [p.name for p in Path().iterdir()] == ["model"]


# ---------------------------------------------------------------- the command

def test_export_command(network, capsys):
    network.save_pretrained("model")
    main(["export", "model", "net.pt2"])
    said = capsys.readouterr().out
    assert "written: net.pt2" in said and re.search(r"at least (99\.9|100)", said)
    assert Path("net.pt2").exists()


def test_export_command_in_integers(network, capsys):
    pytest.importorskip("onnxruntime")
    network.save_pretrained("model")
    Path("photos").mkdir()
    for k, photo in enumerate(photos(small=True)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(f"photos/{k}.png")
    main(["export", "model", "net.onnx", "--int8", "photos"])
    assert "of the pixels of 3 photographs" in capsys.readouterr().out
    assert sorted(p.name for p in Path().iterdir()) == ["model", "net.onnx", "photos"]


def test_the_exercise_adds_a_format(network, monkeypatch):
    "Its answer is run as it stands on the page."
    code = answer("10a_export", "format")
    names = {"torch": torch, "SegmentationModel": SegmentationModel, "FORMATS": {},
             "ImageToLabels": ImageToLabels, "plain_layers": plain_layers}
    exec(code, names)
    monkeypatch.setitem(FORMATS, ".pth", names["FORMATS"][".pth"])
    assert len(code.splitlines()) <= 20
    assert export(network, Path("net.pth"), photos(True)).pixels >= .999
